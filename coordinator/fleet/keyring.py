"""Whose letters the coordinator takes: those of devices that joined, with their seals."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from coordinator.fleet.records import Device, FleetRecords
from coordinator.fleet.secret import FleetSecret
from foundation.errors import JoinRefused, NotEnrolled
from foundation.seal import DOWN, UP, SealKeys
from foundation.topics import Topics

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the rows are looked at: so soon is a device shut out that another process revokes."""


class FleetKeyring:
    """Keys by topic; a `foundation.sealed.Keyring`."""

    def __init__(
        self,
        records: FleetRecords,
        secret: FleetSecret | None,
        topics: Topics,
        *,
        required: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """With `required`, letters of devices that never joined are not taken; else those go unsealed.

        `secret` may be missing while no device has joined.
        """
        self._records, self._secret, self._topics = records, secret, topics
        self._required, self._clock = required, clock
        self._devices: dict[str, Device] = {}
        self._keys: dict[tuple[str, str], SealKeys] = {}
        self._looked = float("-inf")

    def key_to_write(self, topic: str) -> bytes | None:
        """Return the key of a letter to a device that joined."""
        agent = self._agent(topic, DOWN)
        device = None if agent is None else self._device(agent)
        return None if device is None or device.revoked is not None else self._keys_of(device).of(topic)

    def key_to_read(self, topic: str) -> bytes | None:
        """Return the key of a letter from a device; raises `NotEnrolled` for one that is not taken."""
        agent = self._agent(topic, UP)
        if agent is None:
            return None
        device = self._device(agent)
        if device is None:
            if self._required:
                raise NotEnrolled(f"{agent} never joined: invite it with `hedgerow coordinator invite`")
            return None
        if device.revoked is not None:
            raise NotEnrolled(f"{agent} was revoked: {device.reason or 'no reason was given'}")
        return self._keys_of(device).of(topic)

    def look_again(self) -> None:
        """Look at the rows with the next letter: somebody has just joined."""
        self._looked = float("-inf")

    def revoked(self) -> dict[str, str]:
        """Return the devices that were shut out, with the reasons."""
        self._look()
        return {d.agent: d.reason for d in self._devices.values() if d.revoked is not None}

    def _agent(self, topic: str, whats: tuple[str, ...]) -> str | None:
        if topic.rpartition("/")[2] not in whats:
            return None
        try:
            return self._topics.agent_of(topic)
        except ValueError:  # another topic that ends like one of ours
            return None

    def _device(self, agent: str) -> Device | None:
        self._look()
        return self._devices.get(agent)

    def _look(self) -> None:
        if self._clock() - self._looked < LOOK_S:
            return
        self._looked = self._clock()
        self._devices = {device.agent: device for device in self._records.devices()}

    def _keys_of(self, device: Device) -> SealKeys:
        name = (device.agent, device.public)
        if name not in self._keys:
            if self._secret is None:
                raise NotEnrolled(f"{device.agent} has joined, but the coordinator's fleet.key is not here")
            try:
                self._keys[name] = self._secret.shared(device.agent, bytes.fromhex(device.public)).seals
            except (JoinRefused, ValueError) as error:
                raise NotEnrolled(f"the key of {device.agent} cannot be used: {error}") from error
        return self._keys[name]
