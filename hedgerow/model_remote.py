"""`hedgerow model list`, and `pin|unpin|rollback --device D|--all`: from the coordinator's side.

Orders go over the coordinator's API. A device that is offline hears of it when it comes back; one whose owner
has pinned a model says so and keeps it.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from coordinator.rollout.picture import ModelView, pictures
from coordinator.store.sql import Store
from foundation.errors import HedgerowError, SettingsError
from foundation.words import unknown
from hedgerow.client import Client
from hedgerow.exits import DONE, FAILED, code_of
from hedgerow.ledger import store_folder

_LOOK_S = 0.3


def order(
    api: Client,
    verb: Literal["pin", "unpin", "rollback"],
    devices: list[str],
    *,
    model: str | None = None,
    reason: str = "",
    wait_s: float = 10.0,
    as_json: bool = False,
) -> int:
    """Order, wait for the devices' answers, print them, and return the exit code.

    `devices` empty means all. 1 where a device refused or could not be ordered anything, 3 where the
    coordinator refused.
    """
    body: dict[str, Any] = {"devices": devices} if devices else {"all": True}
    body |= {"reason": reason} | ({} if model is None else {"model": model})
    try:
        told = api.ask(f"models/{verb}", body)
        orders = _answers(api, told["orders"], wait_s)
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow model: {error}\n")
        return code_of(error)
    if as_json:
        print(json.dumps({"orders": orders, "problems": told["problems"]}))
    else:
        for one in orders:
            print(f"{one['device']}: {_outcome(one)}")
        for device, why in sorted(told["problems"].items()):
            print(f"{device}: not ordered: {why}")
    refused = any(one["state"] == "refused" for one in orders)
    return FAILED if refused or told["problems"] else DONE


def _answers(api: Client, orders: list[dict[str, Any]], wait_s: float) -> list[dict[str, Any]]:
    """Return orders as they stand when all are answered, or the time is up."""
    found = {one["id"]: one for one in orders}
    deadline, said = time.monotonic() + wait_s, False
    while waiting := [id for id, one in found.items() if one["state"] == "open"]:
        if time.monotonic() >= deadline:
            break
        if not said and wait_s > 1:
            sys.stderr.write(f"waiting up to {wait_s:g} s for {len(waiting)} devices to answer\n")
            said = True
        time.sleep(min(_LOOK_S, wait_s))
        for part in (waiting[i : i + 100] for i in range(0, len(waiting), 100)):
            query = urllib.parse.urlencode([("id", id) for id in part] + [("limit", "1000")])
            found |= {one["id"]: one for one in api.ask(f"orders?{query}")}
    return list(found.values())


def _outcome(one: dict[str, Any]) -> str:
    words: dict[str, str] = {
        "open": "not answered yet; it is told again when it is here",
        "done": one["said"],
        "refused": f"refused: {one['said']}",
        "withdrawn": "withdrawn by a newer order",
    }
    return words[one["state"]]


def show(folder: Path, *, device: str | None, run: str | None, as_json: bool) -> int:
    """Print the models of a coordinator's devices, from its store, which may be in use."""
    try:
        with Store.open_to_read(store_folder(folder)) as store:
            if device is not None and device not in (cards := store.cards()):
                raise SettingsError(unknown("device", device, cards))
            found = pictures(store, device=device, run=run)
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow model: {error}\n")
        return code_of(error)
    if as_json:
        print(json.dumps([view.model_dump(mode="json") for view in found], indent=1))
        return DONE
    if not found:
        sys.stderr.write("no device has told of a model yet: a run's last round makes them\n")
        return DONE
    Console().print(_table(found))
    return DONE


def _table(found: list[ModelView]) -> Table:
    table = Table("device", "run", "round", "sha256", "accuracy", "bytes", "ms", "ring", "state", box=None)
    for view in found:
        table.add_row(
            *(view.device, view.run, str(view.round), f"{view.sha256[:12]}…"),
            "?" if view.accuracy is None else f"{view.accuracy:.1%}",
            "?" if view.bytes is None else f"{view.bytes:,}",
            "?" if view.latency_ms is None else f"{view.latency_ms:.2f}",
            "" if view.ring is None else str(view.ring),
            view.state.replace("_", " ") + (f" by {view.pinned_by}" if view.pinned_by else ""),
        )
    return table
