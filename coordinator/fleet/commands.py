"""`hedgerow coordinator invite | invites | devices | revoke | broker-config | token | tokens | audit`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from coordinator.fleet.access import access_of, revoked
from coordinator.fleet.authority import certified
from coordinator.fleet.brokers.access import BROKERS, COORDINATOR, Listener, broker_files, give, reload, write
from coordinator.fleet.certificates import OWN, own
from coordinator.fleet.desk import Desk
from coordinator.fleet.records import Device, FleetRecords, person
from coordinator.fleet.secret import FleetSecret
from coordinator.fleet.tokens import ApiTokens
from coordinator.settings import CoordinatorSettings
from coordinator.store.sql import Store
from foundation import settings
from foundation.errors import HedgerowError, SettingsError

HOUR_S = 3600.0


def main(words: Sequence[str]) -> int:
    """Carry out one of the commands; returns the exit code."""
    arguments = parser().parse_args(words)
    try:
        s, _ = settings.load(
            CoordinatorSettings, arguments.config, os.environ, arguments.set, prefix="COORDINATOR"
        )
        do = {
            "invite": _invite, "invites": _invites, "devices": _devices, "revoke": _revoke,
            "broker-config": _broker_config, "token": _token, "tokens": _tokens, "audit": _audit,
        }  # fmt: skip
        do[arguments.command](arguments, s)
    except SettingsError as error:
        sys.stderr.write(f"hedgerow coordinator {arguments.command}: {error}\n")
        return 2
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow coordinator {arguments.command}: {error}\n")
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(prog="hedgerow coordinator")
    commands = result.add_subparsers(dest="command", required=True)
    invite = _command(
        commands, "invite", "Print one-time tokens, each for one device to join with.",
        "On the device: hedgerow agent join mqtts://broker.local:8883 --token hg1...",
    )  # fmt: skip
    invite.add_argument("--devices", type=int, default=1, metavar="N", help="so many tokens (1)")
    invite.add_argument("--name", help="the only name that the device may take")
    invite.add_argument(
        "--replace", action="store_true", help="a device of that name gives way (new SD card)"
    )
    invite.add_argument("--hours", type=float, default=24.0, help="how long the tokens are good (24)")
    _command(commands, "invites", "List the invitations that nobody has taken yet.")
    _command(commands, "devices", "List the devices that joined.")
    revoke = _command(
        commands, "revoke", "Shut a device out: at the broker, at its seals, and in the roster.",
        "The coordinator may run meanwhile; it knows within a second.",
    )  # fmt: skip
    revoke.add_argument("device")
    revoke.add_argument("--reason", default="", help="kept, and shown where the device is")
    config = _command(
        commands, "broker-config", "Write a broker's files for this fleet: TLS, users, who may do what.",
        "Start the broker with them, put the lines that are printed into coordinator.toml, invite devices.",
    )  # fmt: skip
    config.add_argument("broker", choices=BROKERS)
    config.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the broker's files alone")
    config.add_argument("--host", action="append", default=[], help="name or address of the broker; several")
    config.add_argument("--port", type=int, help="8883; without TLS 1883")
    config.add_argument(
        "--certificates", action="store_true",
        help="mosquitto: every device gets a client certificate, and is asked for it",
    )  # fmt: skip
    config.add_argument("--join-port", type=int, help="with --certificates, for joining alone (--port and 1)")
    config.add_argument("--insecure", action="store_true", help="without TLS: everybody in between can read")
    config.add_argument("--group", help="the broker's group, which reads the files (as root: named as it is)")
    token = _command(
        commands, "token", "Make a token for the page and the API, or take one back.",
        "With curl: -H 'Authorization: Bearer hgt_...'. Only needed beyond loopback, or with http.auth = on.",
    )  # fmt: skip
    token.add_argument("name", help="whose it is; the audit names it")
    token.add_argument("--role", choices=("viewer", "operator"), default="viewer", help="viewers only look")
    token.add_argument("--days", type=float, help="how long it is good (for ever)")
    token.add_argument("--take-back", action="store_true", help="make it worthless, within a second")
    _command(commands, "tokens", "List the tokens for the page and the API.")
    audit = _command(commands, "audit", "Say who invited, revoked and changed what.")
    audit.add_argument("--last", type=int, default=50, metavar="N", help="the newest N (50)")
    return result


def _command(commands: Any, name: str, text: str, more: str | None = None) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=more)
    made.add_argument("--config", type=Path, help="coordinator.toml")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


@contextmanager
def _records(s: CoordinatorSettings) -> Iterator[FleetRecords]:
    with Store.open(s.folder, place=s.store) as store:
        yield FleetRecords(store)


def _invite(arguments: argparse.Namespace, s: CoordinatorSettings) -> None:
    with _records(s) as records:
        made = Desk(s, records).invite(
            arguments.devices,
            name=arguments.name,
            replace=arguments.replace,
            hours=arguments.hours,
            who=person(),
        )
    if arguments.json:
        told = {"expires": made.expires, "address": s.enrolment.address, "broker": made.broker}
        _print({"tokens": made.tokens, **told})
        return
    sys.stderr.write(f"good until {_when(made.expires)}, each for one device; {made.broker}\n")
    for line in made.lines:
        sys.stdout.write(f"{line}\n")


def _invites(arguments: argparse.Namespace, s: CoordinatorSettings) -> None:
    with _records(s) as records:
        found = records.open_invites()
    if arguments.json:
        _print([asdict(invite) for invite in found])
        return
    rows = [(i.invite, i.name or "any", _when(i.created), _when(i.expires)) for i in found]
    _table(("invitation", "name", "made", "good until"), rows, "no invitation is open")


def _devices(arguments: argparse.Namespace, s: CoordinatorSettings) -> None:
    with _records(s) as records:
        found = records.devices()
    if arguments.json:
        _print([_shown(device) for device in found])
        return
    rows = [
        (
            d.agent,
            d.public[:16],
            _when(d.enrolled),
            "joined" if d.revoked is None else f"revoked {_when(d.revoked)} {d.reason}".rstrip(),
        )
        for d in found
    ]
    _table(("device", "key", "joined", "state"), rows, "no device has joined: hedgerow coordinator invite")


def _revoke(arguments: argparse.Namespace, s: CoordinatorSettings) -> None:
    with _records(s) as records:
        device, done = Desk(s, records).revoke(arguments.device, arguments.reason, who=person())
    if arguments.json:
        _print({**_shown(device), "broker": done})
        return
    sys.stdout.write(f"{device.agent} is shut out; {done}\n")


def _broker_config(arguments: argparse.Namespace, s: CoordinatorSettings) -> None:
    folder = arguments.out.resolve()
    port = arguments.port or (1883 if arguments.insecure else 8883)
    joining = _joining_port(arguments, port)
    folder.mkdir(parents=True, exist_ok=True)
    give(folder, arguments.group or arguments.broker, wanted=arguments.group is not None)
    tls = None if arguments.insecure else certified(folder, arguments.host or [s.mqtt.host])
    secret = FleetSecret.load(s.folder, s.federation)
    enrolment = {**s.enrolment.model_dump(), "enabled": True, "broker": arguments.broker, "files": folder}
    enrolment |= {"certificates": joining is not None, "port": None if joining is None else port}
    told = s.model_copy(update={"enrolment": type(s.enrolment).model_validate(enrolment)})
    module = broker_files(arguments.broker)
    with _records(told) as records:
        access = access_of(told, records, secret)
        certificates = {} if joining is None else {**revoked(told, records), OWN: own(folder, COORDINATOR)}
        records.note(person(), "broker-config", arguments.broker, str(folder))
    password = {"coordinator.password": access.coordinator.password + "\n"}
    listener = Listener(port, tls, joining_port=joining)
    files = {**module.config(folder, listener, access), **module.users(folder, access)}
    files |= {**password, **certificates}
    changed = write(folder, files)
    done = reload(folder, arguments.broker, s.enrolment.reload) if changed else "nothing has changed"
    host = (arguments.host or [s.mqtt.host])[0]
    lines = _lines(arguments.broker, folder, host, port, tls=tls is not None, joining=joining)
    if arguments.json:
        _print({"folder": str(folder), "changed": changed, "broker": done, "coordinator_toml": lines})
        return
    sys.stderr.write(f"wrote {', '.join(changed) or 'nothing new'} to {folder}; {done}\n")
    if tls is None:
        sys.stderr.write("without TLS whoever is in between reads and changes letters; seals only tell\n")
    sys.stderr.write("put this into coordinator.toml:\n\n")
    sys.stdout.write(lines)


def _joining_port(arguments: argparse.Namespace, port: int) -> int | None:
    """Return where devices join without a certificate, `None` where nobody has one."""
    if not arguments.certificates:
        if arguments.join_port is not None:
            raise SettingsError("--join-port means nothing without --certificates")
        return None
    if arguments.insecure or arguments.broker != "mosquitto":
        raise SettingsError("--certificates is for mosquitto, with TLS: the others have no files for it here")
    joining: int = arguments.join_port or port + 1
    if joining == port:
        raise SettingsError("--join-port is another than --port: who joins has no certificate yet")
    return joining


def _lines(broker: str, folder: Path, host: str, port: int, *, tls: bool, joining: int | None = None) -> str:
    q = json.dumps
    lines = ["[mqtt]", f"host = {q(host)}", f"port = {port}", f"username = {q(COORDINATOR)}"]
    lines.append(f"password_file = {q(str(folder / 'coordinator.password'))}")
    if tls:
        lines += ["tls = true", f"ca_file = {q(str(folder / 'authority.pem'))}"]
    if joining is not None:
        lines.append(f"cert_file = {q(str(folder / OWN))}")
    lines += ["", "[enrolment]", "enabled = true", f"broker = {q(broker)}", f"files = {q(str(folder))}"]
    scheme = "mqtts" if tls else "mqtt"
    lines.append(f"address = {q(f'{scheme}://{host}:{joining or port}')}")
    if joining is not None:
        lines += ["certificates = true", f"port = {port}"]
    return "\n".join(lines) + "\n"


def _token(arguments: argparse.Namespace, s: CoordinatorSettings) -> None:
    with Store.open(s.folder, place=s.store) as store:
        tokens, records = ApiTokens(store), FleetRecords(store)
        if arguments.take_back:
            tokens.take_back(arguments.name)
            records.note(person(), "take back token", arguments.name)
            sys.stdout.write(f"the token {arguments.name} is worth nothing any more\n")
            return
        expires = None if arguments.days is None else arguments.days * 24 * HOUR_S
        made = tokens.make(arguments.name, arguments.role, expires_s=expires)
        records.note(person(), "token", arguments.name, arguments.role)
    if arguments.json:
        _print({"name": arguments.name, "role": arguments.role, "token": made})
        return
    sys.stderr.write("kept nowhere: write it down now\n")
    sys.stdout.write(made + "\n")


def _tokens(arguments: argparse.Namespace, s: CoordinatorSettings) -> None:
    with Store.open(s.folder, place=s.store) as store:
        found = ApiTokens(store).all()
    if arguments.json:
        _print([asdict(token) for token in found])
        return
    rows = [(t.name, t.role, _when(t.created), _when(t.expires) if t.expires else "for ever") for t in found]
    _table(("name", "role", "made", "good until"), rows, "there is no token: hedgerow coordinator token NAME")


def _audit(arguments: argparse.Namespace, s: CoordinatorSettings) -> None:
    with _records(s) as records:
        found = records.deeds(last=arguments.last)
    if arguments.json:
        _print([asdict(deed) for deed in found])
        return
    rows = [(_when(d.at), d.who, d.what, d.of, d.detail) for d in found]
    _table(("when", "who", "what", "of", ""), rows, "nobody has done anything yet")


def _shown(device: Device) -> dict[str, Any]:
    return {name: value for name, value in asdict(device).items() if name != "salt"}


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], nothing: str) -> None:
    if not rows:
        sys.stderr.write(nothing + "\n")
        return
    table = Table(*heads, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _print(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
