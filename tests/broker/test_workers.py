"""Ingest workers as processes on Mosquitto and PostgreSQL, two of three killed: the bits of a run without."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from foundation.halt import REACHED, VARIABLE
from foundation.transport import MemoryBroker
from hedgerow.broker import EmbeddedBroker, find_broker
from hedgerow.children import spawn
from tests.conftest import require_service
from tests.fleet import fleet, memory, run_settings
from tests.processes import AGENTS, Processes, loader, sets, until, write_data

WORKERS = ("w0", "w1", "w2")
pytestmark = [pytest.mark.broker, pytest.mark.slow]


def rows(database: str, query: str) -> list[tuple[Any, ...]]:
    """Ask the database of a running coordinator."""
    import psycopg  # where it is not installed, the fixture has said so

    with psycopg.connect(database, autocommit=True) as connection:
        try:
            return connection.execute(query.encode()).fetchall()
        except psycopg.errors.UndefinedTable:
            return []  # its tables are not made yet


def start_worker(whole: Processes, name: str, table: dict[str, Any], halt: Path) -> None:
    command = [sys.executable, "-m", "coordinator", "worker", "--name", name, *sets(table)]
    environment = dict(os.environ) | {VARIABLE: str(halt)}
    whole.children[name] = spawn(name, command, whole.folder / f"{name}.log", environment)


def killed_where_it_halted(whole: Processes, halt: Path, name: str) -> str:
    """Kill the worker that came to a halt, and return which one it was."""
    reached = halt / f"{name}{REACHED}"
    until(reached.exists)
    pid = int(reached.read_text())
    (worker,) = (child for child in WORKERS if child in whole.children and whole.pid(child) == pid)
    whole.kill(worker)
    return worker


def test_workers_killed_in_mid_upload_lose_nothing_and_count_nothing_twice(
    tmp_path: Path, database: str
) -> None:
    require_service(find_broker("mosquitto") is not None, "mosquitto")
    whole = Processes(tmp_path, 0)
    halt = tmp_path / "halt"
    halt.mkdir()
    (halt / "ingest-1").touch()
    run = run_settings(name="workers")
    with EmbeddedBroker(tmp_path / "broker", prefer="mosquitto") as broker:
        whole.port = broker.port
        whole.more = {"mqtt": {"port": broker.port, "max_part_bytes": 1024}}  # a body is some dozens of parts
        shared = {"workers": True, "store": {"database": database}}
        table = {
            "federation": "test",
            "folder": str(tmp_path / "runs" / run.name),
            "mqtt": {"port": broker.port},
        } | shared
        try:
            for name in WORKERS:
                start_worker(whole, name, table, halt)
            until(lambda: all("listening" in (tmp_path / f"{n}.log").read_text() for n in WORKERS))
            for agent in AGENTS:
                write_data(tmp_path, int(agent[1:]))
                whole.start_agent(agent)
            whole.start_coordinator(run, **shared)
            # All parts are rows, nothing is confirmed: the others have to go on from there.
            killed_where_it_halted(whole, halt, "ingest-1")
            # And in the middle of the parts of a later round.
            until(lambda: rows(database, "select 1 from rounds where round = 2") != [])
            (halt / "part-2").touch()
            killed_where_it_halted(whole, halt, "part-2")
            assert len([name for name in WORKERS if name in whole.children]) == 1
            end = whole.finished(run.name)
            with whole.store(run.name) as store:
                assert [len(store.updates(run.name, n)) for n in (1, 2, 3)] == [3, 3, 3]
                told = [event for event in store.latest_events(500, run.name) if event.kind == "update"]
                assert len(told) == 9, "none was counted twice"
            assert rows(database, "select count(*) from parts") == [(0,)]
            assert rows(database, "select count(*) from arrivals where refused is not null") == [(0,)]
            assert not [path for agent in AGENTS for path in (whole.vault(agent) / "outbox").glob("*")]
        finally:
            whole.close()

    async def unbroken() -> bytes:
        folder = tmp_path / "unbroken"
        async with fleet(folder, memory(MemoryBroker()), run_settings(name="u"), loader(folder)) as alone:
            assert await alone.finished(120) == "finished"
            return alone.state().to_bytes()

    assert asyncio.run(unbroken()) == end, "to the bit: updates are summed in the order of names"
