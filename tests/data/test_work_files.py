"""No temporary file is open any more when the folder that holds it is removed, however the run ends."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_selection import SPLITS, TOKENIZER, proteins, write_fasta

from megatron_plm.data import external_sort
from megatron_plm.data.external_sort import ExternalSort
from megatron_plm.data.indexed_writer import IndexedDatasetWriter
from megatron_plm.data.pipeline import preprocess
from megatron_plm.data.rearrange import Selection
from megatron_plm.data.store import Column


def open_files(folder: Path) -> list[str]:
    """Files in `folder` that this process holds open, removed ones included."""
    targets = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            targets.append(str(descriptor.readlink()))
        except FileNotFoundError:  # the listing's own
            continue
    return [target for target in targets if target.startswith(f"{folder}/")]


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, list[str]]]:
    """The folders that have been removed, each with the files that were open in it."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("the system doesn't tell which files are open")
    seen: list[tuple[Path, list[str]]] = []
    remove = shutil.rmtree

    def watched(folder: Path, **kwargs: bool) -> None:
        seen.append((folder, open_files(folder)))
        remove(folder, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    monkeypatch.setattr(external_sort, "MEMORY", 3000)
    return seen


def failing_after(real: Callable[..., object], count: int) -> Callable[..., object]:
    calls = iter(range(count))

    def method(*args: object, **kwargs: object) -> object:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return method


def selections(folder: Path) -> list[Selection]:
    (folder / "clusters.tsv").write_text("".join(f"C{i % 9}\tP{i}\n" for i in range(200)))
    table = str(folder / "clusters.tsv")
    return [
        Selection(dedup=True),
        Selection(shuffle_seed=1),
        Selection(clusters=table),
        Selection(dedup=True, shuffle_seed=1, clusters=table, splits=SPLITS),
    ]


@pytest.mark.parametrize("selection", range(4), ids=["dedup", "shuffle", "clusters", "everything"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (None, ""),
        (IndexedDatasetWriter, "append"),
        (IndexedDatasetWriter, "complete"),
        (ExternalSort, "_write"),
        (ExternalSort, "_sort"),
        (Column, "append"),
        (Column, "take"),
        (Column, "__init__"),
    ],
)
def test_no_file_in_the_folder_is_open_when_it_is_removed(
    tmp_path: Path,
    removed: list[tuple[Path, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    owner: type | None,
    name: str,
    selection: int,
) -> None:
    source, chosen = write_fasta(tmp_path / "in.fasta", proteins(400)), selections(tmp_path)[selection]
    for count in (0, 1, 5):
        with monkeypatch.context() as patch:
            if owner is not None:
                patch.setattr(owner, name, failing_after(getattr(owner, name), count))
            try:
                preprocess([source], tmp_path / "p", TOKENIZER, selection=chosen, force=True)
            except KeyboardInterrupt:
                assert owner is not None
    assert len(removed) == 3
    assert all(not still_open for _, still_open in removed)
    assert not any(folder.exists() for folder, _ in removed)
