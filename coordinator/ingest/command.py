"""`hedgerow coordinator worker`: one ingest worker as a process."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from coordinator.ingest.seals import with_seals
from coordinator.ingest.worker import Worker
from coordinator.settings import CoordinatorSettings
from coordinator.store.sql import Store
from foundation import logs, settings
from foundation.errors import HedgerowError, SettingsError, TransportError
from foundation.mqtt import MqttTransport
from foundation.topics import client_id

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="hedgerow coordinator worker",
        description="Take devices' updates for a coordinator with `workers = true`; start as many as you"
        " like.",
        epilog="It reads the coordinator's settings: federation, store, mqtt and enrolment. For several"
        " machines rows are in PostgreSQL and blobs in an S3-compatible store; see docs/workers.md.",
    )
    result.add_argument("--config", type=Path, help="coordinator.toml")
    result.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="over the file's")
    result.add_argument("--name", help="for people, in logs and rows (the machine's, and the process id)")
    return result


def main(words: Sequence[str]) -> int:
    """Work until told to stop; returns the exit code."""
    arguments = parser().parse_args(words)
    try:
        s, _ = settings.load(
            CoordinatorSettings, arguments.config, os.environ, arguments.set, prefix="COORDINATOR"
        )
        if not s.workers:
            raise SettingsError(
                "this coordinator takes its updates itself: set workers = true in its settings, start it"
                " again, then start workers"
            )
        logs.setup(s.log_level)
        logging.getLogger("alembic").setLevel(logging.WARNING)  # it lists its plug-ins at every start
        return asyncio.run(_run(s, arguments.name or f"{socket.gethostname()}-{os.getpid()}"))
    except SettingsError as error:
        sys.stderr.write(f"hedgerow coordinator worker: {error}\n")
        return 2
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow coordinator worker: {error}\n")
        return 1


async def _run(s: CoordinatorSettings, name: str) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # Of its own each time: what a session had kept for a worker that is gone, nobody would read.
    client = MqttTransport(s.mqtt, client_id(s.federation, f"worker-{secrets.token_hex(6)}"), clean=True)
    with Store.open(s.folder, place=s.store, sweep=False) as store:
        transport = with_seals(s, client, store)
        async with transport:
            if client.limits is None or not client.limits.shares:
                raise TransportError(
                    f"the broker at {s.mqtt.address} shares no subscriptions, which workers need: use one"
                    " with MQTT 5 that does, such as Mosquitto or EMQX, or workers = false"
                )
            worker = Worker(s.federation, transport=transport, store=store, name=name)
            serving, stopping = asyncio.create_task(worker.serve()), asyncio.create_task(stop.wait())
            try:
                await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (serving, stopping):
                    task.cancel()
                await asyncio.wait({serving, stopping})
            if not serving.cancelled():
                _raise(serving.exception())
    return 0


def _raise(error: BaseException | None) -> None:
    """Raise what ended the worker; of a group the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error
