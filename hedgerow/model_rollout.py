"""`hedgerow model rollout show|go|stop`: how far new models are let go, and a hand on that, over the API."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from hedgerow.client import Client
from hedgerow.exits import done

STATES = {
    "open": "under way",
    "done": "done",
    "stopped": "stopped",
    "superseded": "a newer one took its place",
}


def show(api: Client, *, last: int = 1, as_json: bool) -> int:
    """Print the newest rollouts, with every device of the newest; returns the exit code."""
    return _said(lambda: api.ask("rollouts", query={"limit": last}), as_json=as_json)


def go(api: Client, *, as_json: bool) -> int:
    """Let the next ring go now, whatever it waits for; returns the exit code."""
    return _said(lambda: [api.ask("rollouts/go", {})], as_json=as_json)


def stop(api: Client, reason: str, *, as_json: bool) -> int:
    """Stop the rollout under way and roll its devices back; returns the exit code."""
    return _said(lambda: [api.ask("rollouts/stop", {"reason": reason})], as_json=as_json)


def _said(ask: Callable[[], list[dict[str, Any]]], *, as_json: bool) -> int:
    return done("hedgerow model rollout", lambda: _print(ask(), as_json))


def _print(found: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
    elif not found:
        sys.stderr.write("there was no rollout yet: rollout.enabled, and a round that exports, begin one\n")
    else:
        for rollout in found:
            print(_line(rollout))
        Console().print(_table(found[0]["members"]))


def _line(rollout: dict[str, Any]) -> str:
    """Return one rollout in words."""
    text = (
        f"run {rollout['run']}, round {rollout['round']}: {STATES.get(rollout['state'], rollout['state'])},"
        f" ring {rollout['ring']} of {rollout['rings']}"
    )
    if rollout["reason"]:
        text += f": {rollout['reason']}"
    return text + (f"; waits for {rollout['waits']}" if rollout["waits"] else "")


def _table(members: list[dict[str, Any]]) -> Table:
    table = Table("device", "ring", "state", "model", "before", "", box=None)
    for one in sorted(members, key=lambda member: (member["ring"], member["device"])):
        table.add_row(
            *(one["device"], str(one["ring"]), one["state"].replace("_", " ")),
            *("" if one[key] is None else f"{one[key][:12]}…" for key in ("model", "before")),
            one["reason"],
        )
    return table
