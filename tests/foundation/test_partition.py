"""Shares of a data set: disjoint, covering, repeatable, and as unequal as they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import DataError, SettingsError
from foundation.parameters import Array
from foundation.partition import LEAST, Share, parse, shares

LABELS = np.random.default_rng(5).integers(0, 10, 1000)
GROUPS = np.random.default_rng(6).integers(0, 7, 1000)


def all_shares(
    labels: Array, count: int, partition: str, seed: int = 0, groups: Array | None = None
) -> list[Array]:
    return [shares(labels, groups, Share(i, count, partition, seed)) for i in range(count)]


@pytest.mark.parametrize(
    "partition", ["iid", "pathological:2", "pathological:10", "dirichlet:0.1", "dirichlet:100"]
)
@pytest.mark.parametrize("count", [5, 13, 50])
def test_shares_are_disjoint_and_cover(partition: str, count: int) -> None:
    parts = all_shares(LABELS, count, partition)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(LABELS)))
    assert all(len(part) for part in parts)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    count=st.integers(1, 12),
    partition=st.sampled_from(["iid", "dirichlet:0.05", "dirichlet:1", "dirichlet:0.0001", "pathological:1"]),
    seed=st.integers(0, 2**32),
)
def test_any_labels_are_shared_once_or_refused(
    labels: list[int], count: int, partition: str, seed: int
) -> None:
    try:
        parts = all_shares(np.array(labels), count, partition, seed)
    except DataError:
        return
    rows = np.concatenate(parts)
    assert len(np.unique(rows)) == len(rows)
    assert all(len(part) for part in parts)
    if not partition.startswith("pathological") or count >= len(set(labels)):
        assert len(rows) == len(labels)


@pytest.mark.parametrize("partition", ["iid", "pathological:3", "dirichlet:0.3"])
def test_the_seed_decides(partition: str) -> None:
    same = [shares(LABELS, None, Share(2, 6, partition, 9)) for _ in range(2)]
    np.testing.assert_array_equal(same[0], same[1])
    assert not np.array_equal(same[0], shares(LABELS, None, Share(2, 6, partition, 10)))


def test_a_pinned_share_stays_what_it_is() -> None:
    # Devices with different builds of this file must agree: changing the draw is a change of protocol.
    small = np.arange(12) % 3
    assert shares(small, None, Share(0, 3, "iid", 1)).tolist() == PINNED["iid"]
    assert shares(small, None, Share(0, 3, "pathological:2", 1)).tolist() == PINNED["pathological:2"]
    assert shares(small, None, Share(0, 3, "dirichlet:0.5", 1)).tolist() == PINNED["dirichlet:0.5"]


PINNED = {"iid": [0, 1, 7, 11], "pathological:2": [3, 4, 6, 10], "dirichlet:0.5": [1, 4, 9, 10]}


def test_pathological_gives_every_device_its_classes() -> None:
    for count in (5, 7, 30):
        parts = all_shares(LABELS, count, "pathological:2")
        assert [len(np.unique(LABELS[part])) for part in parts] == [2] * count
    pairs = {tuple(np.unique(LABELS[part])) for part in all_shares(LABELS, 30, "pathological:2")}
    assert len(pairs) > 10  # dealt, not the same five couples again and again


def test_dirichlet_is_unequal_but_nobody_starves() -> None:
    parts = all_shares(LABELS, 40, "dirichlet:0.05")
    assert min(map(len, parts)) >= LEAST

    def top(alpha: str) -> float:
        of = all_shares(LABELS, 10, f"dirichlet:{alpha}")
        return float(np.mean([np.bincount(LABELS[p]).max() / len(p) for p in of]))

    assert top("0.1") > 0.4 > 0.2 > top("1000")


def test_natural_gives_one_group_to_one_device() -> None:
    parts = all_shares(LABELS, 7, "natural", groups=GROUPS)
    assert [np.unique(GROUPS[part]).tolist() for part in parts] == [[i] for i in range(7)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(LABELS)))
    fewer = all_shares(LABELS, 3, "natural", groups=GROUPS)
    assert [np.unique(GROUPS[part]).tolist() for part in fewer] == [[0], [1], [2]]


def test_natural_says_why_not() -> None:
    with pytest.raises(SettingsError, match="has none"):
        shares(LABELS, None, Share(0, 2, "natural"))
    with pytest.raises(SettingsError, match="7 groups, too few for 8"):
        shares(LABELS, GROUPS, Share(0, 8, "natural"))


@pytest.mark.parametrize(
    "partition",
    ["", "IID", "iid:1", "natural:", "pathological", "pathological:0", "pathological:-1",
     "pathological:1.5", "pathological:²", "dirichlet", "dirichlet:", "dirichlet:0", "dirichlet:-1",
     "dirichlet:nan", "dirichlet:inf"],
)  # fmt: skip
def test_a_partition_that_is_none_names_the_forms(partition: str) -> None:
    with pytest.raises(SettingsError, match=r"pathological:K.*dirichlet:ALPHA.*natural"):
        Share(0, 2, partition)
    with pytest.raises(SettingsError):
        parse(partition)


@pytest.mark.parametrize(("index", "count"), [(-1, 3), (3, 3), (0, 0)])
def test_a_share_that_does_not_exist(index: int, count: int) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        Share(index, count)


def test_too_little_to_share() -> None:
    with pytest.raises(DataError, match="3 samples cannot be shared among 4"):
        shares(LABELS[:3], None, Share(0, 4))
    with pytest.raises(DataError, match="class 1 has 1 samples for"):
        shares(np.array([0] * 20 + [1]), None, Share(0, 4, "pathological:2"))
    with pytest.raises(SettingsError, match="more classes than the 10"):
        shares(LABELS, None, Share(0, 4, "pathological:11"))
