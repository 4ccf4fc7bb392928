"""The command `plan`: what it prints, builds and refuses."""

import json
import subprocess
import sys

import pytest
from processes import REPOSITORY, environment

from megatron_plm.config.load import load_config
from megatron_plm.config.problems import problems
from megatron_plm.errors import run_command
from megatron_plm.plan import check as checking
from megatron_plm.plan.command import main

GOOD = ["--gpu", "h100", "--num-gpus", "8", "--preset", "esm2-35m", "--global-batch-size", "256"]


@pytest.fixture
def plan(capsys):
    """Run the command; returns exit code, standard output and standard error."""

    def run(*argv):
        code = run_command(main, list(argv))
        return code, *capsys.readouterr()

    return run


def test_the_table_names_layouts_and_what_to_type(plan):
    code, text, errors = plan(*GOOD, "--top", "2")
    assert (code, errors) == (0, "")
    assert "33.5 million parameters on 8 x h100" in text
    commands = [line.split("launch/pretrain.sh ")[1].split() for line in text.splitlines() if "launch/" in line]
    assert len(commands) == 2
    for command in commands:
        config, _ = load_config(command)
        assert config.preset == "esm2-35m"
        assert problems(config, world_size=8) == []


def test_the_json_is_read_back(plan):
    code, text, _ = plan(*GOOD, "--json", "--top", "3")
    told = json.loads(text)
    assert code == 0
    assert len(told["plans"]) == 3
    assert told["plans"][0]["layout"] == {"pp": 1, "dp_replicate": 1, "dp_shard": 8, "cp": 1, "tp": 1}


ALONE = ["--tensor-model-parallel-size=1", "--pipeline-model-parallel-size=1", "--context-parallel-size=1"]
PIPELINE = [ALONE[0], ALONE[2], "--data-parallel-sharding=zero2"]
TENSOR = ["--tensor-model-parallel-size=2", "--sequence-parallel", *ALONE[1:]]
DECISIONS = [  # the table of docs/parallelism.md
    ("650m", 8, 2048, [[*ALONE, "--data-parallel-sharding=zero2"]]),
    ("3b", 64, 2048, [[*ALONE, "--data-parallel-sharding=zero2", "--data-parallel-replicate-size=8"]]),
    *(
        (
            "15b", count, 3072,
            [*([*PIPELINE, f"--pipeline-model-parallel-size={pp}"] for pp in (2, 4)),
             [*TENSOR, f"--data-parallel-sharding={sharding}"]],
        )
        for count, sharding in ((64, "zero3"), (512, "zero2"))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "num_gpus", "rows", "layouts"), DECISIONS)
def test_what_the_page_recommends_is_near_the_fastest_that_is_found(plan, model, num_gpus, rows, layouts):
    asked = ["--gpu=h100", f"--num-gpus={num_gpus}", f"--preset=esm2-{model}", f"--global-batch-size={rows}"]
    seconds = []
    for flags in ([], *layouts):
        code, text, errors = plan(*asked, *flags, "--json", "--top=1")
        assert (code, errors) == (0, "")
        seconds.append(json.loads(text)["plans"][0]["speed"]["step_seconds"])
    assert max(seconds) <= 1.1 * min(seconds)


def test_other_flags_of_training_are_handed_on(plan, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        "preset = 'esm2-8m'\n[training]\nglobal_batch_size = 512\n"
        "[parallel]\ntensor_model_parallel_size = 4\nsequence_parallel = true\n"
    )
    code, text, _ = plan(
        "--gpu", "h100", "--num-gpus", "8", "--config", str(file), "--lr", "0.001", "--json", "--top", "9"
    )
    told = json.loads(text)
    assert code == 0
    for row in told["plans"]:
        config, _ = load_config(row["flags"])
        assert (config.training.lr, config.training.global_batch_size, config.preset) == (0.001, 512, "esm2-8m")
        assert config.parallel.tensor_model_parallel_size == row["layout"]["tp"]  # also where the file says another
        assert problems(config, world_size=8) == []


def test_a_batch_in_tokens_is_one_in_rows(plan):
    rows = plan("--gpu", "h100", "--num-gpus", "4", "--seq-length", "512", "--global-batch-size", "64")
    tokens = plan("--gpu", "h100", "--num-gpus", "4", "--seq-length", "512", "--global-batch-tokens", "32768")
    assert rows == tokens


def test_a_gpu_without_bfloat16_is_planned_in_fp32(plan):
    code, text, _ = plan("--gpu", "v100", "--num-gpus", "4", "--global-batch-size", "64", "--top", "1")
    assert code == 0
    assert "a step, fp32;" in text
    assert "--no-bf16" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpu", "h10"], ["--gpu h10", "'h100'", "a100-80gb"]),
        (["--num-gpus", "0"], ["--num-gpus must be above 0, not 0"]),
        (["--num-gpus", "-8"], ["--num-gpus must be above 0, not -8"]),
        (["--num-gpus", "12"], ["--num-gpus 12", "--gpus-per-node 8", "8 or 16"]),
        (["--num-gpus", "1000000"], ["--num-gpus 1000000", "up to 16384"]),
        (["--num-gpus", "x"], ["--num-gpus", "invalid int value"]),
        (["--gpus-per-node", "0"], ["--gpus-per-node must be above 0"]),
        (["--preset", "esm2-35"], ["--preset", "'esm2-35m'"]),
        (["--config", "no/such.toml"], ["--config no/such.toml"]),
        (["--num-gpu", "8"], ["unknown flag --num-gpu", "--num-gpus"]),
        (["--global-batch-size", "0"], ["--global-batch-size must be above 0"]),
        (["--global-batch-size", "7", "--micro-batch-size", "2"], ["--global-batch-size 7", "not a multiple"]),
        (["--global-batch-tokens", "1024"], ["--global-batch-tokens and --global-batch-size"]),
        (["--micro-batch-size", "-1"], ["--micro-batch-size must be above 0"]),
        (["--tensor-model-parallel-size", "3"], ["--tensor-model-parallel-size 3", "8 processes"]),
        (["--tensor-model-parallel-size", "0"], ["--tensor-model-parallel-size must be above 0"]),
        (["--num-attention-heads", "7"], ["--hidden-size 480", "--num-attention-heads 7"]),
        (["--seq-length", "3"], ["--seq-length must be at least 16"]),
        (["--attention-length", "0"], ["--attention-length 0 must be above 0"]),
        (["--attention-length", "2000"], ["--attention-length 2000", "--seq-length 1024"]),
        (["--top", "0"], ["--top must be above 0"]),
        (["--gpu", "v100", "--bf16"], ["--bf16", "v100 does not compute in bfloat16"]),
        (["--print-config"], ["--print-config"]),
        (["--json", "--check"], ["--check prints no JSON"]),
        (["--check", "--num-gpus", "8192", "--global-batch-size", "8192"], ["--check builds up to 4096 processes"]),
        (["--num-layers", "999", "--hidden-size", "9600"], ["--num-gpus 8: nothing fits", "GPUs would do"]),
    ],
)
def test_bad_input_is_one_sentence(plan, argv, words):
    code, text, errors = plan(*GOOD, *argv)
    assert (code, text) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert all(word in errors for word in words), errors


def test_what_is_required_is_named(plan):
    assert "--gpu, --num-gpus" in plan("--preset", "tiny")[2]


@pytest.mark.parametrize(
    ("tp", "pp", "cp", "replicas", "ranks"),
    [
        (1, 1, 2, 1, [0, 63]),
        (1, 1, 2, 4, [0, 15]),
        (2, 1, 1, 1, [0, 62]),
        (2, 2, 2, 2, [0, 14, 32, 46]),  # the first and the last shard of both stages
    ],
)
def test_built_without_hardware_processes_hold_what_was_estimated(plan, tp, pp, cp, replicas, ranks):
    code, text, _ = plan(
        "--gpu", "h100", "--num-gpus", "64", "--preset", "tiny", "--global-batch-size", "64",
        "--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp), "--context-parallel-size",
        str(cp), "--data-parallel-sharding", "zero3", "--data-parallel-replicate-size", str(replicas),
        "--pipeline-schedule", "1f1b", "--top", "1", "--check",
    )  # fmt: skip
    assert code == 0, text
    built = [line for line in text.splitlines() if line.startswith("rank ")]
    assert [int(line.split(":")[0].removeprefix("rank ")) for line in built] == ranks
    assert all("(as estimated)" in line for line in built)


@pytest.mark.parametrize("preset", ["proteinlm-200m", "tape-transformer", "amplify-120m"])
def test_every_kind_of_model_is_planned_and_built_as_estimated(plan, preset):
    for schedule in ("1f1b", "zbv"):
        code, text, _ = plan(
            "--gpu", "h100", "--num-gpus", "16", "--preset", preset, "--global-batch-size", "64", "--num-layers", "5",
            "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--pipeline-schedule", schedule,
            "--context-parallel-size", "1", "--top", "1", "--check",
        )  # fmt: skip
        assert code == 0, text
        assert text.count("(as estimated)") == 4  # the first and the last shard of both pipeline ranks
        (command,) = (line.split("launch/pretrain.sh ")[1].split() for line in text.splitlines() if "launch/" in line)
        config, _ = load_config(command)
        assert (config.preset, problems(config, world_size=16)) == (preset, [])


@pytest.mark.timeout(120)
def test_four_thousand_processes_are_built_in_one(plan):
    code, text, _ = plan(
        "--gpu", "h100", "--num-gpus", "4096", "--preset", "tiny", "--global-batch-size", "4096",
        "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--context-parallel-size", "1",
        "--data-parallel-sharding", "zero3", "--data-parallel-replicate-size", "1", "--top", "1", "--check",
    )  # fmt: skip
    assert code == 0, text
    assert "rank 4095:" in text
    assert "4096 processes" in text


def test_a_difference_is_told_and_fails(plan, monkeypatch):
    monkeypatch.setattr(checking, "estimated_parameters", lambda *_: 5)
    code, text, _ = plan(
        *GOOD, "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--check", "--top", "1"
    )
    assert code == 1
    assert "(estimated 5)" in text


def test_a_plan_needs_no_torch():
    code = (
        "import sys; from megatron_plm.plan.command import main; "
        f"main({GOOD!r}); sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
