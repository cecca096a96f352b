"""`python -m coordinator --config coordinator.toml`: the program in the middle."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from coordinator.app import create_app
from coordinator.engine import Engine
from coordinator.exports import Exporter
from coordinator.fleet.desk import Desk
from coordinator.fleet.records import FleetRecords
from coordinator.fleet.start import with_fleet
from coordinator.fleet.tokens import ApiTokens
from coordinator.home_assistant import HomeAssistant
from coordinator.live import Live
from coordinator.settings import CoordinatorSettings, HttpSettings
from coordinator.store.sql import Store
from coordinator.strategies.base import load_strategy
from coordinator.wall.collector import Wall
from foundation import logs, settings
from foundation.errors import HedgerowError, SettingsError
from foundation.hosts import is_loopback
from foundation.lock import hold
from foundation.memory import one_pool
from foundation.messages import Presence
from foundation.mqtt import MqttTransport
from foundation.topics import Topics, client_id

logger = logging.getLogger(__name__)

LARGE_BYTES = 64 * 2**10
"""Buffers from here on go back to the system when they are freed: bodies of letters, frames, arrays."""
COMMANDS = ("broker-config", "invite", "invites", "devices", "revoke", "token", "tokens", "audit")
"""What coordinator/fleet/commands.py does."""


def parser() -> argparse.ArgumentParser:
    """Return the command line of the coordinator."""
    result = argparse.ArgumentParser(
        prog="hedgerow coordinator",
        description="Run a federation: hand out work, gather updates, serve the page.",
        epilog="Settings come from coordinator.toml, then COORDINATOR__... in the environment, then --set."
        f" Beside it: worker, {', '.join(COMMANDS)}; `hedgerow coordinator invite --help` and so on.",
    )
    result.add_argument("--config", type=Path, help="coordinator.toml")
    result.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for instance run.rounds=20"
    )
    result.add_argument("--print-settings", action="store_true", help="show every setting and its origin")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the coordinator until it is told to stop; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["worker"]:
        from coordinator.ingest.command import main as worker

        return worker(words[1:])
    if words[:1] and words[0] in COMMANDS:
        from coordinator.fleet.commands import main as command

        return command(words)
    arguments = parser().parse_args(words)
    try:
        loaded, origins = settings.load(
            CoordinatorSettings, arguments.config, os.environ, arguments.set, prefix="COORDINATOR"
        )
        load_strategy(loaded.run.strategy, loaded.run.settings)  # said before anything is connected
        checked(loaded.http)
        if arguments.print_settings:
            sys.stdout.write(settings.show(loaded, origins) + "\n")
            return 0
        logs.setup(loaded.log_level)
        one_pool(LARGE_BYTES)
        logging.getLogger("alembic").setLevel(logging.WARNING)  # it lists its plug-ins at every start
        with hold(loaded.folder, "coordinator"):
            return asyncio.run(_run(loaded, settings.rows(loaded, origins)))
    except SettingsError as error:
        sys.stderr.write(f"hedgerow coordinator: {error}\n")
        return 2
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow coordinator: {error}\n")
        return 1


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: this program has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(s: CoordinatorSettings, told: Sequence[settings.Row]) -> int:
    will = (
        Topics(s.federation).coordinator_presence,
        Presence(state="offline").model_dump_json().encode(),
    )
    transport = MqttTransport(s.mqtt, client_id(s.federation, "coordinator"), will=will)
    with Store.open(s.folder, place=s.store) as store, store.alone():
        live = Live(store)
        async with live:
            fleet = with_fleet(s, transport, store, live)
            home = HomeAssistant(s, transport=fleet.transport, store=store, live=live)
            wall = Wall(s, transport=fleet.transport, store=store, live=live)
            beside = [home.run, wall.run, *fleet.lives]
            engine = Engine(s, transport=fleet.transport, store=store, live=live, beside=beside)
            fleet.watch(engine)
            return await _until_stopped(s, engine, lambda: _app(s, told, store, live, engine))


async def _until_stopped(s: CoordinatorSettings, engine: Engine, app: Callable[[], FastAPI]) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    motor = asyncio.create_task(engine.serve())
    waiting = {motor, asyncio.create_task(stop.wait())}
    if s.exit_when_done:
        waiting.add(asyncio.create_task(engine.finished.wait()))
    server = _server(s.http, app()) if s.http.enabled else None
    page = asyncio.create_task(server.serve(sockets=[bound(s.http)])) if server else None
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if server is not None and page is not None:
            server.should_exit = True
            await asyncio.wait([page], timeout=5)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
    if not motor.cancelled():
        motor.result()  # raises what ended it
    return 1 if engine.outcome == "failed" and s.exit_when_done else 0


def bound(http: HttpSettings) -> socket.socket:
    """Return a listening socket; raises `SettingsError` when the port is taken."""
    try:
        listening = socket.create_server((http.host, http.port))
    except OSError as error:
        raise SettingsError(
            f"{http.host}:{http.port} cannot be opened ({error.strerror}): set http.port to another, or 0"
        ) from error
    host, port = listening.getsockname()[:2]
    scheme = "http" if http.tls_cert is None else "https"
    logger.info("page", extra={"address": f"{scheme}://{host}:{port}/"})
    return listening


def checked(http: HttpSettings) -> None:
    """Raise `SettingsError` where page and API would be open to those in between, or cannot be served."""
    if not http.enabled:
        return
    if http.tls_cert is None and not http.insecure and not is_loopback(http.host):
        raise SettingsError(
            f"http.host = {http.host} lets others in without TLS: set http.tls_cert and http.tls_key, or"
            " http.insecure = true where nobody is in between (or keep 127.0.0.1 and come by ssh -L"
            f" {http.port}:127.0.0.1:{http.port})"
        )
    if http.tls_cert is not None and http.tls_key is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(http.tls_cert, http.tls_key, "")
        except OSError as error:  # ssl.SSLError is one too
            raise SettingsError(f"http.tls_cert and http.tls_key cannot be used: {error}") from error


def _app(
    s: CoordinatorSettings, told: Sequence[settings.Row], store: Store, live: Live, engine: Engine
) -> FastAPI:
    http, records = s.http, FleetRecords(store)
    loopback = is_loopback(http.host)
    return create_app(
        store,
        live,
        engine,
        models=engine.models,
        desk=Desk(s, records) if s.enrolment.enabled else None,
        maker=Exporter(s.folder),
        settings=told,
        hosts=http.hosts or (("localhost", "127.0.0.1", "[::1]", http.host) if loopback else ()),
        tokens=ApiTokens(store) if http.auth == "on" or not loopback else None,
        records=records,
        per_second=http.per_second,
        secure=http.tls_cert is not None,
    )


def _server(http: HttpSettings, app: FastAPI) -> _Server:
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=2,
        ssl_certfile=http.tls_cert,
        ssl_keyfile=http.tls_key,
        server_header=False,
    )
    return _Server(config)


if __name__ == "__main__":
    sys.exit(main())
