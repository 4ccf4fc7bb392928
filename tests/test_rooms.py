"""Who may import whom: dependencies point one way, and a bare cluster image can train."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_plm"

# Importable by every room; none of them imports a room.
FOUNDATION = {
    "errors", "arguments", "invocation", "files", "philox", "machine", "memory", "rendezvous", "torchrun_agent",
    "__init__",
}  # fmt: skip

# room: (rooms it may import, modules from outside that it must not)
ROOMS = {
    "config": (set(), {"torch", "numpy"}),
    "tokenizers": ({"config"}, {"torch", "urllib", "socket", "http", "requests"}),
    "checkpoint_format": ({"config", "tokenizers"}, {"torch"}),
    "distributed_checkpoint": ({"checkpoint_format"}, {"torch.nn", "torch.optim"}),
    "data": ({"config", "tokenizers"}, {"torch.distributed", "torch.nn"}),
    "kernels": (set(), set()),
    # The loader's batches reach the model as tensors, so of data it needs nothing.
    "model": (
        {"config", "tokenizers", "kernels"},
        {"torch.distributed", "torch.optim", "os", "pathlib", "sys", "io"},
    ),
    "parallel": ({"model", "data", "config", "tokenizers", "kernels"}, {"torch.optim", "torch.distributed.checkpoint"}),
    "training": (
        {
            "parallel", "model", "kernels", "data", "tokenizers", "config",
            "checkpoint_format", "distributed_checkpoint",
        },
        {"safetensors", "transformers"},
    ),
    "convert": ({"model", "tokenizers", "config", "checkpoint_format", "distributed_checkpoint"}, {"torch.optim"}),
    "inference": (
        {"convert", "model", "data", "tokenizers", "config"}, {"torch.distributed", "torch.optim", "transformers"},
    ),
    "plan": ({"parallel", "model", "tokenizers", "config"}, {"torch.optim"}),
    "preflight": ({"parallel", "model", "tokenizers", "config", "checkpoint_format"}, {"torch.optim"}),
    "report": ({"config"}, {"torch", "numpy"}),
    "benchmark": (
        {"plan", "inference", "convert", "training", "parallel", "model", "kernels", "data", "tokenizers", "config"},
        set(),
    ),
    "cli": (set(), {"torch", "numpy"}),
}  # fmt: skip


def python_files(room: str) -> list[Path]:
    module = REPOSITORY / PACKAGE / f"{room}.py"
    return [module] if module.is_file() else sorted((REPOSITORY / PACKAGE / room).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Full names that `path` imports, anywhere in it; `from a import b` gives a and a.b."""
    found: set[str] = set()
    parent = path.relative_to(REPOSITORY).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(parent[: len(parent) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def rooms_of(modules: set[str]) -> set[str]:
    return {module.split(".")[1] for module in modules if module.startswith(f"{PACKAGE}.")} - {"__version__"}


def within(module: str, forbidden: str) -> bool:
    return module == forbidden or module.startswith(f"{forbidden}.")


def test_the_walk_sees_imports_of_every_form():
    path = REPOSITORY / PACKAGE / "model" / "heads.py"
    assert {"torch", "torch.nn", f"{PACKAGE}.config.options"} <= imported_modules(path)
    assert "config" in rooms_of(imported_modules(path))
    assert within("torch.distributed.checkpoint", "torch.distributed")
    assert not within("torchvision", "torch")
    hidden = REPOSITORY / PACKAGE / "model" / "attention.py"
    assert "torch.nn.attention.varlen.varlen_attn" in imported_modules(hidden), "an import inside a function"


def test_every_file_of_the_package_belongs_to_a_room():
    names = {path.stem if path.is_file() else path.name for path in (REPOSITORY / PACKAGE).iterdir()}
    names = {name for name in names if not name.startswith(("__pycache__", "."))}
    assert names <= ROOMS.keys() | FOUNDATION


@pytest.mark.parametrize("room", [room for room in ROOMS if python_files(room)])
def test_a_room_imports_only_what_it_may(room):
    may, must_not = ROOMS[room]
    for path in python_files(room):
        modules = imported_modules(path)
        where = path.relative_to(REPOSITORY)
        assert rooms_of(modules) <= may | FOUNDATION | {room}, where
        assert not [m for m in modules for forbidden in must_not if within(m, forbidden)], where
        assert not [m for m in modules if within(m, "tape_finetune")], where


def test_the_model_holds_no_word_of_processes():
    words = re.compile(r"\branks?\b|world.?size|mesh|dtensor|shard|distributed|process.?group", re.I)
    found = [(path.name, word) for path in python_files("model") for word in words.findall(path.read_text())]
    assert found == []
    assert words.findall(python_files("parallel")[1].read_text()), "and it finds them where they are"


@pytest.mark.parametrize("name", sorted(FOUNDATION))
def test_the_foundation_stands_on_itself(name):
    assert rooms_of(imported_modules(REPOSITORY / PACKAGE / f"{name}.py")) <= FOUNDATION


def test_convert_uses_checkpoints_but_no_process_groups():
    for path in python_files("convert"):
        distributed = {m for m in imported_modules(path) if within(m, "torch.distributed")}
        assert all(within(m, "torch.distributed.checkpoint") for m in distributed), path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "tools").glob("*.py")), ids=lambda path: path.name)
def test_tools_hold_no_logic(path):
    assert len(path.read_text().splitlines()) <= 100
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def python(code: str, *argv: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter in which the packages it calls BLOCKED are not installed."""
    header = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
    return subprocess.run(
        [sys.executable, "-c", header + code, *argv], capture_output=True, text=True, timeout=120, cwd=REPOSITORY
    )


def test_config_tokenizers_and_help_need_no_torch():
    done = python("""
BLOCKED = {"torch"}
import megatron_plm.config.load, megatron_plm.tokenizers, megatron_plm.checkpoint_format, megatron_plm.cli
assert len(megatron_plm.tokenizers.get_tokenizer("esm2").tokens) == 33
megatron_plm.config.load.load_config(["--preset", "tiny"])
try:
    import torch
except ModuleNotFoundError:
    print("blocked")
""")
    assert (done.returncode, done.stdout) == (0, "blocked\n"), done.stderr


def test_pretraining_needs_only_torch_and_numpy(pair_data, tmp_path):
    code = """
BLOCKED = {"rich", "tensorboard", "transformers", "matplotlib", "jinja2", "gemmi", "zstandard", "safetensors",
           "pyarrow", "lmdb", "scipy", "sklearn", "pandas", "sentencepiece", "tape_finetune"}
from megatron_plm.errors import run_command
from megatron_plm.training.pretrain import main
sys.exit(run_command(main))
"""
    done = python(code, *pair_data.flags, "--train-iters=2", f"--save={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "pip install tensorboard" in done.stderr
    assert (tmp_path / "run" / "status").read_text() == "finished\n"


def source_files() -> list[Path]:
    """The files under version control, or about to be; in a copy without git, all."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    if listing.returncode == 0:
        files = [REPOSITORY / line for line in listing.stdout.splitlines()]
    else:
        roots = ["megatron_plm", "tape_finetune", "tools", "launch", "csrc", "tests", "examples"]
        files = [path for root in roots for path in (REPOSITORY / root).rglob("*")]
    suffixes = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".sh"}
    return [path for path in files if path.suffix in suffixes and path.is_file()]


def test_no_source_file_is_too_long_to_read():
    files = source_files()
    assert len(files) > 50
    assert [path for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 320] == []
