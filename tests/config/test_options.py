"""Every option is read somewhere: an option without a reader promises what nothing keeps."""

import ast
import functools
from pathlib import Path

import pytest

from megatron_plm.config.options import GROUPS, option_fields

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS_FILE = REPOSITORY / "megatron_plm" / "config" / "options.py"
# Under these names the code holds option groups; `json.load` is no reader of the option `load`.
HOLDERS = {"options", "_options", "model", "data", "training", "parallel"}


def attributes_of(tree: ast.AST, holders: set[str]) -> set[str]:
    """Names read as HOLDER.name, or as x.HOLDER.name, anywhere in `tree`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            holder = node.value
            name = holder.id if isinstance(holder, ast.Name) else getattr(holder, "attr", None)
            if name in holders:
                found.add(node.attr)
    return found


@functools.cache
def options_read() -> set[str]:
    """Options read outside options.py, and those that its properties read when the property itself is read."""
    found: set[str] = set()
    for path in (REPOSITORY / "megatron_plm").rglob("*.py"):
        if path != OPTIONS_FILE:
            found |= attributes_of(ast.parse(path.read_text(encoding="utf-8")), HOLDERS)
    for node in ast.walk(ast.parse(OPTIONS_FILE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name in found:
            found |= attributes_of(node, {"self"})
    return found


@pytest.mark.parametrize("name", option_fields())
def test_the_option_is_read(name):
    assert name in options_read()


def test_the_search_finds_no_reader_for_an_option_that_has_none():
    assert "load" not in attributes_of(ast.parse("json.load(f); training.load = 3"), HOLDERS)
    assert "load" in attributes_of(ast.parse("x = run.config.training.load"), HOLDERS)
    assert "sentinel_option" not in options_read()


def test_options_cannot_be_changed_once_resolved():
    for options in GROUPS.values():
        with pytest.raises(AttributeError):
            options().seed = 1


def test_every_option_has_help_that_fits_one_sentence():
    for entry in option_fields().values():
        assert 10 < len(entry.help) < 120, entry.name
        assert not entry.help.endswith("."), entry.name
