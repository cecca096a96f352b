"""Eclipse Mosquitto 2: a configuration, an access list, a password file that SIGHUP makes it read again.

A device's client id becomes its user name, so nobody with a password of his own can take over another
device's session. Who is no longer in the password file is cut off when the file is read again. With client
certificates there is a second listener that only users of invitations get into; `use_identity_as_username`
is not used, as Mosquitto then cuts nobody off who is taken out of the password file.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

from coordinator.fleet.brokers.access import Access, Account, Listener
from coordinator.fleet.certificates import REVOKED
from foundation.topics import READ_BY_AGENTS, WRITTEN_BY_AGENTS

PID_FILE = "mosquitto.pid"
HOME_READS = ("coordinator/+", "agents/+/presence", "home/+/state", "agents/+/answer", "agents/+/prediction")
_ROUNDS = 101  # passwords here are 128 random bits: nobody guesses them, however cheap a guess


def config(folder: Path, listener: Listener, access: Access) -> Mapping[str, str]:
    """Return `mosquitto.conf` and `acl`."""
    acl = [*_acl(access), *_own(folder / "acl", "# Rules of your own go below this line; they stay.")]
    return {"mosquitto.conf": _conf(folder, listener), "acl": "\n".join(acl) + "\n"}


def users(folder: Path, access: Access) -> Mapping[str, str]:
    """Return `passwords` and `joining`; lines of users that are none of ours stay."""
    lines = [_line(account) for account in (access.coordinator, *access.devices)]
    joining = [_line(account) for account in access.joining]
    own = _own(folder / "passwords", "# Users of your own go below this line; they stay.")
    if access.certificates:
        return {
            "passwords": "\n".join([*lines, *own]) + "\n",
            "joining": "\n".join(["# Users of open invitations.", *joining]) + "\n",
        }
    return {"passwords": "\n".join([*lines, *joining, *own]) + "\n"}


def _conf(folder: Path, listener: Listener) -> str:
    lines = [
        "# Written by `hedgerow coordinator broker-config mosquitto`. Start it with:",
        f"# mosquitto -c {folder}/mosquitto.conf",
        *_listeners(folder, listener),
        f"pid_file {folder}/{PID_FILE}",
        "set_tcp_nodelay true",
        "persistence true",
        f"persistence_location {folder}/",
        "autosave_interval 60",
        "# Its default of 1,000 drops parts for a device that is away.",
        "max_queued_messages 20000",
        "max_queued_bytes 268435456",
        "max_packet_size 2000000",
        "log_type error",
        "log_type warning",
        "log_type notice",
    ]
    return "\n".join(lines) + "\n"


def _listeners(folder: Path, listener: Listener) -> list[str]:
    """Return the one listener, or with certificates two: who joins has none yet."""

    def one(port: int, passwords: str, *more: str) -> list[str]:
        return [
            f"listener {port} {listener.host}".rstrip(),
            *_tls(listener),
            *more,
            "allow_anonymous false",
            f"password_file {folder}/{passwords}",
            f"acl_file {folder}/acl",
            "use_username_as_clientid true",
        ]

    if listener.joining_port is None:
        return one(listener.port, "passwords")
    asked = ("require_certificate true", f"crlfile {folder}/{REVOKED}")
    return [
        "per_listener_settings true",
        *one(listener.port, "passwords", *asked),
        *one(listener.joining_port, "joining"),
    ]


def _tls(listener: Listener) -> list[str]:
    if listener.tls is None:
        return []
    return [
        f"cafile {listener.tls.authority}",
        f"certfile {listener.tls.certificate}",
        f"keyfile {listener.tls.key}",
        "tls_version tlsv1.2",
    ]


def _acl(access: Access) -> list[str]:
    topics = access.topics
    lines = [
        "# Written by `hedgerow coordinator broker-config mosquitto`. %u is the user's name, a device's own.",
        f"user {access.coordinator.user}",
        f"topic readwrite {topics.root}/#",
        f"topic readwrite {access.home_prefix}/#",
        *(f"topic read {pattern}" for pattern in access.coordinator_reads),
        *(f"topic write {pattern}" for pattern in access.coordinator_writes),
        "",
        f"pattern read {topics.coordinator_presence}",
        *(f"pattern write {topics.of('%u', what)}" for what in WRITTEN_BY_AGENTS),
        *(f"pattern read {topics.of('%u', what)}" for what in READ_BY_AGENTS),
        *(f"pattern read {pattern}" for pattern in access.devices_read),
        f"pattern write {access.join_topic('%u', 'request')}",
        f"pattern read {access.join_topic('%u', 'answer')}",
        "",
        "# Home Assistant's, where it has a password here.",
        "user homeassistant",
        f"topic readwrite {access.home_prefix}/#",
        *(f"topic read {topics.root}/{what}" for what in HOME_READS),
        f"topic write {topics.every('predict')}",
    ]
    return lines


def _line(account: Account) -> str:
    salt = hashlib.sha256(f"{account.user}\0{account.password}".encode()).digest()[:12]
    made = hashlib.pbkdf2_hmac("sha512", account.password.encode(), salt, _ROUNDS)
    text = (base64.b64encode(part).decode() for part in (salt, made))
    return f"{account.user}:$7${_ROUNDS}${'$'.join(text)}"


def _own(path: Path, mark: str) -> list[str]:
    """Return the mark and the lines below it, which a person wrote."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    _, _, below = text.partition(mark)
    return [mark, *(line for line in below.splitlines() if line.strip())]
