"""Child processes that end with us: stopped in reverse order, and killed by the kernel if we are killed."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foundation.process import bound_to_parent

STOP_S = 10.0


@dataclass
class Child:
    """One child process and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self, lines: int = 12) -> str:
        """Return the end of its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


def spawn(name: str, command: Sequence[str], log: Path, environment: dict[str, str]) -> Child:
    """Start a command in a process group of its own, so that Ctrl-C reaches us first."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            bound_to_parent(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            process_group=0,
        )
    return Child(name, process, log)


def stop_all(children: Sequence[Child]) -> None:
    """Ask all to stop, last first, wait, and kill what does not; agents go before what they need."""
    for child in reversed(children):
        if child.process.poll() is None:
            child.process.terminate()
    for child in reversed(children):
        try:
            child.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.process.send_signal(signal.SIGKILL)
            child.process.wait()
