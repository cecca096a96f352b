"""`hedgerow fleet`: the picture of a coordinator, once and as it changes."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from coordinator.app import create_app
from coordinator.live import Live
from coordinator.store.sql import Store
from hedgerow.cli import app
from hedgerow.fleet import Screen
from hedgerow.fleet_table import energy, line, seen, table
from tests.coordinator.filled_store import AGENTS, NOON, Clock, Engine, enliven, fill, with_models
from tests.coordinator.test_api import served

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[2]


@dataclass
class House:
    live: Live
    address: str

    async def run(self, *words: str) -> tuple[int, str, str]:
        words = ("fleet", *words, "--coordinator", self.address)
        result = await asyncio.to_thread(CliRunner().invoke, app, words)
        return result.exit_code, result.stdout, result.stderr


@asynccontextmanager
async def house(folder: Path, *, filled: bool = True) -> AsyncIterator[House]:
    clock = Clock()
    with Store.open(folder, clock=clock) as store:
        async with Live(store, clock=clock, monotonic=clock) as live:
            if filled:
                fill(store, clock)
                enliven(live, clock)
                live.card(with_models(0))
                live.asked("pi-kitchen", skipped="it is offline")
                live.quarantined("vps-1", "its change is 4,000 times\x1b[2J the others'")
            web = create_app(store, live, Engine(store, live), clock=clock, status_every_s=0.05)
            async with served(web) as (http, _):
                yield House(live, str(http.base_url))


async def test_a_line_for_every_device_with_kinds_and_reasons(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        code, said, _ = await here.run()
        assert code == 0
        head, *lines = said.splitlines()
        assert head.startswith("run greenhouse-1, round 6 of 10, collecting")
        assert head.endswith("3 of 4 devices online")
        jetson, greenhouse, kitchen, vps = lines
        assert "train 62% 12 s" in jetson
        for part in ("accuracy 84.0%", "units 162/256", "18.4 J measured", "61.5 °C", "model of round 5"):
            assert part in jetson
        assert "≈ 9.7 J modelled" in greenhouse
        assert "°C" not in greenhouse
        assert "pi-kitchen  offline  accuracy –  units –  energy –  model of round –" in kitchen
        assert kitchen.endswith("(skipped: it is offline)")
        assert "quarantined: its change is 4,000 times\N{REPLACEMENT CHARACTER}[2J the others'" in vps
        assert "\x1b" not in said

        code, said, _ = await here.run("--json")
        told = json.loads(said)
        assert (code, [one["agent"] for one in told["agents"]]) == (0, list(AGENTS))
        assert (told["agents"][0]["model_run"], told["agents"][0]["temperature_c"]) == ("greenhouse-1", 61.5)


async def test_nobody_is_here_yet(tmp_path: Path) -> None:
    async with house(tmp_path, filled=False) as here:
        code, said, hint = await here.run()
    assert (code, said) == (0, "")
    assert "hedgerow agent" in hint


async def test_changes_are_followed_in_a_pipe_until_ctrl_c(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        program = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hedgerow.cli", "fleet", "--watch", "--coordinator", here.address),
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        assert program.stdout is not None
        try:
            async with asyncio.timeout(60):
                first = [(await program.stdout.readline()).decode() for _ in range(5)]
                assert first[0] == "run greenhouse-1 round 6/10 collecting\n"
                assert [text.split()[0] for text in first[1:]] == list(AGENTS)
                here.live.temperature("jetson-barn", 70.0)  # worth no line
                here.live.presence("pi-kitchen", online=True)
                changed = (await program.stdout.readline()).decode()
                assert changed.startswith("pi-kitchen  online")
                program.send_signal(signal.SIGINT)
                assert await program.wait() == 0
        finally:
            if program.returncode is None:
                program.kill()
                await program.wait()


def a_status(**changes: Any) -> dict[str, Any]:
    one = Live()
    enliven(one, Clock())
    status = json.loads(one.snapshot().model_dump_json())
    status["agents"][0] |= changes
    return status  # type: ignore[no-any-return]


def drawn(what: Any) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=180)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_modelled_joules_look_otherwise_than_measured_ones() -> None:
    measured, modelled = (
        drawn(table([a_status(energy_kind=kind)["agents"][0]], NOON, 180))
        for kind in ("measured", "modelled")
    )
    assert "\x1b[32m18.4 J measured" in measured
    assert "\x1b[3;33m≈ 18.4 J modelled" in modelled
    assert energy({"joules": 18.4, "energy_kind": "none"}) == "18.4 J of unknown kind"
    assert energy({"joules": None, "energy_kind": "measured"}) == "–"
    assert energy({"joules": 12_340.0, "energy_kind": "mixed"}) == "≈ 12.3 kJ mixed"


def test_a_coordinator_of_before_knows_no_temperature_and_no_model() -> None:
    one = a_status()["agents"][0]
    for key in ("temperature_c", "model_run", "model_round"):
        del one[key]
    assert "model of round –" in line(one)
    assert "jetson-barn" in drawn(table([one], NOON, 100))


@pytest.mark.parametrize("width", [80, 200])
def test_names_figures_and_reasons_have_room_on_any_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    reason = "its change is 4,000 times the median of the others', and goes another way"
    console.print(table(a_status(quarantined=reason)["agents"], NOON, width))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in said
    assert all(name in said for name in AGENTS)
    for part in ("train 62% 12 s", "84.0%", "162/256", "18.4 J measured", "≈ 9.7 J modelled", "quarantined"):
        assert part in said
    assert reason in " ".join(said.split())


def test_ages_count_from_the_last_word_and_never_backwards() -> None:
    one = {"last_seen": NOON.isoformat()}
    assert seen(one, NOON + timedelta(seconds=90)) == "2 min ago"
    assert seen(one, NOON - timedelta(hours=1)) == "now"
    assert seen({"last_seen": None}, NOON) == "never"


def test_a_screen_that_lost_its_connection_says_since_when(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    screen.lost()  # nothing to draw on yet
    shown: list[Any] = []
    monkeypatch.setattr(screen._live, "update", lambda what, *, refresh: shown.append(what))
    screen.update(a_status())
    changed = a_status(agent="pi-new")
    screen.update(changed | {"agents": changed["agents"][:1]})
    assert all(name in drawn(shown[-1]) for name in (*AGENTS, "pi-new"))
    screen.lost()
    assert re.search(r"no connection since \d\d:\d\d:\d\d UTC", drawn(shown[-1]))
