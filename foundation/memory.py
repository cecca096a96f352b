"""Giving back what is free between two stretches of work."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    # glibc keeps what was freed for whoever asks next; other C libraries have no such call, or no need.
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


def give_back() -> None:
    """Return freed memory to the system, where the C library can: 15 to 25 MB after a round of training."""
    trim = _trim()
    if trim is not None:
        trim(0)
