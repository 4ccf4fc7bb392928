"""What `preprocess` leaves out, splits, shuffles and clusters: against a model in plain Python."""

import gzip
import itertools
import json
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_plm.data import external_sort, store
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.pipeline import Summary, preprocess
from megatron_plm.data.rearrange import Selection
from megatron_plm.data.splits import parse_splits
from megatron_plm.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("esm2")
SPLITS = parse_splits("train=0.6,valid=0.25,test=0.15")


@dataclass(frozen=True)
class Record:
    name: str
    letters: str


def write_fasta(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(f">{record.name} some words\n{record.letters}\n" for record in records))
    return path


def proteins(count: int, *, seed: int = 1) -> list[Record]:
    """Records of different letters, long enough that none is there twice."""
    source = random.Random(seed)
    return [
        Record(f"P{number}", "".join(source.choices("LAGVSERTIDPKQNFYMHWC", k=source.randint(12, 60))))
        for number in range(count)
    ]


def documents(prefix: Path) -> list[list[str]]:
    """The sequences of each document of a dataset."""
    dataset = IndexedDataset(prefix)
    bounds = dataset.document_indices.tolist()
    return [
        [TOKENIZER.decode(dataset[i]) for i in range(first, end)] for first, end in itertools.pairwise(bounds)
    ]  # fmt: skip


def sequences(prefix: Path) -> list[str]:
    return list(itertools.chain(*documents(prefix)))


def run(folder: Path, records: list[Record], selection: Selection, *, workers: int = 1) -> Summary:
    source = write_fasta(folder / "in.fasta", records)
    return preprocess([source], folder / "p", TOKENIZER, selection=selection, workers=workers, force=True)


def model(records: list[Record], selection: Selection, clusters: dict[str, str]) -> list[list[str]]:
    """The documents that a selection without splits and shuffling makes; `clusters` from member to representative."""
    seen: set[str] = set()
    groups: dict[object, list[str]] = defaultdict(list)
    for number, record in enumerate(records):
        if not (selection.min_length or 0) <= len(record.letters) <= (selection.max_length or 10**9):
            continue
        if selection.dedup and record.letters in seen:
            continue
        seen.add(record.letters)
        groups[clusters.get(record.name, number)].append(record.letters)
    return list(groups.values())


RECORDS = st.lists(
    st.builds(Record, st.sampled_from(["a", "b", "c", "d", "sp|P1|x", "e"]), st.text("MKV", min_size=1, max_size=4)),
    min_size=1, max_size=25,
)  # fmt: skip
TABLES = st.dictionaries(
    st.sampled_from(["a", "b", "c", "sp|P1|x", "missing", "gone"]), st.sampled_from(["a", "r", "s"]), min_size=1
)
SELECTIONS = st.builds(
    Selection, min_length=st.sampled_from([None, 1, 2]), max_length=st.sampled_from([None, 3]), dedup=st.booleans()
)


@settings(max_examples=150, deadline=None)
@given(RECORDS, st.none() | TABLES, SELECTIONS, st.sampled_from([1, 200, 1 << 25]))
def test_documents_are_those_of_the_model(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[Record],
    table: dict[str, str] | None,
    selection: Selection,
    memory: int,
) -> None:
    folder = tmp_path_factory.mktemp("made")
    if table is not None:
        records = [*records, Record(next(iter(table)), "MKV")]  # at least one member is in the input
        text = "".join(f"{cluster}\t{member}\n" for member, cluster in table.items())
        (folder / "clusters.tsv").write_text(text)
        selection = replace(selection, clusters=str(folder / "clusters.tsv"))
    expected = model(records, selection, table or {})
    if not expected:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_sort, "MEMORY", memory)
        patch.setattr(store, "_BATCH_RECORDS", 3)
        patch.setattr(store, "_BATCH_TOKENS", 5)
        summary = run(folder, records, selection)
    assert documents(folder / "p") == expected
    kept = [letters for document in expected for letters in document]
    lengths = [len(record.letters) for record in records]
    assert summary.counts.num_read == len(records)
    assert summary.counts.num_shorter == sum(length < (selection.min_length or 0) for length in lengths)
    assert summary.counts.num_longer == sum(length > (selection.max_length or 10**9) for length in lengths)
    assert len(kept) == len(records) - summary.counts.num_left_out
    metadata = json.loads((folder / "p.json").read_text())
    assert metadata["num_residues"] == sum(map(len, kept))
    assert all(metadata["token_counts"][letter] == "".join(kept).count(letter) for letter in "MKV")
    assert metadata["num_documents"] == len(expected)
    if table is not None:
        assert metadata["selection"]["clusters"] == {
            "path": selection.clusters,
            "num_clusters": len(expected),
            "num_members": len(table),
            "num_members_missing": len(table.keys() - {record.name for record in records}),
        }
    assert not [path.name for path in folder.iterdir() if path.name.endswith(("tmp", "lock"))]


def test_shuffling_keeps_every_sequence_and_depends_on_input_and_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = proteins(3000)
    orders = {}
    for seed in (1, 2):
        for memory, workers in [(1 << 25, 1), (1 << 15, 2), (3000, 1)]:
            monkeypatch.setattr(external_sort, "MEMORY", memory)
            for dedup in (False, True):  # by way of the store; nothing is repeated here
                run(tmp_path, records, Selection(shuffle_seed=seed, dedup=dedup), workers=workers)
                order = sequences(tmp_path / "p")
                assert orders.setdefault(seed, order) == order
        assert sorted(orders[seed]) == sorted(record.letters for record in records)
    assert orders[1] != orders[2]


def test_a_shuffled_order_is_even(tmp_path: Path) -> None:
    """Over seeds, each of six records stands at each place equally often (chi-square, 25 degrees of freedom)."""
    records = [Record(str(i), letters) for i, letters in enumerate(["A", "C", "D", "E", "F", "G"])]
    counts: dict[tuple[int, str], int] = defaultdict(int)
    num_seeds = 120
    for seed in range(num_seeds):
        run(tmp_path, records, Selection(shuffle_seed=seed))
        for place, letters in enumerate(sequences(tmp_path / "p")):
            counts[place, letters] += 1
    expected = num_seeds / 6
    statistic = sum((counts[place, r.letters] - expected) ** 2 / expected for place in range(6) for r in records)
    assert statistic < 52.6, "p < 0.001"


def test_a_protein_is_in_the_same_split_whatever_the_order_the_case_and_the_tokenizer(tmp_path: Path) -> None:
    records = proteins(2000)
    selection = Selection(splits=SPLITS)
    run(tmp_path, records, selection)
    split_of = {letters: name for name in SPLITS.names for letters in sequences(Path(f"{tmp_path / 'p'}_{name}"))}
    assert set(split_of) == {record.letters for record in records}
    shares = [list(split_of.values()).count(name) / len(split_of) for name in SPLITS.names]
    # Four standard deviations of a share of 2,000 are 0.044 at most.
    assert all(
        abs(share - float(SPLITS.fractions[name])) < 0.044 for share, name in zip(shares, SPLITS.names, strict=True)
    )
    other = [replace(record, letters=record.letters.lower()) for record in random.Random(3).sample(records, 2000)]
    tape = get_tokenizer("tape-iupac")
    preprocess(
        [write_fasta(tmp_path / "b.fasta", other)],
        tmp_path / "q",
        tape,
        selection=replace(selection, shuffle_seed=4, dedup=True),
    )
    for name in SPLITS.names:
        dataset = IndexedDataset(f"{tmp_path / 'q'}_{name}")
        assert {split_of[tape.decode(sequence)] for sequence in dataset} == {name}


def test_each_split_keeps_the_order_of_the_input(tmp_path: Path) -> None:
    records = proteins(300)
    run(tmp_path, records, Selection(splits=SPLITS))
    order = {record.letters: number for number, record in enumerate(records)}
    for name in SPLITS.names:
        numbers = [order[letters] for letters in sequences(Path(f"{tmp_path / 'p'}_{name}"))]
        assert numbers == sorted(numbers)


def test_clusters_stay_together_when_shuffled_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_sort, "MEMORY", 4000)
    records = proteins(1200)
    cluster_of = {record.name: f"C{i % 150}" for i, record in enumerate(records) if i % 3}
    table = "".join(f"{cluster}\t{name}\r\n" for name, cluster in cluster_of.items())
    (tmp_path / "clusters.tsv.gz").write_bytes(gzip.compress(table.encode()))
    selection = Selection(clusters=str(tmp_path / "clusters.tsv.gz"), splits=SPLITS, shuffle_seed=5)
    name_of = {record.letters: record.name for record in records}
    summary = run(tmp_path, records, selection)
    groups = [
        [name_of[letters] for letters in document]
        for name in SPLITS.names
        for document in documents(Path(f"{tmp_path / 'p'}_{name}"))
    ]
    expected = defaultdict(list)
    for record in records:
        expected[cluster_of.get(record.name, record.name)].append(name_of[record.letters])
    assert sorted(groups) == sorted(expected.values())
    assert summary.counts.clusters is not None
    assert summary.counts.clusters.num_clusters == len(expected)
    # Another data set with the same clusters, and others: a cluster's split depends on its name alone.
    split_of = {letters: name for name in SPLITS.names for letters in sequences(Path(f"{tmp_path / 'p'}_{name}"))}
    run(tmp_path, records[::-7], replace(selection, shuffle_seed=None))
    for name in SPLITS.names:
        assert {split_of[letters] for letters in sequences(Path(f"{tmp_path / 'p'}_{name}"))} == {name}


@pytest.mark.parametrize(
    "selection",
    [
        Selection(dedup=True, shuffle_seed=1, splits=SPLITS),
        Selection(min_length=15, max_length=50),
        Selection(dedup=True, min_length=20),
    ],
    ids=["dedup shuffle split", "lengths", "dedup lengths"],
)
def test_files_are_the_same_for_every_number_of_workers(tmp_path: Path, selection: Selection) -> None:
    records = [*proteins(500), *proteins(300, seed=1), *proteins(500, seed=2)]
    seen = set()
    for workers in (1, 2, 5):
        run(tmp_path, records, selection, workers=workers)
        seen.add(tuple(path.read_bytes() for path in sorted(tmp_path.glob("p*"))))
    assert len(seen) == 1


def test_a_cluster_of_more_than_fits_into_memory_is_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_sort, "MEMORY", 1000)
    records = [replace(record, name="same" if i % 5 else f"alone{i}") for i, record in enumerate(proteins(500))]
    (tmp_path / "clusters.tsv").write_text("C\tsame\n")
    run(tmp_path, records, Selection(clusters=str(tmp_path / "clusters.tsv")))
    assert sorted(map(len, documents(tmp_path / "p"))) == [1] * 100 + [400]
    assert documents(tmp_path / "p")[1] == [record.letters for i, record in enumerate(records) if i % 5]
