"""`hedgerow run`: runs are started, paused, resumed, stopped and shown through the coordinator's API."""

from __future__ import annotations

import json
import sys
import urllib.parse
from collections.abc import Mapping
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from foundation.errors import SettingsError
from hedgerow.client import Client
from hedgerow.exits import done

COMMAND = "hedgerow run"
UNKNOWN = "?"


def start(client: Client, asked: Mapping[str, Any], *, as_json: bool) -> int:
    """Start a run with what of `asked` is given; print how it stands and return the exit code."""
    given = {key: value for key, value in asked.items() if value is not None}
    return done(COMMAND, lambda: _say(client.ask("runs", given), as_json))


def change(
    client: Client,
    verb: Literal["pause", "resume", "stop"],
    run: str | None,
    body: Mapping[str, Any],
    *,
    as_json: bool,
) -> int:
    """Change the run, or the one under way; print how it stands and return the exit code."""
    return done(COMMAND, lambda: _say(client.ask(f"runs/{_named(client, run)}/{verb}", body), as_json))


def show_all(client: Client, *, as_json: bool) -> int:
    """Print all runs, and return the exit code."""

    def shown() -> None:
        found = list(client.pages("runs"))
        if as_json:
            print(json.dumps(found, indent=1))
        elif not found:
            sys.stderr.write("no run yet: `hedgerow run start` begins one\n")
        else:
            table = Table("run", "strategy", "rounds", "state", "since", "reason", box=None)
            for one in found:
                row = (one[key] for key in ("run", "strategy", "rounds", "state", "changed", "reason"))
                table.add_row(*(str(value) for value in row))
            Console().print(table)

    return done(COMMAND, shown)


def show(client: Client, run: str | None, *, as_json: bool) -> int:
    """Print one run, or the one under way, with its rounds; return the exit code."""

    def shown() -> None:
        name = _named(client, run)
        found, rounds = client.ask(f"runs/{name}"), list(client.pages(f"runs/{name}/rounds"))
        if as_json:
            print(json.dumps(found | {"closed_and_open": rounds}, indent=1))
            return
        why = f" ({found['reason']})" if found["reason"] else ""
        print(f"{found['run']}: {found['strategy']}, {found['state']}{why}, {found['rounds']} rounds")
        Console().print(_rounds(rounds))

    return done(COMMAND, shown)


def _rounds(found: list[dict[str, Any]]) -> Table:
    table = Table("round", "state", "updates", "accuracy", "worst", "joules", "seconds", box=None)
    for one in found:
        accuracy = one["accuracy"] or {}
        table.add_row(
            *(str(one[key]) for key in ("round", "state", "updates")),
            *(UNKNOWN if accuracy.get(key) is None else f"{accuracy[key]:.1%}" for key in ("mean", "worst")),
            _joules(one["joules"], one["unknown_energy"]),
            UNKNOWN if one["seconds"] is None else f"{one['seconds']:.1f}",
        )
    return table


def _joules(by_kind: Mapping[str, float], unknown: int) -> str:
    """Return joules by kind, which are never added, and how many updates' are unknown."""
    told = [f"{joules:.3g} {kind}" for kind, joules in by_kind.items()]
    return ", ".join([*told, *([f"{unknown} unknown"] if unknown else [])]) or UNKNOWN


def _named(client: Client, run: str | None) -> str:
    """Return a run's name as it stands in an address; raises `SettingsError` where none is under way."""
    name = run or client.ask("status")["run"]
    if not name:
        raise SettingsError("no run is under way: name one, see `hedgerow run list`")
    return urllib.parse.quote(name, safe="")


def _say(answer: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(answer) if as_json else f"run {answer['run']}: {answer['state']}")
