"""Where devices are invited and shut out, whoever asks: the command line, or the page."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.fleet.access import tell_broker
from coordinator.fleet.authority import pin_of
from coordinator.fleet.records import Device, FleetRecords
from coordinator.fleet.secret import FleetSecret
from coordinator.settings import CoordinatorSettings
from foundation.errors import SettingsError

HOUR_S = 3600.0
MOST_DEVICES = 10_000
MOST_HOURS = 8760.0


@dataclass(frozen=True, slots=True)
class Invited:
    """Tokens that were made, each for one device."""

    tokens: tuple[str, ...]
    address: str
    """Of the broker, as devices reach it."""
    expires: float
    """UTC seconds."""
    broker: str
    """What was done for the broker, in words."""
    certificates: bool = False
    """Whether devices ask for a client certificate as they join."""

    @property
    def lines(self) -> tuple[str, ...]:
        """What is typed on each device."""
        more = " --certificate" if self.certificates else ""
        return tuple(f"hedgerow agent join {self.address} --token {token}{more}" for token in self.tokens)


class Desk:
    """Invitations and revocations under a coordinator's settings. Its verbs may be called from any thread."""

    def __init__(self, s: CoordinatorSettings, records: FleetRecords) -> None:
        self._s, self._records = s, records

    def invite(
        self, count: int = 1, *, name: str | None = None, replace: bool = False, hours: float = 24.0, who: str
    ) -> Invited:
        """Open places for devices and tell the broker; raises `SettingsError` where nobody can join."""
        s = self._s
        if not s.enrolment.enabled:
            raise SettingsError(
                "this coordinator lets devices in without joining: set enrolment.enabled = true in its"
                " settings first (`hedgerow coordinator broker-config` prints all that belongs there)"
            )
        if not 1 <= count <= MOST_DEVICES or not 0 < hours <= MOST_HOURS:
            raise SettingsError("--devices is 1 to 10000 and --hours up to 8760")
        secret = FleetSecret.load(s.folder, s.federation)
        pin = None if s.enrolment.files is None else pin_of(s.enrolment.files)
        made = self._records.invite(count, name=name, replace=replace, expires_s=hours * HOUR_S, who=who)
        done = tell_broker(s, self._records, secret)
        tokens = tuple(secret.token(invite, pin).text() for invite in made)
        address = s.enrolment.address or s.mqtt.address
        return Invited(tokens, address, made[0].expires, done, s.enrolment.certificates)

    def revoke(self, agent: str, reason: str, *, who: str) -> tuple[Device, str]:
        """Shut a device out; returns it and what was done for the broker.

        Raises `SettingsError` for one that never joined.
        """
        secret = FleetSecret.load(self._s.folder, self._s.federation)
        device = self._records.revoke(agent, reason, who=who)
        return device, tell_broker(self._s, self._records, secret)
