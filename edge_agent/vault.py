"""What stays on the device: identity, personal parameters, the work in hand, the outbox, artifacts.

    vault/
      identity.json                       who this is
      personal/<run>/<round>.safetensors  own parameters after that round (two rounds kept)
      work/next.frame                     an assignment that has arrived and was not begun
      work/assignment.frame               the assignment in hand
      work/checkpoint.safetensors         where its training stands (after every epoch)
      outbox/<run>~<round>.frame          an update that the coordinator has not confirmed yet (at most 32)
      done.json                           digests of the last assignments that were done
      broken/                             files whose contents are not what was written, and their reason
      last_model.safetensors              the last whole model, to export again (edge_agent/last_model.py)
      signing.key                         signs this device's artifacts (export/sign.py)
      joules.json                         joules of work by day, where a limit counts them
      artifacts/                          personal models (see export/package.py)
      canary.npz                          a few validation samples, to compare models on

Every file is written beside its place, synced and renamed, so a power cut leaves the old or the new one.
Frames have their SHA-256 behind them: what a bad card has changed is put aside, and the next update says so.
A round is done the moment its update is in the outbox: before that, a restart repeats the round from the
personal parameters of the round before it, and comes to the same end.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foundation.durable import write_whole
from foundation.energy import EnergyReading
from foundation.errors import SettingsError
from foundation.parameters import Array, Parameters

logger = logging.getLogger(__name__)

OUTBOX = 32
"""Updates that wait for the coordinator, at most; the oldest goes first."""
DONE = 64
"""Assignments that are remembered as done."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SUM = b"\nsha256:"


@dataclass(frozen=True, slots=True)
class Personal:
    """A device's own parameters after a round."""

    round: int
    parameters: Parameters
    pruning_steps: int = 0
    trained: EnergyReading | None = None
    """Joules and seconds of all training in this run so far."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An update on its way."""

    run: str
    round: int
    frame: bytes


def full(error: OSError, folder: Path) -> str | None:
    """Return what to do about a disk that is full, in words; `None` for another error."""
    if error.errno not in FULL:
        return None
    return f"the disk of this device is full ({os.strerror(error.errno or 0)}): make room for {folder}"


class Vault:
    """The folder of one agent; one process at a time."""

    def __init__(self, folder: Path, agent: str) -> None:
        self.folder = folder
        self._said: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        for torn in folder.rglob(".*.tmp"):
            torn.unlink()
        self._identify(agent)

    def said(self) -> list[str]:
        """Return what was found broken or was given up since the last call, for the coordinator's page."""
        said, self._said = self._said, []
        return said

    def _tell(self, text: str) -> None:
        logger.error(text)
        self._said.append(text)

    def _write_frame(self, path: Path, frame: bytes) -> None:
        write_whole(path, frame + _SUM + hashlib.sha256(frame).digest())

    def _frame(self, path: Path) -> bytes | None:
        """Read a frame; one that is not what was written is put aside, and said."""
        if not path.exists():
            return None
        data = path.read_bytes()
        frame, mark, found = data[: -32 - len(_SUM)], data[-32 - len(_SUM) : -32], data[-32:]
        if mark == _SUM and hashlib.sha256(frame).digest() == found:
            return frame
        aside = self.folder / "broken" / path.name
        aside.parent.mkdir(exist_ok=True)
        path.replace(aside)
        self._tell(
            f"{path.parent.name}/{path.name} was not what was written, and is put aside in {aside.parent}"
        )
        return None

    @property
    def artifacts(self) -> Path:
        """The folder of exported models."""
        return self.folder / "artifacts"

    def _identify(self, agent: str) -> None:
        path = self.folder / "identity.json"
        if not path.exists():
            identity = {"agent": agent, "id": uuid.uuid4().hex}
            write_whole(path, json.dumps(identity).encode())
        try:
            found = json.loads(path.read_text())["agent"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"{path} cannot be read ({error}): put back the file that says whose vault this is, or give"
                " this agent an empty vault"
            ) from error
        if found != agent:
            raise SettingsError(
                f"the vault {self.folder} belongs to agent {found!r}, not to {agent!r}: give this agent"
                " a vault of its own, or its old name back"
            )

    # --- personal parameters -------------------------------------------------------------------

    def save_personal(self, run: str, personal: Personal) -> None:
        """Keep a device's own parameters after a round; the round before it is kept too."""
        meta: dict[str, Any] = {"round": personal.round, "pruning_steps": personal.pruning_steps}
        if personal.trained is not None:
            meta["trained"] = personal.trained.model_dump(mode="json")
        write_arrays(self._personal(run, personal.round), personal.parameters, meta)
        for old in sorted(self._rounds(run))[:-2]:
            self._personal(run, old).unlink()

    def personal(self, run: str, before: int) -> Personal | None:
        """Return the newest own parameters of a round under `before`; a corrupt file is passed over."""
        broken: list[int] = []
        for number in sorted((r for r in self._rounds(run) if r < before), reverse=True):
            loaded = read_arrays(self._personal(run, number))
            if loaded is None:
                broken.append(number)
            else:
                if broken:
                    self._tell(
                        f"personal parameters of round {broken} are broken: those of {number} are used"
                    )
                parameters, meta = loaded
                trained = EnergyReading(**meta["trained"]) if "trained" in meta else None
                return Personal(int(meta["round"]), parameters, int(meta["pruning_steps"]), trained)
        if broken:
            self._tell(
                f"personal parameters of round {broken} are broken, and there are none before: begun anew"
            )
        return None

    def _personal(self, run: str, number: int) -> Path:
        return self.folder / "personal" / run / f"{number:06d}.safetensors"

    def _rounds(self, run: str) -> list[int]:
        folder = self.folder / "personal" / run
        return [int(path.stem) for path in folder.glob("*.safetensors")] if folder.is_dir() else []

    # --- the work in hand ----------------------------------------------------------------------

    def receive(self, frame: bytes) -> None:
        """Write down an assignment that has arrived; it takes the place of one that was not begun."""
        self._write_frame(self._next, frame)

    def take_in_hand(self, frame: bytes) -> None:
        """Begin an assignment; an older one's checkpoint goes."""
        if self._frame(self._in_hand) != frame:
            self._checkpoint.unlink(missing_ok=True)
            self._write_frame(self._in_hand, frame)
        if self._frame(self._next) == frame:
            self._next.unlink()

    def waiting(self) -> bytes | None:
        """Return the assignment to go on with: the newest that arrived, or the one that was begun."""
        return self._frame(self._next) or self._frame(self._in_hand)

    def begun(self, frame: bytes) -> bool:
        """Whether this is the assignment in hand, and not one that only waits."""
        return self._frame(self._in_hand) == frame

    def put_down(self) -> None:
        """Forget the assignment in hand: it is done, or was called off."""
        self._in_hand.unlink(missing_ok=True)
        self._checkpoint.unlink(missing_ok=True)

    def drop(self, frame: bytes) -> None:
        """Forget an assignment that will not be done, begun or not."""
        for path in (self._next, self._in_hand):
            if self._frame(path) == frame:
                path.unlink()
        if not self._in_hand.exists():
            self._checkpoint.unlink(missing_ok=True)

    @property
    def _next(self) -> Path:
        return self.folder / "work" / "next.frame"

    @property
    def _in_hand(self) -> Path:
        return self.folder / "work" / "assignment.frame"

    def save_checkpoint(self, arrays: Mapping[str, Array], counters: Mapping[str, float]) -> None:
        """Keep where the training of the work in hand stands."""
        write_arrays(self._checkpoint, arrays, dict(counters))

    def checkpoint(self) -> tuple[Parameters, dict[str, float]] | None:
        """Return where the training of the work in hand stands."""
        loaded = read_arrays(self._checkpoint) if self._checkpoint.exists() else None
        return None if loaded is None else (loaded[0], {k: float(v) for k, v in loaded[1].items()})

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "work" / "checkpoint.safetensors"

    # --- the outbox ----------------------------------------------------------------------------

    def finish(self, outgoing: Outgoing) -> None:
        """Put an update into the outbox, which makes its round done, and put the work down."""
        self._write_frame(self._outgoing(outgoing.run, outgoing.round), outgoing.frame)
        if (done := self._frame(self._in_hand)) is not None:
            self._remember(done)
        self.put_down()
        for old in self._outbox_files()[:-OUTBOX]:
            old.unlink()
            self._tell(f"the outbox is full: {old.stem} is given up, the coordinator was away for too long")

    def is_done(self, frame: bytes) -> bool:
        """Whether this very assignment was done before."""
        return hashlib.sha256(frame).hexdigest() in self._done()

    def _remember(self, frame: bytes) -> None:
        digest = hashlib.sha256(frame).hexdigest()
        known = [one for one in self._done() if one != digest]
        write_whole(self._done_file, json.dumps([*known, digest][-DONE:]).encode())

    def _done(self) -> list[str]:
        if not self._done_file.exists():
            return []
        try:
            found = json.loads(self._done_file.read_bytes())
            return [str(one) for one in found] if isinstance(found, list) else []
        except (OSError, ValueError) as error:
            logger.warning("what was done is unreadable, begun anew", extra={"reason": str(error)})
            return []

    @property
    def _done_file(self) -> Path:
        return self.folder / "done.json"

    def outbox(self) -> list[Outgoing]:
        """Return what the coordinator has not confirmed, oldest first."""
        result = []
        for path in self._outbox_files():
            run, _, number = path.stem.rpartition("~")
            if (frame := self._frame(path)) is not None:
                result.append(Outgoing(run, int(number), frame))
        return result

    def unconfirmed(self) -> int:
        """Return how many updates are in the outbox, without reading them."""
        return len(self._outbox_files())

    def _outbox_files(self) -> list[Path]:
        return sorted(
            (self.folder / "outbox").glob("*~*.frame"), key=lambda p: (p.stat().st_mtime_ns, p.name)
        )

    def delivered(self, run: str, number: int) -> None:
        """Take a confirmed update out of the outbox."""
        self._outgoing(run, number).unlink(missing_ok=True)

    def _outgoing(self, run: str, number: int) -> Path:
        return self.folder / "outbox" / f"{run}~{number:06d}.frame"

    # --- the canary set ------------------------------------------------------------------------

    def save_canary(self, content: bytes | None) -> None:
        """Keep the samples that models are compared on; `None` for a device that has none."""
        path = self.folder / "canary.npz"
        if content is None:
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_bytes() != content:
            write_whole(path, content)


def write_arrays(path: Path, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
    """Write arrays and facts to a file that knows its own digest, atomically."""
    from safetensors.numpy import save  # loaded with the first work, as in foundation/codec.py

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    told = json.dumps(dict(meta))
    header = {"meta": told, "order": json.dumps([*contiguous]), "sha256": _digest(contiguous, told)}
    write_whole(path, save(contiguous, header))


def read_arrays(path: Path) -> tuple[Parameters, dict[str, Any]] | None:
    """Read what `write_arrays` wrote; `None`, and a line in the log, when it is not that."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])["__metadata__"]
        arrays = load(data)
        ordered = Parameters((name, arrays[name]) for name in json.loads(header["order"]))
        if _digest(ordered, header["meta"]) != header["sha256"]:
            raise ValueError("its contents are not what was written")
        return ordered, json.loads(header["meta"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        logger.warning("vault file unreadable, passed over", extra={"file": path.name, "error": str(error)})
        return None


def _digest(arrays: Mapping[str, Array], meta: str) -> str:
    """Return a digest of everything a file says; the format itself has none, and flash memory rots."""
    result = hashlib.sha256(meta.encode())
    for name, array in arrays.items():
        result.update(f"|{name}|{array.dtype.str}|{array.shape}|".encode())
        result.update(np.ascontiguousarray(array).data)
    return result.hexdigest()
