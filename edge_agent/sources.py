"""A user's own data: NumPy archives, CSV files, folders of images, and functions of their own.

Whatever is wrong with them is a `DataError` that says in which file and row, and what to do.
"""

from __future__ import annotations

import csv
import importlib
import logging
import math
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.columns import with_groups, with_parts
from edge_agent.files import Archive, reading
from edge_agent.samples import DataSettings, LocalData, Source, as_classes, gather, input_of
from foundation.errors import DataError
from foundation.parameters import Array
from foundation.partition import group_asked

logger = logging.getLogger(__name__)

MOST_CLASSES = 100_000
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


def npz(settings: DataSettings, path: Path | None = None) -> Source:
    """A `.npz` with arrays of samples (n, ...) and labels (n,); for text, ids and next ids, both (n, T).

    `path` is the file where `settings.path` is not. Raises `SettingsError` when the group that is asked for
    is not in it, `DataError` for everything else.
    """
    path = path or _path(settings)
    archive = Archive(path)
    shape, dtype = archive.header(settings.x)
    y = archive.whole(settings.y)
    segment = archive.whole(settings.segment) if settings.segment else None

    def read(rows: Array) -> Array:
        return gather(archive.blocks(settings.x), rows, shape[0], shape[1:], dtype)

    source = _from_arrays(_Raw(str(path), shape, dtype, y, segment, read), settings)
    grouping = group_asked(settings.partition) or settings.group
    if grouping is not None:
        source = with_groups(source, archive, grouping)
    return source if settings.split is None else with_parts(source, archive, settings.split)


@dataclass(frozen=True, slots=True)
class _Raw:
    """Samples as they are stored, before their shape and type are settled."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    y: Array
    segment: Array | None
    read: Callable[[Array], Array]


def _from_arrays(raw: _Raw, settings: DataSettings) -> Source:
    n = raw.shape[0] if raw.shape else 0
    if not n:
        raise DataError(f"{raw.name} is empty: there is nothing to learn from")
    for name, values in (("y", raw.y), ("segment", raw.segment)):
        if values is not None and len(values) != n:
            raise DataError(
                f"{raw.name}: x has {n} rows and {name} has {len(values)}: one for each is needed"
            )
    if raw.segment is not None and raw.segment.ndim != 1:
        raise DataError(
            f"{raw.name}: segment has shape {raw.segment.shape}: one value for each row is needed"
        )
    if raw.y.ndim > 1 and raw.y.shape != (n, 1):
        return _text(raw, settings)
    if raw.dtype.kind not in "biuf":
        raise DataError(f"{raw.name}: x is of type {raw.dtype}, not numbers")
    dtype = (
        np.dtype(np.uint8) if raw.dtype in (np.dtype(np.uint8), np.dtype(np.bool_)) else np.dtype(np.float32)
    )
    shape, arrange = _arranged(raw, settings)
    classes, labels = _classes(raw.y.reshape(n), settings.labels, raw.name)

    def read(rows: Array) -> tuple[Array, Array]:
        with np.errstate(over="ignore"):  # what does not fit float32 is found as not finite, by row
            return arrange(raw.read(rows)).astype(dtype, copy=False), classes[rows]

    return Source(raw.name, input_of(shape), shape, labels, classes, read, segments=raw.segment)


def _text(raw: _Raw, settings: DataSettings) -> Source:
    if raw.dtype.kind not in "iu" or raw.y.dtype.kind not in "iu" or raw.y.shape != raw.shape:
        raise DataError(
            f"{raw.name}: a label for every step means text, and then x and y are whole numbers of one shape;"
            f" here they are {raw.dtype} {raw.shape} and {raw.y.dtype} {raw.y.shape}"
        )
    shape = raw.shape[1:]
    if settings.shape is not None and settings.shape != shape:
        raise DataError(f"{raw.name}: x has samples of shape {shape}, the settings say {settings.shape}")
    x = raw.read(np.arange(raw.shape[0]))
    most = max(int(x.max()), int(raw.y.max()))
    labels = settings.labels or tuple(map(str, range(min(most, MOST_CLASSES) + 1)))
    wrong = ((x < 0) | (x >= len(labels)) | (raw.y < 0) | (raw.y >= len(labels))).any(axis=1)
    if wrong.any():
        raise DataError(
            f"{raw.name}: row {int(wrong.argmax())} (from 0) has an id outside 0 to {len(labels) - 1},"
            " the vocabulary"
        )
    classes = np.zeros(len(x), np.int64)

    def read(rows: Array) -> tuple[Array, Array]:
        return x[rows].astype(np.int64), raw.y[rows].astype(np.int64)

    ordered = raw.segment is None
    return Source(raw.name, "text", shape, labels, classes, read, segments=raw.segment, ordered=ordered)


def _arranged(raw: _Raw, settings: DataSettings) -> tuple[tuple[int, ...], Callable[[Array], Array]]:
    """Return the shape of a sample, and what brings stored rows into it."""
    stored = raw.shape[1:]
    last = settings.channels == "last" and len(stored) == 3
    have = (stored[2], stored[0], stored[1]) if last else stored
    # A bare row of numbers is a series of one step: each number is a channel with a scale of its own.
    want = settings.shape or ((1, *have) if len(have) == 1 else have)
    fits = have == want or (len(have) == 1 and len(want) > 1) or (1, *have) == want
    if not fits or math.prod(have) != math.prod(want) or len(want) not in (2, 3) or min(want) < 1:
        raise DataError(
            f"{raw.name}: x has samples of shape {have},"
            f" which are not {settings.shape or '(C, H, W) or (T, C)'};"
            " set shape and channels in [data], or store them so"
        )

    def arrange(x: Array) -> Array:
        x = x.transpose(0, 3, 1, 2) if last else x
        return np.ascontiguousarray(x).reshape(len(x), *want)

    return want, arrange


def _classes(y: Array, labels: tuple[str, ...] | None, name: str) -> tuple[Array, tuple[str, ...]]:
    """Return classes (n,) and their names, from numbers or text."""
    if (
        y.dtype.kind == "f"
        and np.isfinite(y).all()
        and (np.abs(y) < 2**53).all()
        and (y == np.floor(y)).all()
    ):
        y = y.astype(np.int64)
    if y.dtype.kind not in "biuUS":
        raise DataError(f"{name}: labels are {y.dtype} and not whole numbers or text; repair y")
    different, first, which = np.unique(y, return_index=True, return_inverse=True)
    numbers = y.dtype.kind in "biu"
    if numbers and labels is None:
        if int(different.max()) >= MOST_CLASSES or int(different.min()) < 0:
            row = first[-1] if int(different.max()) >= MOST_CLASSES else first[0]
            raise DataError(
                f"{name}: row {row} (from 0) has label {y[row]}; labels count from 0, or are names"
            )
        labels = tuple(map(str, range(int(different.max()) + 1)))
    texts = [
        value.decode(errors="replace") if isinstance(value, bytes) else str(int(value) if numbers else value)
        for value in different.tolist()
    ]
    classes, names = as_classes(texts, labels, lambda i: f"{name}: row {first[i]} (from 0)")
    return classes[which], names


def csv_file(settings: DataSettings) -> Source:
    """A CSV file: a row for each sample, a column with its label, numbers in the others."""
    path = _path(settings)
    with reading(path), path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, delimiter=settings.delimiter)
        first = next((row for row in rows if row), None)
        if first is None:
            raise DataError(f"{path} is empty: there is nothing to learn from")
        table = _Table(path, settings, first)
        if not table.named:
            table.add(first, rows.line_num)
        for row in rows:
            if row:
                table.add(row, rows.line_num)
    lines = table.lines
    if not lines:
        raise DataError(f"{path} has names of columns but no rows")
    x = np.frombuffer(table.values, np.float32).reshape(len(lines), -1)
    classes, labels = as_classes(table.labels, settings.labels, lambda i: f"{path}: row {lines[i]}")
    segments = np.unique(table.segments, return_inverse=True)[1] if table.segments else None
    shape, arrange = _arranged(_Raw(str(path), x.shape, x.dtype, classes, None, x.__getitem__), settings)

    def read(rows: Array) -> tuple[Array, Array]:
        return arrange(x[rows]), classes[rows]

    return Source(str(path), input_of(shape), shape, labels, classes, read, segments=segments)


class _Table:
    """The rows of a CSV file so far: four bytes a number, each label once."""

    def __init__(self, path: Path, settings: DataSettings, first: Sequence[str]) -> None:
        self._path = path
        self._width = len(first)
        chosen = [settings.label, settings.segment, *(settings.columns or ())]
        self.named = settings.header
        if self.named is None:
            self.named = any(isinstance(key, str) for key in chosen) or not any(map(_is_number, first))
        self._names = [cell.strip() for cell in first] if self.named else None
        default: str | int = "label" if self._names and "label" in self._names else -1
        self._label = self._column(settings.label if settings.label is not None else default)
        self._segment = self._column(settings.segment) if settings.segment is not None else None
        self._columns = (
            [self._column(key) for key in settings.columns]
            if settings.columns is not None
            else [i for i in range(self._width) if i not in (self._label, self._segment)]
        )
        if not self._columns or self._label in self._columns:
            raise DataError(f"{path}: choose at least one column of numbers that is not the label's")
        self.values = array("f")
        self.labels: list[str] = []
        self.segments: list[str] = []
        self.lines = array("q")
        self._known: dict[str, str] = {}

    def _column(self, key: str | int) -> int:
        if isinstance(key, int) and -self._width <= key < self._width:
            return key % self._width
        if isinstance(key, str) and self._names and key in self._names:
            return self._names.index(key)
        there = ", ".join(self._names) if self._names else f"0 to {self._width - 1}, without names"
        raise DataError(f"{self._path} has no column {key!r}; its columns are {there}")

    def add(self, row: Sequence[str], line: int) -> None:
        """Take one row; raises `DataError` that names line and column when it is not numbers and a label."""
        if len(row) != self._width:
            raise DataError(f"{self._path}: row {line} has {len(row)} cells, the first has {self._width}")
        try:
            numbers = [float(row[i]) for i in self._columns]
        except ValueError:
            numbers = [math.nan]
        if not all(map(math.isfinite, numbers)):
            wrong = next(
                i for i in self._columns if not _is_number(row[i]) or not math.isfinite(float(row[i]))
            )
            name = self._names[wrong] if self._names else str(wrong)
            raise DataError(
                f"{self._path}: row {line}, column {name}: {row[wrong][:40]!r} is not a finite number;"
                " repair or remove the row"
            )
        label = row[self._label].strip()
        if not label:
            raise DataError(f"{self._path}: row {line} has no label; add one or remove the row")
        self.values.extend(numbers)
        self.labels.append(self._known.setdefault(label, label))
        self.lines.append(line)
        if self._segment is not None:
            segment = row[self._segment]
            self.segments.append(self._known.setdefault(segment, segment))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def image_folder(settings: DataSettings) -> Source:
    """A folder with one folder of images for each class; needs the extra `images` (Pillow)."""
    folder = _path(settings)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder with one folder of images for each class")
    with reading(folder):
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise DataError(f"{folder} is empty: put one folder of images for each class into it")
    kinds, labels = as_classes(names, settings.labels, lambda i: f"{folder / names[i]}")
    files: list[Path] = []
    classes: list[int] = []
    for name, kind in zip(names, kinds.tolist(), strict=True):
        with reading(folder / name):
            found = sorted(file for file in (folder / name).iterdir() if file.suffix.lower() in PICTURES)
        files += found
        classes += [kind] * len(found)
    if not files:
        raise DataError(f"{folder}: there are no images in {', '.join(names)}")
    decode = _decoder(settings)
    shape = decode(files[0]).shape
    y = np.array(classes, np.int64)

    def read(rows: Array) -> tuple[Array, Array]:
        x = np.empty((len(rows), *shape), np.uint8)
        for place, row in enumerate(rows.tolist()):
            image = decode(files[row])
            if image.shape != shape:
                raise DataError(
                    f"{files[row]} is {image.shape[1:]} pixels, {files[0]} is {shape[1:]}:"
                    " set size = [height, width] in [data]"
                )
            x[place] = image
        return x, y[rows]

    return Source(str(folder), "image", shape, labels, y, read)


def _decoder(settings: DataSettings) -> Callable[[Path], Array]:
    """Return what reads one image as uint8 of shape (C, H, W)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading images needs Pillow: pip install 'hedgerow[images]'") from error

    def decode(file: Path) -> Array:
        try:
            with reading(file), Image.open(file) as image:
                picture = image.convert("L" if settings.grayscale else "RGB")
                if settings.size is not None:
                    height, width = settings.size
                    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
                pixels = np.asarray(picture, np.uint8)
        except (SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{file} cannot be read as an image: {error}") from error
        return pixels[None] if settings.grayscale else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    return decode


def python_function(settings: DataSettings) -> Source | LocalData:
    """What a function of the user's returns: `(x, y)`, a dict with x, y, labels, segment, or `LocalData`."""
    dotted = settings.function or ""
    try:
        result = _find(dotted, settings.path)()
    except DataError:
        raise
    except Exception as error:  # a user's code may raise anything; the agent stays up and says it
        logger.exception("data function failed", extra={"function": dotted})
        raise DataError(f"{dotted} failed: {type(error).__name__}: {error}") from error
    if isinstance(result, LocalData):
        return result
    if isinstance(result, tuple | list) and len(result) == 2:
        result = {"x": result[0], "y": result[1]}
    if not isinstance(result, Mapping) or not {"x", "y"} <= set(result) <= {"x", "y", "labels", "segment"}:
        raise DataError(
            f"{dotted} returned {type(result).__name__}; it should return (x, y),"
            " a dict with x, y and perhaps labels and segment, or LocalData"
        )
    try:
        x, y = np.asarray(result["x"]), np.asarray(result["y"])
        segment = None if result.get("segment") is None else np.asarray(result["segment"])
        names = tuple(map(str, result["labels"])) if result.get("labels") is not None else None
    except (ValueError, TypeError) as error:
        raise DataError(f"{dotted} returned what cannot be arrays: {error}") from error
    if x.ndim < 2 or y.ndim < 1:
        raise DataError(f"{dotted} returned x of shape {x.shape} and y of shape {y.shape}: rows are needed")
    raw = _Raw(dotted, x.shape, x.dtype, y, segment, lambda rows: x[rows])
    return _from_arrays(raw, settings.model_copy(update={"labels": settings.labels or names}))


def _find(dotted: str, folder: Path | None) -> Callable[[], object]:
    module, _, name = dotted.replace(":", ".").rpartition(".")
    if not module or not name:
        raise DataError(f"function {dotted!r} should read module:function")
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        found = getattr(importlib.import_module(module), name, None)
    finally:
        if folder is not None:
            sys.path.remove(str(folder))
    if not callable(found):
        raise DataError(f"module {module} has no function {name}")
    function: Callable[[], object] = found
    return function


def _path(settings: DataSettings) -> Path:
    if settings.path is None:
        raise DataError(f"kind = {settings.kind!r} needs path in [data]")
    return settings.path.expanduser()
