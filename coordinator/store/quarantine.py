"""Updates that were not merged: kept apart for a person to look at, within bounds.

    quarantine/<digest>.json    who, when, in which round, and why
    quarantine/<digest>.frame   the update as it came, while there is room

The digest is that of run, round, agent and the frame's bytes: the same thing told twice is kept once. The
oldest frames go first, when they are more than `FRAMES` or `FRAME_BYTES`; of the oldest cases nothing stays,
when they are more than `CASES`. Nothing here is ever decoded again by the coordinator itself.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, Field, ValidationError

from foundation.durable import write_whole
from foundation.errors import StoreError
from foundation.frozen import Frozen

logger = logging.getLogger(__name__)

FRAMES = 20
FRAME_BYTES = 64 * 1024 * 1024
CASES = 1000


class Case(Frozen):
    """One quarantined update."""

    id: str
    agent: str
    run: str | None = None
    round: int | None = None
    """`None` where it could not be read so far."""
    cause: str
    """`malformed`: it could not be decoded or did not fit; `outside`: it was far from the others."""
    reason: str = Field(max_length=2000)
    at: AwareDatetime
    frame_bytes: int
    sha256: str
    kept: bool = True
    """Whether the frame is still there."""


class Quarantine:
    """A folder of cases; made with the first one. All verbs may be called from any thread."""

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._folder, self._clock = folder, clock
        self._lock = threading.Lock()

    def keep(
        self, agent: str, frame: bytes, *, cause: str, reason: str, run: str | None, round: int | None
    ) -> Case:
        """Keep an update apart; raises `StoreError` when the disk refuses."""
        sha256 = hashlib.sha256(frame).hexdigest()
        key = hashlib.sha256(f"{run}|{round}|{agent}|{sha256}".encode()).hexdigest()[:32]
        case = Case(
            id=key,
            agent=agent,
            run=run,
            round=round,
            cause=cause,
            reason=reason[:2000],
            at=datetime.fromtimestamp(self._clock(), UTC),
            frame_bytes=len(frame),
            sha256=sha256,
        )
        with self._lock:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                if len(frame) <= FRAME_BYTES:
                    write_whole(self._folder / f"{key}.frame", frame)
                write_whole(self._folder / f"{key}.json", case.model_dump_json().encode())
                self._trim()
            except OSError as error:
                raise StoreError(f"a quarantined update of {agent!r} cannot be kept: {error}") from error
        return case

    def cases(self, run: str | None = None) -> list[Case]:
        """Return the cases of one run, or all, newest first; one that cannot be read is left out."""
        return [case for case in self._all() if run is None or case.run == run]

    def frame(self, id: str) -> bytes:
        """Return a case's update as it came; raises `StoreError` when it is not there, or no longer."""
        if not any(case.id == id for case in self._all()):
            raise StoreError(f"there is no quarantined update {id!r}")
        try:
            return (self._folder / f"{id}.frame").read_bytes()
        except OSError as error:
            raise StoreError(f"the frame of {id!r} is no longer kept: {error}") from error

    def forget(self, run: str, round: int) -> None:
        """Let go of those of a round that is judged again; raises `StoreError` when the disk refuses."""
        with self._lock:
            for case in self._all():
                if (case.run, case.round, case.cause) == (run, round, "outside"):
                    self._remove(case)

    def _all(self) -> list[Case]:
        found = []
        for path in self._folder.glob("*.json"):
            try:
                case = Case.model_validate_json(path.read_bytes())
            except FileNotFoundError:  # being removed
                continue
            except (OSError, ValidationError) as error:
                told = {"file": path.name, "reason": str(error)}
                logger.warning("quarantined update unreadable", extra=told)
                continue
            there = path.with_suffix(".frame").exists()
            found.append(case.model_copy(update={"kept": there}))
        return sorted(found, key=lambda case: (case.at, case.id), reverse=True)

    def _trim(self) -> None:
        cases, held = self._all(), 0
        for case in cases[CASES:]:
            self._remove(case)
        for place, case in enumerate(c for c in cases if c.kept):
            held += case.frame_bytes
            if place >= FRAMES or held > FRAME_BYTES:
                (self._folder / f"{case.id}.frame").unlink(missing_ok=True)

    def _remove(self, case: Case) -> None:
        for suffix in (".frame", ".json"):
            try:
                (self._folder / f"{case.id}{suffix}").unlink(missing_ok=True)
            except OSError as error:
                raise StoreError(f"quarantined update {case.id} cannot be removed: {error}") from error
