"""A device's data: `load` reads what `[data]` in `agent.toml` names; one function for each built-in data set.

A built-in data set comes with the federation's experiments: each device finds the same files, takes its share
by the seed, and keeps nothing but its share in memory.
"""

from __future__ import annotations

import gzip
import importlib.util
import re
import struct
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import numpy as np

from edge_agent import sources, stream
from edge_agent.samples import DataSettings, Input, LocalData, Part, Source, gather, local_data
from edge_agent.sources import BLOCK_BYTES, Archive, exactly, reading
from foundation.errors import DataError, SettingsError
from foundation.parameters import Array
from foundation.partition import shares

__all__ = ["BUILTIN", "DataSettings", "Input", "LocalData", "Part", "dataset", "load"]

Opener: TypeAlias = Callable[[Path, DataSettings], Source]

BUILTIN: dict[str, Opener] = {}
"""The built-in data sets by name."""

VOCABULARY = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ROLE_CHARACTERS = 1000
"""Roles that say less than this are left out."""


def dataset(name: str) -> Callable[[Opener], Opener]:
    """Register a function that opens the data set of that name, given the folder of all data sets."""

    def register(opener: Opener) -> Opener:
        BUILTIN[name] = opener
        return opener

    return register


def load(settings: DataSettings, data_dir: Path | None = None, buffer_dir: Path | None = None) -> LocalData:
    """Read this device's data and split it for training, validation and test; the same every time.

    `data_dir` holds the built-in data sets, unless `settings.path` says otherwise; `buffer_dir` is where a
    `StreamRecorder` writes. Raises `DataError` in words for the device's owner: which file, which row, what
    to do.
    """
    if settings.kind == "builtin":
        source = _open_builtin(settings, data_dir)
        try:
            rows = own_rows(source, settings)
        except SettingsError as error:  # found out only here; the agent stays up and says so
            raise DataError(f"{settings.name}: {error}") from error
        return local_data(source, rows, settings)
    if settings.kind == "python":
        result = sources.python_function(settings)
        if isinstance(result, LocalData):
            return result
        source = result
    elif settings.kind == "mqtt_stream":
        source = stream.recorded(settings, buffer_dir)
    else:
        readers = {"npz": sources.npz, "csv": sources.csv_file, "image_folder": sources.image_folder}
        source = readers[settings.kind](settings)
    return local_data(source, np.arange(len(source.classes)), settings)


def _open_builtin(settings: DataSettings, data_dir: Path | None) -> Source:
    if settings.name not in BUILTIN:
        raise DataError(f"there is no data set {settings.name!r}; there are {', '.join(sorted(BUILTIN))}")
    folder = settings.path.expanduser() if settings.path else data_dir
    if folder is None and settings.name != "digits":
        raise DataError(
            f"{settings.name} needs the folder of the data sets: give --data-dir, set HEDGEROW_DATA, or path"
            " in [data]"
        )
    return BUILTIN[settings.name](folder or Path(), settings)


def own_rows(source: Source, settings: DataSettings) -> Array:
    """Return the rows of this device; rows of one segment stay on one device."""
    everyone = np.arange(len(source.classes))
    groups = source.groups
    natural = settings.partition == "natural"
    if natural and groups is not None:
        # Samples of people who do not take part should not count towards the limit.
        everyone = everyone[np.isin(groups, np.unique(groups)[: settings.count])]
    if settings.limit is not None and settings.limit < len(everyone):
        everyone = _limited(source, everyone, settings)
    units = everyone if source.segments is None else source.segments[everyone]
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    rows = everyone[first]
    chosen = shares(source.classes[rows], None if groups is None else groups[rows], settings.share)
    mine: Array = everyone[np.isin(unit, chosen)]
    return mine


def _limited(source: Source, rows: Array, settings: DataSettings) -> Array:
    """Return `settings.limit` of the rows, as equal in number over classes (and people) as can be."""
    stratum = source.classes[rows]
    if settings.partition == "natural" and source.groups is not None:
        stratum = np.unique(np.stack([stratum, source.groups[rows]]), axis=1, return_inverse=True)[1].ravel()
    order = np.arange(len(rows))
    if not source.ordered:
        # Whole segments before parts of others; text goes on where it began.
        units = rows if source.segments is None else source.segments[rows]
        unit = np.unique(units, return_inverse=True)[1]
        rank = np.random.default_rng([settings.seed, 0x11417]).permutation(int(unit.max()) + 1)
        order = np.argsort(rank[unit], kind="stable")
    left = settings.limit or 0
    values, counts = np.unique(stratum, return_counts=True)
    kept: list[Array] = []
    for done, which in enumerate(np.argsort(counts, kind="stable")):
        quota = min(int(counts[which]), left // (len(values) - done))
        kept.append(order[stratum[order] == values[which]][:quota])
        left -= quota
    limited: Array = rows[np.sort(np.concatenate(kept))]
    return limited


@dataset("digits")
def digits(folder: Path, settings: DataSettings) -> Source:
    """1,797 handwritten digits, 8x8, values 0 to 16, from the file that scikit-learn brings."""
    # Found, not imported: scikit-learn and scipy would take 80 MB of a device's memory for one small file.
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise DataError("digits come with scikit-learn: pip install 'hedgerow[demo]'")
    file = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with reading(file), gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    x, y = table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1].astype(np.int64)
    labels = tuple("0123456789")
    return Source("digits", "image", (1, 8, 8), labels, y, lambda rows: (x[rows], y[rows]))


@dataset("mnist")
def mnist(folder: Path, settings: DataSettings) -> Source:
    """70,000 handwritten digits, 28x28, in the four published files."""
    return _idx_source(folder / "mnist", tuple("0123456789"))


@dataset("fashion-mnist")
def fashion_mnist(folder: Path, settings: DataSettings) -> Source:
    """70,000 images of clothing, 28x28, in the four published files."""
    names = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
    return _idx_source(folder / "fashion-mnist", tuple(names.split(",")))


def _idx_source(folder: Path, labels: tuple[str, ...]) -> Source:
    files = [
        (folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz")
        for part in ("train", "t10k")
    ]
    y = np.concatenate([_idx_labels(file, len(labels)) for _, file in files])
    counts = [_idx_count(images, like) for images, like in files]

    def read(rows: Array) -> tuple[Array, Array]:
        blocks = chain.from_iterable(_idx_blocks(images) for images, _ in files)
        return gather(blocks, rows, sum(counts), (1, 28, 28), np.uint8), y[rows]

    return Source(folder.name, "image", (1, 28, 28), labels, y, read)


def _idx_header(stream: gzip.GzipFile, file: Path, dimensions: int) -> tuple[int, ...]:
    """Read an IDX header (big-endian: two zeros, type 8 for bytes, dimensions, then each side)."""
    magic, *sides = struct.unpack(f">I{dimensions}I", exactly(stream, 4 + 4 * dimensions))
    if magic != 0x0800 + dimensions:
        raise DataError(f"{file} is not an IDX file of bytes in {dimensions} dimensions; fetch it again")
    return tuple(sides)


def _idx_labels(file: Path, classes: int) -> Array:
    with reading(file), gzip.open(file) as packed:
        (count,) = _idx_header(packed, file, 1)
        # At most as much as the file holds is read, whatever its header promises.
        y = np.frombuffer(packed.read(count + 1), np.uint8).astype(np.int64)
    if len(y) != count or not count or y.max() >= classes:
        raise DataError(f"{file} does not hold {count} labels below {classes}; fetch it again")
    return y


def _idx_count(images: Path, labels: Path) -> int:
    with reading(images), gzip.open(images) as packed:
        count, height, width = _idx_header(packed, images, 3)
    with reading(labels), gzip.open(labels) as packed:
        (expected,) = _idx_header(packed, labels, 1)
    if (count, height, width) != (expected, 28, 28):
        raise DataError(
            f"{images} holds {count} images of {height}x{width}, not {expected} of 28x28; fetch it again"
        )
    return count


def _idx_blocks(file: Path) -> Iterator[Array]:
    with reading(file), gzip.open(file) as packed:
        count, height, width = _idx_header(packed, file, 3)
        step = BLOCK_BYTES // (height * width)
        for start in range(0, count, step):
            rows = min(step, count - start)
            pixels = exactly(packed, rows * height * width)
            yield np.frombuffer(pixels, np.uint8).reshape(rows, 1, height, width)


@dataset("cifar10")
def cifar10(folder: Path, settings: DataSettings) -> Source:
    """Colour photographs, 32x32, from however many `.npz` parts are there."""
    folder = folder / "cifar10"
    archives = [
        Archive(file)
        for file in [*sorted(folder.glob("cifar10_train_part*.npz")), folder / "cifar10_test.npz"]
    ]
    for archive in archives:
        shape, dtype = archive.header("x")
        if shape[1:] != (32, 32, 3) or dtype != np.uint8 or archive.header("y")[0] != shape[:1]:
            raise DataError(f"{archive.path} does not hold 32x32x3 bytes with labels; fetch it again")
    y = np.concatenate([archive.whole("y") for archive in archives]).astype(np.int64)
    names = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"

    def read(rows: Array) -> tuple[Array, Array]:
        blocks = chain.from_iterable(archive.blocks("x") for archive in archives)
        turned = (block.transpose(0, 3, 1, 2) for block in blocks)
        return gather(turned, rows, len(y), (3, 32, 32), np.uint8), y[rows]

    return Source("cifar10", "image", (3, 32, 32), tuple(names.split(",")), y, read)


@dataset("uci-har")
def uci_har(folder: Path, settings: DataSettings) -> Source:
    """30 people, six activities: windows of 128 readings of 9 channels; windows of a segment overlap."""
    archive = Archive(folder / "uci-har" / "uci_har.npz")
    shape, _ = archive.header("x")
    y, people, segments = (archive.whole(key).astype(np.int64) for key in ("y", "subject", "segment"))
    if shape[1:] != (128, 9) or any(len(values) != shape[0] for values in (y, people, segments)):
        raise DataError(f"{archive.path} does not hold windows of 128x9 with their labels; fetch it again")
    names = "WALKING,WALKING_UPSTAIRS,WALKING_DOWNSTAIRS,SITTING,STANDING,LAYING"

    def read(rows: Array) -> tuple[Array, Array]:
        return gather(archive.blocks("x"), rows, len(y), (128, 9), np.float32), y[rows]

    return Source(
        "uci-har", "series", (128, 9), tuple(names.split(",")), y, read, groups=people, segments=segments
    )


@dataset("shakespeare")
def shakespeare(folder: Path, settings: DataSettings) -> Source:
    """Roles that say 1,000 characters or more, in windows that do not overlap; the next character is asked.

    Every label is a character, so that all devices agree on all 65 of them.
    """
    file = folder / "shakespeare" / "input.txt"
    roles = _roles(file)
    names = sorted(name for name, text in roles.items() if len(text) >= ROLE_CHARACTERS)
    window = settings.window or 64
    numbers = np.full(256, 255, np.uint8)
    numbers[np.frombuffer(VOCABULARY.encode(), np.uint8)] = np.arange(len(VOCABULARY))
    ids = {name: numbers[np.frombuffer(roles[name].encode("latin-1"), np.uint8)] for name in names}
    counts = [(len(ids[name]) - 1) // window for name in names]
    if not sum(counts) or any(values.max() == 255 for values in ids.values()):
        raise DataError(
            f"{file} has other characters than the 65 of tiny Shakespeare, or too few; fetch it again"
        )
    role = np.repeat(np.arange(len(names)), counts)
    start = window * np.concatenate([np.arange(count) for count in counts])

    def read(rows: Array) -> tuple[Array, Array]:
        cut = [ids[names[role[row]]][start[row] : start[row] + window + 1] for row in rows.tolist()]
        both = np.array(cut, np.int64).reshape(len(rows), window + 1)
        return both[:, :-1], both[:, 1:]

    return Source(
        "shakespeare",
        "text",
        (window,),
        tuple(VOCABULARY),
        role,
        read,
        groups=np.array(names)[role],
        ordered=True,
    )


def _roles(file: Path) -> dict[str, str]:
    """Return what each role says, its speeches joined by line ends; headings without a speech are dropped."""
    with reading(file):
        text = file.read_bytes().decode("latin-1")
    speeches: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        heading, _, speech = block.strip("\n").partition("\n")
        if re.fullmatch(r"[^\n]+:", heading) and speech:
            speeches.setdefault(heading[:-1], []).append(speech)
    return {name: "\n".join(said) for name, said in speeches.items()}
