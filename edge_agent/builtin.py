"""The built-in data sets by name; those that are published in a form of their own are read by a module each.

Published test samples are samples like the others: a device splits its share by itself.
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

from edge_agent.cifar import cifar10
from edge_agent.files import BLOCK_BYTES, exactly, published, reading
from edge_agent.har import uci_har
from edge_agent.samples import DataSettings, Source, gather
from foundation.errors import DataError
from foundation.parameters import Array

Opener: TypeAlias = Callable[[Path, DataSettings], Source]

BUILTIN: dict[str, Opener] = {"cifar10": cifar10, "uci-har": uci_har}
"""What opens each data set, given the folder of all of them."""

MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION_MNIST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"

VOCABULARY = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ROLE_CHARACTERS = 1000
"""Roles that say less than this are left out."""


def dataset(name: str) -> Callable[[Opener], Opener]:
    """Register a function that opens the data set of that name."""

    def register(opener: Opener) -> Opener:
        BUILTIN[name] = opener
        return opener

    return register


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
    return _idx_source(folder / "mnist", MNIST, tuple("0123456789"))


@dataset("fashion-mnist")
def fashion_mnist(folder: Path, settings: DataSettings) -> Source:
    """70,000 images of clothing, 28x28, in the four published files."""
    names = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
    return _idx_source(folder / "fashion-mnist", FASHION_MNIST, tuple(names.split(",")))


def _idx_source(folder: Path, address: str, labels: tuple[str, ...]) -> Source:
    kinds = ("images-idx3", "labels-idx1")
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in kinds]
    found = published(folder, names, address)
    files = [(found[0], found[1]), (found[2], found[3])]
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


@dataset("shakespeare")
def shakespeare(folder: Path, settings: DataSettings) -> Source:
    """Roles that say 1,000 characters or more, in windows that do not overlap; the next character is asked.

    Every label is a character, so that all devices agree on all 65 of them.
    """
    (file,) = published(folder / "shakespeare", ["input.txt"], SHAKESPEARE)
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
        grouping="role",
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
