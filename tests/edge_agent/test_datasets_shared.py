"""A `.npz` that is shared among devices, rows' parts that a file says, and shares looked at beforehand."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from edge_agent import files
from edge_agent.datasets import DataSettings, LocalData, load, load_shares, partition_problems
from edge_agent.samples import TEST, TRAIN, VALIDATION
from foundation.errors import DataError, SettingsError
from foundation.parameters import Array

N = 240
X = np.arange(N, dtype=np.float32).reshape(N, 1, 1) * np.ones((1, 4, 2), np.float32)
"""Sample i is all i, so that rows can be told from values."""
Y = np.arange(N) % 3
PERSON = np.array(["ann", "bob", "cay", "dan"])[np.arange(N) // 60]
SITE = np.arange(N) // 120

Shared = Callable[..., DataSettings]


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    """Write a file of these arrays over the usual ones (None: leave it out); return settings for it."""

    def write(arrays: dict[str, Any] | None = None, **more: Any) -> DataSettings:
        usual = {"x": X, "y": Y, "person": PERSON, "site": SITE}
        np.savez(
            tmp_path / "mine.npz", **{k: v for k, v in (usual | (arrays or {})).items() if v is not None}
        )
        return DataSettings(**{"name": str(tmp_path / "mine.npz"), "seed": 5, **more})

    return write


def parts_of(data: LocalData) -> tuple[list[int], list[int], list[int]]:
    train, validation, test = (
        sorted(part.x.reshape(len(part), -1)[:, 0].astype(int).tolist())
        for part in (data.train, data.validation, data.test)
    )
    return train, validation, test


def rows_of(data: LocalData) -> list[int]:
    return sorted(chain(*parts_of(data)))


def every(settings_: DataSettings, data_dir: Path | None = None) -> list[LocalData]:
    return [load(settings_.model_copy(update={"index": index}), data_dir) for index in range(settings_.count)]


def refusal(settings_: DataSettings, data_dir: Path) -> str | None:
    """Return why there can be no such shares; any other error comes through."""
    try:
        partition_problems(settings_, data_dir)
    except (DataError, SettingsError) as error:
        return str(error)
    return None


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("partition", "count"), [("iid", 5), ("pathological:2", 3), ("dirichlet:0.5", 3), ("by:person", 4)]
)
def test_a_shared_file_is_dealt_once(shared: Shared, partition: str, count: int) -> None:
    shares = [rows_of(data) for data in every(shared(partition=partition, count=count))]
    assert sorted(chain(*shares)) == list(range(N))


@pytest.mark.parametrize(
    "more", [{}, {"partition": "by:person"}, {"split": "fold"}, {"segment": "fold"}, {"limit": 200}]
)
def test_shares_read_at_once_are_those_read_one_by_one(shared: Shared, more: dict[str, Any]) -> None:
    fold = np.arange(N) // 6 if "segment" in more else np.arange(N) % 3
    table = shared({"fold": fold}, count=3, **more)
    at_once = load_shares(table)
    assert len(at_once) == 3
    for one, other in zip(every(table), at_once, strict=True):
        assert (one.labels, one.shape, one.normalisation) == (other.labels, other.shape, other.normalisation)
        for part in ("train", "validation", "test"):
            np.testing.assert_array_equal(getattr(one, part).x, getattr(other, part).x)
            np.testing.assert_array_equal(getattr(one, part).y, getattr(other, part).y)
    with pytest.raises(DataError, match=r"mine\.npz: there is no group|mine\.npz: .*no array 'who'"):
        load_shares(shared(partition="by:who"))
    with pytest.raises(SettingsError, match="own data"):
        load_shares(DataSettings(kind="npz", path=Path("mine.npz")))


def test_the_name_counts_from_the_folder_of_the_data_sets(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows_of(load(shared(count=2)))
    assert rows_of(load(DataSettings(name="mine.npz", count=2, seed=5), tmp_path)) == whole
    assert rows_of(load(DataSettings(name="mine.npz", path=tmp_path, count=2, seed=5))) == whole
    monkeypatch.chdir(tmp_path)
    assert rows_of(load(DataSettings(name="mine.npz", count=2, seed=5))) == whole
    with pytest.raises(DataError, match=r"other/mine\.npz is not there: put the file there"):
        load(DataSettings(name="mine.npz"), tmp_path / "other")
    with pytest.raises(DataError, match=r"mine\.npz is not there"):
        load(DataSettings(name=str(tmp_path)[:-1] + "/mine.npz"))


def test_names_shape_channels_and_labels_are_those_asked_for(shared: Shared) -> None:
    images = np.zeros((N, 6, 4, 3), np.uint8)
    words = np.array(["rest", "wave", "tap"])[Y]
    found = shared(
        {"x": None, "y": None, "pixels": images, "gesture": words},
        x="pixels",
        y="gesture",
        channels="last",
        labels=("rest", "wave", "tap", "clap"),
    )
    data = load(found)
    assert (data.input, data.shape) == ("image", (3, 6, 4))
    assert data.labels == ("rest", "wave", "tap", "clap")
    flat = shared({"x": X.reshape(N, 8)}, shape=(4, 2))
    assert load(flat).shape == (4, 2)


def test_all_devices_agree_on_labels_that_only_some_have(shared: Shared) -> None:
    labels = np.where(PERSON == "ann", 0, np.where(np.arange(N) % 2, 1, 2))
    found = every(shared({"y": labels}, partition="by:person", count=4))
    assert {data.labels for data in found} == {("0", "1", "2")}


def test_a_segment_stays_on_one_device_and_in_one_part(shared: Shared) -> None:
    segment = np.arange(N) // 6
    found = shared({"run": segment, "y": segment % 3}, segment="run", count=3)
    places = {
        (int(segment[row]), device, part)
        for device, data in enumerate(every(found))
        for part, rows in enumerate(parts_of(data))
        for row in rows
    }
    assert len(places) == N // 6


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"partition": "by:person"},
        {"partition": "natural", "group": "person"},
        {"partition": "by:person", "group": "person"},
    ],
)
def test_a_person_is_a_device(shared: Shared, more: dict[str, Any]) -> None:
    found = [rows_of(data) for data in every(shared(count=4, **more))]
    assert found == [list(range(60 * i, 60 * i + 60)) for i in range(4)]
    fewer = [rows_of(data) for data in every(shared(count=2, limit=30, **more))]
    assert [len(rows) for rows in fewer] == [15, 15]
    assert max(fewer[0]) < 60 <= min(fewer[1])


def test_any_array_of_the_file_may_be_the_group(shared: Shared) -> None:
    assert [rows_of(d) for d in every(shared(partition="by:site", count=2))] == [
        list(range(120)),
        list(range(120, 240)),
    ]


@pytest.mark.parametrize(
    ("arrays", "more", "words"),
    [
        ({}, {"partition": "by:persons"}, "no array 'persons'; did you mean 'person'? There are"),
        ({}, {"group": "room"}, "no array 'room'. There are: person, site, x, y"),
        ({}, {"partition": "natural"}, "this data set has none: name the array of a .npz, as by:person"),
        ({}, {"partition": "by:person", "count": 5}, "'by:person' has 4 groups, too few for 5 devices"),
        ({"person": PERSON[:9]}, {"partition": "by:person"}, "has shape (9,): one value for each of 240"),
        ({}, {"partition": "by:x"}, "has shape (240, 4, 2): one value"),
        ({"person": Y + 0.5}, {"partition": "by:person"}, "whole numbers or text are needed"),
        ({"person": np.array([None] * N)}, {"partition": "by:person"}, "Python objects"),
        ({}, {"split": "fold"}, "has no array 'fold', only"),
        ({}, {"split": "person"}, "row 0 (from 0) is 'ann': 0 is training and 1 test"),
        ({"fold": Y + 1}, {"split": "fold"}, "row 2 (from 0) is '3'"),
        ({"fold": Y - 1}, {"split": "fold"}, "row 0 (from 0) is '-1'"),
        ({"fold": Y * 0}, {"split": "fold"}, "no row for the test part"),
        ({"fold": Y * 0 + 1}, {"split": "fold"}, "no row for the training part"),
        ({"fold": Y.astype(float)}, {"split": "fold"}, "whole numbers or text are needed"),
        ({"fold": Y[:5]}, {"split": "fold"}, "one value for each of 240 rows"),
        ({"fold": Y, "run": Y // 3}, {"split": "fold", "segment": "run"}, "tears segment 0 apart at row 1"),
        ({"run": np.arange(N) % 60}, {"segment": "run", "group": "person"}, "person tears segment 0 apart"),
        ({}, {"y": "z"}, "no array 'z', only x, y, person, site"),
    ],
)  # fmt: skip
def test_what_a_shared_file_lacks_is_said(
    shared: Shared, arrays: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        load(shared(arrays, **more))
    assert "mine.npz" in str(caught.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"name": "digits", "x": "pixels"}, "x: not a key of kind = 'builtin' with name = 'digits'"),
        ({"name": "uci-har", "group": "subject"}, "group: not a key .* only with that of a .npz file"),
        ({"name": "a.npz", "group": "person", "partition": "by:site"}, "give one of them"),
        ({"name": "a.npz", "split": "fold", "test": 0.2}, "says already what is tested on"),
        ({"kind": "npz", "path": "a.npz", "group": "person"}, "group: not a key of kind = 'npz'"),
    ],
)
def test_keys_that_do_not_belong_together_are_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataSettings(**more)


def test_a_key_that_is_none_is_not_given() -> None:
    assert DataSettings(name="digits", group=None, split=None, segment=None, labels=None).group is None


@pytest.mark.parametrize("name", ["digits"])
def test_by_another_group_names_the_one_there_is(name: str) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(DataError, match=r"digits: .*no group 'person'. There is none"):
        load(DataSettings(name=name, partition="by:person"))


# --- parts that the file says ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "meaning"),
    [
        ([0, 1], [TRAIN, TEST]),
        ([False, True], [TRAIN, TEST]),
        ([0, 1, 2], [TRAIN, VALIDATION, TEST]),
        ([0, 2], [TRAIN, TEST]),
        (["train", "test"], [TRAIN, TEST]),
        (["training", "val", "test"], [TRAIN, VALIDATION, TEST]),
        ([b"train", b"validation", b"test"], [TRAIN, VALIDATION, TEST]),
        (["0", "1"], [TRAIN, TEST]),
    ],
)
@pytest.mark.parametrize("partition", ["iid", "by:person", "dirichlet:0.5"])
def test_rows_are_in_the_part_that_the_file_says(
    shared: Shared, names: list[Any], meaning: list[int], partition: str
) -> None:
    which = RNG.integers(0, len(names), N)
    found = every(shared({"fold": np.array(names)[which]}, split="fold", partition=partition, count=4))
    for data in found:
        train, validation, test = parts_of(data)
        assert {meaning[which[row]] for row in test} == {TEST}
        if VALIDATION in meaning:
            assert {meaning[which[row]] for row in validation} == {VALIDATION}
            assert {meaning[which[row]] for row in train} == {TRAIN}
        else:
            assert {meaning[which[row]] for row in train + validation} == {TRAIN}
            assert len(validation) == pytest.approx(0.15 * len(train + validation), abs=2)
    assert sorted(chain(*map(rows_of, found))) == list(range(N))


RNG = np.random.default_rng(4)


def test_the_meaning_is_that_of_the_whole_file_on_every_device(shared: Shared) -> None:
    # Only one person has validation rows: for the others 1 still means validation, and they have none.
    fold = np.where(PERSON == "ann", np.arange(N) % 3, 2 * (np.arange(N) % 2))
    found = shared({"fold": fold}, split="fold", partition="by:person", count=4)
    assert len(load(found).validation) == 20
    with pytest.raises(DataError, match=r"none for the validation part; .* repair the array 'fold'"):
        load(found.model_copy(update={"index": 1}))
    with pytest.raises(
        DataError, match=r"devices 1, 2 and 3 without a sample in the validation part.*'fold'"
    ):
        partition_problems(found)
    less = shared({"fold": fold}, split="fold", partition="by:person", count=4, validation=0)
    assert [len(data.validation) for data in every(less)] == [20, 0, 0, 0]


def test_validation_is_not_torn_out_of_a_segment(shared: Shared) -> None:
    run = np.arange(N) // 6
    data = load(
        shared({"fold": (run % 4 == 3).astype(int), "run": run, "y": run % 3}, split="fold", segment="run")
    )
    parts = [{int(run[row]) for row in rows} for rows in parts_of(data)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == N // 6
    assert parts[2] == {one for one in range(N // 6) if one % 4 == 3}
    assert len(data.validation) == pytest.approx(0.15 * 180, abs=9)


def test_one_devices_own_file_takes_a_split_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=X, y=Y, fold=np.arange(N) % 4 == 0)
    train, validation, test = parts_of(
        load(DataSettings(kind="npz", path=tmp_path / "own.npz", split="fold"))
    )
    assert test == list(range(0, N, 4))
    assert len(validation) == 27
    assert len(train) == 153


def test_text_with_parts_and_people(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 5, (40, 9))
    person, fold = np.arange(40) // 20, np.arange(40) % 20 >= 15
    np.savez(tmp_path / "text.npz", x=ids[:, :-1], y=ids[:, 1:], person=person, fold=fold)
    table: dict[str, Any] = {"name": "text.npz", "partition": "by:person", "count": 2, "split": "fold"}
    data = load(DataSettings(**table, index=1), tmp_path)
    np.testing.assert_array_equal(data.test.x, ids[35:, :-1])
    # Text is in order: what comes last of the training rows is validated on.
    np.testing.assert_array_equal(data.validation.x, ids[33:35, :-1])
    said = partition_problems(DataSettings(**table), tmp_path, batch_size=4)
    assert said == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    n=st.sampled_from([1, 7, 40, 120, N]),
    partition=st.sampled_from(["iid", "natural", "by:g", "by:y", "pathological:1", "dirichlet:0.5"]),
    count=st.integers(1, 4),
    how=st.sampled_from(["plain", "split", "segment", "both"]),
)
def test_any_columns_give_shares_or_words_and_both_agree(
    tmp_path: Path, data: st.DataObject, n: int, partition: str, count: int, how: str
) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 999)))
    length = data.draw(st.sampled_from([1, 1, 2, 4]))
    run = np.arange(n) // length

    def column(most: int, *, torn: bool = False) -> Array:
        values = draw.integers(0, most + 1, n)
        return values if torn else values[run * length]

    fold = column(data.draw(st.integers(0, 3)), torn=data.draw(st.booleans()) and length < 4)
    arrays = {"y": column(2, torn=data.draw(st.booleans())), "g": column(data.draw(st.integers(0, 3)))}
    np.savez(tmp_path / "any.npz", x=X[:n], fold=fold, run=run, **arrays)
    more = {"split": "fold"} if how in ("split", "both") else {}
    more |= {"segment": "run"} if how in ("segment", "both") else {}
    table = DataSettings(
        name="any.npz",
        partition=partition,
        count=count,
        group="g" if partition == "natural" else None,
        **more,
    )
    refused = refusal(table, tmp_path)
    if refused is not None:
        assert re.search(r"device|any\.npz|pathological:1", refused)
        return
    # What is not refused beforehand works on every device.
    shares = every(table, tmp_path)
    rows = [*chain(*map(rows_of, shares))]
    assert len(rows) == len(set(rows))
    if "split" in more:
        meaning = [TRAIN, VALIDATION, TEST] if fold.max() == 2 else [TRAIN, TEST]
        for one in shares:
            assert all(meaning[fold[row]] == TEST for row in parts_of(one)[2])
            assert not any(meaning[fold[row]] == TEST for row in parts_of(one)[0] + parts_of(one)[1])
    if "segment" in more:
        where = {
            row: (i, part)
            for i, one in enumerate(shares)
            for part in (0, 1, 2)
            for row in parts_of(one)[part]
        }
        assert len({(run[row], place) for row, place in where.items()}) == len({run[row] for row in where})


# --- problems, before anything runs ---------------------------------------------------------------


def test_shares_that_work_have_no_problems(shared: Shared) -> None:
    assert partition_problems(shared(count=2)) == []
    assert partition_problems(shared(partition="by:person", count=4), batch_size=16) == []
    assert partition_problems(DataSettings(kind="csv", path=Path("mine.csv"))) == []


def test_devices_with_less_than_two_batches_are_warned_of_by_number(shared: Shared) -> None:
    people = np.repeat(["a", "b", "c"], [100, 20, 120])
    said = partition_problems(shared({"person": people}, partition="by:person", count=3))
    (few,) = said
    assert "fewer than 64 training samples, two batches of 32, on devices 0 and 1" in few
    assert "the fewest: 12 on device 1" in few
    assert "fewer devices, more samples (a larger limit) or another partition" in few
    data = every(shared({"person": people}, partition="by:person", count=3))
    assert [d.examples < 64 for d in data] == [True, True, False]
    assert partition_problems(shared({"person": people}, partition="by:person", count=3), batch_size=6) == []


@pytest.mark.parametrize(
    ("arrays", "more", "words"),
    [
        (
            {"person": np.repeat(["a", "b", "c"], [237, 1, 2])},
            {"partition": "by:person", "count": 3},
            "'by:person' leaves devices 1 and 2 without a sample in the validation part: use fewer devices",
        ),
        (
            {"person": np.repeat(["a", "b"], [238, 2]), "fold": np.arange(N) >= 200},
            {"partition": "by:person", "count": 2, "split": "fold"},
            "device 1 without a sample in the training part: .* or leave split out",
        ),
        (
            {"y": np.repeat([0, 1, 2], [230, 9, 1])},
            {"partition": "pathological:2", "count": 6},
            r"class 2 has 1 samples for 4 devices, so that devices \d, \d and \d would be without it:"
            " use fewer devices, a larger limit, or fewer classes each",
        ),
        (
            {"fold": (Y == 2) | (np.arange(N) % 4 == 0)},
            {"partition": "pathological:2", "count": 3, "split": "fold"},
            r"pathological:2 leaves devices \d and \d with fewer than 2 classes to train on",
        ),
        ({}, {"limit": 3, "count": 4}, r"3 samples .* cannot be shared among 4 devices: use at most 3, or"),
        ({"y": Y * 0}, {}, "only the label"),
    ],
)
def test_shares_that_cannot_work_name_the_device_and_the_remedy(
    shared: Shared, arrays: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        partition_problems(shared(arrays, **more))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"partition": "by:who"}, "no array 'who'"),
        ({"partition": "natural"}, "this data set has none"),
        ({"partition": "by:site", "count": 9}, "2 groups, too few for 9 devices: use at most 2"),
        ({"partition": "pathological:4"}, "more classes than the 3 there are: use pathological:3 or less"),
    ],
)
def test_a_partition_that_does_not_fit_the_data_is_a_wrong_setting(
    shared: Shared, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=rf"mine\.npz: .*{words}"):
        partition_problems(shared(**more))


def test_a_class_that_is_tested_but_not_trained_is_warned_of(shared: Shared) -> None:
    fold = ((np.arange(N) % 4 == 0) | ((Y == 2) & (PERSON == "bob"))).astype(int)
    said = partition_problems(
        shared({"fold": fold}, split="fold", partition="by:person", count=4), batch_size=8
    )
    assert said == [
        "class '2' is tested but not trained on device 1: use fewer devices, more samples (a larger limit) or"
        " another partition, repair the array 'fold', or leave split out"
    ]


def test_a_class_that_nobody_has_is_warned_of(shared: Shared) -> None:
    (said,) = partition_problems(shared(partition="pathological:1", count=2), batch_size=8)
    (nobody,) = {0, 1, 2} - {
        int(label)
        for data in every(shared(partition="pathological:1", count=2))
        for label in np.unique(data.train.y)
    }
    assert said == f"no device has samples of class {nobody}"


def test_problems_are_found_without_reading_samples(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    table = shared(partition="by:person", count=4)
    read: list[str] = []
    blocks = files.Archive.blocks
    monkeypatch.setattr(files.Archive, "blocks", lambda self, key: (read.append(key), blocks(self, key))[1])
    partition_problems(table)
    assert sorted(read) == ["person", "y"]


def test_the_misspelt_data_set_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'fashion-mnist'"):
        partition_problems(DataSettings(name="fashon-mnist"), tmp_path)
