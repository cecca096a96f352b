"""Holding little memory; giving back what is free is `foundation.memory`'s."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

_M_ARENA_MAX = -8
"""glibc's malloc.h."""


def hold_little() -> None:
    """Tell the libraries of this process to keep little: call it at the start, before torch is loaded.

    All threads share one pool of memory, where glibc would keep one for each: an agent trains in one thread
    at a time, so they do not wait for one another. oneDNN, where torch computes with it (not on x86, see
    foundation/nn/kernels.py), keeps a kernel for every shape it has met, 1,024 of them, and pruning meets
    new shapes all the time: 64 are more than a step needs. Both together took 8 MB off a training agent here.
    What the environment says already stands.
    """
    mallopt: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
