"""Bad links, real ones: slow, losing packets, narrow, cut off. The run ends in the same bits as without.

Agents live in a network namespace of their own. One short run on a link that is all of it; with
HEDGEROW_LONG=1 each by itself and a cut of 20 s, with a larger model. `-s` prints what docs/links.md shows.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.settings import RunSettings
from foundation.spec import ModelSettings
from foundation.transport import MemoryBroker
from hedgerow.children import spawn
from tests.broker.conftest import LONG, RunBroker
from tests.fleet import MODEL, fleet, memory, run_settings
from tests.links import CUT, GOOD, Bad, Link, link
from tests.processes import AGENTS, Processes, loader, until

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(600)]

ALL = Bad(delay_s=0.1, loss=0.05, rate_bps=1e6)
"""200 ms there and back."""
NARROW = Bad(rate_bps=2e6)
LARGE = MODEL.model_copy(update={"width": 64, "ffl_ratio": 4})
"""About 100,000 parameters, 400 KB."""
CUT_S = 20.0
BROKER = (
    "listener {port} 127.0.0.1\nlistener {port} HOST\nallow_anonymous true\nuser root\nset_tcp_nodelay true\n"
)


class Linked(Processes):
    """Agents on the far side of a link."""

    link: Link

    def start_agent(self, name: str) -> None:
        command = [*self.link.inside, *self.agent_command(name)]
        self.children[name] = spawn(name, command, self.folder / f"{name}.log", dict(os.environ))


@pytest.fixture
def linked(tmp_path: Path, run_broker: RunBroker) -> Iterator[Linked]:
    with link() as made:
        port = run_broker("mosquitto", BROKER.replace("HOST", made.host))
        whole = Linked(tmp_path / "fleet", port, more={"mqtt": {"host": made.host, "port": port}})
        whole.folder.mkdir()
        whole.link = made
        try:
            yield whole
        finally:
            made.bad = GOOD  # so that they can say goodbye
            whole.close()


def run_of(name: str, model: ModelSettings, rounds: int) -> RunSettings:
    settings = {"warm_up": 0, "target": 0.5, "every": 2, "learning_rate": 5e-3}
    return run_settings(name=name, settings=settings, model=model, rounds=rounds, deadline_s=400, wait_s=240)


def unbroken(folder: Path, model: ModelSettings, rounds: int) -> bytes:
    """The last state of the same run inside this process, where there is no link."""

    async def run() -> bytes:
        whole = fleet(folder, memory(MemoryBroker()), run_of("unbroken", model, rounds), loader(folder))
        async with whole as it:
            assert await it.finished(120) == "finished"
            return it.state().to_bytes()

    return asyncio.run(run())


def figures(linked: Linked, name: str, bad: object) -> str:
    """Say how long the rounds took and what went over the wire."""
    times = linked.rows(name, "select closed from rounds where closed is not null order by round")
    each = [later - earlier for (earlier,), (later,) in itertools.pairwise(times)]
    took = ", ".join(f"{s:.1f}" for s in each)
    it = linked.link
    sent = f"{it.carried_bytes / 1e6:.2f} MB carried, {it.lost} packets lost"
    return f"\n{bad}: rounds {took} s; {sent}, agents sent {it.sent_again()} TCP segments again\n"


def completed(linked: Linked, name: str, model: ModelSettings, rounds: int) -> bytes:
    """Run to the end on the link as it is and return the last state."""
    for agent in AGENTS:
        linked.start_agent(agent)
    linked.start_coordinator(run_of(name, model, rounds))
    return linked.finished(name, 500)


def same_updates(linked: Linked, name: str, rounds: int) -> None:
    assert [linked.updates(name, n + 1) for n in range(rounds)] == [3] * rounds


@LONG
def test_a_link_that_is_slow_narrow_and_loses_packets_ends_in_the_same_bits(
    linked: Linked, tmp_path: Path
) -> None:
    linked.link.bad = ALL
    found = completed(linked, "allofit", MODEL, 2)
    sys.stdout.write(figures(linked, "allofit", ALL))
    assert found == unbroken(tmp_path / "unbroken", MODEL, 2)
    same_updates(linked, "allofit", 2)
    assert linked.link.lost > 0, "the link was bad"


@LONG
@pytest.mark.parametrize("bad", [GOOD, Bad(delay_s=0.1), Bad(loss=0.05), Bad(rate_bps=1e6), ALL], ids=str)
def test_a_larger_model_over_bad_links_ends_in_the_same_bits(
    linked: Linked, tmp_path: Path, bad: str
) -> None:
    linked.link.bad = bad
    found = completed(linked, "larger", LARGE, 4)
    sys.stdout.write(figures(linked, "larger", bad))
    assert found == unbroken(tmp_path / "unbroken", LARGE, 4)
    same_updates(linked, "larger", 4)


@LONG
def test_a_link_that_is_cut_off_for_20_s_costs_nothing_but_time(linked: Linked, tmp_path: Path) -> None:
    linked.link.bad = NARROW
    cut = threading.Event()

    def cutting() -> None:
        until(lambda: linked.opened("cut", 2), 200)
        linked.link.bad = CUT
        cut.set()
        time.sleep(CUT_S)
        linked.link.bad = NARROW

    thread = threading.Thread(target=cutting, daemon=True)
    thread.start()
    found = completed(linked, "cut", LARGE, 4)
    sys.stdout.write(figures(linked, "cut", f"{NARROW}, cut off for {CUT_S:g} s in round 2"))
    assert cut.is_set(), "it was cut in the middle of the run"
    assert found == unbroken(tmp_path / "unbroken", LARGE, 4)
    same_updates(linked, "cut", 4)
