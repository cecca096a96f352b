"""A whole federation on one machine: a real broker, a coordinator and agents as processes of their own.

Nothing is shared but the broker. Each agent cuts its own share of the data set, keeps it, trains on it,
and ends with a personal pruned ONNX model that it serves over HTTP.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import numpy as np
from pydantic import ValidationError
from rich.console import Console

from coordinator.strategies.base import Strategy, load_strategy
from edge_agent.datasets import load, partition_problems
from edge_agent.samples import DataSettings, LocalData
from foundation.errors import HedgerowError, SettingsError
from foundation.profile import DeviceProfile
from hedgerow.broker import EmbeddedBroker
from hedgerow.children import Child, spawn, stop_all
from hedgerow.demo_report import DemoReport, Sample, gather, show
from hedgerow.demo_screen import Screen

READY_S = 60.0
SERVING_S = 30.0
POLL_S = 0.25
SAMPLES = 8
WIDTH = 110
"""Columns of what is printed into a pipe."""
SMALL: Mapping[str, Any] = {"epochs": 4, "learning_rate": 3e-3}
"""For digits, which are few and small, more local work than the strategies' default; FedAvg gets the same."""
WIDTH = 110
"""Columns of what is printed into a pipe."""
EPOCHS = 3
"""Local epochs a round: 1,797 small images, so more than the strategies' default."""


@dataclass(frozen=True)
class DemoOptions:
    """What a person can ask of the demo."""

    devices: int = 4
    rounds: int = 10
    strategy: str = "pfl_tpp"
    dataset: str = "digits"
    data_dir: Path | None = None
    partition: str = "dirichlet:0.3"
    seed: int = 0
    limit: int | None = None
    arrays: Mapping[str, str] = field(default_factory=dict)
    """Of a `.npz`: names of the arrays x, y, group and split."""
    broker: str | None = None
    profile: str = "auto"
    reference: bool = False
    keep: bool = False
    port: int = 8080
    json: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0


@dataclass
class Federation:
    """The processes of the demo and where they are."""

    options: DemoOptions
    folder: Path
    broker_url: str
    page: str
    children: list[Child] = field(default_factory=list)

    def get(self, path: str) -> Any:
        """Return an answer of the coordinator's API; raises `HedgerowError` when it has none."""
        try:
            answer = httpx.get(f"{self.page}{path}", timeout=10)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise HedgerowError(f"the coordinator did not answer {path}: {error}") from error
        return answer.json()

    def items(self, path: str) -> list[Any]:
        """Return all items of a paged answer."""
        found: list[Any] = []
        after, mark = "", "&" if "?" in path else "?"
        while True:
            page = self.get(f"{path}{mark}limit=200{after}")
            found += page["items"]
            if not page["next"]:
                return found
            after = f"&after={page['next']}"

    def check(self) -> None:
        """Raise `HedgerowError` with the end of its log when a process is gone."""
        for child in self.children:
            if (code := child.process.poll()) is not None:
                raise HedgerowError(f"{child.name} ended with code {code}:\n{child.tail()}")

    def samples_of(self, index: int) -> LocalData:
        """Return what device `index` has, as its owner sees it."""
        return device_data(self.options, index)


def run(options: DemoOptions) -> int:
    """Run the demo; returns the exit code. Leaves no process behind, whatever happens."""
    console = Console(stderr=options.json)
    if not console.is_terminal:
        console = Console(stderr=options.json, width=WIDTH)
    with ExitStack() as stack:
        stack.enter_context(interruptible())
        try:
            report = _run(options, console, stack)
        except KeyboardInterrupt:
            console.print("\n[yellow]stopped[/yellow]; every process of the demo is being ended")
            return 130
        except HedgerowError as error:
            console.print("[red]the demo failed:[/red] ", end="")
            console.print(str(error), markup=False, highlight=False)
            return 2 if isinstance(error, SettingsError) else 1
    if options.json:
        sys.stdout.write(report.model_dump_json(indent=2) + "\n")
    return 0


def _run(options: DemoOptions, console: Console, stack: ExitStack) -> DemoReport:
    _check(options)
    for problem in problems_of(options):
        console.print(f"warning: {problem}", style="yellow", markup=False, highlight=False)
    started = time.monotonic()
    with console.status("starting broker, coordinator and agents"):
        federation = _start(options, stack)
        _wait_for(federation, lambda: federation.get("/healthz"), READY_S)
    console.print(
        f"[bold]hedgerow demo[/bold]: {options.devices} devices, {options.strategy}, {options.dataset}"
        f" ({options.partition}), {options.rounds} rounds"
    )
    console.print(f"page {federation.page}   broker {federation.broker_url}", highlight=False)
    _follow(federation, "demo", console)
    with console.status("waiting for the devices to serve their models"):
        samples = _ask(federation)
    report = gather(federation, "demo", samples, time.monotonic() - started)
    if options.reference:
        _start_reference(federation)
        _follow(federation, "reference", console)
        report = report.with_reference(federation.items("/api/v1/runs/reference/updates"))
    show(report, console)
    if options.keep:
        _keep(federation, report, console)
    return report


def _check(options: DemoOptions) -> None:
    """Say what cannot be before anything is started; raises `HedgerowError`."""
    if options.devices < 2:
        raise SettingsError("a federation needs at least 2 devices: give --devices 2 or more")
    if options.rounds < 1:
        raise SettingsError("give --rounds 1 or more")
    load_strategy(options.strategy, learning(options))
    if options.profile != "auto":
        DeviceProfile.load(options.profile)
    device_data(options, 0)


def problems_of(options: DemoOptions) -> list[str]:
    """Return what to know of the devices' shares before anything starts; raises as `partition_problems`."""
    strategy = load_strategy(options.strategy, learning(options))
    return partition_problems(_data_settings(options, 0), options.data_dir, strategy.batch_size)


def device_data(options: DemoOptions, index: int) -> LocalData:
    """Return what one device has; raises `DataError` or `SettingsError` in words."""
    return load(_data_settings(options, index), options.data_dir)


def _data_settings(options: DemoOptions, index: int) -> DataSettings:
    try:
        return DataSettings(**data_table(options, index))
    except ValidationError as error:
        said = "; ".join(str(e["msg"]).removeprefix("Value error, ") for e in error.errors())
        raise SettingsError(said) from error


def data_table(options: DemoOptions, index: int) -> dict[str, Any]:
    """Return the `[data]` table of one agent."""
    table: dict[str, Any] = {
        "kind": "builtin",
        "name": options.dataset,
        "index": index,
        "count": options.devices,
        "partition": options.partition,
        "seed": options.seed,
    }
    if options.limit is not None:
        table["limit"] = options.limit
    return table | dict(options.arrays)


# --- starting ------------------------------------------------------------------------------------


def _start(options: DemoOptions, stack: ExitStack) -> Federation:
    folder = Path(tempfile.mkdtemp(prefix="hedgerow-demo-"))
    if not options.keep:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
    url = options.broker
    if url is None:
        (folder / "broker").mkdir()
        url = stack.enter_context(EmbeddedBroker(folder / "broker")).url
    children: list[Child] = []
    stack.callback(stop_all, children)
    port = free_port(options.port)
    federation = Federation(options, folder, url, f"http://127.0.0.1:{port}", children)
    name = f"demo-{os.getpid()}"
    broker = broker_table(url)
    environment = dict(os.environ)
    config = folder / "coordinator.toml"
    config.write_text(toml_text(_coordinator_table(options, name, port) | {"mqtt": broker}))
    command = [sys.executable, "-m", "coordinator", "--config", str(config)]
    children.append(spawn("coordinator", command, folder / "coordinator.log", environment))
    for index in range(options.devices):
        config = folder / f"agent-{index}.toml"
        config.write_text(toml_text(_agent_table(options, name, index) | {"mqtt": broker}))
        command = [sys.executable, "-m", "edge_agent", "--config", str(config)]
        children.append(spawn(f"device-{index}", command, folder / f"agent-{index}.log", environment))
    return federation


def _coordinator_table(options: DemoOptions, name: str, port: int) -> dict[str, Any]:
    settings = learning(options)
    return {
        "federation": name,
        "folder": "coordinator",
        "http": {"port": port},
        "run": {
            "name": "demo",
            "strategy": options.strategy,
            "rounds": options.rounds,
            "seed": options.seed,
            "min_agents": options.devices,
            "wait_s": READY_S * 4,
            "deadline_s": options.timeout_s,
            "settings": settings,
            "model": dict(options.model),
        },
    }


def _agent_table(options: DemoOptions, name: str, index: int) -> dict[str, Any]:
    table: dict[str, Any] = {
        "agent": f"device-{index}",
        "federation": name,
        "vault": f"device-{index}",
        "profile": options.profile,
        # Four agents on one machine: one thread each, and each is charged its own share of the joules.
        "threads": 1,
        "data": data_table(options, index),
        "serve": {"enabled": True},
        "energy": {"share": "process", "agents_on_host": options.devices},
    }
    if options.data_dir is not None:
        table["data_dir"] = str(options.data_dir.resolve())
    return table


def broker_table(url: str) -> dict[str, Any]:
    """Return the `[mqtt]` table for a broker's URL; raises `SettingsError` for what is none."""
    from foundation.mqtt import MqttSettings

    settings = MqttSettings.from_url(url)
    table = settings.model_dump(mode="json", exclude_defaults=True)
    if settings.password is not None:
        table["password"] = settings.password.get_secret_value()
    return table or {"host": settings.host}


def learning(options: DemoOptions) -> dict[str, Any]:
    """Return the strategy's settings: what was asked for, over what suits the data set."""
    return dict(SMALL if options.dataset == "digits" else {}) | dict(options.settings)


def toml_text(table: Mapping[str, Any]) -> str:
    """Write a table of plain values; JSON's strings, numbers, booleans and lists are TOML's too."""
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]

    def section(path: str, inner: Mapping[str, Any]) -> None:
        lines.append(f"\n[{path}]")
        lines.extend(f"{k} = {json.dumps(v)}" for k, v in inner.items() if not isinstance(v, Mapping))
        for key, value in inner.items():
            if isinstance(value, Mapping):
                section(f"{path}.{key}", value)

    for key, value in table.items():
        if isinstance(value, Mapping):
            section(key, value)
    return "\n".join(lines) + "\n"


def free_port(wanted: int) -> int:
    """Return `wanted` if it is free on loopback, else another that is."""
    for port in (wanted, 0):
        try:
            with socket.create_server(("127.0.0.1", port)) as probe:
                return int(probe.getsockname()[1])
        except OSError:
            continue  # taken: the system chooses another
    raise SettingsError("no free port on 127.0.0.1")


def _wait_for(federation: Federation, question: Any, within_s: float) -> Any:
    deadline = time.monotonic() + within_s
    while True:
        federation.check()
        try:
            if answer := question():
                return answer
        except HedgerowError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise HedgerowError(f"no answer within {within_s:.0f} s; logs are in {federation.folder}")
        time.sleep(0.1)


# --- while it runs -------------------------------------------------------------------------------


def _follow(federation: Federation, run: str, console: Console) -> None:
    deadline = time.monotonic() + federation.options.timeout_s
    with Screen(console, run) as screen:
        while True:
            federation.check()
            status = federation.get("/api/v1/status")
            screen.update(status)
            if status["run"] == run and status["phase"] in ("finished", "failed"):
                break
            if time.monotonic() > deadline:
                raise HedgerowError(f"the run did not end within {federation.options.timeout_s:.0f} s")
            time.sleep(POLL_S)
    if status["phase"] == "failed":
        raise HedgerowError(f"run {run} failed: {status['detail'].get('reason', 'no reason given')}")


def _start_reference(federation: Federation) -> None:
    settings = {k: v for k, v in learning(federation.options).items() if k in Strategy.model_fields}
    request = {"name": "reference", "strategy": "fedavg", "settings": settings, "export": False}
    answer = httpx.post(f"{federation.page}/api/v1/runs", json=request, timeout=10)
    if answer.is_error:
        raise HedgerowError(f"the reference run did not start: {answer.text}")


# --- at the end ----------------------------------------------------------------------------------


def _ask(federation: Federation) -> list[Sample]:
    """Send held-out samples to every device's own server; what comes back, beside the truth."""

    def served() -> dict[str, str] | None:
        agents = federation.get("/api/v1/status")["agents"]
        found = {a["agent"]: a["serving"] for a in agents if a["serving"]}
        return found if len(found) == federation.options.devices else None

    addresses = _wait_for(federation, served, SERVING_S)
    samples = []
    for index in range(federation.options.devices):
        agent = f"device-{index}"
        data = federation.samples_of(index)
        if data.input == "text":
            continue  # a next-character model has no one truth to show
        rows = np.random.default_rng(federation.options.seed).permutation(len(data.test))[:SAMPLES]
        body = {"inputs": np.asarray(data.test.x[rows], np.float64).tolist()}
        begun = time.perf_counter()
        answer = httpx.post(f"{addresses[agent]}/predict", json=body, timeout=30)
        elapsed_ms = 1000 * (time.perf_counter() - begun)
        if answer.is_error:
            raise HedgerowError(f"{agent} did not predict: {answer.text}")
        predictions = answer.json()["predictions"]
        samples.append(
            Sample(
                agent=agent,
                address=addresses[agent],
                predicted=tuple(p["label"] for p in predictions),
                probability=tuple(float(p["probability"]) for p in predictions),
                truth=tuple(data.labels[int(y)] for y in data.test.y[rows]),
                request_ms=elapsed_ms,
            )
        )
    return samples


def _keep(federation: Federation, report: DemoReport, console: Console) -> None:
    console.print("\n[bold]kept running[/bold] until Ctrl-C:")
    console.print(f"  page     {federation.page}/", highlight=False)
    console.print(f"  API      {federation.page}/openapi.json", highlight=False)
    console.print(f"  broker   {federation.broker_url}", highlight=False)
    for sample in report.samples:
        console.print(f"  {sample.agent} {sample.address}/", highlight=False)
    console.print(f"  files    {federation.folder}", highlight=False)
    while True:
        federation.check()
        time.sleep(0.5)


@contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM and SIGHUP what Ctrl-C is, so that both end the children."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
