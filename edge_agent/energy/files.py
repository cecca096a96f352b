"""Small system files that are read again and again: one descriptor each, never 0 for an error."""

from __future__ import annotations

import os
from pathlib import Path


class NumberFile:
    """A file that holds one whole number, read through a descriptor that stays open.

    Reading so takes about a hundredth of opening, reading and closing each time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def read(self) -> int | None:
        """Return the number; `None` where there is none to be had. It is looked for anew the next time."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            # What was removed must not go on answering with its last words.
            if os.fstat(self._descriptor).st_nlink > 0:
                return int(os.pread(self._descriptor, 64, 0))
        except (OSError, ValueError):
            pass
        self.close()
        return None

    def close(self) -> None:
        """Give the descriptor back; reading opens another."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


def text_of(path: Path) -> str | None:
    """Return a system file's text without NUL and blanks at its ends; `None` where it cannot be read."""
    try:
        return path.read_bytes().decode(errors="replace").strip("\0 \n")
    except OSError:
        return None
