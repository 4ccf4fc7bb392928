"""The commands of docs/benchmarks.md that no test can run: each is one that the commands would take."""

import re
import shlex
from pathlib import Path

import pytest

from tape_finetune.download import FOLDERS, SPLITS, _parser
from tape_finetune.tasks import TASKS
from tape_finetune.train_flags import parse_train_flags

PAGE = (Path(__file__).resolve().parents[2] / "docs/benchmarks.md").read_text(encoding="utf-8")
SECTIONS = {text.partition("\n")[0]: text for text in PAGE.split("\n## ")}


def commands(section: str, program: str) -> list[str]:
    """The arguments of each command of that program in the blocks of a section that are not run."""
    blocks = re.findall(r"<!-- not run here: .+? -->\n```bash\n(.*?)```", SECTIONS[section], re.S)
    return [line.split(program)[1].strip() for block in blocks for line in block.splitlines() if program in line]


@pytest.mark.parametrize(
    ("base", "weights"),
    [("onehot", ""), ("lstm", ""), *((base, "--from_pretrained x") for base in ("transformer", "random", "resnet"))],
)
def test_the_command_of_each_row_is_one_that_tape_train_takes(base: str, weights: str) -> None:
    values = {"$base": base, "$from": weights, "$seed": "1"}
    parsed = []
    for line in commands("The command of each row", "tape_train.py"):
        for name, value in values.items():
            line = line.replace(name, value)
        parsed.append(parse_train_flags(shlex.split(line)))
    assert [arguments.task for arguments in parsed] == [
        "secondary_structure", "contact_prediction", "remote_homology", "fluorescence", "stability",
    ]  # fmt: skip
    assert {arguments.base_model for arguments in parsed} == {base}


def test_the_commands_of_what_was_measured_are_ones_that_tape_train_takes() -> None:
    (tasks,) = re.findall(r"for task in (.*); do", SECTIONS["Measured here"])
    lines = commands("Measured here", "tape_train.py")
    found = set()
    for task in shlex.split(tasks):
        for line in lines:
            flags = line.replace("$flags", f"{task} --data_dir data/few --seed 1").replace("$model", "random")
            parsed = parse_train_flags(shlex.split(flags))
            found.add((parsed.task, parsed.label))
    assert len(found) == 3 * len(lines) == 12


def test_the_recommended_batch_sizes_are_those_of_the_commands() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+) \| \d+ \(\d+\) \|", PAGE, re.M))
    assert rows.keys() == TASKS.keys() - {"csv"}
    for task, batch_size in re.findall(r"\$base (\w+) .*?--batch_size (\d+)", PAGE):
        assert rows[task] == batch_size


def test_the_download_commands_are_taken_and_the_splits_are_the_archives() -> None:
    lines = commands("TAPE's data", "download_tape.py")
    assert len(lines) == 2
    assert all(_parser().parse(shlex.split(line)) for line in lines)
    for task, splits in SPLITS.items():
        (row,) = [
            line
            for line in PAGE.splitlines()
            if line.startswith("|") and f"`{task}`" in line and "train, valid" in line
        ]
        assert set(row.split("|")[2].strip().split(", ")) == set(splits)
    assert all(f"`{folder}`" in PAGE for folder in FOLDERS.values())
