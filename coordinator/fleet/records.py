"""Invitations, devices that joined, and who did what: rows of the coordinator's store.

None of them holds a secret: keys, passwords and invitations' secrets come from `fleet.key`, and names,
numbers and salts in these rows (coordinator/fleet/secret.py).
"""

from __future__ import annotations

import getpass
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from coordinator.store import schema
from coordinator.store.sql import Store
from foundation.errors import JoinRefused, SettingsError
from foundation.seal import Mark

ANSWERED_S = 600.0
"""How long the broker lets the user of a taken invitation in: its device may have lost the answer."""


@dataclass(frozen=True, slots=True)
class Invite:
    """One place in the fleet, for one device."""

    invite: str
    """16 hexadecimal digits."""
    name: str | None
    """The only name that may be taken with it, if so."""
    replace: bool
    """Whether a device of that name gives way."""
    created: float
    expires: float
    """UTC seconds, as are all times here."""
    used_by: str | None
    """Public key of the device that took the place."""
    used: float | None


@dataclass(frozen=True, slots=True)
class Device:
    """A device that joined."""

    agent: str
    public: str
    """X25519, 64 hexadecimal digits."""
    salt: str
    """Makes its broker password; new with every joining."""
    enrolled: float
    revoked: float | None
    reason: str
    """Why it was revoked."""


@dataclass(frozen=True, slots=True)
class Deed:
    """Something somebody did."""

    at: float
    who: str
    what: str
    of: str
    detail: str


class FleetRecords:
    """The verbs; every one is a transaction of its own, safe from any thread and beside other processes."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock

    def invite(
        self, count: int, *, name: str | None, replace: bool, expires_s: float, who: str
    ) -> list[Invite]:
        """Open `count` places; raises `SettingsError` for a name that several could not share."""
        if name is not None and count > 1:
            raise SettingsError("a name is for one device: invite them one by one, or without names")
        now = self._clock()
        made = [
            Invite(secrets.token_hex(8), name, replace, now, now + expires_s, None, None)
            for _ in range(count)
        ]
        with self._store.transaction(writes=True) as connection:
            for one in made:
                row = {field: getattr(one, field) for field in Invite.__dataclass_fields__}
                connection.execute(sa.insert(schema.invites).values(**row))
                self._note(connection, who, "invite", one.invite, name or "any name")
        return made

    def open_invites(self) -> list[Invite]:
        """Return the invitations that nobody took and that are still good, oldest first."""
        table = schema.invites
        query = (
            sa.select(table)
            .where(table.c.used.is_(None), table.c.expires > self._clock())
            .order_by(table.c.created, table.c.invite)
        )
        with self._store.transaction() as connection:
            return [_invite(row) for row in connection.execute(query)]

    def joining(self) -> list[Invite]:
        """Return the invitations whose users the broker lets in: open ones, and those just taken.

        A device that has taken its place still has to read the answer.
        """
        table, now = schema.invites, self._clock()
        just = table.c.used > now - ANSWERED_S
        query = sa.select(table).where(sa.or_(sa.and_(table.c.used.is_(None), table.c.expires > now), just))
        with self._store.transaction() as connection:
            return [_invite(row) for row in connection.execute(query.order_by(table.c.invite))]

    def withdraw(self, invite: str, *, who: str) -> None:
        """Close a place nobody took; raises `SettingsError` where there is none."""
        table = schema.invites
        with self._store.transaction(writes=True) as connection:
            gone = connection.execute(
                sa.delete(table).where(table.c.invite == invite, table.c.used.is_(None))
            )
            if not gone.rowcount:
                raise SettingsError(f"there is no open invitation {invite!r}: `invites` lists them")
            self._note(connection, who, "withdraw", invite, "")

    def join(self, invite: str, name: str, public: str) -> Device:
        """Let a device take its place; once more with the same key gives the same answer.

        Raises `JoinRefused` with the reason.
        """
        now = self._clock()
        with self._store.transaction(writes=True) as connection:
            row = connection.execute(sa.select(schema.invites).filter_by(invite=invite)).first()
            place = None if row is None else _invite(row)
            known = _device_of(connection, name)
            if place is not None and place.used_by == public and known is not None and known.public == public:
                return _unrevoked(known)  # its answer was lost, and it asks again
            place = _good(place, name, now)
            if known is not None and not place.replace:
                raise JoinRefused(
                    f"there is a device {name!r} already: take another name with --name, or have it invited"
                    f" anew with `hedgerow coordinator invite --name {name} --replace`"
                )
            device = Device(name, public, secrets.token_hex(16), now, None, "")
            row_values = {field: getattr(device, field) for field in Device.__dataclass_fields__}
            connection.execute(sa.delete(schema.devices).where(schema.devices.c.agent == name))
            connection.execute(sa.insert(schema.devices).values(**row_values, marks_json="{}"))
            connection.execute(
                sa.update(schema.invites)
                .where(schema.invites.c.invite == invite)
                .values(used_by=public, used=now)
            )
            self._note(connection, name, "join", name, f"with invitation {invite}, key {public[:16]}")
        return device

    def devices(self) -> list[Device]:
        """Return all that ever joined, by name; revoked ones too."""
        with self._store.transaction() as connection:
            found = connection.execute(sa.select(schema.devices).order_by(schema.devices.c.agent))
            return [_device(row) for row in found]

    def revoke(self, agent: str, reason: str, *, who: str) -> Device:
        """Shut a device out; raises `SettingsError` for one that never joined."""
        with self._store.transaction(writes=True) as connection:
            known = _device_of(connection, agent)
            if known is None:
                raise SettingsError(
                    f"no device {agent!r} has joined: `hedgerow coordinator devices` lists them"
                )
            if known.revoked is None:
                table = schema.devices
                change = sa.update(table).where(table.c.agent == agent)
                connection.execute(change.values(revoked=self._clock(), reason=reason))
                self._note(connection, who, "revoke", agent, reason)
            revoked = _device_of(connection, agent)
        assert revoked is not None
        return revoked

    def marks(self) -> dict[str, Mark]:
        """Return how far each device's topics were read."""
        with self._store.transaction() as connection:
            found = connection.execute(sa.select(schema.devices.c.marks_json)).scalars().all()
        return {
            topic: Mark.model_validate(mark) for text in found for topic, mark in json.loads(text).items()
        }

    def keep_marks(self, marks: Mapping[str, Mapping[str, Mark]]) -> None:
        """Keep how far topics were read, by device."""
        with self._store.transaction(writes=True) as connection:
            for agent, of_agent in marks.items():
                text = json.dumps({topic: mark.model_dump() for topic, mark in of_agent.items()})
                change = sa.update(schema.devices).where(schema.devices.c.agent == agent)
                connection.execute(change.values(marks_json=text))

    def note(self, who: str, what: str, of: str, detail: str = "") -> None:
        """Write down who did what to whom."""
        with self._store.transaction(writes=True) as connection:
            self._note(connection, who, what, of, detail)

    def deeds(self, *, last: int = 100) -> list[Deed]:
        """Return the newest deeds, oldest first."""
        table = schema.audit
        query = sa.select(table).order_by(table.c.id.desc()).limit(last)
        with self._store.transaction() as connection:
            rows = connection.execute(query).all()
        return [Deed(row.at, row.who, row.what, row.of, row.detail) for row in reversed(rows)]

    def _note(self, connection: Connection, who: str, what: str, of: str, detail: str) -> None:
        values = {"at": self._clock(), "who": who, "what": what, "of": of, "detail": detail}
        connection.execute(sa.insert(schema.audit).values(**values))


def person() -> str:
    """Return the name of whoever types, for the audit."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "somebody without a name"


def _good(place: Invite | None, name: str, now: float) -> Invite:
    """Return an invitation that may be used now, by that name; raises `JoinRefused`."""
    again = "ask for another: `hedgerow coordinator invite`"
    if place is None:
        raise JoinRefused(f"this coordinator knows no such invitation: {again}")
    if place.used is not None:
        raise JoinRefused(f"this token was used already by another device: {again}")
    if place.expires <= now:
        raise JoinRefused(f"this token has expired: {again}")
    if place.name is not None and place.name != name:
        raise JoinRefused(
            f"this token is for a device called {place.name!r}, not {name!r}: --name {place.name}"
        )
    return place


def _unrevoked(device: Device) -> Device:
    if device.revoked is not None:
        raise JoinRefused(f"device {device.agent!r} was revoked: {device.reason or 'no reason was given'}")
    return device


def _device_of(connection: Connection, agent: str) -> Device | None:
    row = connection.execute(sa.select(schema.devices).filter_by(agent=agent)).first()
    return None if row is None else _device(row)


def _device(row: Row[tuple[object, ...]]) -> Device:
    return Device(**{field: getattr(row, field) for field in Device.__dataclass_fields__})


def _invite(row: Row[tuple[object, ...]]) -> Invite:
    return Invite(**{field: getattr(row, field) for field in Invite.__dataclass_fields__})
