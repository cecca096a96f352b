"""What a coordinator with enrolment goes over: a transport with seals, and the gate beside its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from coordinator.fleet.access import authority_of, certificates_of, tell_broker
from coordinator.fleet.brokers.access import write
from coordinator.fleet.gate import Gate
from coordinator.fleet.keyring import LOOK_S, FleetKeyring
from coordinator.fleet.records import FleetRecords
from coordinator.fleet.secret import FleetSecret
from coordinator.live import Live
from coordinator.settings import CoordinatorSettings
from coordinator.store.sql import Store
from export.sign import COORDINATOR_KEY, CoordinatorKey
from foundation.errors import SealBroken, SettingsError
from foundation.seal import Opener, Sealer, new_epoch
from foundation.sealed import SealedTransport
from foundation.topics import Topics
from foundation.transport import Transport


class Doors(Protocol):
    """What an engine does when a device is shut out, or may come in again."""

    def shut_out(self, agent: str, reason: str) -> None:
        """Give a device no more work, and wait for it no more."""
        ...

    def let_in(self, agent: str) -> None:
        """Take a device's work again."""
        ...


@dataclass(slots=True)
class Fleet:
    """What the engine gets, and what runs beside it."""

    transport: Transport
    lives: list[Callable[[], Coroutine[Any, Any, None]]] = field(default_factory=list)
    keyring: FleetKeyring | None = None
    _doors: Doors | None = None

    def watch(self, doors: Doors) -> None:
        """Tell an engine who is revoked; call it before the lives run."""
        self._doors = doors

    async def look(self) -> None:
        """Look who is revoked, until cancelled."""
        out: dict[str, str] = {}
        while self._doors is not None and self.keyring is not None:
            now = await asyncio.to_thread(self.keyring.revoked)
            for agent in now.keys() - out.keys():
                self._doors.shut_out(agent, f"it was revoked: {now[agent] or 'no reason was given'}")
            for agent in out.keys() - now.keys():
                self._doors.let_in(agent)
            out = now
            await asyncio.sleep(LOOK_S)


def with_fleet(s: CoordinatorSettings, transport: Transport, store: Store, live: Live) -> Fleet:
    """Put seals on a transport, where the settings say so.

    Raises `SettingsError` where devices have joined and the settings would take their letters unsealed.
    """
    records = FleetRecords(store)
    if not s.enrolment.enabled:
        if joined := [d.agent for d in records.devices() if d.revoked is None]:
            raise SettingsError(
                f"{len(joined)} devices have joined with keys ({', '.join(joined[:3])}, ...): set"
                " enrolment.enabled = true, or revoke them"
            )
        return Fleet(transport)
    secret = FleetSecret.load(s.folder, s.federation)
    keyring = FleetKeyring(records, secret, Topics(s.federation), required=s.enrolment.required)
    epoch = _epoch(s.folder)
    if s.workers:
        store.begin_seals(epoch)
    opener = Opener(records.marks())
    told = _Told(live)
    sealed = SealedTransport(transport, keyring, Sealer(epoch), opener, tell=told.tell)
    gate = Gate(
        sealed,
        records,
        secret,
        authority=authority_of(s),
        signing=CoordinatorKey.load(s.folder / COORDINATOR_KEY, make=True).public.hex(),
        tell_broker=lambda: _told_broker(s, records, secret, live),
        joined=keyring.look_again,
        emit=lambda kind, text, agent: live.emit(kind, text, agent=agent or None),
        opener=opener,
        certificates=certificates_of(s),
        port=s.enrolment.port,
    )
    with suppress(SettingsError):  # said as an event; devices that the broker knows already can go on
        _told_broker(s, records, secret, live)
    fleet = Fleet(sealed, keyring=keyring)
    fleet.lives += [gate.run, fleet.look]
    return fleet


def _epoch(folder: Path) -> int:
    """Return the epoch of this life's seals; it is on the disk before any letter has it."""
    path = folder / "fleet.epoch"
    try:
        epoch = new_epoch(int(path.read_text("ascii")) if path.exists() else 0)
        write(folder, {path.name: f"{epoch}\n"})
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{path} cannot be used ({error}): remove it where the clock goes right"
        ) from error
    return epoch


def _told_broker(s: CoordinatorSettings, records: FleetRecords, secret: FleetSecret, live: Live) -> None:
    try:
        tell_broker(s, records, secret)
    except SettingsError as error:  # the device has its place; a person has to help the broker
        live.emit("broker_not_told", str(error))
        raise


class _Told:
    """Says once what is not taken of a device for one reason, and then at 10, 100, ... letters."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._counts: dict[tuple[str, str], int] = {}

    def tell(self, topic: str, error: SealBroken) -> None:
        """Hear of a letter that was not taken."""
        agent = topic.split("/")[-2][:64]
        key = (agent, type(error).__name__)
        if key not in self._counts and len(self._counts) >= 10_000:
            return  # a stranger with any number of names does not fill the memory
        count = self._counts[key] = self._counts.get(key, 0) + 1
        if str(count).strip("0") == "1":
            name = {"NotSealed": "not_sealed", "SealWrong": "seal_wrong", "Replayed": "replayed"}
            times = "" if count == 1 else f" ({count} letters so far)"
            self._live.emit(name.get(key[1], "not_enrolled"), f"{agent}: {error}{times}", agent=agent)
