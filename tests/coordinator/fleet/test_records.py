"""Invitations and devices in the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.fleet.keyring import FleetKeyring
from coordinator.fleet.records import ANSWERED_S, FleetRecords
from coordinator.fleet.secret import FILE, FleetSecret
from coordinator.store.place import StoreSettings
from coordinator.store.sql import Store
from foundation.errors import JoinRefused, NotEnrolled, SettingsError
from foundation.joining import public_of
from foundation.seal import Mark
from foundation.topics import Topics

pytest.importorskip("cryptography")
DAY_S = 86_400.0
KEY, OTHER = public_of(bytes([1]) * 32).hex(), public_of(bytes([2]) * 32).hex()


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgres"])
def records(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[FleetRecords]:
    url = None if request.param == "sqlite" else request.getfixturevalue("database")
    with Store.open(tmp_path, place=StoreSettings(database=url)) as store:
        yield FleetRecords(store, clock=clock)


def invited(records: FleetRecords, name: str | None = None, *, replace: bool = False) -> str:
    (made,) = records.invite(1, name=name, replace=replace, expires_s=DAY_S, who="me")
    return made.invite


def test_an_invitation_is_for_one_device(records: FleetRecords) -> None:
    invite = invited(records)
    device = records.join(invite, "pi", KEY)
    assert [d.agent for d in records.devices()] == ["pi"]
    assert records.join(invite, "pi", KEY) == device, "its answer was lost, and it asks again"
    with pytest.raises(JoinRefused, match="used already"):
        records.join(invite, "po", OTHER)
    with pytest.raises(JoinRefused, match="used already"):
        records.join(invite, "po", KEY)
    assert records.open_invites() == []


def test_unknown_expired_withdrawn_and_others_invitations_are_refused(
    records: FleetRecords, clock: Clock
) -> None:
    with pytest.raises(JoinRefused, match="no such invitation"):
        records.join("0" * 16, "pi", KEY)
    named, old, withdrawn = invited(records, "kitchen"), invited(records), invited(records)
    with pytest.raises(JoinRefused, match="called 'kitchen'"):
        records.join(named, "pi", KEY)
    records.withdraw(withdrawn, who="me")
    with pytest.raises(JoinRefused, match="no such"):
        records.join(withdrawn, "pi", KEY)
    with pytest.raises(SettingsError, match="no open invitation"):
        records.withdraw(withdrawn, who="me")
    clock.now += DAY_S
    with pytest.raises(JoinRefused, match="expired"):
        records.join(old, "pi", KEY)
    assert records.devices() == []


def test_a_name_is_taken_once_and_given_up_only_when_that_is_asked_for(records: FleetRecords) -> None:
    first = records.join(invited(records), "pi", KEY)
    with pytest.raises(JoinRefused, match="--replace"):
        records.join(invited(records), "pi", OTHER)
    second = records.join(invited(records, "pi", replace=True), "pi", OTHER)
    assert [d.public for d in records.devices()] == [OTHER]
    assert second.salt != first.salt, "the old card's broker password is worth nothing any more"


def test_the_broker_lets_a_device_read_its_answer(records: FleetRecords, clock: Clock) -> None:
    invite = invited(records)
    assert [i.invite for i in records.joining()] == [invite]
    records.join(invite, "pi", KEY)
    assert [i.invite for i in records.joining()] == [invite]
    clock.now += ANSWERED_S + 1
    assert records.joining() == []


def test_who_is_revoked_cannot_come_back_with_its_token(records: FleetRecords) -> None:
    invite = invited(records)
    records.join(invite, "pi", KEY)
    gone = records.revoke("pi", "sold", who="me")
    assert (gone.revoked, gone.reason) == (1_000_000.0, "sold")
    assert records.revoke("pi", "again", who="me") == gone
    with pytest.raises(JoinRefused, match="sold"):
        records.join(invite, "pi", KEY)
    with pytest.raises(SettingsError, match="no device 'po'"):
        records.revoke("po", "", who="me")
    assert [(d.who, d.what, d.of) for d in records.deeds()] == [
        ("me", "invite", invite),
        ("pi", "join", "pi"),
        ("me", "revoke", "pi"),
    ]


def test_how_far_letters_were_read_is_kept(records: FleetRecords) -> None:
    records.join(invited(records), "pi", KEY)
    marks = {"hedgerow/v1/f/agents/pi/card": Mark(epoch=2**60, counter=7, seen=2**1023)}
    records.keep_marks({"pi": marks})
    assert records.marks() == marks


def test_the_keyring_has_keys_of_those_who_joined_and_refuses_the_others(records: FleetRecords) -> None:
    secret, topics, now = FleetSecret(bytes(32), "f"), Topics("f"), [0.0]
    ring = FleetKeyring(records, secret, topics, required=True, clock=lambda: now[0])
    card, work = topics.of("pi", "card"), topics.of("pi", "assignment")
    with pytest.raises(NotEnrolled, match="never joined"):
        ring.key_to_read(card)
    assert ring.key_to_write(work) is None
    records.join(invited(records), "pi", KEY)
    now[0] += 2
    keys = secret.shared("pi", bytes.fromhex(KEY)).seals
    assert (ring.key_to_read(card), ring.key_to_write(work)) == (keys.up, keys.down)
    assert ring.key_to_read(topics.coordinator_presence) is None
    records.join(invited(records), "po", OTHER)
    with pytest.raises(NotEnrolled, match="never joined"):
        ring.key_to_read(topics.of("po", "card"))
    ring.look_again()  # as the gate says when somebody joins: its first letter must not be lost
    assert ring.key_to_read(topics.of("po", "card")) is not None
    records.revoke("pi", "sold", who="me")
    now[0] += 2
    with pytest.raises(NotEnrolled, match="revoked: sold"):
        ring.key_to_read(card)
    assert ring.key_to_write(work) is None
    assert ring.revoked() == {"pi": "sold"}
    open_ring = FleetKeyring(records, secret, topics, required=False)
    assert open_ring.key_to_read(topics.of("other", "card")) is None


def test_the_fleets_key_is_made_once_kept_secret_and_checked(tmp_path: Path) -> None:
    first = FleetSecret.load(tmp_path, "f")
    assert FleetSecret.load(tmp_path, "f").secret == first.secret
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert first.own_password() != FleetSecret.load(tmp_path, "g").own_password()
    (tmp_path / FILE).chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        FleetSecret.load(tmp_path, "f")
    (tmp_path / FILE).chmod(0o600)
    (tmp_path / FILE).write_bytes(b"short")
    with pytest.raises(SettingsError, match="not a key"):
        FleetSecret.load(tmp_path, "f")


def test_no_secret_is_in_the_store(tmp_path: Path, records: FleetRecords) -> None:
    secret = FleetSecret(bytes(range(32)), "f")
    invite = invited(records)
    device = records.join(invite, "pi", KEY)
    content = b"".join(path.read_bytes() for path in tmp_path.glob("hedgerow.sqlite*"))
    for hidden in (secret.password(device), secret.invite_secret(invite).hex(), secret.own_password()):
        assert hidden.encode() not in content
