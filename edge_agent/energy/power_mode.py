"""A Jetson's power mode by its name: which clocks and cores are allowed. Read from two files.

Its number is no identity: the same number means another mode in another release of the system.
"""

from __future__ import annotations

import re
from pathlib import Path

from edge_agent.energy.files import text_of

STATUS = "var/lib/nvpmodel/status"
MODES = "etc/nvpmodel.conf"
MOST = 100
"""Characters of a name."""

_NOW = re.compile(r"pmode:\s*(\d{1,9})")
_MODE = re.compile(r"^\s*<\s*POWER_MODEL\s+ID=(\d{1,9})\s+NAME=([^\s>]+)", re.MULTILINE)


def power_mode(root: Path = Path("/")) -> str | None:
    """Return the name of the present mode; `None` on a board without modes, or where nobody says."""
    now = _NOW.search(text_of(root / STATUS) or "")
    if now is None:
        return None
    names = {int(number): name for number, name in _MODE.findall(text_of(root / MODES) or "")}
    name = names.get(int(now.group(1)))
    return None if name is None else name[:MOST]
