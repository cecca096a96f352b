"""Data sets as they are published: read exactly, never unpickled, and missing ones with their address."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent import cifar
from edge_agent.builtin import BUILTIN
from edge_agent.datasets import DataSettings, load
from edge_agent.har import SIGNALS
from edge_agent.samples import split
from foundation.errors import DataError
from foundation.parameters import Array

RNG = np.random.default_rng(2)


def refusal(name: str, folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(DataSettings(name=name), folder)
    return str(caught.value)


# --- what is missing ------------------------------------------------------------------------------

ADDRESSES = {
    "mnist": (
        "mnist/train-images-idx3-ubyte.gz",
        "https://ossci-datasets.s3.amazonaws.com/mnist/train-images",
    ),
    "fashion-mnist": (
        "fashion-mnist/train-images-idx3-ubyte.gz",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-images-idx3-ubyte.gz",
    ),
    "cifar10": (
        "cifar10/cifar-10-batches-bin/data_batch_1.bin",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    ),
    "uci-har": (
        "uci-har/UCI HAR Dataset/train/y_train.txt",
        "https://archive.ics.uci.edu/static/public/240/human+activity+recognition+using+smartphones.zip",
    ),
    "shakespeare": (
        "shakespeare/input.txt",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
}


@pytest.mark.parametrize("name", sorted(set(BUILTIN) - {"digits"}))
def test_a_missing_file_is_named_with_its_address_and_its_place(name: str, tmp_path: Path) -> None:
    file, address = ADDRESSES[name]
    words = refusal(name, tmp_path)
    assert words.startswith(f"{tmp_path / file} is not there: ")
    assert address in words
    assert f"into {tmp_path / name}" in words
    assert Path(file).name in words.split(address)[1], "what the folder holds is listed"


def test_the_second_file_is_missed_as_well(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"")
    words = refusal("mnist", tmp_path)
    assert "train-labels-idx1-ubyte.gz is not there" in words
    assert "/mnist/train-labels-idx1-ubyte.gz into" in words


# --- CIFAR-10 -------------------------------------------------------------------------------------

RECORDS = 20
PIXELS = RNG.integers(0, 256, (6 * RECORDS, 3, 32, 32), dtype=np.uint8)
LABELS = (np.arange(6 * RECORDS) % 10).astype(np.uint8)


def write_binary(folder: Path) -> Path:
    folder.mkdir(parents=True)
    records = np.concatenate([LABELS[:, None], PIXELS.reshape(len(LABELS), -1)], axis=1)
    for name, part in zip(cifar.FILES, np.split(records, 6), strict=True):
        (folder / name).write_bytes(part.tobytes())
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "RECORDS", RECORDS)
    monkeypatch.setattr(cifar, "BLOCK_BYTES", 7 * cifar.RECORD_BYTES)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("below", ["cifar10/cifar-10-batches-bin", "cifar-10-batches-bin"])
def test_the_binary_version_is_read_exactly(tmp_path: Path, below: str) -> None:
    write_binary(tmp_path / below)
    source = BUILTIN["cifar10"](tmp_path, DataSettings())
    assert source.classes.tolist() == LABELS.tolist()
    rows = np.array([119, 0, 25, 7, 99])
    x, y = source.read(rows)
    np.testing.assert_array_equal(x, PIXELS[rows])
    assert y.tolist() == LABELS[rows].tolist()
    data = load(DataSettings(name="cifar10", partition="iid", count=2), tmp_path)
    assert sum(map(len, (data.train, data.validation, data.test))) == 60


@pytest.mark.usefixtures("few")
def test_the_npz_parts_come_first_and_need_each_other(tmp_path: Path) -> None:
    own = write_binary(tmp_path / "cifar10" / "cifar-10-batches-bin").parent
    last = PIXELS.transpose(0, 2, 3, 1)
    np.savez(own / "cifar10_train_part1.npz", x=last[:50], y=LABELS[:50])
    assert "cifar10_test.npz is not there" in refusal("cifar10", tmp_path)
    np.savez(own / "cifar10_test.npz", x=last[50:80], y=LABELS[50:80])
    source = BUILTIN["cifar10"](tmp_path, DataSettings())
    assert len(source.classes) == 80
    np.testing.assert_array_equal(source.read(np.array([79, 3]))[0], PIXELS[[79, 3]])
    (own / "cifar10_train_part1.npz").unlink()
    assert "cifar10_train_part1.npz is not there" in refusal("cifar10", tmp_path)


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was loaded')",)


@pytest.mark.parametrize("below", ["cifar10/cifar-10-batches-py", "cifar-10-batches-py"])
def test_the_pickled_version_is_never_loaded(tmp_path: Path, below: str) -> None:
    (tmp_path / below).mkdir(parents=True)
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / below / name).write_bytes(pickle.dumps(Trap()))
    words = refusal("cifar10", tmp_path)
    assert "cifar-10-batches-py holds Python pickles" in words
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz" in words


@pytest.mark.usefixtures("few")
def test_a_damaged_binary_file_is_named(tmp_path: Path) -> None:
    folder = write_binary(tmp_path / "cifar10" / "cifar-10-batches-bin")
    third = folder / "data_batch_3.bin"
    whole = third.read_bytes()
    for wrong in (whole[:-1], whole[: -cifar.RECORD_BYTES], b"", whole + b"\0"):
        third.write_bytes(wrong)
        words = refusal("cifar10", tmp_path)
        assert f"data_batch_3.bin has {len(wrong)} bytes" in words
    third.write_bytes(whole[: cifar.RECORD_BYTES] + b"\x0a" + whole[cifar.RECORD_BYTES + 1 :])
    assert "data_batch_3.bin: record 1 (from 0) has label 10" in refusal("cifar10", tmp_path)
    third.unlink()
    assert "data_batch_3.bin is not there: unpack https" in refusal("cifar10", tmp_path)
    third.mkdir()
    assert "data_batch_3.bin" in refusal("cifar10", tmp_path)


@pytest.mark.usefixtures("few")
def test_a_binary_file_cut_short_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    folder = write_binary(tmp_path / "cifar10" / "cifar-10-batches-bin")
    source = BUILTIN["cifar10"](tmp_path, DataSettings())
    last = folder / "test_batch.bin"
    last.write_bytes(last.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"test_batch\.bin .*too early"):
        source.read(np.arange(120))


@pytest.mark.usefixtures("few")
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.one_of(st.just(RECORDS * cifar.RECORD_BYTES), st.integers(0, (RECORDS + 2) * cifar.RECORD_BYTES)),
    seed=st.integers(0, 99),
    most=st.sampled_from([9, 255]),
)
def test_any_bytes_in_a_binary_file_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, size: int, seed: int, most: int
) -> None:
    folder = tmp_path_factory.mktemp("cifar")
    data = np.random.default_rng(seed).integers(0, most + 1, size, dtype=np.uint8)
    file = write_binary(folder / "cifar-10-batches-bin") / "data_batch_2.bin"
    file.write_bytes(data.tobytes())
    labels = data[:: cifar.RECORD_BYTES]
    if size == RECORDS * cifar.RECORD_BYTES and labels.max() < 10:
        source = BUILTIN["cifar10"](folder, DataSettings())
        assert source.classes[RECORDS : 2 * RECORDS].tolist() == labels.tolist()
    else:
        assert "data_batch_2.bin" in refusal("cifar10", folder)


# --- UCI HAR --------------------------------------------------------------------------------------


def write_har(folder: Path, windows: Array, y: Array, people: Array, tested: Array) -> None:
    """Write windows (n, 128, 9), activities from 0, people and which are tested, in the published form."""
    for half, rows in (("train", np.flatnonzero(~tested)), ("test", np.flatnonzero(tested))):
        signals = folder / half / "Inertial Signals"
        signals.mkdir(parents=True)
        (folder / half / f"y_{half}.txt").write_text("".join(f"{y[row] + 1}\n" for row in rows))
        (folder / half / f"subject_{half}.txt").write_text("".join(f"{people[row]}\n" for row in rows))
        for channel, signal in enumerate(SIGNALS):
            lines = (" ".join(f"{v: .7e}" for v in windows[row, :, channel].tolist()) for row in rows)
            (signals / f"{signal}_{half}.txt").write_text("".join(f" {line}\n" for line in lines))


def recordings(people: int = 2, windows: int = 6) -> tuple[Array, Array, Array, Array, Array]:
    """Return windows that overlap by half, activities, people, whether tested, and the true segments."""
    x, y, who, segments = [], [], [], []
    for person in range(1, people + 1):
        for stretch in range(8):
            signal = RNG.normal(size=(64 * (windows + 1), 9))
            x += [signal[start : start + 128] for start in range(0, 64 * windows, 64)]
            y += [stretch % 6] * windows
            who += [person] * windows
            segments += [8 * person + stretch] * windows
    person_of = np.array(who)
    return np.array(x), np.array(y), person_of, person_of == people, np.array(segments)


def same_partition(a: Array, b: Array) -> bool:
    pairs = np.unique(np.stack([a, b]), axis=1).shape[1]
    return pairs == len(np.unique(a)) == len(np.unique(b))


@pytest.mark.parametrize("below", ["uci-har/UCI HAR Dataset", "UCI HAR Dataset"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_published_text_files_are_read_exactly(tmp_path: Path, below: str, *, shuffled: bool) -> None:
    x, y, people, tested, segments = recordings()
    if shuffled:
        order = RNG.permutation(len(y))
        x, y, people, tested, segments = (a[order] for a in (x, y, people, tested, segments))
    write_har(tmp_path / below, x, y, people, tested)
    source = BUILTIN["uci-har"](tmp_path, DataSettings())
    order = np.concatenate([np.flatnonzero(~tested), np.flatnonzero(tested)])
    assert source.groups is not None
    assert source.groups.tolist() == people[order].tolist()
    assert source.segments is not None
    assert same_partition(source.segments, segments[order])
    rows = np.array([95, 0, 50, 3])
    got, labels = source.read(rows)
    np.testing.assert_allclose(got, x[order][rows], rtol=1e-6, atol=1e-12)
    assert labels.tolist() == y[order][rows].tolist()
    data = load(DataSettings(name="uci-har", partition="by:subject", count=2, index=1), tmp_path)
    assert sum(map(len, (data.train, data.validation, data.test))) == 48


DAMAGED = [
    ("train/y_train.txt", "7\n", "line 1 is b'7', not a number from 1 to 6"),
    ("train/y_train.txt", "one\n", "not a number from 1 to 6"),
    ("train/y_train.txt", "", "train/y is empty"),
    ("test/subject_test.txt", "31\n", "not a number from 1 to 30"),
    ("test/subject_test.txt", "2\n" * 47, "y and subject have not the same number of lines"),
    ("train/Inertial Signals/total_acc_z_train.txt", "1.0 " * 128 + "\n", "has 1 lines, not 48"),
    ("train/Inertial Signals/body_acc_x_train.txt", "1.0 " * 128 + "\n", "has 1 lines, not 48"),
    ("test/Inertial Signals/body_gyro_y_test.txt", "1.0 2.0\n" * 48, "line 1 has 2 numbers, not 128"),
    ("test/Inertial Signals/body_gyro_y_test.txt", "x " * 128 + "\n", "line 1 is not numbers"),
    ("test/Inertial Signals/body_gyro_y_test.txt", "nan " * 128 + "\n" + "1 " * 128, "not 48"),
    ("test/Inertial Signals/body_gyro_y_test.txt", ("nan " * 128 + "\n") * 48, "not finite"),
    ("test/Inertial Signals/body_gyro_y_test.txt", ("1e300 " * 128 + "\n") * 48, "not finite"),
]


@pytest.mark.parametrize(("file", "text", "words"), DAMAGED)
def test_a_damaged_text_file_is_an_error_in_words(tmp_path: Path, file: str, text: str, words: str) -> None:
    x, y, people, tested, _ = recordings()
    write_har(tmp_path / "UCI HAR Dataset", x, y, people, tested)
    (tmp_path / "UCI HAR Dataset" / file).write_text(text)
    assert words in refusal("uci-har", tmp_path)


def test_windows_that_follow_each_other_in_a_ring_are_one_segment(tmp_path: Path) -> None:
    x, y, people, tested, _ = recordings(windows=1)
    x[0, 64:] = x[0, :64]  # goes on with itself
    write_har(tmp_path / "UCI HAR Dataset", x, y, people, tested)
    source = BUILTIN["uci-har"](tmp_path, DataSettings())
    assert source.segments is not None
    assert len(np.unique(source.segments)) == 16


@pytest.mark.data
@pytest.mark.slow
def test_both_layouts_of_uci_har_hold_the_same(tmp_path: Path, data_dir: Path) -> None:
    known = BUILTIN["uci-har"](data_dir, DataSettings())
    assert known.groups is not None
    rows = np.flatnonzero(np.isin(known.groups, (1, 2)))  # one of the training, one of the test people
    x, y = known.read(rows)
    write_har(tmp_path / "UCI HAR Dataset", x, y, known.groups[rows], known.groups[rows] == 2)
    source = BUILTIN["uci-har"](tmp_path, DataSettings())
    got, labels = source.read(np.arange(len(rows)))
    np.testing.assert_allclose(got, x, rtol=1e-6)
    assert labels.tolist() == y.tolist()
    assert source.segments is not None
    assert known.segments is not None
    assert same_partition(source.segments, known.segments[rows])
    everyone = np.arange(len(rows))
    assert [len(part) for part in split(source, everyone, DataSettings())] == [
        len(part) for part in split(known, rows, DataSettings())
    ]
