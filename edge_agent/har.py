"""UCI HAR (Anguita et al., ESANN 2013) in two layouts: one `.npz`, and the published text files.

30 people, six activities, windows of 128 readings of 9 channels at 50 Hz. Neighbouring windows share half of
their readings, so the rows of a segment, one unbroken stretch of one activity by one person, stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from edge_agent.files import Archive, published, reading
from edge_agent.samples import DataSettings, Source, gather
from foundation.errors import DataError
from foundation.parameters import Array

ADDRESS = "https://archive.ics.uci.edu/static/public/240/human+activity+recognition+using+smartphones.zip"
AGAIN = f"unpack {ADDRESS} again"
LABELS = ("WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING")
STEPS = 128
SIGNALS = tuple(f"{sensor}_{axis}" for sensor in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
SHAPE = (STEPS, len(SIGNALS))
PEOPLE = 30
PUBLISHED = "UCI HAR Dataset"
HALVES = ("train", "test")


def uci_har(folder: Path, settings: DataSettings) -> Source:
    """Windows of 128x9: `uci-har/uci_har.npz` where it is, else the published folder `UCI HAR Dataset`.

    That may lie in `uci-har` or directly in the folder of the data sets. Its rows are the same windows in
    another order, so devices of one federation need the same layout.
    """
    own = folder / "uci-har"
    file = own / "uci_har.npz"
    if file.exists():
        return _archive(Archive(file))
    found = [place / PUBLISHED for place in (own, folder) if (place / PUBLISHED).is_dir()]
    return _published(found[0] if found else own / PUBLISHED, own)


def _archive(archive: Archive) -> Source:
    shape, _ = archive.header("x")
    y, people, segments = (archive.whole(key).astype(np.int64) for key in ("y", "subject", "segment"))
    if shape[1:] != SHAPE or any(len(values) != shape[0] for values in (y, people, segments)):
        raise DataError(f"{archive.path} does not hold windows of 128x9 with their labels; fetch it again")

    def read(rows: Array) -> tuple[Array, Array]:
        return gather(archive.blocks("x"), rows, len(y), SHAPE, np.float32), y[rows]

    return _source(y, people, segments, read)


def _source(y: Array, people: Array, segments: Array, read: Callable[[Array], tuple[Array, Array]]) -> Source:
    return Source(
        "uci-har",
        "series",
        SHAPE,
        LABELS,
        y,
        read,
        groups=people,
        grouping="subject",
        segments=segments,
    )


# --- the published text files ---------------------------------------------------------------------


def _published(folder: Path, own: Path) -> Source:
    signals = [f"Inertial Signals/{signal}" for signal in SIGNALS]
    names = [f"{half}/{what}_{half}.txt" for half in HALVES for what in ("y", "subject", *signals)]
    published(folder, names, ADDRESS, unpack=f"{own}, and the archive in it as well")
    y, people = _numbers(folder, "y", len(LABELS)), _numbers(folder, "subject", PEOPLE)
    counts = [len(labels) for labels in y]
    if counts != [len(subjects) for subjects in people]:
        raise DataError(f"{folder}: y and subject have not the same number of lines: {AGAIN}")
    classes, person = np.concatenate(y) - 1, np.concatenate(people)

    def read(rows: Array) -> tuple[Array, Array]:
        place = np.full(len(classes), -1, np.int64)
        place[rows] = np.arange(len(rows))
        x = np.empty((len(rows), *SHAPE), np.float32)
        for channel, signal in enumerate(signals):
            for row, (where, words) in enumerate(_both(folder, signal, counts)):
                if place[row] >= 0:
                    x[place[row], :, channel] = _window(where, words)
        return x, classes[rows]

    segments = _segments(_both(folder, signals[-1], counts), classes, person)
    return _source(classes, person, segments, read)


def _lines(folder: Path, what: str, half: str) -> Iterator[tuple[str, list[bytes]]]:
    """Yield each line of a file, as words, with where it stands."""
    file = folder / f"{half}/{what}_{half}.txt"
    with reading(file), file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            yield f"{file}: line {number}", line.split()


def _both(folder: Path, what: str, counts: Sequence[int]) -> Iterator[tuple[str, list[bytes]]]:
    """Yield the lines of the training and the test file; raises `DataError` unless there are so many."""
    for half, expected in zip(HALVES, counts, strict=True):
        number = 0
        for number, line in enumerate(_lines(folder, what, half), 1):
            if number <= expected:
                yield line
        if number != expected:
            raise DataError(f"{folder}: {half}/{what} has {number} lines, not {expected}: {AGAIN}")


def _numbers(folder: Path, what: str, most: int) -> list[Array]:
    """Return the numbers, 1 to `most`, of the training file and of the test file."""
    found = []
    for half in HALVES:
        values = [_number(where, words, most) for where, words in _lines(folder, what, half)]
        if not values:
            raise DataError(f"{folder}: {half}/{what} is empty: {AGAIN}")
        found.append(np.array(values, np.int64))
    return found


def _number(where: str, words: Sequence[bytes], most: int) -> int:
    text = b" ".join(words)
    if not text.isdigit() or len(text) > 3 or not 1 <= int(text) <= most:
        raise DataError(f"{where} is {text[:40]!r}, not a number from 1 to {most}: {AGAIN}")
    return int(text)


def _window(where: str, words: Sequence[bytes]) -> Array:
    try:
        values = np.array([float(word) for word in words], np.float64)
    except ValueError as error:
        raise DataError(f"{where} is not numbers ({error}): {AGAIN}") from error
    if len(values) != STEPS:
        raise DataError(f"{where} has {len(values)} numbers, not {STEPS}: {AGAIN}")
    with np.errstate(over="ignore"):  # what does not fit float32 is found as not finite, by row
        return values.astype(np.float32)


def _segments(windows: Iterator[tuple[str, list[bytes]]], classes: Array, person: Array) -> Array:
    """Return the segment of each row: a window goes on where another one's second half is its first."""
    begins: dict[tuple[int, int, bytes], int] = {}
    ends = []
    for row, (_, words) in enumerate(windows):
        first, second = (
            blake2b(b" ".join(half), digest_size=16).digest()
            for half in (words[: STEPS // 2], words[STEPS // 2 :])
        )
        who = int(person[row]), int(classes[row])
        begins[*who, first] = row
        ends.append((*who, second))
    after = {row: begins[end] for row, end in enumerate(ends) if end in begins}
    heads = sorted(set(range(len(ends))) - set(after.values()))
    segment = np.full(len(ends), -1, np.int64)
    # What is left after the heads' chains would be a ring; real recordings have none.
    for head in (*heads, *range(len(ends))):
        reached: int | None = head
        while reached is not None and segment[reached] < 0:
            segment[reached] = head
            reached = after.get(reached)
    return segment
