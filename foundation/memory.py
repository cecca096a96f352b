"""Holding little memory: one pool for all threads, and what is free given back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    # glibc keeps what was freed for whoever asks next; other C libraries have no such call, or no need.
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3
"""glibc's malloc.h."""


def one_pool(large_bytes: int | None = None) -> None:
    """Let all threads share one pool of memory, where glibc would keep one for each; call it at the start.

    With `large_bytes`, what is at least so large is no part of the pool and goes back to the system as soon
    as it is freed: buffers that come and go leave no holes between what stays.
    """
    mallopt: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_ARENA_MAX, 1)
    if large_bytes is not None:
        mallopt(_M_MMAP_THRESHOLD, large_bytes)


def give_back() -> None:
    """Return freed memory to the system, where the C library can: 15 to 25 MB after a round of training."""
    trim = _trim()
    if trim is not None:
        trim(0)
