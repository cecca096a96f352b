"""What a `.npz` says of its rows beside samples and labels: whose they are, and which part they are in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge_agent.files import Archive
from edge_agent.samples import TEST, TRAIN, VALIDATION, Source
from foundation.errors import DataError, SettingsError
from foundation.parameters import Array
from foundation.words import unknown

WORDS = {"train": TRAIN, "training": TRAIN, "validation": VALIDATION, "val": VALIDATION, "test": TEST}
TWO = {"0": TRAIN, "1": TEST}
THREE = {"0": TRAIN, "1": VALIDATION, "2": TEST}


def with_groups(source: Source, archive: Archive, name: str) -> Source:
    """Return the source whose groups (people, sites) are the array of that name.

    Raises `SettingsError` with the names there are when it is none of them, `DataError` when it is not one
    whole number or text for each row.
    """
    if not archive.has(name):
        raise SettingsError(unknown("array", name, archive.names()))
    groups = archive.whole(name)
    where = f"{archive.path}: {name}"
    _check(groups, len(source.classes), where)
    _check_segments(source.segments, groups, where, "number segments on from one group to the next")
    return replace(source, groups=groups, grouping=name)


def with_parts(source: Source, archive: Archive, name: str) -> Source:
    """Return the source whose parts are those of the array of that name.

    0 and 1 are training and test, and validation is yet to be taken from training; 0, 1 and 2, or words, are
    training, validation and test. What they are is told from the whole file, so all devices agree.
    Raises `DataError` for other values, when nothing is trained or tested on, or a segment is torn.
    """
    where = f"{archive.path}: {name}"
    split = archive.whole(name)
    _check(split, len(source.classes), where)
    different, first, which = np.unique(split, return_index=True, return_inverse=True)
    numbers = split.dtype.kind in "biu"
    texts = [_text(int(value) if numbers else value) for value in different.tolist()]
    known = WORDS | (THREE if "2" in texts else TWO)
    for text, row in zip(texts, first.tolist(), strict=True):
        if text not in known:
            raise DataError(
                f"{where}: row {row} (from 0) is {text!r}: 0 is training and 1 test, or 0, 1 and 2, or the"
                " words, are training, validation and test"
            )
    meaning = [known[text] for text in texts]
    for part, part_name in ((TRAIN, "training"), (TEST, "test")):
        if part not in meaning:
            raise DataError(f"{where} has no row for the {part_name} part: repair it, or leave split out")
    parts = np.array(meaning, np.int64)[which]
    _check_segments(source.segments, parts, where, "repair it")
    return replace(source, parts=parts, carve=VALIDATION not in meaning)


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _check(values: Array, n: int, where: str) -> None:
    if values.shape != (n,):
        raise DataError(f"{where} has shape {values.shape}: one value for each of {n} rows is needed")
    if values.dtype.kind not in "biuUS":
        raise DataError(f"{where} is of type {values.dtype}: whole numbers or text are needed")


def _check_segments(segments: Array | None, values: Array, where: str, remedy: str) -> None:
    """Raise `DataError` when the rows of a segment have different values."""
    if segments is None:
        return
    _, first, segment = np.unique(segments, return_index=True, return_inverse=True)
    torn = np.flatnonzero(values != values[first][segment])
    if len(torn):
        raise DataError(
            f"{where} tears segment {_text(segments[torn[0]])} apart at row {torn[0]} (from 0): {remedy}, or"
            " leave segment out"
        )
