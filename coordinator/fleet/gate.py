"""Lets devices in: answers those that have a token, and tells the broker who may connect."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from pydantic import ValidationError

from coordinator.fleet.brokers.access import COORDINATOR
from coordinator.fleet.certificates import Certificates
from coordinator.fleet.records import FleetRecords
from coordinator.fleet.secret import FleetSecret
from foundation.errors import HedgerowError, JoinRefused, NotConnected, PublishRefused
from foundation.joining import (
    Box,
    CertificateAsked,
    CertificateGiven,
    Grant,
    Request,
    boxed,
    read_request,
    vouched,
)
from foundation.seal import Mark, Opener
from foundation.topics import ROOT, Topics, checked_name
from foundation.transport import Letter, Transport

logger = logging.getLogger(__name__)

KEEP_S = 5.0
"""How often it is written down how far letters were read."""
EXPIRED_S = 60.0
"""How often the broker is told of invitations that have expired: nobody sends a letter of that."""


class Gate:
    """Answers devices that want to join, and keeps how far the seals of the others were read."""

    def __init__(
        self,
        transport: Transport,
        records: FleetRecords,
        secret: FleetSecret,
        *,
        authority: str,
        signing: str,
        tell_broker: Callable[[], None],
        joined: Callable[[], None],
        emit: Callable[[str, str, str], None],
        opener: Opener,
        certificates: Certificates | None = None,
        port: int | None = None,
    ) -> None:
        """`authority` is the PEM of the broker's, `signing` the coordinator's public Ed25519 key, or empty.

        `tell_broker` brings the broker's files up to date; `joined` hears that somebody did,
        and `emit` takes kind, text and device of an event. With `certificates` every device has one, and
        `port` is where those that have reach the broker.
        """
        self._certificates, self._port = certificates, port
        self._transport, self._records, self._secret = transport, records, secret
        self._authority, self._signing = authority, signing
        self._tell_broker, self._joined = tell_broker, joined
        self._emit, self._opener = emit, opener
        self._kept: dict[str, Mark] = {}

    async def run(self) -> None:
        """Answer until cancelled."""
        letters = await self._transport.subscribe(f"{ROOT}/{self._secret.federation}/join/+/request")
        keeping = asyncio.create_task(self._keep())
        asking = await self._transport.subscribe(Topics(self._secret.federation).every("renew"))
        renewing = asyncio.create_task(self._renew(asking))
        try:
            async for letter in letters:
                await self._answer(letter)
        finally:
            keeping.cancel()
            renewing.cancel()
            await asyncio.to_thread(self._keep_now)

    async def _answer(self, letter: Letter) -> None:
        user = letter.topic.split("/")[-2]
        secret = self._secret.invite_secret(user.removeprefix("join-"))
        try:
            request = read_request(letter.body, secret)
        except JoinRefused as error:
            # Whoever wrote it cannot be told: it has no secret that an answer could be vouched for with.
            self._emit("join_refused", f"somebody at {user} wanted to join: {error}", "")
            return
        try:
            grant = await asyncio.to_thread(self._granted, user.removeprefix("join-"), request)
        except HedgerowError as error:
            grant = Grant(refused=str(error), asked=request.public)
            self._emit("join_refused", f"{request.name} may not join: {error}", request.name)
        else:
            self._emit("joined", f"{request.name} joined", request.name)
        try:
            await self._transport.publish(f"{letter.topic.rpartition('/')[0]}/answer", vouched(grant, secret))
        except (NotConnected, PublishRefused) as error:  # it asks again
            logger.warning("answer not sent", extra={"agent": request.name, "reason": str(error)})

    def _granted(self, invite: str, request: Request) -> Grant:
        name = checked_name(request.name, "device")
        if name == COORDINATOR or name.startswith("join-"):
            raise JoinRefused(f"{name!r} is a name that the broker has for others: take another with --name")
        public = bytes.fromhex(request.public)
        keys = self._secret.shared(name, public)  # a bad key is refused before it takes the place
        if self._certificates is not None and not request.certificate:
            raise JoinRefused("this fleet's devices have client certificates: join with --certificate")
        device = self._records.join(invite, name, request.public)
        certificate = None
        if self._certificates is not None:
            certificate = self._certificates.issue(request.certificate, device)
        self._joined()
        self._tell_broker()
        box = Box(username=name, password=self._secret.password(device))
        return Grant(
            name=name,
            asked=request.public,
            public=self._secret.public.hex(),
            signing=self._signing,
            authority=self._authority,
            box=boxed(box, keys.box),
            certificate=certificate,
            port=self._port if certificate is not None else None,
        )

    async def _renew(self, letters: AsyncIterator[Letter]) -> None:
        """Give joined devices new certificates; whose letters are not sealed are not heard."""
        async for letter in letters:
            agent = letter.topic.split("/")[-2]
            try:
                given = await asyncio.to_thread(self._renewed, agent, letter.body)
            except (HedgerowError, ValidationError) as error:
                given = CertificateGiven(refused=str(error)[:2_000])
                self._emit("certificate_refused", f"{agent} gets no new certificate: {error}", agent)
            topic = Topics(self._secret.federation).of(agent, "certificate")
            try:
                await self._transport.publish(topic, given.model_dump_json().encode())
            except (NotConnected, PublishRefused) as error:  # it asks again
                logger.warning("answer not sent", extra={"agent": agent, "reason": str(error)})

    def _renewed(self, agent: str, body: bytes) -> CertificateGiven:
        if self._certificates is None:
            raise JoinRefused("this fleet's devices have no client certificates")
        asked = CertificateAsked.model_validate_json(body)
        device = next((d for d in self._records.devices() if d.agent == agent and d.revoked is None), None)
        if device is None:
            raise JoinRefused(f"no device {agent!r} has joined")
        given = self._certificates.issue(asked.request, device)
        self._records.note(agent, "renew certificate", agent)
        return CertificateGiven(certificate=given)

    async def _keep(self) -> None:
        looked = time.monotonic()
        while True:
            await asyncio.sleep(KEEP_S)
            try:
                await asyncio.to_thread(self._keep_now)
                if time.monotonic() - looked >= EXPIRED_S:
                    looked = time.monotonic()
                    await asyncio.to_thread(self._tell_broker)
            except HedgerowError as error:  # a busy or full disk, a broker that is not there: tried again
                logger.error("not kept", extra={"reason": str(error)})

    def _keep_now(self) -> None:
        marks = self._opener.marks()
        changed = {topic for topic, mark in marks.items() if self._kept.get(topic) != mark}
        if changed:
            agents = {_agent_of(topic) for topic in changed}
            self._records.keep_marks(_by_agent(marks, agents))
            self._kept = marks


def _by_agent(marks: Mapping[str, Mark], agents: set[str]) -> dict[str, dict[str, Mark]]:
    result: dict[str, dict[str, Any]] = {agent: {} for agent in agents}
    for topic, mark in marks.items():
        if (agent := _agent_of(topic)) in result:
            result[agent][topic] = mark
    return result


def _agent_of(topic: str) -> str:
    return topic.split("/")[-2]
