"""The page: its size, its first paint, how soon a lost device is seen, and what a reader costs.

    python bench/page.py                          all of it, 1,000 devices
    python bench/page.py --agents 50 --seconds 5  a short look

A real coordinator and a real broker. The devices are one connection that says what a thousand would: cards,
presence, and telemetry at an agent's own pace (every 300 s at rest, every 0.5 s in work for `--working` of
them). What a reader costs is the coordinator's CPU with a reader less that without, in turns, medians: once
for the bare stream of events (the bar is for it), once for a browser with the overview open. The lost
devices are real agents, killed with SIGKILL. Bars: 300 KB, 1 s, 2 s, 5 % of a core. Ends with 1 where one is
missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import paho.mqtt.client as paho
import psutil
from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from coordinator.web.pages.shell import PLACES  # noqa: E402
from edge_agent.agent import RARE_TELEMETRY_S, TELEMETRY_S  # noqa: E402
from foundation.energy import Stage  # noqa: E402
from foundation.messages import AgentCard, Presence, Telemetry  # noqa: E402
from foundation.topics import Topics  # noqa: E402
from hedgerow.broker import EmbeddedBroker  # noqa: E402
from tests.broker.conftest import free_port  # noqa: E402
from tests.browser.conftest import chromium  # noqa: E402
from tests.fleet import run_settings  # noqa: E402
from tests.processes import Processes, until, write_data  # noqa: E402

BARS = {"bytes": 300_000, "first_paint_s": 1.0, "lost_seen_s": 2.0, "stream_share": 0.05}
LOADS = 5
LOSSES = 5


class Crowd:
    """Many devices by one connection: what they say of themselves, at their own pace."""

    def __init__(self, port: int, agents: int, working: int) -> None:
        self.names = [f"device-{number:05d}" for number in range(agents)]
        self.working = self.names[:working]
        self._topics = Topics("test")
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="crowd")
        self._client.max_inflight_messages_set(1000)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._end = threading.Event()
        self.sent = 0
        for name in self.names:
            self._say(name, "presence", Presence(state="online", session="one"), retain=True)
            card = AgentCard(agent=name, version="bench", profile="unknown-linux", examples=100)
            self._say(name, "card", card, retain=True)
        self._thread = threading.Thread(target=self._talk)
        self._thread.start()

    def _say(self, name: str, what: str, told: Any, *, retain: bool = False) -> None:
        body = told.model_dump_json().encode()
        self._client.publish(self._topics.of(name, what), body, qos=int(retain), retain=retain)
        self.sent += 1

    def _talk(self) -> None:
        """Spread everybody's letters evenly over time."""
        resting = self.names[len(self.working) :]
        turn, rested = 0, 0.0
        while not self._end.wait(TELEMETRY_S):
            turn += 1
            for name in self.working:
                self._say(name, "telemetry", telemetry(name, Stage.TRAIN, turn))
            rested += len(resting) * TELEMETRY_S / RARE_TELEMETRY_S
            for _ in range(int(rested)):
                resting.append(resting.pop(0))
                self._say(resting[-1], "telemetry", telemetry(resting[-1], Stage.IDLE, turn))
            rested %= 1

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self._client.loop_stop()
        self._client.disconnect()


def telemetry(name: str, stage: Stage, turn: int) -> Telemetry:
    share = turn % 100 / 100
    return Telemetry(
        agent=name,
        stage=stage,
        run="watched",
        round=1,
        progress=share if stage is Stage.TRAIN else None,
        eta_s=60 * (1 - share) if stage is Stage.TRAIN else None,
        joules=float(turn),
        energy_kind="modelled",
        sent_bytes=turn,
        received_bytes=turn,
        rss_bytes=60_000_000,
    )


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def share(process: psutil.Process, seconds: float) -> float:
    """Return the share of one core that a process takes over `seconds`."""
    began, before = time.monotonic(), cpu_s(process)
    time.sleep(seconds)
    return (cpu_s(process) - before) / (time.monotonic() - began)


@contextlib.contextmanager
def stream(address: str) -> Iterator[None]:
    """Read the stream of events as a script does."""
    end = threading.Event()

    def read() -> None:
        with httpx.stream("GET", f"{address}/api/v1/events", timeout=30) as answer:
            for _ in answer.iter_bytes():
                if end.is_set():
                    return

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@contextlib.contextmanager
def opened(browser: Browser, address: str, path: str = "/") -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        page = context.new_page()
        page.goto(address + path, wait_until="load")
        yield page
    finally:
        context.close()


def painted(browser: Browser, address: str, path: str) -> tuple[float, int]:
    """Return seconds to the first paint, and bytes without plotly's script; nothing is cached."""
    with opened(browser, address, path) as page:
        until(lambda: bool(page.evaluate(PAINT)), 20, 0.05)
        sizes = page.evaluate(SIZES)
        return page.evaluate(PAINT)[0] / 1000, sum(size for name, size in sizes if "plotly" not in name)


PAINT = """() => performance.getEntriesByType("paint").filter((e) => e.name === "first-contentful-paint")
  .map((e) => e.startTime)"""
SIZES = """() => ["navigation", "resource"].flatMap((kind) => performance.getEntriesByType(kind))
  .map((e) => [e.name, e.decodedBodySize])"""


def extra(
    process: psutil.Process, seconds: float, turns: int, reader: Callable[[], Any], say: Callable[[str], None]
) -> dict[str, float]:
    """Return the coordinator's share of a core without and with a reader, in turns; medians."""
    without, along = [], []
    for turn in range(turns):
        say(f"turn {turn + 1} of {turns}")
        without.append(share(process, seconds))
        with reader():
            time.sleep(2)  # what it asks for at first is not what it costs to go on
            along.append(share(process, seconds))
    more = statistics.median(b - a for a, b in zip(without, along, strict=True))
    return {"without": statistics.median(without), "with": statistics.median(along), "more": more}


ROW = """() => [...document.querySelectorAll("tr")].map((row) => row.innerText)
  .find((text) => /\\bd0\\b/.test(text)) || ''"""


def shown(page: Page, online: bool) -> bool:
    """Tell whether the page says of d0 that it is online, or offline."""
    told = page.evaluate(ROW)
    return "d0" in told and ("offline" not in told) == online


def losses(browser: Browser, processes: Processes, address: str, say: Callable[[str], None]) -> list[float]:
    """Kill real agents and return the seconds until the page shows that they are gone."""
    took = []
    for turn in range(LOSSES):
        say(f"lost device {turn + 1} of {LOSSES}")
        processes.start_agent("d0")
        with opened(browser, address, "/fleet") as page:
            until(partial(shown, page, True), 60, 0.05)
            processes.kill("d0")
            killed = time.monotonic()
            until(partial(shown, page, False), 30, 0.02)
            took.append(time.monotonic() - killed)
    return took


def measured(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    program = chromium()
    if program is None:
        raise SystemExit("no chromium on this machine: apt-get install chromium, or set HEDGEROW_CHROMIUM")
    with (
        tempfile.TemporaryDirectory() as told,
        EmbeddedBroker(Path(told) / "broker") as broker,
        sync_playwright() as playwright,
        contextlib.ExitStack() as stack,
    ):
        processes = Processes(Path(told) / "all", broker.port)
        processes.folder.mkdir()
        stack.callback(processes.close)
        write_data(processes.folder, 0)
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        run = run_settings(name="watched", min_agents=options.agents + 100, wait_s=86_400)
        say("coordinator")
        http = {"enabled": True, "port": port, "per_second": 500}
        processes.start_coordinator(run, exit_when_done=False, http=http)
        until(lambda: alive(address), 60, 0.1)
        crowd = Crowd(broker.port, options.agents, options.working)
        stack.callback(crowd.close)
        say(f"{options.agents} devices say who they are")
        until(lambda: online(address) == options.agents, 120, 0.5)
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        stack.callback(browser.close)
        process = psutil.Process(processes.pid("coordinator"))
        found: dict[str, Any] = {"agents": options.agents, "working": options.working, "pages": {}}
        for place in PLACES:
            say(f"{place.title}: {LOADS} loads")
            loads = [painted(browser, address, place.path) for _ in range(LOADS)]
            paint = statistics.median(seconds for seconds, _ in loads)
            found["pages"][place.path] = {"first_paint_s": paint, "bytes": max(size for _, size in loads)}
        found["lost_seen_s"] = losses(browser, processes, address, say)
        turns, seconds = options.turns, options.seconds
        found["stream"] = extra(process, seconds, turns, lambda: stream(address), say)
        found["page"] = extra(process, seconds, turns, lambda: opened(browser, address), say)
        found["coordinator_rss_bytes"] = process.memory_info().rss
        return found


def alive(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz", timeout=1).is_success
    except httpx.TransportError:
        return False


def online(address: str) -> int:
    return int(httpx.get(f"{address}/api/v1/status", timeout=10).json()["online"])


def verdicts(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """Return what was measured, its figure, its bar, and whether that is held."""
    rows = []
    for path, page in found["pages"].items():
        size, paint = page["bytes"], page["first_paint_s"]
        rows.append((f"{path}: bytes", f"{size / 1000:.0f} KB", "300 KB", size <= BARS["bytes"]))
        rows.append((f"{path}: first paint", f"{paint:.2f} s", "1 s", paint <= BARS["first_paint_s"]))
    lost = statistics.median(found["lost_seen_s"])
    told = f"{lost:.2f} s ({min(found['lost_seen_s']):.2f} to {max(found['lost_seen_s']):.2f})"
    rows.append(("a killed device is seen to be gone", told, "2 s", lost <= BARS["lost_seen_s"]))
    for what, name in (("stream", "a reader of the stream"), ("page", "a browser on the overview")):
        one = found[what]
        told = f"{one['more']:.1%} of a core ({one['without']:.1%} without)"
        rows.append((name, told, "5 %", one["more"] <= BARS["stream_share"]))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--working", type=int, default=50, help="devices in work, telemetry twice a second")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each look at the CPU")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    console = Console(stderr=True)
    with console.status("") as status:
        found = measured(options, status.update)
    rows = verdicts(found)
    table = Table("what", "measured", "bar", "")
    for what, told, bar, good in rows:
        table.add_row(what, told, bar, "met" if good else "MISSED")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if all(good for *_, good in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
