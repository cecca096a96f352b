"""The testbed of the kill matrix as a fleet: its agents have joined, and every letter has a seal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_agent.enrolment import PASSWORD
from foundation.errors import HedgerowError
from hedgerow.chaos_bed import AGENTS, STEP_S, Bed
from hedgerow.children import stop_all
from hedgerow.demo import broker_table


class JoinedBed(Bed):
    """A bed whose coordinator takes sealed letters alone; its broker asks nobody who he is."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        """Prepare a bed in `folder`, with a broker of its own."""
        super().__init__(folder, None, seed)

    def start(self) -> None:
        """Start the broker, let both agents join, start them; raises `HedgerowError` where that fails."""
        assert self.own is not None
        self.own.start()
        self._url = self.own.url
        table = {**self._ours(), "folder": str(self.store), "http": {"enabled": False}, "autostart": False}
        config = self._spawn("coordinator", "coordinator", {**table, "mqtt": broker_table(self._url)})
        words = ("coordinator", "invite", "--devices", str(len(AGENTS)), "--json", "--config", str(config))
        tokens = json.loads(self._said(words))["tokens"]
        for name, token in zip(AGENTS, tokens, strict=True):
            self._said((
                "edge_agent", "join", self._url, "--token", token, "--name", name, "--vault",
                str(self.vault(name)), "--config", str(self.folder / f"{name}.joined.toml"),
            ))  # fmt: skip
        stop_all([self._children.pop("coordinator")])
        for name in AGENTS:
            self._start_agent(name)

    def _said(self, words: Sequence[str]) -> str:
        try:
            done = subprocess.run(
                [sys.executable, "-m", *words], capture_output=True, text=True, check=False, timeout=STEP_S
            )
        except subprocess.TimeoutExpired as error:
            raise HedgerowError(f"{' '.join(words[:2])} did not end within {STEP_S:.0f} s") from error
        if done.returncode:
            raise HedgerowError(f"{' '.join(words[:2])}: {done.stderr.strip()}")
        return done.stdout

    def _ours(self) -> dict[str, Any]:
        return {"federation": self._federation, "enrolment": {"enabled": True}}

    def _coordinator_table(self) -> dict[str, Any]:
        return super()._coordinator_table() | self._ours()

    def _agent_table(self, name: str) -> dict[str, Any]:
        table = super()._agent_table(name)
        mine = {"username": name, "password_file": str(self.vault(name) / PASSWORD)}
        return table | {"mqtt": table["mqtt"] | mine}
