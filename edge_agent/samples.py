"""What an agent learns from: its settings, the rows of a source, and the three parts they are split into."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from pydantic import Field, model_validator

from foundation.errors import DataError, SettingsError
from foundation.frozen import Frozen
from foundation.normalisation import Normalisation
from foundation.parameters import Array
from foundation.partition import Share, group_asked

Input: TypeAlias = Literal["image", "series", "text"]

TRAIN, VALIDATION, TEST = 0, 1, 2

COMMON = frozenset({"kind", "validation", "test", "split_seed"})
ARCHIVE = frozenset({"x", "y", "segment", "split", "shape", "channels", "labels"})
"""Keys that say how a `.npz` is read, one device's own or one that is shared."""
KEYS: dict[str, frozenset[str]] = {
    "builtin": frozenset({"name", "path", "index", "count", "partition", "seed", "limit", "window"})
    | ARCHIVE
    | {"group"},
    "npz": ARCHIVE | {"path"},
    "csv": frozenset({"path", "label", "columns", "segment", "header", "delimiter", "shape", "labels"}),
    "image_folder": frozenset({"path", "size", "grayscale", "labels"}),
    "python": frozenset({"function", "path", "shape", "channels", "labels"}),
    "mqtt_stream": frozenset({"topic", "fields", "label_topic", "window", "stride", "time_field", "labels"})
    | frozenset({"sample_rate_hz", "max_gap_s", "buffer_mb"}),
}
NEEDED: dict[str, tuple[str, ...]] = {
    "npz": ("path",),
    "csv": ("path",),
    "image_folder": ("path",),
    "python": ("function",),
    "mqtt_stream": ("topic", "fields", "label_topic"),
}


class DataSettings(Frozen):
    """The `[data]` table of `agent.toml`: where this device's samples are and how they are read.

    A key that does not belong to `kind` is refused by name, as is a misspelt one.
    """

    kind: Literal["builtin", "npz", "csv", "image_folder", "python", "mqtt_stream"] = "builtin"
    path: Path | None = None
    """File (npz, csv) or folder (image_folder: of classes; builtin: of data sets; python: of the module)."""
    labels: tuple[str, ...] | None = None
    """Class names in order; devices of one federation should give the same ones."""
    validation: float = Field(0.15, ge=0, lt=1)
    """Fraction of this device's samples."""
    test: float = Field(0.25, ge=0, lt=1)
    """Fraction of this device's samples."""
    split_seed: int = Field(0, ge=0)

    name: str = "digits"
    """builtin: which data set; a name that ends in `.npz` is a file, in the folder of the data sets."""
    index: int = Field(0, ge=0)
    """builtin: this device's number, from 0."""
    count: int = Field(1, ge=1)
    """builtin: among how many devices the data set is shared."""
    partition: str = "iid"
    """builtin: iid, pathological:K, dirichlet:ALPHA, by:GROUP or natural."""
    seed: int = Field(0, ge=0)
    """builtin: of the partition; the same on every device."""
    limit: int | None = Field(None, ge=1)
    """builtin: samples over all devices together, balanced over classes."""

    x: str = "x"
    """npz: name of the array of samples."""
    y: str = "y"
    """npz: name of the array of labels."""
    group: str | None = None
    """a shared .npz: array of people, sites or other groups; `by:ARRAY` names it as well."""
    split: str | None = None
    """npz: array of each row's part: 0 training, 1 test; or 0, 1, 2 or the words: with validation between."""
    segment: str | None = None
    """npz, csv: array or column; rows with the same value (overlapping windows) stay in one part."""
    shape: tuple[int, ...] | None = None
    """npz, csv, python: of one sample: (C, H, W) for images, (T, C) for series, (T,) for text."""
    channels: Literal["first", "last"] = "first"
    """npz, python: where an image in the file has its channels."""

    label: str | int | None = None
    """csv: column by name or number; without it the column `label`, or else the last one."""
    columns: tuple[str | int, ...] | None = None
    """csv: the columns that make a sample; without it all but label and segment."""
    header: bool | None = None
    """csv: whether the first row is names; without it, it is when it is not numbers."""
    delimiter: str = Field(",", min_length=1, max_length=1)

    size: tuple[int, int] | None = None
    """image_folder: height and width to which every image is scaled."""
    grayscale: bool = False

    function: str | None = None
    """python: `module:function`, called without arguments."""

    topic: str | None = None
    """mqtt_stream: where the sensor's readings come from."""
    fields: tuple[str, ...] | None = Field(None, min_length=1, max_length=256)
    """mqtt_stream: the numbers of one reading, in order; they become the channels."""
    label_topic: str | None = None
    """mqtt_stream: where the label of the moment comes from."""
    window: int | None = Field(None, ge=1, le=100_000)
    """mqtt_stream: readings in one sample (128 without it); shakespeare: characters (64)."""
    stride: int | None = Field(None, ge=1)
    """mqtt_stream: readings from one window to the next; without it half a window."""
    time_field: str | None = None
    """mqtt_stream: seconds within a reading; without it the time of arrival counts."""
    sample_rate_hz: float | None = Field(None, gt=0)
    """mqtt_stream: readings per second, to place readings that arrive together."""
    max_gap_s: float = Field(1.0, gt=0)
    """mqtt_stream: a longer silence ends a stretch; no window spans it."""
    buffer_mb: float = Field(16.0, ge=0.1, le=100_000)
    """mqtt_stream: what the recording may take on disk; the oldest goes first."""

    @model_validator(mode="after")
    def _belongs_together(self) -> DataSettings:
        self._check_keys()
        self._check_parts()
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError("labels: at least two names, each of them once")
        if self.shape is not None and (len(self.shape) not in (1, 2, 3) or min(self.shape) < 1):
            raise ValueError("shape: (C, H, W), (T, C) or (T,) of positive numbers")
        if self.size is not None and min(self.size) < 1:
            raise ValueError("size: height and width are positive numbers")
        self._check_stream()
        if self.kind == "builtin":
            _ = self.share
            asked = group_asked(self.partition)
            if self.group is not None and asked not in (None, self.group):
                raise ValueError(
                    f"group is {self.group!r}, but partition {self.partition!r}: give one of them"
                )
        return self

    def _check_keys(self) -> None:
        given = {key for key in self.model_fields_set if getattr(self, key) is not None}
        foreign = sorted(given - KEYS[self.kind] - COMMON)
        if foreign:
            raise ValueError(f"{', '.join(foreign)}: not a key of kind = {self.kind!r}")
        if self.kind == "builtin" and not self.shared_file:
            foreign = sorted(given & (ARCHIVE | {"group"}))
            if foreign:
                raise ValueError(
                    f"{', '.join(foreign)}: not a key of kind = 'builtin' with name = {self.name!r},"
                    " only with that of a .npz file"
                )
        missing = [key for key in NEEDED.get(self.kind, ()) if getattr(self, key) is None]
        if missing:
            raise ValueError(f"kind = {self.kind!r} needs {' and '.join(missing)}")

    def _check_parts(self) -> None:
        if self.split is not None and "test" in self.model_fields_set:
            raise ValueError("test: the array named by split says already what is tested on; leave one out")
        if self.validation + (0 if self.split else self.test) >= 1:
            raise ValueError("validation and test together leave nothing to train on: give less than 1")

    def _check_stream(self) -> None:
        topics = [topic for topic in (self.topic, self.label_topic) if topic is not None]
        if len(set(topics)) < len(topics):
            raise ValueError("topic and label_topic are the same: labels need a topic of their own")
        if any(not topic or re.search(r"[+#\0]", topic) for topic in topics):
            raise ValueError("topic, label_topic: one topic each, without + and #")
        if self.fields is not None and len(set(self.fields)) < len(self.fields):
            raise ValueError("fields: each of them once")

    @property
    def shared_file(self) -> bool:
        """Whether the data set that is shared is a `.npz` file, not a known one."""
        return self.kind == "builtin" and self.name.lower().endswith(".npz")

    @property
    def share(self) -> Share:
        """This device's share of a built-in data set; raises `ValueError` in words if there is no such."""
        try:
            return Share(self.index, self.count, self.partition, self.seed)
        except SettingsError as error:  # pydantic names the table when it is told by ValueError
            raise ValueError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Part:
    """Raw samples x of shape (n, *shape), uint8, float32 or int64 (text); y int64 (n,), for text (n, T)."""

    x: Array
    y: Array

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, slots=True)
class LocalData:
    """All that a device learns from; values are raw, `normalisation` is learned from `train` alone."""

    input: Input
    shape: tuple[int, ...]
    labels: tuple[str, ...]
    train: Part
    validation: Part
    test: Part
    normalisation: Normalisation

    @property
    def examples(self) -> int:
        """Training samples."""
        return len(self.train)

    @property
    def classes(self) -> int:
        """Answers a model can give: labels, or characters of the vocabulary."""
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of samples before their values are in memory.

    `classes` (n,) is the row's class, or the role that speaks for text. `read` gives x and y of the rows
    asked for, in that order. How rows hang together: `segments` (n,) must not be torn apart, `ordered` rows
    are consecutive in time within a class, `parts` (n,) is TRAIN, VALIDATION or TEST already; with `carve`,
    validation is yet to be taken from TRAIN.
    """

    name: str
    input: Input
    shape: tuple[int, ...]
    labels: tuple[str, ...]
    classes: Array
    read: Callable[[Array], tuple[Array, Array]]
    groups: Array | None = None
    grouping: str | None = None
    """What the data set calls its groups: `by:GROUPING`."""
    segments: Array | None = None
    ordered: bool = False
    parts: Array | None = None
    carve: bool = False


def local_data(source: Source, rows: Array, settings: DataSettings) -> LocalData:
    """Split the rows of this device, read them, and learn the normalisation from its training part.

    The three parts are views of one array, so a device holds its share once. Raises `DataError` when a part
    would be empty, or a value is not finite.
    """
    if not len(rows):
        raise DataError(f"{source.name} is empty: there is nothing to learn from")
    check_labels(source)
    parts = split(source, rows, settings)
    wanted = {"training": 1.0, "validation": settings.validation, "test": settings.test}
    for (name, fraction), part in zip(wanted.items(), parts, strict=True):
        if fraction and not len(part):
            raise DataError(
                f"{source.name}: {len(rows)} samples on this device leave none for the {name} part;"
                f" {_advice(settings)}"
            )
    order = np.concatenate(parts)
    x, y = source.read(order)
    _check_finite(x, order, source.name)
    cuts = np.cumsum([len(part) for part in parts])[:-1]
    train, validation, test = map(Part, np.split(x, cuts), np.split(y, cuts))
    learned = Normalisation.learn(train.x, source.input)
    return LocalData(source.input, source.shape, source.labels, train, validation, test, learned)


def check_labels(source: Source) -> None:
    """Raise `DataError` when there is only one answer to learn."""
    if len(source.labels) < 2:
        raise DataError(f"{source.name} has only the label {source.labels}: at least two are needed")


def _advice(settings: DataSettings) -> str:
    if settings.split is None:
        return "bring more samples of each class, or change validation and test"
    return f"bring more samples, repair the array {settings.split!r}, or leave split out"


def _check_finite(x: Array, order: Array, name: str) -> None:
    if not np.issubdtype(x.dtype, np.floating):
        return
    for start in range(0, len(x), 1024):
        finite = np.isfinite(x[start : start + 1024]).reshape(len(x[start : start + 1024]), -1).all(axis=1)
        if not finite.all():
            row = order[start + int(np.argmin(finite))]
            raise DataError(
                f"{name}: sample {row} (from 0) holds a value that is not finite; repair or remove it"
            )


def split(source: Source, rows: Array, settings: DataSettings) -> tuple[Array, Array, Array]:
    """Return the rows for training, validation and test: class by class, and never through a segment."""
    rng = np.random.default_rng([settings.split_seed, 0x5911])
    v, t = settings.validation, settings.test
    if source.parts is None:
        part = _drawn(source, rows, (1 - v - t, v, t), rng)
    else:
        part = source.parts[rows]
        if source.carve:
            free = np.flatnonzero(part == TRAIN)
            part[free] = _drawn(source, rows[free], (1 - v, v, 0.0), rng)
    return rows[part == TRAIN], rows[part == VALIDATION], rows[part == TEST]


def _drawn(source: Source, rows: Array, fractions: Sequence[float], rng: np.random.Generator) -> Array:
    if source.segments is not None:
        return _by_segment(source.classes[rows], source.segments[rows], fractions, rng)
    return _by_row(source.classes[rows], fractions, None if source.ordered else rng)


def _by_row(classes: Array, fractions: Sequence[float], rng: np.random.Generator | None) -> Array:
    """Stratified by class; without `rng` (text) in order: first what is trained on, the test last."""
    part = np.zeros(len(classes), np.int64)
    owed = [0.0, 0.0, 0.0]
    for value in sorted(set(classes.tolist())):  # np.unique loads masked arrays: a megabyte
        rows = np.flatnonzero(classes == value)
        if rng is not None:
            rows = rng.permutation(rows)
        stop = len(rows)
        for kind in (TEST, VALIDATION):
            # What rounding took from one class is made up in the next. One sample of a class always stays for
            # training; the classes of text are roles, which need not.
            owed[kind] += fractions[kind] * len(rows)
            number = max(0, min(math.floor(owed[kind] + 0.5), stop - (rng is not None)))
            owed[kind] -= number
            part[rows[stop - number : stop]] = kind
            stop -= number
    return part


def _by_segment(
    classes: Array, segments: Array, fractions: Sequence[float], rng: np.random.Generator
) -> Array:
    """Whole segments, class by class; a segment belongs to the class of its first row."""
    _, first, segment = np.unique(segments, return_index=True, return_inverse=True)
    sizes = np.bincount(segment)
    part = np.zeros(len(first), np.int64)
    have = [0.0, 0.0, 0.0]
    for value in np.unique(classes[first]):
        members = rng.permutation(np.flatnonzero(classes[first] == value))
        part[members] = deal(sizes[members].tolist(), fractions, have)
    return part[segment]


def deal(sizes: Iterable[int], fractions: Sequence[float], have: list[float] | None = None) -> list[int]:
    """Give pieces, in order, to the part that is furthest behind its fraction; the first is for training.

    `have` is what the parts hold so far, and is brought up to date.
    """
    have = [0.0, 0.0, 0.0] if have is None else have
    parts: list[int] = []
    for size in sizes:
        total = sum(have) + size
        behind = [fraction * total - held for fraction, held in zip(fractions, have, strict=True)]
        part = TRAIN if not parts else max((TRAIN, TEST, VALIDATION), key=behind.__getitem__)
        have[part] += size
        parts.append(part)
    return parts


def input_of(shape: tuple[int, ...]) -> Input:
    """Return the kind of input that a sample's shape stands for."""
    kinds: dict[int, Input] = {3: "image", 2: "series", 1: "text"}
    return kinds[len(shape)]


def as_classes(
    values: Sequence[str], labels: tuple[str, ...] | None, where: Callable[[int], str]
) -> tuple[Array, tuple[str, ...]]:
    """Return the class of each label (n,) and the class names: those given, or the different ones in order.

    With names given, a label may also be the number of one (from 0), unless the names are numbers themselves.
    Raises `DataError` for an unknown label, with `where(i)` in front.
    """
    if labels is None:
        different = set(values)
        whole = all(re.fullmatch(r"-?\d{1,18}", value, re.ASCII) for value in different)
        labels = tuple(sorted(different, key=int)) if whole else tuple(sorted(different))
    number = {name: i for i, name in enumerate(labels)}
    if not any(re.fullmatch(r"-?\d+", name, re.ASCII) for name in labels):
        number |= {str(i): i for i in range(len(labels))}
    classes = np.empty(len(values), np.int64)
    for i, value in enumerate(values):
        found = number.get(value)
        if found is None:
            raise DataError(f"{where(i)}: unknown label {value!r}; the labels are {', '.join(labels)}")
        classes[i] = found
    return classes, labels


def gather(blocks: Iterator[Array], rows: Array, total: int, shape: tuple[int, ...], dtype: object) -> Array:
    """Keep the asked-for rows of a source that is read block by block, in the order asked for.

    Memory is that of the rows and one block. `blocks` is not read beyond the last row needed. Raises
    `DataError` when they hold less, or something else, than was said: the file was replaced in between.
    """
    out = np.empty((len(rows), *shape), np.dtype(dtype))  # type: ignore[call-overload]
    target = np.full(total, -1, np.int64)
    target[rows] = np.arange(len(rows))
    start, last = 0, int(rows.max(initial=-1))
    while start <= last:
        block = next(blocks, None)
        if block is None or not len(block) or block.shape[1:] != shape:
            raise DataError("the file changed while it was read: leave it alone until it is, and try again")
        place = target[start : start + len(block)]
        out[place[place >= 0]] = block[place >= 0]
        start += len(block)
    return out
