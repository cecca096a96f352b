"""What a device keeps of its joining: its name, the coordinator's keys, how far it has read.

    vault/
      identity.key             its X25519 key; only joining needs it
      enrolment.json           whom it joined, and the seal keys of both directions
      seals.json               the epoch of its letters, and how far the coordinator's were read
      broker.password          of its user at the broker
      authority.pem            the authority of the broker's certificate, where the coordinator is that
      trusted/coordinator.pub  what artifacts of the coordinator are checked with (export/sign.py)

No package is needed for any of it once the device has joined.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from foundation.durable import SECRET, write_whole
from foundation.errors import SettingsError
from foundation.frozen import Frozen
from foundation.seal import DOWN, UP, Mark, Opener, Sealer, SealKeys, new_epoch
from foundation.topics import Topics

logger = logging.getLogger(__name__)

IDENTITY, ENROLMENT, SEALS = "identity.key", "enrolment.json", "seals.json"
PASSWORD, AUTHORITY = "broker.password", "authority.pem"
KEEP_S = 5.0
"""How often it is written down how far letters were read."""
_HEX32 = r"^[0-9a-f]{64}$"


class Enrolment(Frozen):
    """Whom this device joined, and with which keys."""

    federation: str
    name: str
    coordinator: str = Field(pattern=_HEX32)
    """Its public key, X25519."""
    up: str = Field(pattern=_HEX32)
    down: str = Field(pattern=_HEX32)

    @property
    def keys(self) -> SealKeys:
        """The seal keys."""
        return SealKeys(bytes.fromhex(self.up), bytes.fromhex(self.down))


class _Seals(Frozen):
    epoch: int = Field(0, ge=0)
    marks: dict[str, Mark] = Field(default_factory=dict)


def enrolment_in(vault: Path) -> Enrolment | None:
    """Return what a vault keeps of its joining, `None` where it did not; `SettingsError` when unreadable."""
    path = vault / ENROLMENT
    try:
        return Enrolment.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise SettingsError(f"{path} cannot be read ({error}): join again with a new token") from error


def keep(vault: Path, enrolment: Enrolment) -> None:
    """Write what belongs to a joining; seals begin anew."""
    write_whole(vault / ENROLMENT, enrolment.model_dump_json().encode(), mode=SECRET)


class DeviceKeyring:
    """This device's own keys, on its own topics; a `foundation.sealed.Keyring`."""

    def __init__(self, enrolment: Enrolment) -> None:
        topics = Topics(enrolment.federation)
        self._writes = {topics.of(enrolment.name, what): enrolment.keys.up for what in UP}
        self._reads = {topics.of(enrolment.name, what): enrolment.keys.down for what in DOWN}

    def key_to_write(self, topic: str) -> bytes | None:
        """Return the key of a letter to the coordinator."""
        return self._writes.get(topic)

    def key_to_read(self, topic: str) -> bytes | None:
        """Return the key of a letter from it."""
        return self._reads.get(topic)


class Seals:
    """The sealer and the opener of one life of the agent, and their memory."""

    def __init__(self, vault: Path) -> None:
        """Begin a new epoch; it is on the disk before any letter has it."""
        self._path = vault / SEALS
        before = self._read()
        self.sealer = Sealer(new_epoch(before.epoch))
        self.opener = Opener(before.marks)
        self._kept = before.marks
        self._write(before.marks)

    async def run(self) -> None:
        """Keep how far letters were read, until cancelled."""
        try:
            while True:
                await asyncio.sleep(KEEP_S)
                await asyncio.to_thread(self.save)
        finally:
            self.save()

    def save(self) -> None:
        """Write it down where it has changed."""
        marks = self.opener.marks()
        if marks != self._kept:
            self._write(marks)
            self._kept = marks

    def _read(self) -> _Seals:
        try:
            return _Seals.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return _Seals()
        except (OSError, ValidationError) as error:
            # The epoch follows the clock then; what was read before could be told again, once.
            logger.error(
                "seals unreadable, begun anew", extra={"file": str(self._path), "reason": str(error)}
            )
            return _Seals()

    def _write(self, marks: dict[str, Mark]) -> None:
        write_whole(self._path, _Seals(epoch=self.sealer.epoch, marks=marks).model_dump_json().encode())


def fits(enrolment: Enrolment, *, federation: str, agent: str) -> None:
    """Raise `SettingsError` where the settings call this device otherwise than it joined."""
    wrong: Sequence[tuple[str, str, str]] = [
        ("agent", agent, enrolment.name),
        ("federation", federation, enrolment.federation),
    ]
    for key, said, joined in wrong:
        if said != joined:
            raise SettingsError(
                f'{key} = "{said}", but this vault joined as "{joined}": set {key} = "{joined}", or join anew'
            )
