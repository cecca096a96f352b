"""Rings over a real broker: agents, their servers and the coordinator are processes; servers are asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hedgerow.broker import EmbeddedBroker
from tests.broker.conftest import LONG, ONE, free_port
from tests.fleet import run_settings
from tests.processes import AGENTS, Processes, until

pytestmark = [ONE, LONG, pytest.mark.broker, pytest.mark.slow]
RINGS = {"enabled": True, "canary": ["d0", "d1"], "rings": [1.0], "soak_s": 3600.0, "errors": 0.1}


class Federation:
    """Three agents that serve, and a coordinator with its API."""

    def __init__(self, folder: Path, port: int) -> None:
        self.processes = Processes(folder, port, more={"serve": {"enabled": True}})
        self.run = run_settings(rounds=2, export_every=1, deadline_s=120)
        self.address = f"http://127.0.0.1:{free_port()}"
        self.client = httpx.Client(base_url=f"{self.address}/api/v1", timeout=20)

    def start_coordinator(self) -> None:
        http = {"enabled": True, "port": int(self.address.rpartition(":")[2])}
        self.processes.start_coordinator(self.run, exit_when_done=False, http=http, rollout=RINGS)

    def get(self, path: str) -> Any:
        try:
            answer = self.client.get(path)
        except httpx.TransportError:
            return None  # not listening yet
        return answer.json() if answer.status_code == 200 else None

    def serving(self, device: str) -> str | None:
        """Ask a device's server which round's model answers."""
        found = self.get(f"/fleet/{device}")
        address = found and found["status"]["serving"]
        if not address:
            return None
        try:
            index = httpx.post(f"{address}/v2/repository/index", timeout=20).json()
        except httpx.TransportError:
            return None
        return str(index[0]["version"])

    def serve(self, *wanted: str) -> bool:
        return [self.serving(device) for device in AGENTS] == list(wanted)

    def rollout(self, round: int) -> dict[str, Any]:
        found = self.get("/rollouts") or []
        return next((one for one in found if one["round"] == round), {"state": None, "members": []})

    def hedgerow(self, *words: str) -> tuple[int, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "hedgerow.cli", "model", *words, "--json"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, json.loads(done.stdout or "null")


@pytest.fixture
def federation(broker: EmbeddedBroker, tmp_path: Path) -> Iterator[Federation]:
    found = Federation(tmp_path, broker.port)
    try:
        found.start_coordinator()
        for name in AGENTS:
            found.processes.start_agent(name)
        yield found
    finally:
        found.client.close()
        found.processes.close()


def test_a_breach_in_the_canaries_takes_them_back_and_no_other_has_it(federation: Federation) -> None:
    until(lambda: federation.serve("2", "2", "1"), within_s=180, every_s=0.2)
    assert federation.rollout(2)["state"] == "open"

    federation.processes.kill("coordinator")
    federation.processes.kill("d0")
    federation.start_coordinator()
    federation.processes.start_agent("d0")
    until(lambda: federation.serve("2", "2", "1"), every_s=0.2)
    assert federation.rollout(2)["state"] == "open"

    address = federation.get("/fleet/d1")["status"]["serving"]
    answer = httpx.post(f"{address}/admin/rollback", json={"reason": "wrong at night"}, timeout=20)
    assert answer.status_code == 200
    until(lambda: federation.rollout(2)["state"] == "stopped", every_s=0.1)
    assert federation.rollout(2)["reason"].startswith(
        "1 of 2 devices refused the new model or rolled it back"
    )
    until(lambda: federation.serve("1", "1", "1"), every_s=0.2)

    folder = str(federation.processes.folder / "runs" / federation.run.name)
    code, listed = federation.hedgerow("list", "--folder", folder)
    assert code == 0
    states = {(one["device"], one["round"]): one["state"] for one in listed}
    assert [states[name, 1] for name in AGENTS] == ["serving"] * 3
    assert [states[name, 2] for name in AGENTS] == ["rolled_back", "rolled_back", "waiting"]
    assert all(one["accuracy"] is not None and one["bytes"] > 0 for one in listed)

    there = ("--coordinator", federation.address)
    code, told = federation.hedgerow("pin", "--device", "d2", "--model", "2", *there)
    assert (code, [one["state"] for one in told["orders"]]) == (0, ["done"])
    until(lambda: federation.serve("1", "1", "2"), every_s=0.2)
    code, told = federation.hedgerow("unpin", "--all", *there)
    assert (code, len(told["orders"])) == (0, 3)
    deeds = federation.processes.rows(federation.run.name, "select who, what, of from audit order by id")
    assert ("coordinator", "rollout stopped", f"{federation.run.name}/2") in deeds
    assert ("somebody on this machine", "model pin", "d2") in deeds
