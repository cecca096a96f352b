"""`hedgerow model rollout`: through a coordinator's API over a socket, by its roles, into its audit."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from typer.testing import CliRunner

from coordinator.app import create_app
from coordinator.fleet.records import FleetRecords
from coordinator.fleet.tokens import ApiTokens
from coordinator.live import Live
from coordinator.rollout.steward import Steward
from coordinator.roster import Roster
from coordinator.settings import RolloutSettings
from coordinator.store.sql import Store
from hedgerow.cli import app as cli
from tests.coordinator.filled_store import Engine

pytestmark = pytest.mark.anyio


@dataclass
class Coordinator:
    address: str
    store: Store
    steward: Steward
    folder: Path

    async def says(self, *words: str, role: str = "operator", code: int = 0) -> str:
        """Run the command as somebody; returns what it prints, or where it fails what it complains of."""
        options = ["--coordinator", self.address, "--token-file", str(self.folder / role)]
        done = await asyncio.to_thread(CliRunner().invoke, cli, ["model", "rollout", *words, *options])
        assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
        return done.stdout if code == 0 else done.stderr


@asynccontextmanager
async def coordinator(folder: Path) -> AsyncIterator[Coordinator]:
    async def send(agent: str, body: bytes) -> None:
        raise AssertionError("nobody is online")

    with Store.open(folder / "store") as store, socket.socket() as listening:
        async with Live(store) as live:
            tokens = ApiTokens(store)
            for role in ("viewer", "operator"):
                (folder / role).write_text(tokens.make(f"a-{role}", role, expires_s=None) + "\n")
            rules = RolloutSettings(enabled=True)
            steward = Steward(rules, store=store, live=live, roster=Roster(), send=send, tick_s=3600)
            web = create_app(
                store, live, Engine(store, live), models=steward, tokens=tokens, records=FleetRecords(store)
            )
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            server = uvicorn.Server(uvicorn.Config(web, log_config=None, lifespan="off"))
            serving = asyncio.create_task(server._serve([listening]))
            try:
                address = f"http://127.0.0.1:{listening.getsockname()[1]}"
                yield Coordinator(address, store, steward, folder)
            finally:
                server.should_exit = True
                await serving


async def test_a_rollout_is_shown_goes_on_and_is_stopped_by_hand(tmp_path: Path) -> None:
    async with coordinator(tmp_path) as here:
        assert json.loads(await here.says("show", "--json", role="viewer")) == []
        assert "no rollout is under way" in await here.says("go", code=3)

        assert here.store.begin_rollout("r", 2, [["d0"], ["d1"], ["d2"]])
        life = asyncio.create_task(here.steward.run())
        async with asyncio.timeout(20):
            while here.steward.waits is None:
                await asyncio.sleep(0.01)
        shown = await here.says("show", role="viewer")
        assert "run r, round 2: under way, ring 1 of 3; waits for d0" in shown
        assert [line.split()[:3] for line in shown.splitlines()[-3:]] == [
            ["d0", "1", "waiting"], ["d1", "2", "waiting"], ["d2", "3", "waiting"],
        ]  # fmt: skip

        assert "takes an operator" in await here.says("go", role="viewer", code=3)
        (told,) = json.loads(await here.says("go", "--json"))
        assert (told["ring"], told["state"]) == (2, "open")
        assert "takes an operator" in await here.says("stop", role="viewer", code=3)
        (told,) = json.loads(await here.says("stop", "--reason", "it is being repainted", "--json"))
        assert (told["state"], told["reason"]) == ("stopped", "it is being repainted")
        assert "stopped, ring 2 of 3: it is being repainted" in await here.says("show", role="viewer")
        assert "no rollout is under way" in await here.says("stop", code=3)

        deeds = [(deed.who, deed.what) for deed in FleetRecords(here.store).deeds()]
        assert ("a-operator", "rollout ring") in deeds
        assert ("a-operator", "rollout stopped") in deeds
        assert not any(who == "a-viewer" for who, _ in deeds)
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)


async def test_nobody_is_there(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        words = ["model", "rollout", "show", "--coordinator", f"http://127.0.0.1:{taken.getsockname()[1]}"]
        done = CliRunner().invoke(cli, words)
    assert done.exit_code == 1
    assert "is it running there" in done.stderr
