"""What is decided about a device's models: pin one, let go of it, go back to the one before.

By its owner, and by the coordinator for its owner (edge_agent/orders.py), whose pin gives way to the owner's.
Links and the record of the folder are changed; the server that follows it does the rest within a second,
and one that is not running does it at its start.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_agent.serving import record
from export.folder import (
    CURRENT,
    FALLBACK,
    GOOD,
    LINKS,
    ORDERED,
    PINNED,
    PREVIOUS,
    SERVING,
    linked,
    load_artifact,
)
from foundation.artifact import Manifest
from foundation.errors import ExportError
from foundation.messages import Verdict


@dataclass(frozen=True, slots=True)
class Known:
    """One artifact of a folder, and which one it is."""

    manifest: Manifest
    links: tuple[str, ...]
    barred: bool


def folder_of(place: Path) -> Path:
    """Return the folder of artifacts that a path means: itself, or `artifacts` of a vault.

    Raises `ExportError` where there is none.
    """
    for folder in (place, place / "artifacts"):
        if (folder / CURRENT).is_symlink():
            return folder
    raise ExportError(f"there are no artifacts in {place}: name a vault, or its folder `artifacts`")


def known(folder: Path) -> tuple[list[Known], list[str]]:
    """Return the artifacts of a folder by round, and what is wrong with those that cannot be read."""
    barred = record.read(folder).barred
    links = {link: linked(folder, link) for link in LINKS}
    found, problems = [], []
    for name in sorted({name for name in links.values() if name is not None}):
        try:
            manifest = load_artifact(folder / name)[0]
        except ExportError as error:
            problems.append(str(error))
            continue
        mine = tuple(link for link in LINKS if links[link] == name)
        found.append(Known(manifest, mine, name in barred))
    return sorted(found, key=lambda one: (one.manifest.round, one.manifest.sha256)), problems


HERE = "command line"
"""By whom, where it is not said: whoever types on this device."""


def pin(folder: Path, wanted: str | None = None, *, by: str = HERE, link: str = PINNED) -> Manifest:
    """Pin an artifact by its round or the beginning of its SHA-256; without, the one that serves.

    `by` is written down beside it, `link` says whose pin it is. Raises `ExportError` when there
    is no such artifact, or several.
    """
    if wanted is None:
        name = linked(folder, SERVING) or linked(folder, CURRENT)
        chosen = [one for one in known(folder)[0] if one.manifest.sha256 == name]
    else:
        chosen = [one for one in known(folder)[0] if _is(one.manifest, wanted)]
    if len(chosen) != 1:
        there = ", ".join(f"{one.manifest.round} ({one.manifest.sha256[:12]})" for one in known(folder)[0])
        what = "several artifacts are" if chosen else "no artifact is"
        raise ExportError(f"{what} {wanted or 'serving'!r}; there are rounds {there or 'none'}")
    manifest = chosen[0].manifest
    record.note(folder, action=record.action("pin", manifest, by), links={link: manifest.sha256})
    return manifest


def unpin(folder: Path, *, by: str = HERE, link: str = PINNED) -> bool:
    """Let the folder's newest artifact serve again, if it proves itself; returns whether one was pinned."""
    if not (folder / link).is_symlink():
        return False
    pinned = linked(folder, link)
    manifest = next((one.manifest for one in known(folder)[0] if one.manifest.sha256 == pinned), None)
    record.note(folder, action=record.action("unpin", manifest, by), links={link: None})
    return True


def roll_back(
    folder: Path, reason: str = "rolled back by hand", *, by: str = HERE
) -> tuple[Verdict, Manifest]:
    """Bar the model that serves, so that an earlier one does; returns the verdict and the earlier one.

    A pin of the coordinator's ends with it.
    Raises `ExportError` when the model is pinned, or when no earlier one is whole.
    """
    if linked(folder, PINNED) is not None:
        raise ExportError("a model is pinned: unpin it first (hedgerow model unpin), or pin another")
    serving = linked(folder, SERVING) or linked(folder, CURRENT)
    if serving is None:
        raise ExportError(f"nothing in {folder} serves")
    said = record.read(folder)
    for link in (GOOD, FALLBACK, PREVIOUS):
        name = linked(folder, link)
        waits = link == PREVIOUS and said.holds(name or "")
        if name is None or name == serving or name in said.barred or waits:
            continue
        try:
            earlier = load_artifact(folder / name)[0]
        except ExportError:
            continue  # not whole: the next one may be
        verdict = record.verdict_on(folder / serving, "rolled_back", reason)
        told = next((one.manifest for one in known(folder)[0] if one.manifest.sha256 == serving), None)
        action = record.action("rollback", told, by, reason)
        record.note(folder, verdict, bar=True, action=action, links={ORDERED: None})
        return verdict, earlier
    raise ExportError(f"there is no earlier model in {folder} to go back to")


def _is(manifest: Manifest, wanted: str) -> bool:
    return wanted == str(manifest.round) or (len(wanted) >= 6 and manifest.sha256.startswith(wanted))
