"""Whether this is a container: energy that is read in one is its whole host's."""

from __future__ import annotations

import re
from pathlib import Path

from edge_agent.energy.files import text_of

_MARKS = (".dockerenv", "run/.containerenv")
_NAMES = re.compile(r"docker|kubepods|containerd|lxc|libpod")


def in_container(root: Path = Path("/")) -> bool:
    """Whether this file system is a container's: then counters and sensors in it are its host's."""
    if any((root / mark).exists() for mark in _MARKS):
        return True
    return _NAMES.search(text_of(root / "proc/1/cgroup") or "") is not None


def busy_is_hidden(root: Path = Path("/")) -> bool:
    """Whether `/proc/stat` was replaced by one container's own view (lxcfs): no share of the host's then."""
    return "lxcfs /proc/stat" in (text_of(root / "proc/self/mounts") or "")
