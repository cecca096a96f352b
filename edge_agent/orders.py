"""The coordinator's word about this device's personal models: let one serve, pin, unpin, roll back.

What is done is on the disk before it is answered, and everything may be said twice: a command is known by its
id, and each names the model it means. The device's owner has precedence: what `hedgerow model pin` pinned
here is not moved from elsewhere. A device that hears nothing keeps its last good model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import ValidationError

from edge_agent.serving import owner, record
from export.folder import CURRENT, LINKS, MANIFEST, ORDERED, PINNED, SERVING, linked
from foundation.artifact import Manifest
from foundation.errors import ExportError, UnknownVerb
from foundation.messages import Command, Done, KeptModel, Models

logger = logging.getLogger(__name__)

_LONGEST = 300
_LARGEST_MANIFEST = 8 << 20
_SHORT = 12
_COARSE_S = 2.0
"""No file system with links keeps times more coarsely."""


def hold(folder: Path, waits: bool) -> None:
    """Say whether models that are exported from now on wait for the coordinator's word.

    What is there already does not. Raises `ExportError` when the disk refuses.
    """
    if not waits and not folder.is_dir():
        return  # nothing was ever held here

    def change(said: record.Record) -> record.Record:
        if waits and not said.hold:
            for link in (CURRENT, SERVING):
                if (name := linked(folder, link)) is not None:
                    said = said.with_released(name)
        return said.model_copy(update={"hold": waits})

    record.change(folder, change)


def carry_out(folder: Path, command: Command) -> Done:
    """Do what a command about models says, once, and return what came of it; also why it was not done.

    Raises `ExportError` when the disk refuses: then it is to be said again.
    """
    if (before := _answered(folder, command.id)) is not None:
        return before
    try:
        done, said = True, _VERBS[command.verb](folder, command)
    except ExportError as error:
        done, said = False, str(error)
    return _answer(folder, Done(id=command.id, verb=command.verb, done=done, said=said[:_LONGEST]))


def unknown(folder: Path, error: UnknownVerb) -> Done:
    """Write down that a command was not understood, and return that."""
    answer = Done(id=error.id, verb=error.verb, done=False, said=str(error)[:_LONGEST])
    return _answered(folder, error.id) or _answer(folder, answer)


def seen(folder: Path) -> int | None:
    """Return when a folder of artifacts changed last, in nanoseconds.

    0 where there is none, `None` where it proves nothing: a second change within the clock's step would have
    the same time.
    """
    try:
        changed = folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
    except OSError:
        return None
    return changed if time.time() - changed / 1e9 > _COARSE_S else None


def told(folder: Path, *, serves: bool) -> Models:
    """Return what the card says of a folder of artifacts. Manifests are read, models are not."""
    said = record.read(folder)
    links = {link: linked(folder, link) for link in LINKS}
    kept = []
    for name in sorted({name for name in links.values() if name is not None}):
        mine = frozenset(link for link in LINKS if links[link] == name)
        waits = said.holds(name) and name not in said.barred and not mine.intersection(_NOT_WAITING)
        if (one := _kept(folder / name, mine, waits)) is not None:
            kept.append(one)
    kept.sort(key=lambda one: (one.round, one.sha256))
    return Models(serves=serves or links[SERVING] is not None, kept=tuple(kept), done=said.done)


_NOT_WAITING = (SERVING, "good", "fallback", PINNED, ORDERED)


def _release(folder: Path, command: Command) -> str:
    _there(folder, command.model)
    record.change(folder, lambda said: said.with_released(command.model))
    return f"{command.model[:_SHORT]}… may serve, if it proves itself"


def _pin(folder: Path, command: Command) -> str:
    _unless_the_owner_pinned(folder)
    _there(folder, command.model)
    manifest = owner.pin(folder, command.model, by=_by(command), link=ORDERED)
    return f"pinned round {manifest.round} ({manifest.sha256[:_SHORT]}…)"


def _unpin(folder: Path, command: Command) -> str:
    was = owner.unpin(folder, by=_by(command), link=ORDERED)
    pinned = linked(folder, PINNED)
    theirs = "" if pinned is None else f"; its owner has pinned {pinned[:_SHORT]}…, which stays"
    return ("unpinned" if was else "nothing was pinned from elsewhere") + theirs


def _rollback(folder: Path, command: Command) -> str:
    _unless_the_owner_pinned(folder)
    said = record.read(folder)
    if command.model in said.barred:
        return f"{command.model[:_SHORT]}… was barred already"
    serving = linked(folder, SERVING) or linked(folder, CURRENT)
    if serving == command.model:
        _, earlier = owner.roll_back(
            folder, command.reason or "rolled back by the coordinator", by=_by(command)
        )
        return f"round {earlier.round} ({earlier.sha256[:_SHORT]}…) serves again"
    _there(folder, command.model)
    verdict = record.verdict_on(folder / command.model, "rolled_back", command.reason or "not wanted")
    links = {ORDERED: None} if linked(folder, ORDERED) == command.model else None
    record.note(folder, verdict, bar=True, links=links)
    return f"{command.model[:_SHORT]}… did not serve, and will not"


_VERBS: Mapping[str, Callable[[Path, Command], str]] = {
    "release": _release,
    "pin": _pin,
    "unpin": _unpin,
    "rollback": _rollback,
}


def _unless_the_owner_pinned(folder: Path) -> None:
    pinned = linked(folder, PINNED)
    if pinned is not None:
        raise ExportError(f"this device's owner has pinned {pinned[:_SHORT]}…, and has precedence")


def _there(folder: Path, sha256: str) -> None:
    if sha256 not in {linked(folder, link) for link in LINKS}:
        raise ExportError(f"there is no model {sha256[:_SHORT] or '(none named)'}… on this device any more")


def _by(command: Command) -> str:
    return f"coordinator: {command.by}" if command.by else "coordinator"


def _answered(folder: Path, id: str) -> Done | None:
    return next((one for one in record.read(folder).done if id and one.id == id), None)


def _answer(folder: Path, done: Done) -> Done:
    if done.id:
        record.change(
            folder,
            lambda said: said.model_copy(update={"done": (*said.done, done)[-record.KEPT_DONE :]}),
        )
    return done


def _kept(folder: Path, links: frozenset[str], waits: bool) -> KeptModel | None:
    """Return what is told of a model; `None`, logged, where its manifest cannot be read or told."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            manifest = Manifest.model_validate_json(file.read(_LARGEST_MANIFEST))
        known = {"sha256": folder.name, "run": manifest.run, "round": manifest.round}
        return KeptModel.model_validate(known | {"links": links, "waits": waits})
    except (OSError, ValidationError) as error:
        logger.warning("manifest not readable", extra={"folder": folder.name[:_SHORT], "reason": str(error)})
        return None
