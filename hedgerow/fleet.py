"""`hedgerow fleet`: every device, once or as it changes, from the coordinator's API."""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from hedgerow.client import Client
from hedgerow.exits import DONE, done
from hedgerow.fleet_table import line, plain, said, seconds, table

EMPTY = "no device yet: each is here from its first `hedgerow agent` on\n"


def show(client: Client, *, watch: bool, as_json: bool) -> int:
    """Print every device, with `watch` whenever something changes, and return the exit code."""
    return done("hedgerow fleet", lambda: _watched(client, as_json) if watch else _once(client, as_json))


def _once(client: Client, as_json: bool) -> None:
    status, console = client.ask("status"), Console()
    if as_json:
        print(json.dumps(status, indent=1))
        return
    if not status["agents"]:
        sys.stderr.write(EMPTY)
    elif console.is_terminal:
        console.print(_picture(status, status["agents"], datetime.now(UTC), console.width))
    else:
        print(headline(status, len(status["agents"])))
        for one in status["agents"]:
            print(line(one))


def _watched(client: Client, as_json: bool) -> int:
    """Follow the picture until the terminal says stop (Ctrl-C), which is no failure."""
    screen: Screen | Lines | Messages = (
        Messages() if as_json else Screen() if Console().is_terminal else Lines()
    )

    def wait(delay_s: float) -> None:
        screen.lost()
        time.sleep(delay_s)

    try:
        with screen.opened():
            for event in client.events(wait=wait):
                if event.name == "status":
                    screen.update(event.data)
    except KeyboardInterrupt:
        return DONE
    return DONE


class Messages:
    """One JSON object a line: the status, with those devices that changed."""

    def opened(self) -> AbstractContextManager[object]:
        """Return what closes it."""
        return nullcontext()

    def update(self, status: dict[str, Any]) -> None:
        """Print one."""
        print(json.dumps(status), flush=True)

    def lost(self) -> None:
        """The stream broke and is taken up again."""
        sys.stderr.write("the connection is lost; trying again\n")


class Lines:
    """A line for the run and for each device when what it does, serves or suffers from changes."""

    def __init__(self) -> None:
        self._run = ""
        self._said: dict[str, tuple[Any, ...]] = {}

    def opened(self) -> AbstractContextManager[object]:
        """Return what closes it."""
        return nullcontext()

    def update(self, status: dict[str, Any]) -> None:
        """Print what changed."""
        run = f"run {status['run']} round {status['round']}/{status['rounds']} {status['phase']}"
        if run != self._run:
            self._run = run
            print(run if status["run"] else status["phase"], flush=True)
        for one in status["agents"]:
            if self._said.get(one["agent"]) != said(one):
                self._said[one["agent"]] = said(one)
                print(line(one), flush=True)

    def lost(self) -> None:
        """The stream broke and is taken up again."""
        sys.stderr.write("the connection is lost; trying again\n")


class Screen:
    """A table that is drawn anew when something changes."""

    def __init__(self) -> None:
        self._live = Live(auto_refresh=False, vertical_overflow="ellipsis")
        self._devices: dict[str, dict[str, Any]] = {}
        self._status: dict[str, Any] = {}

    def opened(self) -> AbstractContextManager[object]:
        """Return what closes it."""
        return self._live

    def update(self, status: dict[str, Any]) -> None:
        """Draw what changed into the rest."""
        self._status = status
        self._devices |= {one["agent"]: one for one in status["agents"]}
        self._draw("")

    def lost(self) -> None:
        """Say that what stands here is old."""
        self._draw(f"no connection since {datetime.now(UTC):%H:%M:%S} UTC; trying again")

    def _draw(self, remark: str) -> None:
        if self._status:
            devices = [self._devices[name] for name in sorted(self._devices)]
            picture = _picture(self._status, devices, datetime.now(UTC), self._live.console.width)
            self._live.update(Group(Text(remark, style="red"), picture) if remark else picture, refresh=True)


def _picture(status: dict[str, Any], devices: list[dict[str, Any]], now: datetime, width: int) -> Group:
    return Group(Text(headline(status, len(devices)), style="bold"), table(devices, now, width))


def headline(status: dict[str, Any], devices: int) -> str:
    """Return the run and how many are there."""
    run = "no run is under way"
    if status["run"]:
        run = f"run {plain(status['run'])}, round {status['round']} of {status['rounds']}, {status['phase']}"
    eta = "" if status["eta_s"] is None else f", about {seconds(status['eta_s'])} left"
    return f"{run}{eta}; {status['online']} of {devices} devices online"
