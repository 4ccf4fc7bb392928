"""Several datasets as one: what `--data-path` may say, and how rows are shared out."""

import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from sample_proteins import pair_proteins, write_dataset

from megatron_plm.data.blend import Blend, Cursor
from megatron_plm.data.indexed import METADATA_FORMAT, METADATA_VERSION
from megatron_plm.data.indexed_writer import IndexedDatasetWriter
from megatron_plm.data.mixture import open_mixture
from megatron_plm.data.packing import Place
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("esm2")


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    return [str(write_dataset(folder / name, pair_proteins(n, seed=n))) for name, n in (("a", 30), ("b", 20))]


def test_weights_stand_before_their_datasets(prefixes):
    mixture = open_mixture(["0.7", prefixes[0], "30", prefixes[1]], TOKENIZER, flag="--data-path")
    assert mixture.weights == (0.7, 30.0)
    assert [dataset.prefix for dataset in mixture.datasets] == prefixes
    assert mixture.num_sequences == 50


def test_without_weights_each_dataset_counts_by_its_size(prefixes):
    mixture = open_mixture(prefixes, TOKENIZER, flag="--data-path")
    assert mixture.weights == tuple(dataset.num_tokens for dataset in mixture.datasets)
    assert mixture.num_tokens == sum(mixture.weights)


def test_a_clustered_dataset_counts_by_one_member_of_each(tmp_path, prefixes):
    with IndexedDatasetWriter(tmp_path / "clusters", documents=True) as writer:
        for number in range(30):
            writer.append(np.full(40, 5, dtype=np.uint8), np.array([40], np.int32), np.array([number % 3 == 0]))
        description = {
            "format": METADATA_FORMAT,
            "version": METADATA_VERSION,
            "num_sequences": 30,
            "num_residues": 1200,
        }
        writer.commit({**description, "tokenizer": {"name": "esm2", "sha256": TOKENIZER.sha256}})
    mixture = open_mixture([str(tmp_path / "clusters"), prefixes[0]], TOKENIZER, flag="--data-path")
    assert mixture.weights[0] == 400


@pytest.mark.parametrize("value", ["esm2", {"name": "esm2"}, {"name": 1, "sha256": "0"}, []])
def test_a_description_whose_tokenizer_is_odd_is_refused(value, prefixes, tmp_path):
    for end in ("bin", "idx"):
        shutil.copy(f"{prefixes[0]}.{end}", tmp_path / f"odd.{end}")
    document = json.loads(Path(f"{prefixes[0]}.json").read_text())
    (tmp_path / "odd.json").write_text(json.dumps({**document, "tokenizer": value}))
    with pytest.raises(UserError, match=r"odd\.json': tokenizer must hold a name and a sha256"):
        open_mixture([str(tmp_path / "odd")], TOKENIZER, flag="--data-path")


def test_content_order_and_weights_identify_a_mixture(prefixes):
    a, b = prefixes
    lists = [[a], [b], [a, b], [b, a], ["1", a, "2", b], ["2", a, "1", b]]
    assert len({open_mixture(words, TOKENIZER, flag="--data-path").sha256 for words in lists}) == len(lists)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["0.7", "A", "0.3"], "--data-path 0.7 A 0.3: expected weights and datasets in turn, as in 0.7 A 0.3 B"),
        (["0.7", "A", "B", "0.3"], "expected weights and datasets in turn"),
        (["A", "0.7", "B", "0.3"], "--data-path: 0.7 stands where a dataset was expected"),
        (["0", "A", "1", "B"], "a weight must be a number above 0"),
        (["-1", "A", "1", "B"], "a weight must be a number above 0"),
        (["nan", "A", "1", "B"], "a weight must be a number above 0"),
        (["inf", "A", "1", "B"], "a weight must be a number above 0"),
        (["0.5"], "dataset '0.5': '0.5.idx' does not exist"),
    ],
)
def test_other_lists_are_refused_by_what_is_wrong(words, said, prefixes):
    named = [{"A": prefixes[0], "B": prefixes[1]}.get(word, word) for word in words]
    with pytest.raises(UserError) as error:
        open_mixture(named, TOKENIZER, flag="--data-path")
    text = str(error.value).replace(prefixes[0], "A").replace(prefixes[1], "B")
    assert said in text


class Counter:
    """A stream whose rows are its own name and their number."""

    num_windows = 1

    def __init__(self, name):
        self.name = name

    def rows_from(self, place):
        for number in itertools.count(place.row):
            yield (self.name, number), Place(row=number + 1)


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [5, 1, 1], [1e-3, 1, 10, 100]])
def test_every_share_is_kept_at_every_point_and_no_row_is_left_out(weights):
    blend = Blend([Counter(name) for name in range(len(weights))], weights)
    taken = [0] * len(weights)
    for number, ((name, row), cursor) in enumerate(
        itertools.islice(blend.rows_from(Cursor.start(len(weights))), 3000), 1
    ):
        assert row == taken[name]
        taken[name] += 1
        assert cursor.taken == tuple(taken)
        error = max(abs(count - number * weight / sum(weights)) for count, weight in zip(taken, weights, strict=True))
        assert error < max(1, len(weights) - 1)


def test_a_blend_goes_on_from_any_cursor():
    weights = [random.Random(1).random() for _ in range(5)]
    blend = Blend([Counter(name) for name in range(5)], weights)
    reference = list(itertools.islice(blend.rows_from(Cursor.start(5)), 400))
    for start in (0, 1, 57, 300):
        assert list(itertools.islice(blend.rows_from(reference[start][1]), 50)) == reference[start + 1 : start + 51]
