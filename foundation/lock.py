"""One process for one folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foundation.errors import SettingsError


@contextmanager
def hold(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however it ends.

    Raises `SettingsError` when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(
                f"{what} folder {folder} is in use by another process: stop that one, or name another folder"
            ) from error
        yield
    finally:
        os.close(handle)
