"""Rounds behind smart plugs on a real broker: joules at the wall, joined over clocks that differ.

The plugs' watts rise with time, so a second is like no other one: a join that is off by the device's seven
seconds is wrong by more than every error bar.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.ledger.entries import read
from coordinator.ledger.report import energy_report
from coordinator.settings import WallSettings
from coordinator.store.sql import Store
from coordinator.wall.join import WallRecord
from edge_agent.training.trainer import Hooks, Outcome, Task, carry_out
from foundation.energy import Kind, Scope, Stage
from foundation.mqtt import MqttSettings
from foundation.process import bound_to_parent
from foundation.timing import Timing
from tests.broker.conftest import ONE
from tests.broker.test_federation import mqtt
from tests.conftest import LONG
from tests.fleet import Fleet, fleet, run_settings
from tests.processes import AGENTS, Processes, until
from tests.scripted_plug import ramp_joules

pytestmark = [pytest.mark.anyio, pytest.mark.broker, pytest.mark.slow]

IDLE_W, PER_S = 500.0, 100.0
BEHIND_S = 7.0
WORK_READINGS = 3
KINDS = {"d0": "tasmota", "d1": "shelly"}
PLUGS = {"d0": "mqtt:tasmota/plug-d0", "d1": "shelly:plug-d1"}


@pytest.fixture
def plugs(settings: MqttSettings, tmp_path: Path) -> Iterator[tuple[float, Callable[[str], None]]]:
    """Two plugs of a device whose power follows the clock; gives when it began, and what ends one of them."""
    start_s = time.time()
    running: dict[str, subprocess.Popen[bytes]] = {}
    for agent, kind in KINDS.items():
        heard = tmp_path / f"heard-{agent}"
        command = [sys.executable, "-m", "tests.scripted_plug", kind, f"plug-{agent}"]
        command += ["--port", str(settings.port), "--idle", str(IDLE_W), "--full", "0", "--heard", str(heard)]
        command += ["--ramp", str(PER_S), "--start", str(start_s)]
        running[agent] = subprocess.Popen(bound_to_parent(command))
        until(heard.exists)
    yield start_s, lambda agent: running[agent].kill()
    for process in running.values():
        process.kill()
        process.wait()


def work_until_heard(readings: Callable[[str], int], agent: str) -> Callable[[Task, Hooks], Outcome]:
    """Train, and go on until the plug has spoken often enough to say something of this round."""

    def work(task: Task, hooks: Hooks) -> Outcome:
        outcome, before = carry_out(task, hooks), readings(agent)
        with hooks.stage(Stage.TRAIN):
            until(lambda: readings(agent) >= before + WORK_READINGS, every_s=0.01)
        return outcome

    return work


def count(whole: Fleet, agent: str) -> int:
    """Seconds in which the store has readings of an agent's plug."""
    assert whole.store is not None
    row = whole.store.plug(agent, PLUGS[agent], 0.0)
    return len({int(r.at) for r in whole.store.plug_readings(row.id, 0.0, 4e9, 10_000)})


def records(store: Store, agent: str) -> list[WallRecord]:
    return [record for record in read(store, "r").wall if record.agent == agent]


def timings(store: Store, agent: str) -> list[Timing]:
    found = [update for n in (1, 2, 3) for update in store.updates("r", n) if update.agent == agent]
    return [Timing.model_validate(update.summary["timing"]) for update in found]


@LONG
@ONE
def test_processes_join_their_last_round_before_they_end(
    tmp_path: Path, settings: MqttSettings, plugs: tuple[float, Callable[[str], None]]
) -> None:
    """`[wall]` as a person writes it; the coordinator ends with its run, a plug speaks once a second."""
    running = Processes(tmp_path, settings.port)
    try:
        for agent in AGENTS:
            running.start_agent(agent)
        run = run_settings(name="walled", strategy="fedavg", settings={"epochs": 1}, rounds=2)
        running.start_coordinator(run, wall={"plugs": PLUGS})
        running.finished("walled")
        with running.store("walled") as store:
            joined = read(store, "walled").wall
    finally:
        running.close()
    assert {(record.agent, record.round) for record in joined} == {(a, n) for a in PLUGS for n in (1, 2)}
    last = [record for record in joined if record.round == 2]
    for record in last:
        assert record.clock_uncertainty_s is not None, record.why
        assert record.clock_uncertainty_s < 0.5
    seen = [record.reading for record in last if record.agent == "d1"]  # ten times a second
    assert [(reading.kind, reading.joules is not None) for reading in seen] == [(Kind.MEASURED, True)]


@ONE
async def test_joules_at_the_wall_are_the_plugs_though_a_clock_is_seven_seconds_off(
    tmp_path: Path, settings: MqttSettings, plugs: tuple[float, Callable[[str], None]]
) -> None:
    start_s, _ = plugs
    run = run_settings(strategy="fedavg", settings={"epochs": 1}, rounds=3)
    more = {"wall": WallSettings(plugs=PLUGS), "utc": {"d0": lambda: time.time() - BEHIND_S}}
    async with fleet(tmp_path / "fleet", mqtt(settings), run, **more) as whole:
        for agent in PLUGS:
            whole.carry_out[agent] = work_until_heard(lambda a: count(whole, a), agent)
        assert await whole.finished(120) == "finished"
        assert whole.store is not None
        await whole.cut("coordinator")  # it joins the last round before it ends
    with Store.open(tmp_path / "fleet" / "c") as store:
        for agent in PLUGS:
            off_s = BEHIND_S if agent == "d0" else 0.0
            for record, timing in zip(records(store, agent), timings(store, agent), strict=True):
                assert timing.clock.offset_s == pytest.approx(off_s, abs=timing.clock.uncertainty_s + 0.01)
                assert timing.clock.uncertainty_s < 0.5
                edges = (timing.spans[0].start_s, timing.spans[-1].end_s)
                begin, end = (edge + off_s - start_s for edge in edges)
                truth = ramp_joules(IDLE_W, PER_S, begin, end)
                check(record, truth, PER_S * BEHIND_S * (end - begin))
        report = energy_report(read(store, "r"))
        assert report.wall is not None
        assert [(d.agent, {2, 3} <= set(d.rounds)) for d in report.wall.devices] == [
            ("d0", True),
            ("d1", True),
        ]
        assert (
            report.total.parts == ()
        )  # of the devices' own joules nobody knows, and the wall's are in no sum


def check(record: WallRecord, truth: float, misjoined: float) -> None:
    """The figure holds what is true, and the error bar would not hide a join that is off."""
    reading = record.reading
    assert reading.scope is Scope.WALL_AC
    assert record.phases == ()  # nothing lasted for a minute
    if record.round == 1 and reading.kind is not Kind.MEASURED:
        return  # the agent was there before its plug had been heard
    assert reading.kind is Kind.MEASURED
    assert reading.joules is not None
    assert reading.uncertainty_joules is not None
    assert abs(reading.joules - truth) < reading.uncertainty_joules < 0.75 * misjoined
    assert reading.joules == pytest.approx(truth, rel=0.05)
