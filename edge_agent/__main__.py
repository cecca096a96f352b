"""`python -m edge_agent --config agent.toml`: the program on the device (also `hedgerow agent`)."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from edge_agent.agent import OFFLINE, Agent, Recorder
from edge_agent.calibration.use import calibrated, logged, place_beside
from edge_agent.certificate import Renewal
from edge_agent.conditions import Conditions
from edge_agent.datasets import load as load_data
from edge_agent.energy.meter import Meter
from edge_agent.enrolment import DeviceKeyring, Seals, enrolment_in, fits
from edge_agent.memory import hold_little
from edge_agent.settings import AgentSettings
from edge_agent.traffic import InterfaceMeter
from foundation import logs, settings
from foundation.errors import HedgerowError, SettingsError
from foundation.lock import hold
from foundation.mqtt import MqttTransport
from foundation.profile import DeviceProfile
from foundation.sealed import SealedTransport
from foundation.topics import Topics, client_id
from foundation.transport import Transport

TOOLS = {
    "join": "edge_agent.join",
    "measure": "edge_agent.measure",
    "calibrate": "edge_agent.calibrate",
    "doctor": "edge_agent.doctor",
    "export": "edge_agent.export_again",
}
"""Modules of what else `hedgerow agent` does, by their first word."""


def parser() -> argparse.ArgumentParser:
    """Return the command line of the agent."""
    result = argparse.ArgumentParser(
        prog="hedgerow agent",
        description="Train on this device's own data, and keep a personal model of it.",
        epilog="Settings come from agent.toml, then AGENT__... in the environment, then --set."
        " `hedgerow agent join` makes this device one of a fleet, `hedgerow agent measure` shows what it"
        " draws, `hedgerow agent calibrate` fits its power"
        " model against a meter, `hedgerow agent doctor` says what is missing, `hedgerow agent export -o DIR`"
        " writes its last model as ONNX.",
    )
    result.add_argument("--config", type=Path, help="agent.toml")
    result.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for instance mqtt.host=10.0.0.2"
    )
    result.add_argument("--print-settings", action="store_true", help="show every setting and its origin")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent until it is told to stop, or one of its tools; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in TOOLS:
        # Each is imported when it is asked for: the agent itself has to stay small.
        tool: Callable[[Sequence[str]], int] = importlib.import_module(TOOLS[words[0]]).main
        return tool(words[1:])
    arguments = parser().parse_args(words)
    try:
        loaded, origins = settings.load(
            AgentSettings, arguments.config, os.environ, arguments.set, prefix="AGENT"
        )
        if arguments.print_settings:
            sys.stdout.write(settings.show(loaded, origins) + "\n")
            return 0
        logs.setup(loaded.log_level)
        hold_little()
        with hold(loaded.vault, "vault"):
            asyncio.run(_run(loaded))
    except SettingsError as error:
        advice = "" if arguments.config else "; settings come from a file: --config agent.toml"
        sys.stderr.write(f"hedgerow agent: {error}{advice}\n")
        return 2
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow agent: {error}\n")
        return 1
    return 0


async def _run(s: AgentSettings) -> None:
    published = DeviceProfile.detect() if s.profile == "auto" else DeviceProfile.load(s.profile)
    chosen = partial(calibrated, published, s.energy.calibration, place_beside(s.vault, s.agent))
    profile = logged(chosen())
    transport, seals = _transport(s)
    data_dir = s.data_dir or (Path(d) if (d := os.environ.get("HEDGEROW_DATA")) else None)
    with Meter(
        profile,
        rate_hz=s.energy.rate_hz,
        share=s.energy.share,
        agents_on_host=s.energy.agents_on_host,
        renewed=lambda: logged(chosen()),
    ) as meter:
        agent = Agent(
            s,
            transport=transport,
            meter=meter,
            profile=profile.id,
            threads=s.threads or profile.agent.threads_of(os.cpu_count() or 1),
            load_data=partial(load_data, s.data, data_dir, s.vault / "stream"),
            interface=InterfaceMeter(s.mqtt.host, s.mqtt.port),
            conditions=Conditions(),
            int8=s.export.int8 if s.export.int8 != "auto" or profile.agent.int8 else "off",
            recorder=_recorder(s),
        )
        async with _metrics(s, agent):
            lives = (
                [seals.run(), Renewal(s.vault, s.agent, Topics(s.federation), transport).run()]
                if seals
                else []
            )
            await _until_stopped(agent, lives)


async def _until_stopped(agent: Agent, lives: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run the agent until it ends or is told to, and `lives` beside it."""
    beside = [asyncio.ensure_future(life) for life in lives]
    task = asyncio.ensure_future(agent.run())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await asyncio.wait([task])
    for life in beside:
        life.cancel()
    if beside:
        await asyncio.wait(beside)
    if not task.cancelled():
        task.result()


@asynccontextmanager
async def _metrics(s: AgentSettings, agent: Agent) -> AsyncIterator[None]:
    """Answer for metrics while this is open, where a port is set."""
    if s.metrics.port is None:
        yield
        return
    from edge_agent.metrics import families  # most agents have no such port
    from edge_agent.metrics_port import metrics_on
    from foundation.prometheus import render

    process = psutil.Process()
    async with metrics_on(s.metrics.port, lambda: render(families(agent, process))):
        yield


def _recorder(s: AgentSettings) -> Recorder | None:
    if s.data.kind != "mqtt_stream":
        return None
    from edge_agent.stream import StreamRecorder  # what no other kind of data needs

    return StreamRecorder(s.data, s.vault / "stream")


def _transport(s: AgentSettings) -> tuple[Transport, Seals | None]:
    """Return the way to the broker, with seals where this device has joined a fleet."""
    topic, offline = Topics(s.federation).of(s.agent, "presence"), OFFLINE.model_dump_json().encode()
    name, enrolment = client_id(s.federation, s.agent), enrolment_in(s.vault)
    if enrolment is None:
        return MqttTransport(s.mqtt, name, will=(topic, offline)), None
    fits(enrolment, federation=s.federation, agent=s.agent)
    seals = Seals(s.vault)
    will = seals.sealer.seal(topic, offline, enrolment.keys.up)
    plain = MqttTransport(s.mqtt, name, will=(topic, will))
    return SealedTransport(plain, DeviceKeyring(enrolment), seals.sealer, seals.opener), seals


if __name__ == "__main__":
    sys.exit(main())
