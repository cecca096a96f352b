"""Holding little memory; giving back what is free is `foundation.memory`'s."""

from __future__ import annotations

import os

from foundation.memory import one_pool


def hold_little() -> None:
    """Tell the libraries of this process to keep little: call it at the start, before torch is loaded.

    All threads share one pool of memory, where glibc would keep one for each: an agent trains in one thread
    at a time, so they do not wait for one another. oneDNN, where torch computes with it (not on x86, see
    foundation/nn/kernels.py), keeps a kernel for every shape it has met, 1,024 of them, and pruning meets
    new shapes all the time: 64 are more than a step needs. Both together took 8 MB off a training agent here.
    What the environment says already stands.
    """
    one_pool()
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
