"""A user's own data: read as they are, or refused in words that say where and what to do."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.datasets import DataSettings, LocalData, load
from foundation.errors import DataError
from foundation.parameters import Array

RNG = np.random.default_rng(0)
Y = np.arange(60) % 3


def everything(data: LocalData) -> tuple[Array, Array]:
    parts = (data.train, data.validation, data.test)
    return np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts])


def refusal(settings: DataSettings) -> str | None:
    """Return why data cannot be loaded; any error but `DataError` comes through."""
    try:
        load(settings)
    except DataError as error:
        return str(error)
    return None


# --- npz ------------------------------------------------------------------------------------------


def npz(tmp_path: Path, more: dict[str, Any] | None = None, **arrays: Any) -> LocalData:
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, **arrays)
    return load(DataSettings(kind="npz", path=path, **(more or {})))


def test_npz_of_series(tmp_path: Path) -> None:
    x = RNG.normal(size=(60, 8, 2))
    data = npz(tmp_path, x=x, y=Y)
    assert (data.input, data.shape, data.labels) == ("series", (8, 2), ("0", "1", "2"))
    got, y = everything(data)
    assert got.dtype == np.float32
    by_value = {float(np.float32(row[0, 0])): label for row, label in zip(x, Y, strict=True)}
    assert [by_value[float(row[0, 0])] for row in got] == y.tolist()
    assert len(data.train) == data.examples == 36


def test_npz_of_images(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (60, 6, 4, 3), dtype=np.uint8)
    last = npz(tmp_path, {"channels": "last"}, x=x, y=Y)
    assert (last.input, last.shape) == ("image", (3, 6, 4))
    assert last.train.x.dtype == np.uint8
    first = npz(tmp_path, x=x.transpose(0, 3, 1, 2).copy(), y=Y)
    np.testing.assert_array_equal(first.test.x, last.test.x)
    gray = npz(tmp_path, {"shape": (1, 6, 4)}, x=x[..., 0].copy(), y=Y)
    np.testing.assert_array_equal(gray.train.x[:, 0], first.train.x[:, 0])


def test_npz_with_names_of_its_own(tmp_path: Path) -> None:
    names = np.array(["walk", "rest", "run"])[Y]
    more = {"x": "signal", "y": "state", "labels": ("rest", "walk", "run")}
    data = npz(tmp_path, more, signal=RNG.normal(size=(60, 8, 2)), state=names)
    assert data.labels == ("rest", "walk", "run")
    assert np.bincount(data.train.y).tolist() == [12, 12, 12]
    assert npz(tmp_path, x=np.zeros((60, 3)), y=names).labels == ("rest", "run", "walk")


def test_npz_numbers_are_places_among_names_unless_names_are_numbers(tmp_path: Path) -> None:
    x = np.zeros((60, 3), np.float32)
    x[:, 0] = Y
    data = npz(tmp_path, {"labels": ("a", "b", "c", "d")}, x=x, y=Y)
    assert data.train.x[:, 0, 0].tolist() == data.train.y.tolist()
    data = npz(tmp_path, {"labels": ("2", "1", "0")}, x=x, y=Y.astype(np.float64))
    assert data.train.x[:, 0, 0].tolist() == (2 - data.train.y).tolist()


def test_npz_of_text(tmp_path: Path) -> None:
    ids = RNG.integers(0, 5, (20, 9))
    data = npz(tmp_path, {"labels": tuple("abcde")}, x=ids[:, :-1], y=ids[:, 1:])
    assert (data.input, data.shape, data.classes) == ("text", (8,), 5)
    np.testing.assert_array_equal(data.train.x, ids[:12, :-1])
    assert data.train.y.dtype == np.int64


def test_npz_keeps_overlapping_windows_together(tmp_path: Path) -> None:
    x = np.repeat(np.arange(60.0) // 5, 4).reshape(60, 4, 1)
    data = npz(tmp_path, {"segment": "run"}, x=x, y=np.arange(60) // 5 % 2, run=np.arange(60) // 5)
    parts = [set(part.x[:, 0, 0].tolist()) for part in (data.train, data.validation, data.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 12


@pytest.mark.parametrize(
    ("more", "arrays", "words"),
    [
        ({}, {"x": np.zeros((0, 4, 1)), "y": Y[:0]}, "empty"),
        ({}, {"x": np.zeros((60, 4, 1)), "y": Y[:50]}, "x has 60 rows and y has 50"),
        ({}, {"x": np.zeros((60, 4, 1)), "z": Y}, "no array 'y', only x, z"),
        ({}, {"x": np.zeros((60, 2, 2, 2, 2)), "y": Y}, "set shape and channels"),
        ({"shape": (3, 3)}, {"x": np.zeros((60, 4, 1)), "y": Y}, r"samples of shape \(4, 1\).*not \(3, 3\)"),
        ({"shape": (5,)}, {"x": np.zeros((60, 5)), "y": Y}, "set shape and channels"),
        ({}, {"x": np.zeros((60, 0, 3)), "y": Y}, "set shape and channels"),
        ({}, {"x": np.zeros(60), "y": Y}, "set shape and channels"),
        ({}, {"x": np.array(3), "y": Y}, "empty"),
        ({}, {"x": np.zeros((60, 4, 1), complex), "y": Y}, "not numbers"),
        ({}, {"x": np.array(["a"] * 60), "y": Y}, "not numbers"),
        ({}, {"x": np.zeros((60, 4, 1)), "y": np.array(5)}, "single value"),
        ({}, {"x": np.zeros((60, 4, 1)), "y": Y + 0.5}, "not whole numbers or text"),
        ({}, {"x": np.zeros((60, 4, 1)), "y": np.where(Y == 1, np.nan, Y)}, "not whole numbers or text"),
        ({}, {"x": np.zeros((60, 4, 1)), "y": Y - 1}, "row 0 .* has label -1"),
        ({}, {"x": np.zeros((60, 4, 1)), "y": np.where(Y == 1, 10**9, Y)}, "row 1 .* has label 1000000000"),
        ({"labels": ("a", "b")}, {"x": np.zeros((60, 4, 1)), "y": Y}, r"row 2 .*unknown label '2'.* a, b"),
        ({"labels": ("a", "b")}, {"x": np.zeros((60, 4)), "y": np.array(["a", "c"] * 30)}, "row 1 .*'c'"),
        ({}, {"x": np.zeros((60, 4, 1)), "y": np.zeros(60, int)}, "at least two"),
        ({}, {"x": np.zeros((60, 4, 1)), "y": np.eye(3)[Y]}, "a label for every step means text"),
        ({"labels": ("a", "b")}, {"x": np.ones((9, 4), int), "y": np.full((9, 4), 2)}, "id outside 0 to 1"),
        ({"segment": "s"}, {"x": np.zeros((60, 4)), "y": Y, "s": np.zeros((60, 2))}, "one value for each"),
        ({}, {"x": np.zeros((60, 4), order="F"), "y": Y}, "ascontiguousarray"),
        ({}, {"x": np.zeros((60, 4), "datetime64[s]"), "y": Y}, "not numbers"),
        ({}, {"x": np.array([None] * 60), "y": Y}, "Python objects"),
    ],
)  # fmt: skip
def test_npz_that_cannot_be_used(
    tmp_path: Path, more: dict[str, Any], arrays: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        npz(tmp_path, more, **arrays)
    assert "mine.npz" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_value_that_is_not_finite_is_named_by_its_row(tmp_path: Path, value: float) -> None:
    x = np.zeros((60, 4, 1))
    x[41, 2] = value
    with pytest.raises(DataError, match=r"sample 41 .*not finite"):
        npz(tmp_path, x=x, y=Y)


def test_a_file_that_is_not_there_or_not_an_archive(tmp_path: Path) -> None:
    for kind in ("npz", "csv", "image_folder"):
        with pytest.raises(DataError, match=r"gone.*not there|gone is not a folder"):
            load(DataSettings(kind=kind, path=tmp_path / "gone"))
    (tmp_path / "junk").write_bytes(b"PK junk")
    with pytest.raises(DataError, match="junk cannot be read"):
        load(DataSettings(kind="npz", path=tmp_path / "junk"))
    with pytest.raises(DataError, match="cannot be read"):
        load(DataSettings(kind="csv", path=tmp_path))


def archive() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.zeros((12, 4, 1), np.float32), y=np.arange(12) % 2)
    return stream.getvalue()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_archive_never_gives_another_error(
    tmp_path: Path, place: float, byte: int, *, cut: bool
) -> None:
    data = bytearray(archive())
    i = min(int(place * len(data)), len(data) - 1)
    data[i] = byte
    path = tmp_path / "damaged.npz"
    path.write_bytes(data[:i] if cut else data)
    words = refusal(DataSettings(kind="npz", path=path))
    assert words is None or "damaged.npz" in words


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(head=st.text("{}()'descrfotanhp_ :,<|>0123456789x[]-TrueFalse\n", max_size=80))
def test_any_header_in_an_archive_is_read_or_refused(tmp_path: Path, head: str) -> None:
    path = tmp_path / "odd.npz"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("x", "y"):
            raw = head.encode()
            file.writestr(f"{name}.npy", b"\x93NUMPY\1\0" + len(raw).to_bytes(2, "little") + raw + bytes(32))
    with pytest.raises(DataError, match=r"odd\.npz"):
        load(DataSettings(kind="npz", path=path))


# --- csv ------------------------------------------------------------------------------------------

Csv = Callable[..., LocalData]


@pytest.fixture
def csv(tmp_path: Path) -> Csv:
    def write(text: str, **more: Any) -> LocalData:
        path = tmp_path / "mine.csv"
        path.write_text(text, encoding="utf-8")
        return load(DataSettings(kind="csv", path=path, **more))

    return write


ROWS = "".join(f"{i},{i + 0.5},{'up' if i % 2 else 'down'}\n" for i in range(20))


def test_csv_without_header(csv: Csv) -> None:
    data = csv(ROWS)
    assert (data.input, data.shape, data.labels) == ("series", (1, 2), ("down", "up"))
    x, y = everything(data)
    assert sorted(x[:, 0, 0].tolist()) == list(range(20))
    assert [int(a) % 2 for a in x[:, 0, 0]] == y.tolist()
    np.testing.assert_array_equal(x[:, 0, 1], x[:, 0, 0] + 0.5)


def test_csv_with_header_columns_and_order_of_labels(csv: Csv) -> None:
    text = "\ufeffid,label,b,a\n" + "".join(f"{i},{i % 2},{-i},{i}\n" for i in range(20))
    data = csv(text, columns=("a", "b"), labels=("even", "odd"))
    x, y = everything(data)
    np.testing.assert_array_equal(x[:, 0, 1], -x[:, 0, 0])
    assert [int(a) % 2 for a in x[:, 0, 0]] == y.tolist()
    assert data.labels == ("even", "odd")
    assert csv(text).shape == (1, 3)
    assert csv(text, label=1, header=True, columns=(3,)).shape == (1, 1)


def test_csv_with_shape_delimiter_blank_lines_and_numbers_as_labels(csv: Csv) -> None:
    text = "".join(f"{10 if i % 2 else 9};1;2;3;{i}\n\n" for i in range(20))
    data = csv(text, delimiter=";", label=0, shape=(1, 2, 2))
    assert (data.input, data.shape, data.labels) == ("image", (1, 2, 2), ("9", "10"))
    assert csv(text, delimiter=";", label=0, shape=(2, 2)).input == "series"


def test_csv_keeps_segments_together(csv: Csv) -> None:
    text = "a,run,label\n" + "".join(f"{i // 5},r{i // 5},{i // 5 % 2}\n" for i in range(60))
    data = csv(text, segment="run")
    parts = [set(part.x.ravel().tolist()) for part in (data.train, data.validation, data.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 12
    assert data.shape == (1, 1)


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("", {}, "mine.csv is empty"),
        ("\n\n", {}, "mine.csv is empty"),
        ("a,b,label\n", {}, "no rows"),
        (ROWS + "7,up\n", {}, "row 21 has 2 cells, the first has 3"),
        (ROWS + "7,nan,up\n", {}, "row 21, column 1: 'nan' is not a finite number"),
        (ROWS + "inf,7,up\n", {}, "row 21, column 0: 'inf'"),
        ("x,y,label\n" + ROWS + "7,seven,up\n", {}, "row 22, column y: 'seven'"),
        (ROWS + "7,,up\n", {}, "row 21, column 1: ''"),
        (ROWS + "7,7,\n", {}, "row 21 has no label"),
        (ROWS + "7,1e300,up\n", {}, "not finite"),
        (ROWS + "7,7,sideways\n", {"labels": ("up", "down")}, "row 21: unknown label 'sideways'"),
        ("x,y,z\n" + ROWS, {"label": "state"}, "no column 'state'; its columns are x, y, z"),
        (ROWS, {"label": 3}, "no column 3; its columns are 0 to 2"),
        (ROWS, {"label": "state", "header": False}, "without names"),
        (ROWS, {"shape": (3, 1)}, r"samples of shape \(2,\)"),
        (ROWS, {"columns": (0, 2)}, "not the label's"),
        ("up\ndown\n", {"header": False}, "at least one column"),
        (ROWS.replace("up", "down"), {}, "at least two"),
        ("1,2,a\n3,4,b\n", {}, "leave none for the"),
        ('1,"2,a\n' * 3, {}, "row 2, column 1: '2,a"),
        ("1,2,a\0\n", {}, "at least two|cannot be read"),
    ],
)
def test_csv_that_cannot_be_used(csv: Csv, text: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        csv(text, **more)
    assert "mine.csv" in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text('0123456789.,\n"-einfa', max_size=200).map(str.encode))
def test_any_bytes_are_a_table_or_an_error_in_words(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any.csv"
    path.write_bytes(data)
    words = refusal(DataSettings(kind="csv", path=path, test=0, validation=0))
    assert words is None or "any.csv" in words


# --- images ---------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    for name, level in (("cat", 200), ("dog", 50)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.full((6, 8, 3), level + i, np.uint8)
            pixels[..., 2] = 0
            image.fromarray(pixels).save(tmp_path / "pets" / name / f"{i}.png")
        (tmp_path / "pets" / name / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / ".hidden").mkdir()
    return tmp_path / "pets"


def test_a_folder_of_images(pictures: Path) -> None:
    data = load(DataSettings(kind="image_folder", path=pictures))
    assert (data.input, data.shape, data.labels) == ("image", (3, 6, 8), ("cat", "dog"))
    x, y = everything(data)
    assert x.dtype == np.uint8
    assert [int(image[0, 0, 0]) < 100 for image in x] == y.astype(bool).tolist()
    assert not x[:, 2].any()
    small = load(DataSettings(kind="image_folder", path=pictures, size=(4, 2), grayscale=True))
    assert small.shape == (1, 4, 2)
    turned = load(DataSettings(kind="image_folder", path=pictures, labels=("dog", "cat", "bird")))
    assert turned.labels == ("dog", "cat", "bird")
    assert len(turned.train) == 12


def test_a_folder_of_images_that_cannot_be_used(pictures: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(DataError, match=r"dog: unknown label 'dog'"):
        load(DataSettings(kind="image_folder", path=pictures, labels=("cat", "cow")))
    image.new("RGB", (9, 9)).save(pictures / "dog" / "z.png")
    with pytest.raises(DataError, match=r"z.png is \(9, 9\) pixels, .*0.png is \(6, 8\): set size"):
        load(DataSettings(kind="image_folder", path=pictures))
    assert load(DataSettings(kind="image_folder", path=pictures, size=(6, 8))).shape == (3, 6, 8)
    whole = (pictures / "dog" / "0.png").read_bytes()
    for damage in (b"", b"no image", whole[: len(whole) // 2], whole[:30]):
        (pictures / "dog" / "z.png").write_bytes(damage)
        with pytest.raises(DataError, match=r"z.png cannot be read"):
            load(DataSettings(kind="image_folder", path=pictures, size=(6, 8)))
    (tmp_path / "none" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="no images in a"):
        load(DataSettings(kind="image_folder", path=tmp_path / "none"))
    with pytest.raises(DataError, match="is empty"):
        load(DataSettings(kind="image_folder", path=tmp_path / "none" / "a"))


# --- python ---------------------------------------------------------------------------------------

MODULE = """
import numpy as np
from edge_agent.datasets import DataSettings, load

def pair():
    return np.zeros((20, 4, 1)), np.arange(20) % 2

def table():
    return {"x": np.zeros((20, 4, 1)), "y": ["a", "b"] * 10, "labels": ["b", "a"], "segment": list(range(20))}

def whole():
    return load(DataSettings(kind="python", function=__name__ + ":pair"))

def fails():
    raise RuntimeError("the sensor is unplugged")

def nothing():
    return None

def odd():
    return {"x": [1], "why": 2, "y": 3}

def flat():
    return np.zeros(20), np.arange(20) % 2

def ragged():
    return [[1], [1, 2]], [0, 1]

not_a_function = 3
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    name = f"of_the_user_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import of_nobody_at_all")
    return name


def test_a_function_of_the_user(tmp_path: Path, module: str) -> None:
    before = list(sys.path)
    pair = load(DataSettings(kind="python", function=f"{module}:pair", path=tmp_path))
    assert (pair.shape, pair.labels) == ((4, 1), ("0", "1"))
    table = load(DataSettings(kind="python", function=f"{module}.table", path=tmp_path))
    assert table.labels == ("b", "a")
    named = load(DataSettings(kind="python", function=f"{module}:pair", path=tmp_path, labels=("n", "y")))
    assert named.labels == ("n", "y")
    whole = load(DataSettings(kind="python", function=f"{module}:whole", path=tmp_path))
    np.testing.assert_array_equal(whole.train.y, pair.train.y)
    assert sys.path == before


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("{}:fails", "RuntimeError: the sensor is unplugged"),
        ("{}:nothing", "returned NoneType; it should return"),
        ("{}:odd", "returned dict; it should return"),
        ("{}:flat", r"returned x of shape \(20,\)"),
        ("{}:ragged", "cannot be arrays"),
        ("{}:missing", "has no function missing"),
        ("{}:not_a_function", "has no function not_a_function"),
        ("{}_broken:load", "of_nobody_at_all"),
        ("of_nobody:load", "of_nobody"),
        ("load", "should read module:function"),
    ],
)
def test_a_function_that_cannot_be_used(tmp_path: Path, module: str, function: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load(DataSettings(kind="python", function=function.format(module), path=tmp_path))
