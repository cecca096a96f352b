"""What must hold for every built-in data set: shares are disjoint and cover, and data are what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_agent.datasets import BUILTIN, DataSettings, LocalData, load, own_rows, partition_problems
from edge_agent.samples import split
from foundation.errors import DataError
from foundation.parameters import Array
from foundation.spec import ModelSpec
from foundation.words import devices

GROUPED = {"uci-har": 30, "shakespeare": 141}
GROUP = {"uci-har": "subject", "shakespeare": "role"}
EVERY = [pytest.param(name, marks=() if name == "digits" else pytest.mark.data) for name in sorted(BUILTIN)]


@pytest.fixture
def folder(request: pytest.FixtureRequest, name: str) -> Path:
    """The data sets' folder; digits come with scikit-learn and need none."""
    if name == "digits":
        pytest.importorskip("sklearn")
        return Path("nowhere")
    found: Path = request.getfixturevalue("data_dir")
    return found


def partitions(name: str) -> list[tuple[str, int]]:
    common = [("iid", 7), ("pathological:2", 8), ("dirichlet:0.3", 7)]
    if name == "shakespeare":
        common[1] = ("pathological:50", 7)
    return common + [("natural", groups) for data, groups in GROUPED.items() if data == name]


def settings_of(name: str, partition: str, count: int, index: int = 0, **more: object) -> DataSettings:
    table = {"name": name, "partition": partition, "count": count, "index": index, "seed": 3, **more}
    return DataSettings.model_validate(table)


@pytest.mark.parametrize("name", EVERY)
def test_shares_are_disjoint_cover_and_repeat(name: str, folder: Path) -> None:
    for partition, count in partitions(name):
        source = BUILTIN[name](folder, settings_of(name, partition, count))
        shares = [own_rows(source, settings_of(name, partition, count, index)) for index in range(count)]
        assert sorted(np.concatenate(shares).tolist()) == list(range(len(source.classes)))
        settings = settings_of(name, partition, count)
        again = own_rows(BUILTIN[name](folder, settings), settings)
        np.testing.assert_array_equal(shares[0], again)
        if source.segments is not None:
            owners = np.empty(len(source.classes), int)
            for index, rows in enumerate(shares):
                owners[rows] = index
            assert torn(source.segments, owners) == 0


@pytest.mark.parametrize("name", EVERY)
def test_shares_are_looked_at_as_they_will_be(name: str, folder: Path) -> None:
    # Segments of UCI HAR leave no room for three parts in so small a share.
    limit = None if name == "uci-har" else 1700
    for partition, count in (*partitions(name)[:2], ("iid", 20)):
        settings = settings_of(name, partition, count, limit=limit)
        said = [line for line in partition_problems(settings, folder, 40) if "two batches of 40" in line]
        source = BUILTIN[name](folder, settings)
        shares = (own_rows(source, settings_of(name, partition, count, i, limit=limit)) for i in range(count))
        trained = [len(split(source, rows, settings)[0]) for rows in shares]
        few = [device for device, number in enumerate(trained) if number < 80]
        assert len(said) == bool(few)
        if few:
            assert f"on {devices(few)} (the fewest: {min(trained)} on" in said[0]
    assert few or name == "uci-har"


@pytest.mark.parametrize("name", EVERY)
def test_by_its_group_is_natural_and_by_another_is_refused(name: str, folder: Path) -> None:
    if name not in GROUP:
        with pytest.raises(DataError, match=r"no group 'subject'. There is none"):
            load(settings_of(name, "by:subject", 3), folder)
        return
    source = BUILTIN[name](folder, settings_of(name, "natural", 5))
    for index in range(5):
        natural = own_rows(source, settings_of(name, "natural", 5, index, limit=900))
        by = own_rows(source, settings_of(name, f"by:{GROUP[name]}", 5, index, limit=900))
        np.testing.assert_array_equal(natural, by)
        assert source.groups is not None
        assert len(np.unique(source.groups[by])) == 1
    with pytest.raises(DataError, match=rf"no group 'person'.*There are: {GROUP[name]}"):
        load(settings_of(name, "by:person", 3), folder)


@pytest.mark.parametrize("name", EVERY)
def test_the_limit_is_kept_over_all_devices_and_classes(name: str, folder: Path) -> None:
    source = BUILTIN[name](folder, settings_of(name, "iid", 5))
    every = [settings_of(name, "iid", 5, index, limit=900) for index in range(5)]
    rows = np.concatenate([own_rows(source, settings) for settings in every])
    assert len(rows) == len(np.unique(rows)) == 900
    counts = np.bincount(source.classes[rows])
    assert counts.min() >= min(np.bincount(source.classes).min(), 900 // len(counts))
    assert counts.max() <= -(-900 // len(counts)) + 1 or name == "shakespeare"


@pytest.mark.parametrize("name", EVERY)
def test_local_data_are_consistent(name: str, folder: Path) -> None:
    partition = "natural" if name in GROUPED else "dirichlet:0.5"
    settings = settings_of(name, partition, 10, 2, limit=4000)
    data = load(settings, folder)
    check(data)
    again = load(settings, folder)
    for part in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(data, part).x, getattr(again, part).x)
        np.testing.assert_array_equal(getattr(data, part).y, getattr(again, part).y)
    other = load(settings_of(name, partition, 10, 3, limit=4000), folder)
    assert other.labels == data.labels
    assert other.shape == data.shape
    # One array, three views of it: the share is in memory once.
    assert data.train.x.base is data.test.x.base is not None


def check(data: LocalData) -> None:
    patch = 1 if data.input == "text" else 4
    spec = ModelSpec(input=data.input, shape=data.shape, classes=data.classes, patch=patch)
    assert spec.tokens > 1
    for part in (data.train, data.validation, data.test):
        assert part.x.shape == (len(part), *data.shape)
        assert part.x.dtype == np.int64 if data.input == "text" else part.x.dtype in (np.uint8, np.float32)
        assert part.y.dtype == np.int64
        assert part.y.shape == ((len(part), *data.shape) if data.input == "text" else (len(part),))
        assert 0 <= part.y.min() <= part.y.max() < data.classes
    total = sum(map(len, (data.train, data.validation, data.test)))
    assert data.examples == len(data.train)
    assert abs(len(data.test) / total - 0.25) < 0.1
    assert abs(len(data.validation) / total - 0.15) < 0.1
    if data.input == "text":
        np.testing.assert_array_equal(data.train.x[:, 1:], data.train.y[:, :-1])
        assert data.normalisation.mean == ()
    else:
        seen = data.normalisation.apply(data.train.x, data.input)
        channel = 1 if data.input == "image" else 2
        axes = tuple(i for i in range(seen.ndim) if i != channel)
        np.testing.assert_allclose(seen.mean(axis=axes), 0, atol=1e-2)
        np.testing.assert_allclose(seen.std(axis=axes), 1, atol=1e-2)


@pytest.mark.data
def test_no_segment_of_a_person_is_in_two_parts(data_dir: Path) -> None:
    for partition, count in (("natural", 30), ("iid", 4)):
        for index in range(0, count, 3):
            settings = settings_of("uci-har", partition, count, index)
            source = BUILTIN["uci-har"](data_dir, settings)
            rows = own_rows(source, settings)
            parts = split(source, rows, settings)
            assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
            assert source.segments is not None
            labelled = np.repeat([0, 1, 2], [len(part) for part in parts])
            assert torn(source.segments[np.concatenate(parts)], labelled) == 0
            assert len(np.unique(source.classes[parts[0]])) == len(np.unique(source.classes[rows]))
            assert 0.15 < len(parts[2]) / len(rows) < 0.35


@pytest.mark.data
def test_a_person_is_a_device(data_dir: Path) -> None:
    settings = settings_of("uci-har", "natural", 30, 4)
    source = BUILTIN["uci-har"](data_dir, settings)
    assert source.groups is not None
    assert np.unique(source.groups[own_rows(source, settings)]).tolist() == [5]
    limited = own_rows(source, settings_of("uci-har", "natural", 5, 4, limit=500))
    assert np.unique(source.groups[limited]).tolist() == [5]
    assert len(limited) == pytest.approx(100, abs=10)


@pytest.mark.data
def test_text_is_tested_on_what_comes_last(data_dir: Path) -> None:
    settings = settings_of("shakespeare", "natural", 141, 7, window=32)
    source = BUILTIN["shakespeare"](data_dir, settings)
    train, validation, test = split(source, own_rows(source, settings), settings)
    assert train.max() < validation.min() <= validation.max() < test.min()
    data = load(settings, data_dir)
    text = "".join(data.labels[i] for i in data.train.x[0])
    assert text.isascii()
    assert " " in text
    assert data.shape == (32,)


@pytest.mark.data
def test_shakespeare_has_the_known_roles(data_dir: Path) -> None:
    source = BUILTIN["shakespeare"](data_dir, settings_of("shakespeare", "iid", 1))
    assert source.groups is not None
    names, windows = np.unique(source.groups, return_counts=True)
    assert len(names) == 141
    assert names[windows.argmax()] == "GLOUCESTER"
    # 37,405 characters of speech and 210 line ends between its 211 speeches.
    assert windows.max() == (37_405 + 210 - 1) // 64
    assert len(source.labels) == 65


def torn(segments: Array, parts: Array) -> int:
    """Return how many segments lie in more than one part."""
    return sum(len(np.unique(parts[segments == one])) > 1 for one in np.unique(segments))


def test_a_wrong_name_or_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set 'minst'; did you mean 'mnist'\? There are: cifar10"):
        load(DataSettings(name="minst"), tmp_path)
    with pytest.raises(DataError, match="HEDGEROW_DATA"):
        load(DataSettings(name="mnist"))
    for name in sorted(set(BUILTIN) - {"digits"}):
        with pytest.raises(DataError, match=r"is not there: (download|unpack) https?://"):
            load(DataSettings(name=name), tmp_path)
