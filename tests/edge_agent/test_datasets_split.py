"""Shares become three parts: by class, by segment, in order; and IDX files are not believed."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.datasets import BUILTIN, DataSettings, load
from edge_agent.samples import TEST, TRAIN, VALIDATION, Source, deal, gather, local_data, split
from edge_agent.sources import npz
from foundation.errors import DataError
from foundation.normalisation import Normalisation
from foundation.parameters import Array


def source_of(classes: Array, segments: Array | None = None, *, ordered: bool = False) -> Source:
    def read(rows: Array) -> tuple[Array, Array]:
        return np.repeat(rows.astype(np.float32), 2).reshape(-1, 2, 1), classes[rows]

    names = tuple(map(str, range(int(classes.max(initial=0)) + 1)))
    return Source("toy", "series", (2, 1), names, classes, read, segments=segments, ordered=ordered)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.integers(0, 9))
def test_rows_are_split_within_every_class(classes: list[int], seed: int) -> None:
    y = np.array(classes)
    parts = split(source_of(y), np.arange(len(y)), DataSettings(split_seed=seed))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(y)))
    assert np.unique(y[parts[TRAIN]]).tolist() == np.unique(y).tolist()
    for part, fraction in ((VALIDATION, 0.15), (TEST, 0.25)):
        for value in np.unique(y):
            assert abs((y[parts[part]] == value).sum() - fraction * (y == value).sum()) < 2.5
        # Where every class is large enough to give, the whole is right to half a sample.
        if np.bincount(y)[np.unique(y)].min() >= 8:
            assert abs(len(parts[part]) - fraction * len(y)) <= 0.5 + 1e-9


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=60), st.integers(0, 9))
def test_a_segment_is_never_torn(pieces: list[tuple[int, int]], seed: int) -> None:
    y = np.concatenate([np.full(size, value) for value, size in pieces])
    segments = np.concatenate([np.full(size, i * 7 - 3) for i, (_, size) in enumerate(pieces)])
    parts = split(source_of(y, segments), np.arange(len(y)), DataSettings(split_seed=seed))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(y)))
    seen = [set(segments[part].tolist()) for part in parts]
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]
    assert np.unique(y[parts[TRAIN]]).tolist() == np.unique(y).tolist()


def test_segments_come_near_the_fractions() -> None:
    y = np.repeat(np.arange(4), 400)
    parts = split(source_of(y, np.arange(1600) // 10), np.arange(1600), DataSettings())
    np.testing.assert_allclose([len(part) / 1600 for part in parts], [0.6, 0.15, 0.25], atol=0.02)


def test_the_same_seed_splits_the_same_way() -> None:
    y = np.arange(100) % 3
    first, again, other = (
        split(source_of(y), np.arange(100), DataSettings(split_seed=seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    assert not np.array_equal(np.concatenate(first), np.concatenate(other))


def test_deal_keeps_pace() -> None:
    parts = deal([1] * 100, (0.6, 0.15, 0.25))
    assert parts[:2] == [TRAIN, TEST]
    for so_far in range(8, 101):
        counts = np.bincount(parts[:so_far], minlength=3)
        np.testing.assert_allclose(counts, [0.6 * so_far, 0.15 * so_far, 0.25 * so_far], atol=1.01)


def test_parts_without_a_sample_are_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match=r"toy: 2 samples on this device leave none for the validation part"):
        local_data(source_of(np.array([0, 1])), np.arange(2), DataSettings())
    with pytest.raises(DataError, match="toy is empty"):
        local_data(source_of(np.zeros(0, np.int64)), np.arange(0), DataSettings())
    with pytest.raises(DataError, match="at least two"):
        local_data(source_of(np.zeros(9, np.int64)), np.arange(9), DataSettings())
    data = local_data(source_of(np.arange(9) % 2), np.arange(9), DataSettings(validation=0, test=0))
    assert (len(data.train), len(data.validation), len(data.test)) == (9, 0, 0)


def test_normalisation_is_learned_on_training_samples_alone() -> None:
    data = local_data(source_of(np.arange(100) % 2), np.arange(100), DataSettings())
    assert data.normalisation.mean[0] == pytest.approx(data.train.x.mean())
    assert data.normalisation.std[0] == pytest.approx(data.train.x.std(), rel=1e-5)
    assert data.normalisation.mean[0] != pytest.approx(49.5, abs=1e-6)


def test_normalisation_of_many_samples_is_that_of_all_at_once() -> None:
    x = np.random.default_rng(1).integers(0, 256, (700, 3, 32, 32), dtype=np.uint8)
    x[:, 1] = 77
    learned = Normalisation.learn(x, "image")
    np.testing.assert_allclose(learned.mean, x.mean(axis=(0, 2, 3), dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(learned.std, [x[:, 0].std(), 1.0, x[:, 2].std()], rtol=1e-12)
    series = x.reshape(-1, 64, 6).astype(np.float32)
    learned = Normalisation.learn(series, "series")
    # Summing all at once, numpy itself is 1.2e-12 off what whole-number arithmetic gives; blocks are closer.
    np.testing.assert_allclose(learned.std, series.astype(np.float64).std(axis=(0, 1)), rtol=1e-11)


@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_gather_returns_rows_in_the_order_asked_for(total: int, step: int, data: st.DataObject) -> None:
    everything = np.arange(total * 3).reshape(total, 3)
    rows = np.array(data.draw(st.lists(st.integers(0, total - 1), unique=True)), np.int64)
    blocks = iter([everything[i : i + step] for i in range(0, total, step)])
    np.testing.assert_array_equal(gather(blocks, rows, total, (3,), np.int64), everything[rows])


def test_a_file_that_is_replaced_while_it_is_read_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    for x in (np.zeros((4, 3)), np.zeros((9, 2)), np.zeros((0, 3))):
        np.savez(path, x=np.ones((9, 3)), y=np.arange(9) % 3)
        source = npz(DataSettings(kind="npz", path=path))
        np.savez(path, x=x, y=np.arange(9) % 3)
        with pytest.raises(DataError, match="changed while it was read"):
            source.read(np.arange(9))


# --- IDX ------------------------------------------------------------------------------------------


def idx(numbers: Array, *, magic: int | None = None, count: int | None = None) -> bytes:
    sides = (len(numbers) if count is None else count, *numbers.shape[1:])
    head = struct.pack(f">I{len(sides)}I", 0x0800 + len(sides) if magic is None else magic, *sides)
    return head + numbers.astype(np.uint8).tobytes()


IMAGES = np.arange(40 * 784).reshape(40, 28, 28) % 251
LABELS = np.arange(40) % 10


def write(folder: Path, name: str, data: bytes) -> None:
    (folder / "mnist").mkdir(exist_ok=True)
    (folder / "mnist" / f"{name}.gz").write_bytes(gzip.compress(data, 1))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    for part in ("train", "t10k"):
        write(tmp_path, f"{part}-images-idx3-ubyte", idx(IMAGES))
        write(tmp_path, f"{part}-labels-idx1-ubyte", idx(LABELS))
    return tmp_path


def test_idx_files_are_read_exactly(small: Path) -> None:
    source = BUILTIN["mnist"](small, DataSettings())
    x, y = source.read(np.array([79, 0, 41]))
    np.testing.assert_array_equal(x[:, 0], IMAGES[[39, 0, 1]])
    assert y.tolist() == [9, 0, 1]
    data = load(DataSettings(name="mnist", count=2), small)
    assert sum(map(len, (data.train, data.validation, data.test))) == 40


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("train-labels-idx1-ubyte", idx(LABELS, magic=2051)),
        ("train-labels-idx1-ubyte", idx(LABELS, count=2**32 - 1)),
        ("train-labels-idx1-ubyte", idx(LABELS[:30])),
        ("train-labels-idx1-ubyte", idx(LABELS + 1)),
        ("train-labels-idx1-ubyte", idx(LABELS)[:20]),
        ("train-labels-idx1-ubyte", b"\0\0"),
        ("t10k-images-idx3-ubyte", idx(IMAGES, count=2**32 - 1)),
        ("t10k-images-idx3-ubyte", idx(IMAGES)[:-1]),
        ("t10k-images-idx3-ubyte", idx(IMAGES[:, :, :20])),
        ("t10k-images-idx3-ubyte", b""),
    ],
)
def test_a_damaged_idx_file_is_named(small: Path, name: str, data: bytes) -> None:
    write(small, name, data)
    with pytest.raises(DataError, match=name.split("-")[0]):
        load(DataSettings(name="mnist"), small)


def test_a_gzip_file_that_is_cut_short_is_named(small: Path) -> None:
    file = small / "mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(DataError, match="train-images"):
        load(DataSettings(name="mnist"), small)
    file.write_bytes(b"not gzip")
    with pytest.raises(DataError, match="train-images"):
        load(DataSettings(name="mnist"), small)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_in_an_idx_file_are_an_error_in_words(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("idx")
    for part in ("train", "t10k"):
        write(folder, f"{part}-images-idx3-ubyte", data)
        write(folder, f"{part}-labels-idx1-ubyte", data)
    with pytest.raises(DataError):
        load(DataSettings(name="mnist"), folder)


# --- memory ---------------------------------------------------------------------------------------

PROBE = """
import resource, sys
from pathlib import Path
from edge_agent.datasets import DataSettings, load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
settings = DataSettings(name=sys.argv[1], index=3, count=20)
data = load(settings, Path(sys.argv[2]))
heavy = [name for name in ("torch", "sklearn", "scipy", "pandas", "PIL") if name in sys.modules]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, heavy)
"""


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "cifar10", "uci-har", "digits"])
def test_a_share_is_read_without_the_rest(data_dir: Path, name: str) -> None:
    command = [sys.executable, "-c", PROBE, name, str(data_dir)]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=paths)
    kib, heavy = done.stdout.split(" ", 1)
    assert heavy.strip() == "[]"
    # All of MNIST is 55 MB; a twentieth with working room stays far below.
    assert int(kib) < 24 * 1024
