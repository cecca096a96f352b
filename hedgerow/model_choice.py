"""`hedgerow model show|pin|unpin|rollback`: which personal model of a device answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edge_agent.serving import admin, owner, record
from foundation.errors import ExportError

DONE, FAILED = 0, 1


def show(place: Path, *, as_json: bool) -> int:
    """Print the artifacts of a folder, which is which, and what was decided about them."""
    return _said(place, lambda folder: _shown(folder, as_json=as_json))


def pin(place: Path, wanted: str | None, *, as_json: bool) -> int:
    """Pin a model."""

    def act(folder: Path) -> None:
        manifest = owner.pin(folder, wanted)
        text = f"pinned: round {manifest.round} ({manifest.sha256[:12]}…) serves until `hedgerow model unpin`"
        _say(text, {"pinned": manifest.sha256, "round": manifest.round}, as_json=as_json)

    return _said(place, act)


def unpin(place: Path, *, as_json: bool) -> int:
    """Let go of a pinned model."""

    def act(folder: Path) -> None:
        was = owner.unpin(folder)
        text = "unpinned: the newest model serves again, if it proves itself" if was else "nothing was pinned"
        _say(text, {"was_pinned": was}, as_json=as_json)

    return _said(place, act)


def rollback(place: Path, reason: str, *, as_json: bool) -> int:
    """Go back to the model before the one that serves."""

    def act(folder: Path) -> None:
        verdict, earlier = owner.roll_back(folder, reason)
        text = (
            f"round {verdict.round} is not served again; round {earlier.round}"
            f" ({earlier.sha256[:12]}…) takes over within a second where a server runs"
        )
        facts = {"rolled_back": verdict.sha256, "serves": earlier.sha256, "round": earlier.round}
        _say(text, facts, as_json=as_json)

    return _said(place, act)


def _said(place: Path, act: Callable[[Path], None]) -> int:
    try:
        act(owner.folder_of(place))
    except ExportError as error:
        sys.stderr.write(f"hedgerow model: {error}\n")
        return FAILED
    return DONE


def _say(text: str, facts: dict[str, Any], *, as_json: bool) -> None:
    print(json.dumps(facts) if as_json else text)


def _shown(folder: Path, *, as_json: bool) -> None:
    found, problems = owner.known(folder)
    said = record.read(folder)
    if as_json:
        print(json.dumps(admin.models(folder)))
        return
    table = Table("run", "round", "sha256", "accuracy", "which", box=None)
    for one in found:
        m = one.manifest
        which = ", ".join((*one.links, *(("barred",) if one.barred else ())))
        accuracy = "unknown" if m.accuracy is None else f"{m.accuracy:.1%}"
        table.add_row(m.run, str(m.round), f"{m.sha256[:12]}…", accuracy, which)
    console = Console()
    console.print(table)
    for verdict in said.verdicts:
        console.print(f"{verdict.at:%Y-%m-%d %H:%M} UTC  {verdict}", markup=False, highlight=False)
    for action in said.actions:
        console.print(f"{action.at:%Y-%m-%d %H:%M} UTC  {action}", markup=False, highlight=False)
    for problem in problems:
        console.print(f"damaged: {problem}", markup=False, highlight=False)
