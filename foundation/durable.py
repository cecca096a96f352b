"""Files that are there whole or not at all, also after a power cut; secret ones from their first byte."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

SECRET = 0o600
"""For its owner alone."""


def write_whole(path: Path, content: bytes, *, mode: int = 0o666, group: int | None = None) -> None:
    """Write beside, sync, rename, sync the folder: after a power cut the old or the new file is there.

    `mode` is what the file may be, less the umask; `group` its group's number. Raises `OSError`, and then the
    old file stays and nothing is left beside it: on a full disk half a file takes the room of a whole one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _written_beside(path, content, mode, group)
    beside.replace(path)
    sync_folder(path.parent)


def write_first(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """The same for a file that is made once: of several writers the first one's stays. Raises `OSError`."""
    beside = _written_beside(path, content, mode, None)
    with suppress(FileExistsError):
        path.hardlink_to(beside)
    beside.unlink()
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _written_beside(path: Path, content: bytes, mode: int, group: int | None) -> Path:
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    beside.unlink(missing_ok=True)  # of an earlier process with this number
    try:
        with os.fdopen(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
            if group is not None:
                os.fchown(file.fileno(), -1, group)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return beside
