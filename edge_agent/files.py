"""Reading files that are not believed: what is missing, cut short or foreign is a `DataError` in words."""

from __future__ import annotations

import csv
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from gzip import GzipFile
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, TypeAlias

import numpy as np

from edge_agent.samples import gather
from foundation.errors import DataError
from foundation.parameters import Array

BLOCK_BYTES = 1 << 20
"""About how much of a file is in memory while rows are picked from it."""
SHOWN = 6
"""Files that a message lists before it counts the rest."""

UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,  # a compression that zipfile does not know
    csv.Error,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)

Header: TypeAlias = tuple[tuple[int, ...], "np.dtype[Any]"]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what reading a missing, damaged or foreign file raises into a `DataError` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there: check the path in [data]") from error
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read, it may be damaged or not what it seems: {error}") from error


class Archive:
    """A `.npz` whose arrays are read row by row, so that an array need not fit into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def header(self, key: str) -> Header:
        """Return shape and type of an array; raises `DataError` if there is none, or its bytes do not fit."""
        with self._open(key) as (_, header):
            return header

    def names(self) -> list[str]:
        """Return the names of its arrays."""
        with reading(self.path), zipfile.ZipFile(self.path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def has(self, key: str) -> bool:
        """Whether there is an array of that name."""
        return key in self.names()

    def whole(self, key: str) -> Array:
        """Return one array."""
        shape, dtype = self.header(key)
        if not shape:
            raise DataError(f"{self.path}: {key} is a single value, not an array")
        return gather(self.blocks(key), np.arange(shape[0]), shape[0], shape[1:], dtype)

    def blocks(self, key: str) -> Iterator[Array]:
        """Yield the rows of an array, about a megabyte at a time."""
        with self._open(key) as (stream, (shape, dtype)):
            size = dtype.itemsize * math.prod(shape[1:])
            step = max(1, BLOCK_BYTES // max(1, size))
            for start in range(0, shape[0], step):
                rows = min(step, shape[0] - start)
                yield np.frombuffer(exactly(stream, rows * size), dtype).reshape(rows, *shape[1:])

    @contextmanager
    def _open(self, key: str) -> Iterator[tuple[IO[bytes], Header]]:
        with reading(self.path), zipfile.ZipFile(self.path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if key not in names:
                raise DataError(f"{self.path} has no array {key!r}, only {', '.join(names) or 'nothing'}")
            member = archive.getinfo(f"{key}.npy")
            if member.flag_bits & 1:
                raise DataError(f"{self.path} is encrypted: save it without a password")
            with archive.open(member) as stream:
                yield stream, _npy_header(stream, member.file_size, f"{self.path}: {key}")


def _npy_header(stream: IO[bytes], file_bytes: int, where: str) -> Header:
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise DataError(f"{where} is of npy version {version}: save it with numpy.savez")
    try:
        shape, fortran, dtype = readers[version](stream)
    except (
        SyntaxError,
        TokenError,
    ) as error:  # what numpy lets through of a header that is no Python literal
        raise DataError(f"{where} has a damaged header ({error}): save it again") from error
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects, which are not loaded: save numbers or text")
    if fortran and len(shape) > 1:
        raise DataError(f"{where} is stored column by column: save numpy.ascontiguousarray of it")
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != file_bytes - stream.tell():
        raise DataError(f"{where} promises shape {shape} but does not hold that many values: save it again")
    return shape, dtype


def exactly(stream: IO[bytes] | GzipFile, size: int) -> bytes:
    """Read `size` bytes; raises `EOFError` when there are fewer."""
    data = stream.read(size)
    if len(data) != size:
        raise EOFError(f"it ends {size - len(data)} bytes too early")
    return data


def published(folder: Path, files: Sequence[str], address: str, unpack: str = "") -> list[Path]:
    """Return the files of a published data set; raises `DataError` for the first that is not there.

    The error says where it is published and what the folder should hold. `address` ends with `/` where each
    file is published by its own name; otherwise it is an archive, and `unpack` says into which folder.
    """
    paths = [folder / file for file in files]
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    listed = ", ".join(files[:SHOWN]) + more
    for path, file in zip(paths, files, strict=True):
        if not path.is_file():
            how = (
                f"unpack {address} into {unpack}"
                if unpack
                else f"download {address}{file} into {folder} as it is"
            )
            raise DataError(
                f"{path} is not there: {how} ({folder.name} holds {listed}), or say where the data"
                " sets are with --data-dir, HEDGEROW_DATA or path in [data]"
            )
    return paths
