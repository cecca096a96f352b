"""Seals of several workers: one sequence of receipts for a device, whoever writes them."""

from __future__ import annotations

from pathlib import Path

from coordinator.fleet.keyring import FleetKeyring
from coordinator.fleet.records import FleetRecords
from coordinator.fleet.secret import FILE, FleetSecret
from coordinator.settings import CoordinatorSettings
from coordinator.store.sql import Store
from foundation.errors import SettingsError
from foundation.seal import Opener, Sealer
from foundation.sealed import SealedTransport
from foundation.topics import Topics
from foundation.transport import Transport


class DrawnSealer(Sealer):
    """Seals with epoch and counter from the store, so that no two workers' receipts have the same."""

    def __init__(self, store: Store) -> None:
        super().__init__(0)
        self._store = store

    def seal(self, topic: str, body: bytes, key: bytes) -> bytes:
        """Return the letter; asks the store, about a millisecond. Raises `StoreError`."""
        self.epoch, counter = self._store.draw_seal()
        self._counter = counter - 1
        return super().seal(topic, body, key)


def with_seals(s: CoordinatorSettings, transport: Transport, store: Store) -> Transport:
    """Put seals on a worker's transport, where devices have joined.

    Each worker knows which letters came to itself: one that comes again to another is opened, and changes
    nothing, since a part is kept once. Raises `SettingsError` without the fleet's key.
    """
    if not s.enrolment.enabled:
        return transport
    if not (Path(s.folder) / FILE).exists():
        raise SettingsError(
            f"there is no {FILE} in {s.folder}: copy the coordinator's there, readable by its owner alone"
        )
    secret = FleetSecret.load(s.folder, s.federation)
    keyring = FleetKeyring(FleetRecords(store), secret, Topics(s.federation), required=s.enrolment.required)
    return SealedTransport(transport, keyring, DrawnSealer(store), Opener())
