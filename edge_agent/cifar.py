"""CIFAR-10 (Krizhevsky, 2009) in two layouts: `.npz` parts, and the published binary files.

The published Python version is a pickle, which runs whatever code it holds when it is loaded; it never is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from edge_agent.files import BLOCK_BYTES, Archive, exactly, published, reading
from edge_agent.samples import DataSettings, Source, gather
from foundation.errors import DataError
from foundation.parameters import Array

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)

BINARY = "cifar-10-batches-bin"
PICKLED = "cifar-10-batches-py"
FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
RECORD_BYTES = 1 + 3 * 32 * 32
"""A label, then 1,024 red, 1,024 green and 1,024 blue pixels, row by row."""
RECORDS = 10_000
"""In each file."""


def cifar10(folder: Path, settings: DataSettings) -> Source:
    """Colour photographs, 32x32: the `.npz` parts where there are any, else the published binary files.

    Either is below `cifar10`; the published folder may also lie directly in the folder of the data sets.
    """
    own = folder / "cifar10"
    parts = sorted(own.glob("cifar10_*.npz"))
    if parts:
        return _archives(own)
    found = [place / BINARY for place in (own, folder) if (place / BINARY).is_dir()]
    if not found:
        for place in (own, folder):
            if (place / PICKLED).is_dir():
                raise DataError(
                    f"{place / PICKLED} holds Python pickles, which can run code and are never loaded:"
                    f" unpack the binary version, {ADDRESS}, into {own}"
                )
    return _binary(found[0] if found else own / BINARY, own)


def _archives(folder: Path) -> Source:
    files = [*sorted(folder.glob("cifar10_train_part*.npz")), folder / "cifar10_test.npz"]
    if len(files) < 2 or not files[-1].is_file():
        lacking = "cifar10_train_part1.npz" if len(files) < 2 else "cifar10_test.npz"
        raise DataError(
            f"{folder / lacking} is not there: it belongs to the other .npz files beside it; or move those"
            f" away and unpack {ADDRESS} into {folder}"
        )
    archives = [Archive(file) for file in files]
    for archive in archives:
        shape, dtype = archive.header("x")
        if shape[1:] != (32, 32, 3) or dtype != np.uint8 or archive.header("y")[0] != shape[:1]:
            raise DataError(f"{archive.path} does not hold 32x32x3 bytes with labels; fetch it again")
    y = np.concatenate([archive.whole("y") for archive in archives]).astype(np.int64)

    def read(rows: Array) -> tuple[Array, Array]:
        blocks = chain.from_iterable(archive.blocks("x") for archive in archives)
        turned = (block.transpose(0, 3, 1, 2) for block in blocks)
        return gather(turned, rows, len(y), SHAPE, np.uint8), y[rows]

    return Source("cifar10", "image", SHAPE, LABELS, y, read)


def _binary(folder: Path, unpack: Path) -> Source:
    files = published(folder, FILES, ADDRESS, unpack=str(unpack))
    y = np.concatenate([_labels(file) for file in files])

    def read(rows: Array) -> tuple[Array, Array]:
        blocks = chain.from_iterable(_records(file) for file in files)
        pixels = (block[:, 1:].reshape(-1, *SHAPE) for block in blocks)
        return gather(pixels, rows, len(y), SHAPE, np.uint8), y[rows]

    return Source("cifar10", "image", SHAPE, LABELS, y, read)


def _labels(file: Path) -> Array:
    with reading(file):
        size = file.stat().st_size
    if size != RECORDS * RECORD_BYTES:
        raise DataError(
            f"{file} has {size} bytes, the published one {RECORDS * RECORD_BYTES}: unpack {ADDRESS} again"
        )
    labels = np.concatenate([block[:, 0].astype(np.int64) for block in _records(file)])
    if labels.max() >= len(LABELS):
        row = int(labels.argmax())
        raise DataError(
            f"{file}: record {row} (from 0) has label {labels[row]}, not 0 to 9: unpack {ADDRESS} again"
        )
    return labels


def _records(file: Path) -> Iterator[Array]:
    """Yield records, (k, RECORD_BYTES), about a megabyte at a time."""
    step = BLOCK_BYTES // RECORD_BYTES
    with reading(file), file.open("rb") as stream:
        for start in range(0, RECORDS, step):
            count = min(step, RECORDS - start)
            data = exactly(stream, count * RECORD_BYTES)
            yield np.frombuffer(data, np.uint8).reshape(count, RECORD_BYTES)
