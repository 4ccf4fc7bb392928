"""Names and clusters whose hashes have one half in common are told apart."""

import random
from pathlib import Path

import numpy as np
import pytest

from megatron_plm.data import clusters, external_sort
from megatron_plm.data.clusters import ClusterJoin
from megatron_plm.errors import UserError

Hash = tuple[int, int]


def join(
    folder: Path, monkeypatch: pytest.MonkeyPatch, table: list[tuple[Hash, Hash]], records: list[Hash]
) -> tuple[ClusterJoin, list[int]]:
    """Join records with a table of (representative, member); returns the first record of each one's cluster."""
    path = folder / "clusters.tsv"
    path.write_text("C\tP\n")
    pairs = np.array(table, dtype=np.uint64)
    monkeypatch.setattr(clusters, "read_cluster_lines", lambda _: (pairs[:, 0], pairs[:, 1], -1))
    joined = ClusterJoin(path, folder)
    joined.add(np.array(records, dtype=np.uint64), np.ones(len(records), dtype=bool))
    return joined, [int(first) for firsts, _ in joined.places() for first in firsts]


@pytest.mark.parametrize("memory", [1, 300, 1 << 25])
@pytest.mark.parametrize("same", [0, 1], ids=["first half", "second half"])
def test_hashes_that_share_one_half_are_different_names_and_clusters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, same: int
) -> None:
    monkeypatch.setattr(external_sort, "MEMORY", memory)

    def hash_with(other: int) -> Hash:
        return (7, other) if same == 0 else (other, 7)

    source = random.Random(1)
    members = [hash_with(number) for number in source.sample(range(2**62), 60)]
    cluster_of = {member: hash_with(2**63 + source.randrange(9)) for member in members[:40]}
    joined, firsts = join(tmp_path, monkeypatch, [(cluster, name) for name, cluster in cluster_of.items()], members)
    first_of: dict[Hash, int] = {}
    expected = [first_of.setdefault(cluster_of.get(name, name), number) for number, name in enumerate(members)]
    assert firsts == expected
    assert joined.counts.num_clusters == len(first_of)
    assert (joined.counts.num_members, joined.counts.num_members_missing) == (40, 0)


def test_a_record_is_no_member_whose_hash_only_begins_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="none of the 2 members"):
        join(tmp_path, monkeypatch, [((1, 1), (7, 1)), ((1, 1), (7, 2))], [(7, 3), (7, 4)])
