"""Child processes that end with their parent, even one that was killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# argv: the parent's pid, then the command. A parent that died before the prctl is seen by its pid.
STARTER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def bound_to_parent(command: Sequence[str]) -> list[str]:
    """Return the command behind a tiny starter that ties it to this process (Linux; elsewhere unchanged).

    The starter sets the parent-death signal and then becomes the command, so the pid is the command's. The
    kernel ties that signal to the *thread* that starts the child: start it from one that lives as long as
    the child should. `command[0]` is the path of a program.
    """
    if sys.platform != "linux":
        return [*command]
    return [sys.executable, "-I", "-S", "-c", STARTER, str(os.getpid()), *command]
