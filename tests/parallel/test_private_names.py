"""torch's private names: those that docs/parallelism.md lists are there, and the code uses no others."""

import ast
import contextlib
import importlib
import inspect
import re

import pytest
import torch
from processes import REPOSITORY
from torch.distributed.pipelining import schedules

PAGE = REPOSITORY / "docs" / "parallelism.md"
LISTED = re.findall(r"^\| `(torch[\w.]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def private_names() -> set[str]:
    """Full names in the package that go through a private name of torch: imported, or written out from `torch` on."""
    found = set()
    for path in (REPOSITORY / "megatron_plm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Attribute):
                found.add(ast.unparse(node))
    # Names between double underscores, such as torch.__version__, are Python's and public.
    return {name for name in found if re.fullmatch(r"torch(\.\w+)*\._(?!_)\w+(\.\w+)*", name)}


def test_the_list_is_whole():
    used = private_names()
    assert "torch.distributed.distributed_c10d._abort_process_group" in used
    # A name that is written out shows its beginnings too.
    whole = {name for name in used if not any(other.startswith(f"{name}.") for other in used)}
    assert whole == set(LISTED)


@pytest.mark.parametrize("name", LISTED)
def test_a_private_name_is_there(name):
    words = name.split(".")
    found = torch
    for at, word in enumerate(words[1:], 2):
        with contextlib.suppress(ImportError):  # a module that nobody has imported yet, or an attribute
            importlib.import_module(".".join(words[:at]))
        assert hasattr(found, word), f"torch {torch.__version__} has no {name}; {PAGE.name} says what it is for"
        found = getattr(found, word)


def test_schedules_of_several_stages_have_the_order_that_evaluation_cuts_short():
    """megatron_plm/parallel/pipeline.py runs only the forward passes of it."""
    source = inspect.getsource(schedules._PipelineScheduleRuntime)
    assert "self.pipeline_order_with_comms" in source, "look at _forward_only in parallel/pipeline.py"
    assert {"computation_type", "stage_index"} <= set(schedules._Action._fields)
