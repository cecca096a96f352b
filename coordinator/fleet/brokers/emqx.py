"""EMQX 5: a piece of configuration, an access list, a file of users for its built-in database.

Written from EMQX's documentation and not run here: there was no EMQX to try it on. EMQX reads `users.csv`
when it starts and its database is empty; set `enrolment.reload` to a command of yours that imports it again
(its HTTP API does: POST /api/v5/authentication/password_based:built_in_database/import_users).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from coordinator.fleet.brokers.access import Access, Listener
from foundation.topics import READ_BY_AGENTS, WRITTEN_BY_AGENTS

PID_FILE = "emqx.pid"


def config(folder: Path, listener: Listener, access: Access) -> Mapping[str, str]:
    """Return `emqx.conf`, to be included in EMQX's own, and `acl.conf`."""
    name, where = ("tcp", f"{listener.host or '0.0.0.0'}:{listener.port}")
    ssl = ""
    if listener.tls is not None:
        name = "ssl"
        files = {
            "cacertfile": listener.tls.authority,
            "certfile": listener.tls.certificate,
            "keyfile": listener.tls.key,
        }
        ssl = "".join(f"\n  ssl_options.{key} = {json.dumps(str(path))}" for key, path in files.items())
    text = f"""# Written by `hedgerow coordinator broker-config emqx`: include it at the end of EMQX's own.
listeners.{name}.hedgerow {{
  bind = "{where}"{ssl}
}}
mqtt.max_packet_size = 2MB
authentication = [{{
  mechanism = password_based, backend = built_in_database, user_id_type = username
  password_hash_algorithm {{ name = sha256, salt_position = suffix }}
  bootstrap_file = {json.dumps(str(folder / "users.csv"))}, bootstrap_type = plain
}}]
authorization {{
  no_match = deny, deny_action = ignore
  sources = [{{ type = file, enable = true, path = {json.dumps(str(folder / "acl.conf"))} }}]
}}
"""
    return {"emqx.conf": text, "acl.conf": _acl(access)}


def users(folder: Path, access: Access) -> Mapping[str, str]:
    """Return `users.csv`."""
    del folder
    everybody = [access.coordinator, *access.devices, *access.joining]
    rows = [f"{account.user},{account.password},false" for account in everybody]
    return {"users.csv": "\n".join(["user_id,password,is_superuser", *rows]) + "\n"}


def _acl(access: Access) -> str:
    topics, own = access.topics, "${username}"
    everything = [f"{topics.root}/#", f"{access.home_prefix}/#"]
    writes = [topics.of(own, what) for what in WRITTEN_BY_AGENTS]
    reads = [topics.coordinator_presence, *(topics.of(own, what) for what in READ_BY_AGENTS)]
    reads += [*access.devices_read, access.join_topic(own, "answer")]
    writes.append(access.join_topic(own, "request"))
    coordinator = f'{{allow, {{user, "{access.coordinator.user}"}}, '
    lines = [
        "%% Written by `hedgerow coordinator broker-config emqx`.",
        f"{coordinator}all, {json.dumps(everything)}}}.",
    ]
    if access.coordinator_reads:
        lines.append(f"{coordinator}subscribe, {json.dumps([*access.coordinator_reads])}}}.")
    if access.coordinator_writes:
        lines.append(f"{coordinator}publish, {json.dumps([*access.coordinator_writes])}}}.")
    lines += [
        f"{{allow, all, publish, {json.dumps(writes)}}}.",
        f"{{allow, all, subscribe, {json.dumps(reads)}}}.",
        "{deny, all}.",
    ]
    return "\n".join(lines) + "\n"
