"""Every command in the README and the docs runs as it stands there, in order, page by page."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "examples/data/README.md"]
_FENCE = re.compile(
    r"(?:<!-- not run here: (?P<reason>.+?) -->\n)?```(?P<language>bash|python)\n(?P<text>.*?)```", re.S
)


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
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    for block in code_blocks(page):
        if block.reason_not_to_run:
            continue
        command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, block.text], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{page.name}:\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.exists() and code_blocks(p)], ids=lambda page: page.name)
def test_the_commands_of_the_page_run(page, tmp_path):
    run_blocks(page, tmp_path)


def test_ci_runs_exactly_the_commands_of_the_readme_that_are_not_run_here():
    (block,) = [block for block in code_blocks(REPOSITORY / "README.md") if block.reason_not_to_run]
    lines = (REPOSITORY / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make ")] == block.text.strip().splitlines()


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
    text = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:megatron_plm|csrc|tools|launch|tape_finetune|tests)/[\w/.]*)`", text))
    assert named
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []


def test_the_dockerfile_copies_what_exists_and_uses_the_makefiles_targets():
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.M))
    for line in re.findall(r"^COPY (.+)$", text, re.M):
        *sources, _ = line.split()
        assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    used = re.findall(r"^RUN make (?:--\S+ )*(\w+)", text, re.M)
    assert used
    assert set(used) <= targets
    for command in re.findall(r"^#\s+torchrun .*$", text, re.M):
        config = re.search(r"--config (\S+)", command)
        assert config
        assert (REPOSITORY / config[1]).exists()
