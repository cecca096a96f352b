"""What an owner decides about the models over HTTP: the same as on the command line (owner.py), written down.

GET  /admin/models                            which there are, which one serves, what was decided
POST /admin/pin       {"model": "12"}         a round, or the beginning of a SHA-256; without, what serves
POST /admin/unpin
POST /admin/rollback  {"reason": "..."}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import Field, ValidationError

from edge_agent.serving import owner, record
from foundation.errors import WireError
from foundation.frozen import Frozen

_T = TypeVar("_T", bound=Frozen)


class Pin(Frozen):
    """Which model is to serve."""

    model: str | None = Field(None, min_length=1, max_length=64)


class RollBack(Frozen):
    """Why the model that serves goes."""

    reason: str = Field("rolled back over HTTP", min_length=1, max_length=200)


class Nothing(Frozen):
    """A request that says nothing more than its address."""


def models(folder: Path) -> dict[str, object]:
    """Return the models of a folder and what was decided about them, as `hedgerow model show --json`."""
    found, problems = owner.known(folder)
    said = record.read(folder)
    return {
        "models": [
            {"links": one.links, "barred": one.barred, "manifest": one.manifest.model_dump(mode="json")}
            for one in found
        ],
        "verdicts": [verdict.model_dump(mode="json") for verdict in said.verdicts],
        "actions": [action.model_dump(mode="json") for action in said.actions],
        "problems": problems,
    }


def pin(folder: Path, body: bytes, by: str) -> dict[str, object]:
    """Pin a model; raises `ExportError` where there is no such one, `WireError` for another request."""
    manifest = owner.pin(folder, _parsed(Pin, body).model, by=by)
    return {"pinned": manifest.sha256, "round": manifest.round}


def unpin(folder: Path, body: bytes, by: str) -> dict[str, object]:
    """Let go of the pinned model."""
    _parsed(Nothing, body)
    return {"was_pinned": owner.unpin(folder, by=by)}


def roll_back(folder: Path, body: bytes, by: str) -> dict[str, object]:
    """Bar the model that serves; raises `ExportError` where there is no earlier one."""
    verdict, earlier = owner.roll_back(folder, _parsed(RollBack, body).reason, by=by)
    return {"rolled_back": verdict.sha256, "round": earlier.round}


ACTIONS: Mapping[str, Callable[[Path, bytes, str], dict[str, object]]] = {
    "/admin/pin": pin,
    "/admin/unpin": unpin,
    "/admin/rollback": roll_back,
}


def _parsed(kind: type[_T], body: bytes) -> _T:
    try:
        return kind.model_validate_json(body or b"{}")
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "body"
        raise WireError(f"the request is malformed: {where}: {problem['msg']}") from error
