"""A short run of the fuzzing of the index reader; the long one is fuzz.py's."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from index_reader import Files, check, files, valid_files

GOOD = valid_files([[4, 5], [], [6]], 1, [0, 1, 3])


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(files())
@example(GOOD)
@example(GOOD._replace(json=b"[" * 100_000))
@example(GOOD._replace(json=(GOOD.json or b"").replace(b"}}", b'}, "sha256": 5}')))
def test_any_files_are_a_dataset_inside_its_bounds_or_a_sentence(case: Files) -> None:
    check(case)


def test_the_check_sees_an_access_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_plm.data.indexed import IndexedDataset

    monkeypatch.setattr(IndexedDataset, "__getitem__", lambda dataset, i: dataset._bin[i : i + 1])
    with pytest.raises(AssertionError):
        check(GOOD)
