"""Content-addressed files: each named by the SHA-256 of its bytes, and checked against it when read.

blobs/ab/abcd...   a blob
blobs/new/...      being written; whatever is left there after a crash is swept
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

from foundation.durable import sync_folder
from foundation.errors import StoreError

_DIGEST = re.compile(r"[0-9a-f]{64}")


class BlobStore(Protocol):
    """Where bytes are kept by their SHA-256: a folder (`Blobs`), or an S3-compatible store (s3.py)."""

    def put(self, body: bytes) -> str:
        """Write a blob and return its digest; durable when this returns. Raises `StoreError`."""
        ...

    def get(self, digest: str) -> bytes:
        """Return a blob's bytes; raises `StoreError` by name when it is missing or damaged."""
        ...

    def all(self) -> Iterator[str]:
        """Yield every digest that is kept."""
        ...

    def discard(self, digests: Collection[str]) -> int:
        """Remove blobs and return how many there were; raises `StoreError`."""
        ...

    def sweep(self, referenced: Collection[str]) -> int:
        """Remove every blob not in `referenced` and all leftovers of writing; returns how many went."""
        ...


def checked(digest: str, body: bytes) -> bytes:
    """Return a blob's bytes; raises `StoreError` where they are others."""
    found = hashlib.sha256(body).hexdigest()
    if found != digest:
        raise StoreError(
            f"blob {digest} is damaged: its {len(body)} bytes have digest {found};"
            " restore the store from a copy"
        )
    return body


def checked_name(digest: str) -> str:
    """Return a digest; raises `StoreError` for what is none, and could lead elsewhere."""
    if not _DIGEST.fullmatch(digest):
        raise StoreError(f"{digest!r} is not the name of a blob")
    return digest


class Blobs:
    """A folder of blobs. Writers and sweepers must hold the store's write lock; readers need nothing."""

    def __init__(self, folder: Path, *, make: bool = True) -> None:
        """Take `folder`, and make it unless it is only to be read."""
        self._folder = folder
        self._new = folder / "new"
        if not make:
            return
        try:
            self._new.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the blob folder {folder} cannot be made: {error}") from error

    def put(self, body: bytes) -> str:
        """Write a blob and return its digest; when this returns, it survives a power cut.

        Raises `StoreError` when the disk refuses.
        """
        digest = hashlib.sha256(body).hexdigest()
        try:
            if not self._holds(digest, body):
                self._write(digest, body)
        except OSError as error:
            raise StoreError(f"blob {digest} ({len(body)} bytes) could not be written: {error}") from error
        return digest

    def get(self, digest: str) -> bytes:
        """Return a blob's bytes; raises `StoreError` by name when it is missing or damaged."""
        try:
            body = self._path(digest).read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"blob {digest} is missing: restore the store's folder from a copy") from error
        except OSError as error:
            raise StoreError(f"blob {digest} cannot be read: {error}") from error
        return checked(digest, body)

    def all(self) -> Iterator[str]:
        """Yield every digest that has a file."""
        for path in self._folder.glob("??/*"):
            if _DIGEST.fullmatch(path.name):
                yield path.name

    def discard(self, digests: Collection[str]) -> int:
        """Remove blobs and return how many there were; raises `StoreError` when the disk refuses."""
        gone = 0
        for digest in digests:
            path = self._path(digest)
            try:
                path.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StoreError(f"blob {digest} cannot be removed: {error}") from error
            gone += 1
        return gone

    def sweep(self, referenced: Collection[str]) -> int:
        """Remove every blob not in `referenced` and all leftovers of writing; returns how many blobs went."""
        for leftover in self._new.iterdir():
            leftover.unlink(missing_ok=True)
        return self.discard([digest for digest in self.all() if digest not in referenced])

    def _path(self, digest: str) -> Path:
        return self._folder / checked_name(digest)[:2] / digest

    def _holds(self, digest: str, body: bytes) -> bool:
        # A file cut short by an older crash or a bad disk must not stand for the blob: compare, then trust.
        path = self._path(digest)
        return path.exists() and path.stat().st_size == len(body) and path.read_bytes() == body

    def _write(self, digest: str, body: bytes) -> None:
        path = self._path(digest)
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            sync_folder(self._folder)
        handle, name = tempfile.mkstemp(dir=self._new)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
