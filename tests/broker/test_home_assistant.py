"""Home Assistant at a real broker: devices come, work, die and come back, and are gone when turned off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from foundation.energy import Kind
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.topics import ROOT
from hedgerow.broker import EmbeddedBroker
from tests.broker.conftest import ONE
from tests.fleet import run_settings
from tests.home import Home
from tests.processes import Processes

pytestmark = [pytest.mark.anyio, pytest.mark.broker, pytest.mark.slow]
MIDDLE = "Hedgerow test"
ROUNDS = 2
RUN = run_settings(
    name="home",
    rounds=ROUNDS,
    min_agents=2,
    settings={"warm_up": 0, "target": 0.5, "every": 2, "learning_rate": 5e-3, "epochs": 6},
)
TELL = {"enabled": True, "every_s": 0.2}
PATTERNS = (
    "homeassistant/#",
    f"{ROOT}/test/agents/+/presence",
    f"{ROOT}/test/coordinator/presence",
    f"{ROOT}/test/coordinator/state",
    f"{ROOT}/test/home/+/state",
)
"""What operations.md lets Home Assistant read, and nothing else."""


@pytest.fixture
def processes(tmp_path: Path, broker: EmbeddedBroker) -> Iterator[Processes]:
    whole = Processes(tmp_path, broker.port, profile="raspberry-pi-4b")
    yield whole
    whole.close()


@contextlib.asynccontextmanager
async def watching(port: int, client: str) -> AsyncIterator[Home]:
    """A Home Assistant of its own, from now on: it has to find everything by what is retained."""
    home = Home()

    async def hear() -> None:
        async for letter in letters:
            home.hear(letter)

    async with MqttTransport(MqttSettings(port=port), client, clean=True) as transport:
        letters = await transport.subscribe(*PATTERNS)
        task = asyncio.create_task(hear())
        try:
            yield home
        finally:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()


async def until(what: str, condition: Callable[[], bool], within_s: float = 90) -> None:
    try:
        async with asyncio.timeout(within_s):
            while not condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {within_s} s: {what}") from None


def shows(home: Home, device: str, *sensors: str) -> bool:
    """Whether a device is there, with a value for each of these sensors."""
    there = home.devices.get(device)
    return there is not None and all(there.entities[key].value is not None for key in sensors)


def available(home: Home, device: str) -> bool:
    return device in home.devices and home.devices[device].available


def never_falls(home: Home, device: str) -> bool:
    """Whether energy of one count, as `last_reset` tells them apart, only grew."""
    highest: dict[object, float] = {}
    for reset, value in home.devices[device].entities["joules_today"].history:
        if value is None:
            continue
        if float(value) < highest.get(reset, 0.0):
            return False
        highest[reset] = float(value)
    return bool(highest)


@ONE
async def test_a_federation_in_home_assistant(processes: Processes, broker: EmbeddedBroker) -> None:
    for agent in ("d0", "d1"):
        processes.start_agent(agent)
    processes.start_coordinator(RUN, exit_when_done=False, home_assistant=TELL)
    async with watching(broker.port, "home-1") as home:
        await until("all are discovered", lambda: {*home.devices} == {"d0", "d1", MIDDLE})
        for agent in ("d0", "d1"):
            await draws_power(home, agent)
        await until("the run ends", lambda: home.devices[MIDDLE].entities["phase"].value == "finished")
        for agent in ("d0", "d1"):
            await has_a_model(home, agent)
        assert [home.value(MIDDLE, key) for key in ("run", "round", "agents")] == ["home", str(ROUNDS), "2"]
        await killed_and_back(processes, home)

    await told_anew(processes, broker)
    await taken_back(processes, broker)


async def draws_power(home: Home, agent: str) -> None:
    await until("it works", lambda: shows(home, agent, "watts", "joules_today", "round"))
    energy = home.devices[agent].entities["joules_today"]
    seen = float(energy.value or 0)
    await until("joules grow", lambda: float(energy.value or 0) > seen)
    assert energy.attributes["kind"] == home.value(agent, "energy_kind") == Kind.MODELLED
    assert energy.attributes["source"] == "utilisation"
    assert float(home.value(agent, "watts") or 0) > 0


async def has_a_model(home: Home, agent: str) -> None:
    await until("it has a model", lambda: shows(home, agent, "model", "accuracy"))
    assert (home.value(agent, "model") or "").startswith(f"home/{ROUNDS} ")
    await until("it tells its last round", lambda: home.value(agent, "round") == str(ROUNDS))
    assert 0 <= float(home.value(agent, "accuracy") or -1) <= 100


async def counts_on(home: Home, agent: str, shown: float) -> None:
    await until("it goes on", lambda: available(home, agent))
    await until("and counts on", lambda: float(home.value(agent, "joules_today") or 0) > shown)
    assert never_falls(home, agent)


async def killed_and_back(processes: Processes, home: Home) -> None:
    """kill -9 of an agent: its last will, and its return; then of the coordinator."""
    assert available(home, "d1")
    processes.kill("d1")
    await until("the last will", lambda: not available(home, "d1"))
    assert available(home, "d0")
    assert available(home, MIDDLE)
    processes.start_agent("d1")
    await until("it is back", lambda: available(home, "d1") and shows(home, "d1", "watts", "joules_today"))
    processes.kill("coordinator")
    await until("nobody speaks for them", lambda: not any(available(home, device) for device in home.devices))
    shown = {agent: float(home.value(agent, "joules_today") or 0) for agent in ("d0", "d1")}
    assert all(shown.values())
    processes.start_coordinator(RUN, exit_when_done=False, home_assistant=TELL)
    for agent, joules in shown.items():
        await counts_on(home, agent, joules)


async def told_anew(processes: Processes, broker: EmbeddedBroker) -> None:
    """A Home Assistant that starts now has everything at once, from what is retained."""
    async with watching(broker.port, "home-2") as home:
        everybody = ("d0", "d1", MIDDLE)
        await until("all are there", lambda: all(available(home, device) for device in everybody))
        await until("one has values", lambda: shows(home, "d0", "joules_today", "model"))
        await until("so has the other", lambda: shows(home, "d1", "joules_today", "model"))


async def taken_back(processes: Processes, broker: EmbeddedBroker) -> None:
    """Turned off, at the next start nothing of it is left at the broker."""
    processes.kill("coordinator")
    async with watching(broker.port, "home-3") as home:
        await until("they are known", lambda: len(home.devices) == 3)
        processes.start_coordinator(RUN, exit_when_done=False)
        await until("they are gone", lambda: not home.devices)
    async with watching(broker.port, "home-4") as home:
        await until("the coordinator is here", lambda: f"{ROOT}/test/coordinator/presence" in home.heard)
        assert not home.devices
        assert not [topic for topic in home.heard if topic.endswith("/state")]
