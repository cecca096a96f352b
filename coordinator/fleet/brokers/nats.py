"""nats-server with its MQTT listener: users with permissions in a file of their own, read again on SIGHUP.

A `/` in a topic is a `.` in a subject. Who is no longer among the users is cut off when the file is read
again. NATS does not bind a client id to a user: whoever has a password of his own and guesses another
device's id can end that device's session (not read or write for it).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from coordinator.fleet.brokers.access import Access, Account, Listener
from foundation.topics import READ_BY_AGENTS, WRITTEN_BY_AGENTS

PID_FILE = "nats.pid"
USERS = "users.conf"
_SESSION = ("$MQTT.sub.>", "$MQTT.deliver.>")
"""Subjects by which NATS hands a client its own letters with QoS 1."""


def config(folder: Path, listener: Listener, access: Access) -> Mapping[str, str]:
    """Return `nats.conf`."""
    host = json.dumps(listener.host or "0.0.0.0")
    tls = ""
    if listener.tls is not None:
        certificate, key = (json.dumps(str(path)) for path in (listener.tls.certificate, listener.tls.key))
        tls = f"\n  tls {{ cert_file: {certificate}, key_file: {key} }}"
    text = f"""# Written by `hedgerow coordinator broker-config nats`. Start it with:
# nats-server -c {folder}/nats.conf
server_name: hedgerow
host: "127.0.0.1"
port: -1
pid_file: {json.dumps(str(folder / PID_FILE))}
max_payload: 8MB
write_deadline: "20s"
jetstream {{
  store_dir: {json.dumps(str(folder / "jetstream"))}, max_memory_store: 64MB, max_file_store: 2GB
}}
mqtt {{
  host: {host}, port: {listener.port}, max_ack_pending: 1024, ack_wait: "5s"{tls}
}}
include "./{USERS}"
"""
    return {"nats.conf": text}


def users(folder: Path, access: Access) -> Mapping[str, str]:
    """Return `users.conf`."""
    del folder
    topics = access.topics
    rows = [
        _user(
            access.coordinator,
            writes=[f"{topics.root}/#", f"{access.home_prefix}/#", *access.coordinator_writes],
            reads=[f"{topics.root}/#", f"{access.home_prefix}/#", *access.coordinator_reads],
        )
    ]
    for device in access.devices:
        reads = [topics.of(device.user, what) for what in READ_BY_AGENTS]
        writes = [topics.of(device.user, what) for what in WRITTEN_BY_AGENTS]
        rows.append(_user(device, writes, [topics.coordinator_presence, *reads, *access.devices_read]))
    for one in access.joining:
        rows.append(
            _user(one, [access.join_topic(one.user, "request")], [access.join_topic(one.user, "answer")])
        )
    lines = "\n".join(f"      {row}" for row in rows)
    # The account needs JetStream, which is where NATS keeps MQTT sessions and retained letters.
    text = f"accounts {{\n  FLEET {{\n    jetstream: enabled\n    users = [\n{lines}\n    ]\n  }}\n}}\n"
    return {USERS: "# Written anew whenever a device joins or is revoked.\n" + text}


def _user(account: Account, writes: Iterable[str], reads: Iterable[str]) -> str:
    publish = json.dumps([_subject(topic) for topic in writes] + ["$MQTT.deliver.pubrel.>"])
    subscribe = json.dumps([_subject(topic) for topic in reads] + list(_SESSION))
    user, password = json.dumps(account.user), json.dumps(account.password)
    return (
        f"{{user: {user}, password: {password}, permissions: {{publish: {publish}, subscribe: {subscribe}}}}}"
    )


def _subject(topic: str) -> str:
    """Return the subject of a topic or pattern, as nats-server maps it (its MQTT documentation)."""
    levels = (level.replace(".", "//") for level in topic.split("/"))
    return ".".join({"+": "*", "#": ">"}.get(level, level) for level in levels)
