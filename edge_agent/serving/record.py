"""What a serving process decided, in `artifacts/serving.json`: the agent reads it, the next process too.

Which artifact is which is said by links beside it (export/folder.py): `serving` answers, `good` is the last
one that kept within its band, `fallback` the one before that, `pinned` its owner's choice, `ordered` the
coordinator's. A file that
cannot be read is taken for an empty one, with a warning: it bars nothing then, and every model is looked
at anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, Field, ValidationError

from export import folder as artifacts
from foundation.artifact import Manifest
from foundation.errors import ExportError
from foundation.frozen import Frozen
from foundation.messages import Done, Verdict

logger = logging.getLogger(__name__)

FILE = "serving.json"
KEPT_VERDICTS = 16
KEPT_BARRED = 64
KEPT_ACTIONS = 32
KEPT_RELEASED = 16
KEPT_DONE = 16
_LONGEST_BY = 80
LARGEST_BYTES = 256 << 10
_LONGEST_REASON = 1000


class Action(Frozen):
    """What an owner decided, and from where."""

    kind: Literal["pin", "unpin", "rollback"]
    sha256: str | None = Field(None, max_length=64)
    """The model that was pinned, unpinned or rolled back."""
    round: int | None = None
    by: str = Field(max_length=_LONGEST_BY)
    """`command line`, or `http` and the address that asked."""
    reason: str | None = Field(None, max_length=1000)
    at: AwareDatetime

    def __str__(self) -> str:
        which = "a model" if self.sha256 is None else f"{self.sha256[:12]}… of round {self.round}"
        return f"{self.kind} {which}, by {self.by}" + (f": {self.reason}" if self.reason else "")


class Record(Frozen):
    """What `serving.json` says."""

    schema_version: int = 1
    barred: tuple[str, ...] = Field((), max_length=KEPT_BARRED)
    """SHA-256 of models that are not taken again: worse than what served, or rolled back. Newest last."""
    verdicts: tuple[Verdict, ...] = Field((), max_length=KEPT_VERDICTS)
    """Newest last."""
    actions: tuple[Action, ...] = Field((), max_length=KEPT_ACTIONS)
    """Newest last."""
    hold: bool = False
    """Whether new models wait until the coordinator lets them serve."""
    released: tuple[str, ...] = Field((), max_length=KEPT_RELEASED)
    """SHA-256 of models that need not wait. Newest last."""
    done: tuple[Done, ...] = Field((), max_length=KEPT_DONE)
    """What came of the coordinator's commands. Newest last."""

    def holds(self, sha256: str) -> bool:
        """Whether a model waits for the coordinator's word."""
        return self.hold and sha256 not in self.released

    def with_released(self, sha256: str) -> Record:
        """Return the record in which a model need not wait."""
        others = tuple(sha for sha in self.released if sha != sha256)
        return self.model_copy(update={"released": (*others, sha256)[-KEPT_RELEASED:]})

    def with_verdict(self, verdict: Verdict, *, bar: bool) -> Record:
        """Return the record with one more verdict; with `bar`, its model is not taken again.

        What was said before, of the same model and for the same reason, is not said again.
        """
        others = tuple(sha for sha in self.barred if sha != verdict.sha256)
        barred = (*others, verdict.sha256)[-KEPT_BARRED:] if bar else self.barred
        said = [(v.kind, v.sha256, v.reason) for v in self.verdicts]
        known = (verdict.kind, verdict.sha256, verdict.reason) in said
        verdicts = self.verdicts if known else (*self.verdicts, verdict)[-KEPT_VERDICTS:]
        return self.model_copy(update={"barred": barred, "verdicts": verdicts})

    def without_bar(self, sha256: str) -> Record:
        """Return the record in which a model may be taken again."""
        return self.model_copy(update={"barred": tuple(sha for sha in self.barred if sha != sha256)})


def read(root: Path) -> Record:
    """Return what was decided in a folder of artifacts so far."""
    try:
        with (root / FILE).open("rb") as file:
            return parse(file.read(LARGEST_BYTES + 1))
    except FileNotFoundError:
        return Record()
    except OSError as error:
        logger.warning("%s cannot be read, taken for empty: %s", root / FILE, error)
        return Record()


def parse(content: bytes) -> Record:
    """Return the record of a file's bytes; an empty one, with a warning, where they are none."""
    if not content:
        return Record()
    try:
        if len(content) > LARGEST_BYTES:
            raise ValueError(f"more than {LARGEST_BYTES} bytes")
        return Record.model_validate_json(content)
    except (ValidationError, ValueError) as error:
        logger.warning("%s is not readable, taken for empty: %s", FILE, str(error).partition("\n")[0])
        return Record()


def note(
    root: Path,
    verdict: Verdict | None = None,
    *,
    bar: bool = False,
    unbar: str | None = None,
    action: Action | None = None,
    links: Mapping[str, str | None] | None = None,
) -> None:
    """Write down what was decided, then move links; raises `ExportError` when the disk refuses."""

    def change(content: bytes) -> bytes:
        before = record = parse(content)
        if unbar is not None:
            record = record.without_bar(unbar)
        if verdict is not None:
            record = record.with_verdict(verdict, bar=bar)
        if action is not None:
            record = record.model_copy(update={"actions": (*record.actions, action)[-KEPT_ACTIONS:]})
        return content if record is before else record.model_dump_json(indent=1).encode()

    artifacts.update(root, FILE, change, links)


def change(root: Path, how: Callable[[Record], Record]) -> None:
    """Replace the record by what `how` makes of it; raises `ExportError` when the disk refuses."""

    def changed(content: bytes) -> bytes:
        before = parse(content)
        after = how(before)
        return content if after == before else after.model_dump_json(indent=1).encode()

    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{root} cannot be made: {error}") from error
    artifacts.update(root, FILE, changed)


def verdict_on(
    folder: Path, kind: Literal["refused", "rolled_back"], reason: str, manifest: Manifest | None = None
) -> Verdict:
    """Return a verdict of now on the artifact in a folder; run and round where it can be read."""
    if manifest is None:
        try:
            manifest = artifacts.load_artifact(folder)[0]
        except ExportError:
            manifest = None  # that is what the reason says
    return Verdict(
        kind=kind,
        sha256=(manifest.sha256 if manifest else folder.name)[:64],
        run=manifest.run if manifest else None,
        round=manifest.round if manifest else None,
        reason=reason[:_LONGEST_REASON],
        at=datetime.now(UTC),
    )


def action(
    kind: Literal["pin", "unpin", "rollback"], manifest: Manifest | None, by: str, reason: str | None = None
) -> Action:
    """Return what an owner decided just now."""
    return Action(
        kind=kind,
        sha256=None if manifest is None else manifest.sha256,
        round=None if manifest is None else manifest.round,
        by=by[:_LONGEST_BY],
        reason=reason,
        at=datetime.now(UTC),
    )
