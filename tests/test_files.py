"""Outputs are complete or absent, and nothing else is left beside them."""

import os
from pathlib import Path

import pytest

from megatron_plm.errors import UserError
from megatron_plm.files import atomic_directory, atomic_file, only_writer, publish_directory, replace_symlink


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with atomic_file(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["out.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "out.txt"
    path.write_text("old")

    def write_half() -> None:
        with atomic_file(path) as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert (path.read_text(), names(tmp_path)) == ("old", ["out.txt"])


def test_a_folder_that_is_missing_or_no_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing" / "x", tmp_path / "file" / "x"):
        with pytest.raises(UserError) as error, atomic_file(path) as aside:
            aside.write_text("x")
        assert str(error.value).startswith(f"{path}: cannot be written: ")
        with pytest.raises(UserError, match="cannot be written"), atomic_directory(tmp_path / "file" / "x"):
            pass
    assert names(tmp_path) == ["file"]


def test_a_directory_appears_when_it_is_complete(tmp_path):
    with atomic_directory(tmp_path / "deep" / "out") as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "sub" / "a").read_text() == "1"
    assert names(tmp_path / "deep") == ["out"]


def test_a_directory_that_exists_is_replaced_by_force_only(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("")
    with pytest.raises(UserError, match=r"exists already.*--force"), atomic_directory(out):
        pytest.fail("must not be entered")
    with atomic_directory(out, force=True) as aside:
        (aside / "new").write_text("")
        assert names(out) == ["old"]
    assert (names(tmp_path), names(out)) == (["out"], ["new"])


def test_a_failure_leaves_the_old_directory_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    out.mkdir()

    def write_half() -> None:
        with atomic_directory(out, force=True) as aside:
            (aside / "new").write_text("")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        write_half()
    assert (names(tmp_path), names(out)) == (["out"], [])


def test_publishing_syncs_every_file_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda d: (events.append(Path(os.readlink(f"/proc/self/fd/{d}")).name), fsync(d))[1]
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b))[1])
    aside = tmp_path / "aside"
    (aside / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (aside / name).write_text(name)
    publish_directory(aside, tmp_path / "out")
    assert {"a", "b", "sub", "aside"} == set(events[: events.index("rename")])
    assert events[events.index("rename") :] == ["rename", tmp_path.name]


def test_a_symlink_moves_in_one_step(tmp_path):
    for target in ("one", "two"):
        replace_symlink(tmp_path / "latest", target)
        assert os.readlink(tmp_path / "latest") == target
    assert names(tmp_path) == ["latest"]


def test_what_a_killed_writer_left_goes_and_nothing_else(tmp_path):
    out = tmp_path / "o.[u]t"
    others = [".o.[u]t.7.json.12.tmp", ".o.ut.12.tmp", ".o.[u]t.tmp", ".o.[u]t.12.tmp2", "o.[u]t.12.tmp", ".x.12.tmp"]
    for name in (*others, ".o.[u]t.12.tmp", ".o.[u]t.345.old"):
        (tmp_path / name).mkdir()
    (tmp_path / ".o.[u]t.3.tmp").write_text("a file")
    with atomic_directory(out):
        assert not (tmp_path / ".o.[u]t.12.tmp").exists()
        assert (tmp_path / ".o.[u]t.345.old").exists()  # the only copy of what stood at `out`
    with atomic_directory(out, force=True):
        pass
    assert names(tmp_path) == sorted([*others, "o.[u]t"])


def test_a_second_writer_is_refused_and_harms_nothing(tmp_path):
    out = tmp_path / "deep" / "out"
    with atomic_directory(out) as aside:
        (aside / "a").write_text("1")
        for second in (atomic_directory(out), only_writer(out)):
            with pytest.raises(UserError, match="another process is writing it at this moment"), second:
                pytest.fail("must not be entered")
    assert (names(out.parent), names(out)) == (["out"], ["a"])
