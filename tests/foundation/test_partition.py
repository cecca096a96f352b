"""Shares of a data set: disjoint, covering, repeatable, and as unequal as they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import DataError, SettingsError
from foundation.parameters import Array
from foundation.partition import LEAST, Share, check_shares, group_asked, group_fits, parse, shares
from foundation.words import devices

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


def test_by_a_group_is_natural() -> None:
    for one, other in zip(
        all_shares(LABELS, 5, "natural", groups=GROUPS),
        all_shares(LABELS, 5, "by:person", groups=GROUPS),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    assert group_asked("by:person") == "person"
    assert group_asked("by:a:b c") == "a:b c"
    assert [group_asked(form) for form in ("natural", "iid", "by", "by:", "pathological:2")] == [None] * 5


def test_by_another_group_names_the_one_there_is() -> None:
    group_fits("by:subject", "subject")
    group_fits("natural", "subject")
    group_fits("iid", None)
    with pytest.raises(SettingsError, match=r"^there is no group 'subjekt'; did you mean 'subject'\?"):
        group_fits("by:subjekt", "subject")
    with pytest.raises(SettingsError, match=r"^there is no group 'role'\. There is none"):
        group_fits("by:role", None)


@pytest.mark.parametrize("partition", ["natural", "by:person"])
def test_natural_says_why_not(partition: str) -> None:
    with pytest.raises(SettingsError, match=f"'{partition}' needs data with groups.*has none"):
        shares(LABELS, None, Share(0, 2, partition))
    with pytest.raises(
        SettingsError, match=f"'{partition}' has 7 groups, too few for 8 devices: use at most 7"
    ):
        shares(LABELS, GROUPS, Share(0, 8, partition))


@pytest.mark.parametrize(
    "partition",
    ["", "IID", "iid:1", "natural:", "by", "by:", "BY:x", "pathological", "pathological:0", "pathological:-1",
     "pathological:1.5", "pathological:²", "dirichlet", "dirichlet:", "dirichlet:0", "dirichlet:-1",
     "dirichlet:nan", "dirichlet:inf"],
)  # fmt: skip
def test_a_partition_that_is_none_names_the_forms(partition: str) -> None:
    with pytest.raises(SettingsError, match=r"pathological:K.*dirichlet:ALPHA.*by:GROUP.*natural"):
        Share(0, 2, partition)
    with pytest.raises(SettingsError):
        parse(partition)


@pytest.mark.parametrize(
    ("partition", "meant"),
    [
        ("natrual", "natural"),
        ("dirichelt:0.3", "dirichlet"),
        ("Pathological:2", "pathological"),
        ("IDD", "iid"),
    ],
)
def test_a_misspelt_partition_names_the_nearest(partition: str, meant: str) -> None:
    with pytest.raises(SettingsError, match=rf"did you mean '{meant}'\?"):
        parse(partition)
    with pytest.raises(SettingsError) as caught:
        parse("dirichlet:-1")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(("index", "count"), [(-1, 3), (3, 3), (0, 0)])
def test_a_share_that_does_not_exist(index: int, count: int) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        Share(index, count)


def test_too_little_to_share() -> None:
    with pytest.raises(DataError, match=r"3 samples .* cannot be shared among 4 devices: use at most 3"):
        shares(LABELS[:3], None, Share(0, 4))
    without = (
        r"class 1 has 1 samples for 4 devices, so that devices \d, \d and \d would be without it: use fewer"
    )
    with pytest.raises(DataError, match=without):
        shares(np.array([0] * 20 + [1]), None, Share(0, 4, "pathological:2"))
    with pytest.raises(SettingsError, match="more classes than the 10"):
        shares(LABELS, None, Share(0, 4, "pathological:11"))


# --- shares looked at beforehand ------------------------------------------------------------------


def counts(devices: int, *, training: int = 64, validation: int = 16, test: int = 26) -> Array:
    """Samples (devices, 3, 2) of two classes, half of each."""
    return np.tile(np.array([training, validation, test]) // 2, (devices, 1))[:, :, None] * np.ones(2, int)


@given(
    held=st.lists(st.tuples(*[st.integers(0, 80)] * 3), min_size=1, max_size=20),
    batch_size=st.integers(1, 40),
    needed=st.tuples(st.just(True), st.booleans(), st.booleans()),
)
def test_every_device_that_lacks_something_is_named_and_no_other(
    held: list[tuple[int, int, int]], batch_size: int, needed: tuple[bool, bool, bool]
) -> None:
    samples = np.array(held)[:, :, None]
    lacking = [[i for i, have in enumerate(held) if not have[part]] for part in range(3)]
    few = [i for i, have in enumerate(held) if have[0] < 2 * batch_size]
    share = Share(0, len(held))
    if any(devices and asked for devices, asked in zip(lacking, needed, strict=True)):
        with pytest.raises(DataError, match=r"leaves devices? .* without a sample in the .* part: use fewer"):
            check_shares(share, samples, batch_size=batch_size, needed=needed)
        return
    said = check_shares(share, samples, batch_size=batch_size, needed=needed)
    assert len(said) == bool(few)
    if few:
        assert devices(few) in said[0]
        assert f"two batches of {batch_size}" in said[0]
        assert f"the fewest: {min(have[0] for have in held)} on" in said[0]


def test_whole_shares_are_not_spoken_of() -> None:
    assert check_shares(Share(0, 3, "pathological:2"), counts(3), ("a", "b")) == []
    assert check_shares(Share(0, 3), counts(3), ("a", "b"), batch_size=32) == []
    (said,) = check_shares(Share(0, 3), counts(3), ("a", "b"), batch_size=33)
    assert "devices 0, 1 and 2 (the fewest: 64 on device 0)" in said


def test_a_device_without_a_class_of_its_own_is_named() -> None:
    samples = counts(4)
    samples[2, 0, 1] = 0
    with pytest.raises(DataError, match="pathological:2 leaves device 2 with fewer than 2 classes"):
        check_shares(Share(0, 4, "pathological:2"), samples, ("a", "b"), batch_size=8)
    (said,) = check_shares(Share(0, 4, "dirichlet:0.3"), samples, ("a", "b"), batch_size=8)
    assert said.startswith("class 'b' is tested but not trained on device 2: ")
    samples[2, 2, 1] = 0
    assert check_shares(Share(0, 4, "dirichlet:0.3"), samples, ("a", "b"), batch_size=8) == []


def test_a_class_on_no_device_is_named() -> None:
    samples = np.insert(counts(2), 1, 0, axis=2)
    assert check_shares(Share(0, 2), samples, ("a", "b", "c")) == ["no device has samples of class b"]
    assert check_shares(Share(0, 2), samples) == []
