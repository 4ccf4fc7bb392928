"""Every command in the README and the docs runs as it stands there, in order, page by page."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from test_rooms import FOUNDATION, ROOMS

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "examples/data/README.md"]
ARCHITECTURE = REPOSITORY / "docs/architecture.md"
_FENCE = re.compile(
    r"(?:<!-- not run here: (?P<reason>.+?) -->\n)?```(?P<language>bash|python)\n(?P<text>.*?)```", re.S
)
# A line of a plain fence that is a command, and a span in a sentence that is one with arguments.
_COMMAND = re.compile(r"^\s*(?:\w+=\S+ )*(?:python3?|torchrun|make|pip|docker|launch/\S+) ", re.M)
_INLINE_COMMAND = re.compile(r"(?:[A-Z_]+=\S+|python3?|torchrun|docker|launch/\S+(?! --help$)) .+", re.S)


class CodeBlock(NamedTuple):
    """One fenced command block of a page."""

    language: str
    text: str
    reason_not_to_run: str | None


def code_blocks(page: Path) -> list[CodeBlock]:
    return [CodeBlock(m["language"], m["text"], m["reason"]) for m in _FENCE.finditer(page.read_text(encoding="utf-8"))]


def run_blocks(page: Path, folder: Path) -> None:
    """Run the page's blocks in `folder`, which looks like a fresh checkout."""
    for name in ("tools", "launch", "tape_finetune", "examples", "megatron_plm", "constraints.txt"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / ".venv").symlink_to(sys.prefix)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if not shutil.which("megatron-plm", path=path):  # where the tree is used without being installed
        command = folder / "bin" / "megatron-plm"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megatron_plm.cli "$@"\n')
        command.chmod(0o755)
        path = f"{command.parent}{os.pathsep}{path}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    for block in code_blocks(page):
        if block.reason_not_to_run:
            continue
        command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, block.text], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{page.name}:\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [p for p in PAGES if p.exists() and code_blocks(p)], ids=lambda page: page.name)
def test_the_commands_of_the_page_run(page, tmp_path):
    run_blocks(page, tmp_path)


def test_ci_runs_exactly_the_two_commands_of_the_readme():
    (block,) = [block for block in code_blocks(README) if ".ci/run" in (block.reason_not_to_run or "")]
    lines = (REPOSITORY / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make ")] == block.text.strip().splitlines()


def test_the_diff_of_an_added_architecture_is_of_the_code():
    page = (REPOSITORY / "docs/parallelism.md").read_text(encoding="utf-8")
    diffs = re.findall(r"^```diff\n--- a/\S+\n\+\+\+ b/(\S+)\n(.*?)^```$", page, re.S | re.M)
    assert [path for path, _ in diffs] == ["megatron_plm/model/transformer.py", "megatron_plm/parallel/tensor.py"]
    for path, text in diffs:
        there = [line[1:] for line in text.splitlines() if not line.startswith("-")]
        assert "\n".join(there[1:]) in (REPOSITORY / path).read_text(encoding="utf-8"), "the lines, one after the other"


def escaped_commands(text: str) -> list[str]:
    """Commands that no test would run: in fences without a language, or inside a sentence."""
    plain = [body for tag, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if not tag]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    spans = re.findall(r"`([^`]+)`", prose)
    return [body for body in plain if _COMMAND.search(body)] + [
        span for span in spans if _INLINE_COMMAND.fullmatch(span)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_of_the_page_escapes_the_tests(page):
    assert escaped_commands(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```\npython tools/report.py\n```\n", 1),
        ("```\n  torchrun --nproc-per-node 2 x\n```\n", 1),
        ("```\nloss of make demo 2.7\n```\n", 0),
        ("```bash\nmake demo\n```\n", 0),
        ("so `python tools/report.py --help` and `A=2 launch/pretrain.sh --seed 1` say", 2),
        ("`make demo`, `launch/pretrain.sh --help`, `python` and `tools/report.py --results`", 0),
    ],
)
def test_a_command_that_escapes_is_seen(text, found):
    assert len(escaped_commands(text)) == found


def test_a_block_that_fails_fails_its_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\ntrue\nfalse\n```\n")
    (tmp_path / "checkout").mkdir()
    with pytest.raises(AssertionError):
        run_blocks(page, tmp_path / "checkout")


def test_pages_link_to_files_that_exist():
    for page in PAGES:
        if not page.exists():
            continue
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_files_named_in_the_architecture_page_exist():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:megatron_plm|csrc|tools|launch|tape_finetune|tests)/[\w/.]*)`", text))
    assert named
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []
    loose = [name for name in re.findall(r"`([\w/]+\.py)`", text) if name not in named]
    assert loose == [], "give the whole path"


def test_the_rooms_of_the_architecture_page_are_those_of_the_tests():
    _, table = ARCHITECTURE.read_text(encoding="utf-8").split("| room | holds |\n")
    paths = [path for line in table.splitlines() for path in re.findall(r"`([^`]+)`", line.split("|")[1])]
    rooms = [path for path in paths if path.startswith("megatron_plm/")]
    assert {Path(path).stem for path in rooms} == (ROOMS.keys() | FOUNDATION) - {"__init__"}
    assert len(rooms) == len(set(rooms))
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    others = {"csrc/", "docs/", "examples/", "launch/", "tape_finetune/", "tests/", "tools/"}
    assert set(paths) - set(rooms) == others


def test_the_dockerfile_copies_what_exists_and_runs_the_makefiles_targets():
    text = re.sub(r"\\\n\s*", "", (REPOSITORY / "Dockerfile").read_text(encoding="utf-8"))
    copied = [source for line in re.findall(r"^COPY (.+)$", text, re.M) for source in line.split()[:-1]]
    assert copied
    assert [source for source in copied if not (REPOSITORY / source).exists()] == []
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert not {source.rstrip("/") for source in copied} & set(ignored)

    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.M))
    makes = []
    for comment, command in re.findall(r"^(?:# (.*)\n)?RUN (.+)$", text, re.M):
        if command.startswith("make "):
            makes.append(command.split()[1])
        elif not command.startswith("apt-get "):
            assert comment.startswith("check:"), command
            code = shlex.split(command)[2]
            assert "torch.version.cuda" in code
            assert "megatron_plm" in code
            compile(code, "Dockerfile", "exec")
    assert makes == ["install"]
    assert set(makes) <= targets
    assert text.count("# check:") == 1


def test_the_examples_of_the_dockerfile_name_configurations_that_exist():
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    commands = re.findall(r"^#\s+torchrun .*launch/pretrain.sh .*--config (\S+)", text, re.M)
    assert commands
    assert [config for config in commands if not (REPOSITORY / config).exists()] == []
