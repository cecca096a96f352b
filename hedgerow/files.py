"""Reports as files: looked at before hours of work, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from foundation.errors import SettingsError


def check_writable(path: Path | None) -> None:
    """Raise `SettingsError` before hours of work when a report could not be written after them."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "is a folder" if path.is_dir() else f"is to be in {path.parent}, which does not exist"
        raise SettingsError(f"{path} {what}: name a file in a folder that exists")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all; raises `SettingsError` when it cannot be written."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise SettingsError(f"{path} cannot be written ({error.strerror}): name another file") from error
