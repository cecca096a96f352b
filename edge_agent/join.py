"""`hedgerow agent join mqtts://broker:8883 --token hg1...`: a device becomes one of a fleet.

Safe to repeat: the same token with the same vault gives the same answer, so whatever is interrupted is done
again. The vault keeps the device's key; everything else of a joining can be had anew with another token.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import secrets
import socket
import ssl
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError

from edge_agent.certificate import PEM, request_of
from edge_agent.certificate import keep as keep_certificate
from edge_agent.enrolment import AUTHORITY, IDENTITY, PASSWORD, Enrolment, keep
from edge_agent.samples import DataSettings
from export.sign import TRUSTED
from foundation.durable import SECRET, write_first, write_whole
from foundation.errors import HedgerowError, JoinRefused, NotConnected, SettingsError, TransportError
from foundation.joining import (
    Grant,
    Request,
    Token,
    public_of,
    read_grant,
    shared,
    unboxed,
    vouched,
)
from foundation.lock import hold
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.topics import Topics, checked_name, client_id

ANSWER_S = 30.0
"""How long the coordinator's answer is waited for."""
ASK_AGAIN_S = 5.0
CONFIRM_S = 20.0
"""How long the broker may take until it knows this device."""


@dataclass(frozen=True, slots=True)
class Joined:
    """What came of it."""

    name: str
    federation: str
    settings: Path | None
    """The agent.toml that was written, `None` where there was one."""
    lines: str
    """What belongs into it."""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="hedgerow agent join",
        description="Join a fleet: this device gets a key, a user at the broker, and its agent.toml.",
        epilog="The token comes from `hedgerow coordinator invite`. Afterwards: hedgerow agent --config"
        " agent.toml",
    )
    result.add_argument("address", help="the broker, mqtts://host:8883")
    token = result.add_mutually_exclusive_group(required=True)
    token.add_argument("--token", help="hg1...; others on this machine can see it while the command runs")
    token.add_argument("--token-file", type=Path, help="a file that holds it; - reads it from the input")
    result.add_argument("--name", help="what this device is to be called (its host name)")
    result.add_argument("--config", type=Path, default=Path("agent.toml"), help="file to write (agent.toml)")
    result.add_argument("--vault", type=Path, default=Path("vault"), help="folder of what stays here (vault)")
    result.add_argument(
        "--ca-file", type=Path, help="authority of the broker's certificate, if not the token"
    )
    result.add_argument(
        "--data", action="append", default=[], metavar="KEY=VALUE",
        help="for [data] in agent.toml, such as kind=npz and path=/data/own.npz",
    )  # fmt: skip
    result.add_argument(
        "--certificate", action="store_true",
        help="get a client certificate, for fleets whose broker asks for one; the invitation says so",
    )  # fmt: skip
    result.add_argument("--systemd", action="store_true", help="install and start it as a service (as root)")
    result.add_argument("--user", default="hedgerow", help="the service's user (hedgerow)")
    result.add_argument("--json", action="store_true", help="print JSON")
    return result


def main(words: Sequence[str]) -> int:
    """Join; returns the exit code."""
    arguments = parser().parse_args(words)
    # The broker cuts the user that may only join off once it is no longer needed: nothing to warn of.
    logging.getLogger("foundation.mqtt").setLevel(logging.ERROR)
    try:
        joined = asyncio.run(_join(arguments))
        service = None
        if arguments.systemd:
            from edge_agent.service import install

            service = install(arguments.config, arguments.vault, user=arguments.user)
    except SettingsError as error:
        sys.stderr.write(f"hedgerow agent join: {error}\n")
        return 2
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow agent join: {error}\n")
        return 1
    if arguments.json:
        told = {"name": joined.name, "federation": joined.federation, "service": service}
        settings = str(joined.settings) if joined.settings else None
        sys.stdout.write(json.dumps({**told, "settings": settings, "agent_toml": joined.lines}) + "\n")
        return 0
    _tell(joined, arguments.config, service)
    return 0


def _tell(joined: Joined, config: Path, service: str | None) -> None:
    sys.stdout.write(f"joined {joined.federation} as {joined.name}\n")
    if joined.settings is None:
        sys.stdout.write(
            f"{config} is there already and was left alone; this belongs into it:\n\n{joined.lines}"
        )
    else:
        sys.stdout.write(f"wrote {joined.settings}\n")
    if service is not None:
        sys.stdout.write(f"{service} runs; its log: journalctl -u {service} -f\n")
    else:
        sys.stdout.write(f"start it: hedgerow agent --config {config}\n")


async def _join(arguments: argparse.Namespace) -> Joined:
    token = Token.of(_token(arguments))
    name = checked_name(arguments.name or socket.gethostname().split(".")[0], "device")
    vault: Path = arguments.vault.expanduser()
    broker = MqttSettings.from_url(arguments.address)
    data = _data(arguments.data)
    with hold(vault, "vault"):
        anchor = await asyncio.to_thread(_anchor, broker, token, vault, arguments.ca_file)
        private = _identity(vault)
        wanted = await asyncio.to_thread(request_of, vault, name) if arguments.certificate else ""
        grant = await _ask(broker, token, name, private, anchor, wanted)
        _keep(vault, token, grant, private, anchor)
        final = _settings(broker, grant, vault, anchor)
        await _confirm(final, token.federation, grant.name)
    lines = _lines(final, token.federation, grant.name, vault, data)
    written = None
    if not arguments.config.exists():
        written = arguments.config
        write_whole(written, lines.encode())
    return Joined(grant.name, token.federation, written, lines)


def _token(arguments: argparse.Namespace) -> str:
    if arguments.token:
        return str(arguments.token)
    try:
        return (
            sys.stdin.read() if str(arguments.token_file) == "-" else arguments.token_file.read_text("ascii")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the token file {arguments.token_file} cannot be read: {error}") from error


def _data(pairs: Sequence[str]) -> dict[str, Any]:
    """Return what goes into [data]; raises `SettingsError` for what the agent would not take later."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, mark, value = pair.partition("=")
        if not mark or not key:
            raise SettingsError(f"--data {pair}: write it as --data kind=npz --data path=/data/own.npz")
        result[key] = _value(value)
    try:
        if result:
            DataSettings.model_validate(result)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "[data]"
        raise SettingsError(f"--data {where}: {problem['msg']}") from error
    return result


def _identity(vault: Path) -> bytes:
    """Return this device's key, made with its first joining."""
    path = vault / IDENTITY
    if not path.exists():
        write_first(path, secrets.token_bytes(32), mode=SECRET)
    content = path.read_bytes()
    if len(content) != 32:
        raise SettingsError(f"{path} is not a key of 32 bytes: put back the file, or remove it and join anew")
    return content


def _anchor(broker: MqttSettings, token: Token, vault: Path, ca_file: Path | None) -> Path | None:
    """Return the file of the authority, or of the broker's own certificate where the token pins that."""
    if not broker.tls:
        return None
    if ca_file is not None:
        return ca_file
    if token.pin is None:
        return None  # the system's authorities
    try:
        pem = ssl.get_server_certificate((broker.host, broker.port), timeout=10)
    except (OSError, ValueError) as error:
        raise NotConnected(f"no connection to the broker at {broker.address}: {error}") from error
    if hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest() != token.pin:
        raise JoinRefused(
            f"the broker at {broker.address} is not the one that this token is for: another certificate."
            " Either somebody is in between, or it was renewed since the invitation: ask for a new token"
        )
    path = vault / AUTHORITY
    write_whole(path, pem.encode())
    return path


async def _ask(
    broker: MqttSettings, token: Token, name: str, private: bytes, anchor: Path | None, certificate: str
) -> Grant:
    me = broker.model_copy(
        update={"username": token.user, "password": SecretStr(token.password), "ca_file": anchor}
    )
    asked = Request(name=name, public=public_of(private).hex(), certificate=certificate)
    request = vouched(asked, token.secret)
    try:
        async with MqttTransport(me, token.user, clean=True) as transport:
            answers = await transport.subscribe(token.topic("answer"))
            async with asyncio.timeout(ANSWER_S):
                asking = asyncio.create_task(_repeat(transport, token.topic("request"), request))
                try:
                    async for letter in answers:
                        grant = read_grant(letter.body, token.secret)
                        if grant.asked == public_of(private).hex():
                            break
                finally:
                    asking.cancel()
    except TimeoutError as error:
        raise NotConnected(
            f"no answer from the coordinator within {ANSWER_S:g} s: does it run, at the broker at"
            f" {broker.address}, with enrolment.enabled = true?"
        ) from error
    except NotConnected as error:
        raise NotConnected(f"{error}; a token that was used or has expired is not let in either") from error
    if grant.refused is not None:
        raise JoinRefused(grant.refused)
    return grant


async def _repeat(transport: MqttTransport, topic: str, request: bytes) -> None:
    while True:
        await transport.publish(topic, request)
        await asyncio.sleep(ASK_AGAIN_S)


def _keep(vault: Path, token: Token, grant: Grant, private: bytes, anchor: Path | None) -> None:
    """Write what was granted; the enrolment last, so that it stands for all of it."""
    try:
        coordinator, device = bytes.fromhex(grant.public), public_of(private)
        keys = shared(
            private,
            coordinator,
            federation=token.federation,
            name=grant.name,
            device=device,
            coordinator=coordinator,
        )
        box = unboxed(grant.box, keys.box)
        enrolment = Enrolment(
            federation=token.federation,
            name=grant.name,
            coordinator=grant.public,
            up=keys.seals.up.hex(),
            down=keys.seals.down.hex(),
        )
    except (ValueError, ValidationError) as error:
        raise JoinRefused(f"the coordinator's answer cannot be used: {error}") from error
    write_whole(vault / PASSWORD, box.password.encode() + b"\n", mode=SECRET)
    if grant.authority and anchor is not None:
        write_whole(vault / AUTHORITY, grant.authority.encode())
    if grant.certificate is not None:
        keep_certificate(vault, grant.certificate)
    if grant.signing:
        write_whole(vault / TRUSTED / "coordinator.pub", grant.signing.encode() + b"\n")
    keep(vault, enrolment)


def _settings(broker: MqttSettings, grant: Grant, vault: Path, anchor: Path | None) -> MqttSettings:
    given = vault / AUTHORITY
    ca_file = given if anchor is not None and given.exists() else anchor
    mine: dict[str, Any] = {
        "username": grant.name,
        "password": None,
        "password_file": vault / PASSWORD,
        "ca_file": ca_file,
    }
    if grant.certificate is not None:
        mine |= {"cert_file": vault / PEM, "port": grant.port or broker.port}
    return broker.model_copy(update=mine)


async def _confirm(final: MqttSettings, federation: str, name: str) -> None:
    """Connect as this device; a broker may need a moment to know it."""
    deadline = asyncio.get_running_loop().time() + CONFIRM_S
    while True:
        try:
            async with MqttTransport(
                final, client_id(federation, f"{name}-joining"), clean=True
            ) as transport:
                await transport.subscribe(Topics(federation).of(name, "assignment"))
                return
        except TransportError as error:
            if asyncio.get_running_loop().time() > deadline:
                raise NotConnected(
                    f"joined, but the broker does not let {name!r} in: {error}. Is it told of new devices"
                    " (enrolment.files and enrolment.reload of the coordinator)? Then run this again"
                ) from error
            await asyncio.sleep(0.5)


def _lines(final: MqttSettings, federation: str, name: str, vault: Path, data: dict[str, Any]) -> str:
    q = json.dumps
    lines = [f"agent = {q(name)}", f"federation = {q(federation)}", f"vault = {q(str(vault.resolve()))}", ""]
    lines += ["[mqtt]", f"host = {q(final.host)}", f"port = {final.port}", f"username = {q(name)}"]
    lines.append(f"password_file = {q(str((vault / PASSWORD).resolve()))}")
    if final.tls:
        lines.append("tls = true")
    if final.ca_file is not None:
        lines.append(f"ca_file = {q(str(final.ca_file.resolve()))}")
    if final.cert_file is not None:
        lines.append(f"cert_file = {q(str(final.cert_file.resolve()))}")
    lines += ["", "[data]"]
    lines += [f"{key} = {q(value)}" for key, value in data.items()] or [
        "# This device's own data; docs/data.md has all kinds.",
        'kind = "npz"',
        f"path = {q(str(Path.home() / 'own.npz'))}",
    ]
    return "\n".join(lines) + "\n"


def _value(text: str) -> Any:
    """Return numbers, truth and lists as they are meant, the rest as text."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(found, dict | type(None)) else found
