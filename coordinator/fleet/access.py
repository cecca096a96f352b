"""The broker's files brought up to date with who has joined."""

from __future__ import annotations

from pathlib import Path

from coordinator.fleet.authority import AUTHORITY
from coordinator.fleet.brokers.access import COORDINATOR, Access, Account, broker_files, reload, write
from coordinator.fleet.certificates import REVOKED, Certificates
from coordinator.fleet.records import FleetRecords
from coordinator.fleet.secret import FleetSecret
from coordinator.settings import CoordinatorSettings


def access_of(s: CoordinatorSettings, records: FleetRecords, secret: FleetSecret) -> Access:
    """Return who may connect now: the coordinator, devices that joined, and users of invitations."""
    devices = [d for d in records.devices() if d.revoked is None]
    tokens = [secret.token(invite, None) for invite in records.joining()]
    return Access(
        federation=s.federation,
        coordinator=Account(COORDINATOR, secret.own_password()),
        devices=[Account(d.agent, secret.password(d)) for d in devices],
        joining=[Account(token.user, token.password) for token in tokens],
        coordinator_reads=s.enrolment.coordinator_reads,
        coordinator_writes=s.enrolment.coordinator_writes,
        devices_read=s.enrolment.devices_read,
        home_prefix=s.home_assistant.prefix,
        certificates=s.enrolment.certificates,
    )


def tell_broker(s: CoordinatorSettings, records: FleetRecords, secret: FleetSecret) -> str:
    """Write the broker's users anew and make it read them; returns what was done.

    Raises `SettingsError` when the broker could not be told.
    """
    folder, broker = s.enrolment.files, s.enrolment.broker
    if folder is None or broker == "none":
        return "the settings name no broker's files (enrolment.files): its users are yours to keep"
    files = {**broker_files(broker).users(folder, access_of(s, records, secret)), **revoked(s, records)}
    if not write(folder, files):
        return "nothing has changed for the broker"
    return reload(folder, broker, s.enrolment.reload)


def certificates_of(s: CoordinatorSettings) -> Certificates | None:
    """Return who makes devices' certificates, `None` where they have none."""
    if not s.enrolment.certificates or s.enrolment.files is None:
        return None
    return Certificates(s.enrolment.files, s.folder, days=s.enrolment.certificate_days)


def revoked(s: CoordinatorSettings, records: FleetRecords) -> dict[str, str]:
    """Return the list of certificates that were taken back, as a file; nothing where there are none."""
    made = certificates_of(s)
    return {} if made is None else {REVOKED: made.revoked(records.devices())}


def authority_of(s: CoordinatorSettings) -> str:
    """Return the PEM of the authority that signed the broker's certificate, empty where it is not ours."""
    path = None if s.enrolment.files is None else Path(s.enrolment.files) / AUTHORITY
    return path.read_text(encoding="ascii") if path is not None and path.is_file() else ""
