"""A real browser without a screen, and a federation of real processes for it to look at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from coordinator.settings import RunSettings
from hedgerow.broker import EmbeddedBroker, find_broker
from tests.broker.conftest import free_port
from tests.conftest import require_service
from tests.fleet import run_settings
from tests.processes import AGENTS, Processes, until, write_data

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


def chromium() -> str | None:
    """Return the browser's program: `HEDGEROW_CHROMIUM`, or the first on the PATH."""
    told = os.environ.get("HEDGEROW_CHROMIUM")
    return told or next((path for name in NAMES if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not longer than a module: as long as it is there, this thread has an event loop that runs."""
    program = chromium()
    if program is None:
        pytest.skip("no chromium on this machine: apt-get install chromium, or set HEDGEROW_CHROMIUM")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


class Reader:
    """A person with a browser: what a page asked for elsewhere or complained of is kept."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser, self.address = browser, address
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self._contexts: list[Any] = []

    def open(self, path: str = "/", *, scheme: Any = "light", size: Any = None) -> Page:
        context = self.browser.new_context(color_scheme=scheme, viewport=size or WIDE, base_url=self.address)
        self._contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._asked)
        page.goto(path, wait_until="load")
        return page

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _asked(self, request: Request) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def close(self) -> None:
        for context in self._contexts:
            context.close()


class Watched:
    """A federation whose coordinator serves its page."""

    def __init__(self, processes: Processes, port: int, run: RunSettings) -> None:
        self.processes, self.run, self.port = processes, run, port
        self.address = f"http://127.0.0.1:{port}"

    def start(self) -> None:
        http = {"enabled": True, "port": self.port, "per_second": 500}
        self.processes.start_coordinator(self.run, exit_when_done=False, http=http)

    def api(self, path: str) -> Any:
        answer = httpx.get(f"{self.address}/api/v1/{path}", timeout=10)
        answer.raise_for_status()
        return answer.json()

    def up(self) -> bool:
        try:
            return httpx.get(f"{self.address}/healthz", timeout=1).is_success
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def watched(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Three agents in a run of many rounds; it is there as long as the module's tests."""
    require_service(find_broker() is not None, "MQTT broker")
    folder = tmp_path_factory.mktemp("watched")
    with EmbeddedBroker(folder / "broker") as broker:
        processes = Processes(folder / "all", broker.port)
        processes.folder.mkdir()
        try:
            yield begun(processes)
        finally:
            processes.close()


def begun(processes: Processes) -> Watched:
    run = run_settings(name="watched", strategy="hedgerow", rounds=500, min_agents=2)
    watched = Watched(processes, free_port(), run)
    watched.start()
    for agent in AGENTS:
        write_data(processes.folder, int(agent[1:]))
        processes.start_agent(agent)
    until(watched.up, 60, 0.05)
    until(lambda: processes.opened(run.name, 3), 120, 0.05)
    return watched


@pytest.fixture
def reader(browser: Browser, watched: Watched) -> Iterator[Reader]:
    reader = Reader(browser, watched.address)
    yield reader
    reader.close()
    assert reader.elsewhere == [], "the page works without the internet"
