"""MqttTransport: paho 2 behind the `Transport` protocol. The only file that imports paho.

Two sides. `_Link` is the network thread: it connects, reads, writes, and comes back after every loss; it
never decides anything. `MqttTransport` lives on the event loop: who waits for which acknowledgement, who gets
which letter, what is said again after a reconnect. Events cross from the thread to the loop in order, and
only after paho has finished the packet they came from: what we say after a reconnect follows what it resends.

The broker is trusted to remember nothing: after each connect we subscribe again and publish again every
retained topic we ever wrote (a Mosquitto that was killed has lost both).

MQTT 5 where the broker speaks it, else 3.1.1. What 5 adds is used and never needed: sessions and letters that
are not retained expire, a refused publish is told and not acknowledged in silence, and what the broker says
it takes (`BrokerLimits`) bounds what is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from pydantic import ConfigDict, Field, SecretStr, ValidationError, model_validator

from foundation.errors import FrameTooLarge, NotConnected, PublishRefused, SettingsError, TransportError
from foundation.frozen import Frozen
from foundation.topics import PROTOCOL
from foundation.transport import Letter, matches

logger = logging.getLogger(__name__)
paho_logger = logging.getLogger(f"{__name__}.paho")

WINDOW = 16
"""Publishes with QoS 1 that may wait for their acknowledgement at once."""
LOOSE = 256
"""Publishes with QoS 0 that may wait for the socket at once; more are dropped."""
BACKOFF_S = (0.5, 8.0)
"""First and longest wait before a new attempt to connect; each is shortened at random by up to a half."""
TCP_CONNECT_S = 4.0
CONNACK_S = 10.0
USER_TIMEOUT_MS = 8_000
"""TCP_USER_TIMEOUT: a black-holed link is noticed after this instead of after 1.5 keepalives."""
GOODBYE_S = 2.0
"""How long a clean close waits for its DISCONNECT to leave."""
SAY_AGAIN_S = 5.0
"""How often the wait for the first connection is logged."""
REPEAT_S = 30.0
"""How often an outage after that is logged."""
QUICK_S = 5.0
"""A connection that ended sooner is suspicious."""
SELECT_FILES = 1_024
"""paho waits with select(), which takes no file descriptor from here on."""
TRY_S = 4.0
"""How long `mqtt.version = "auto"` waits for an answer to MQTT 5 before it tries 3.1.1."""
PACKET_ROOM = 64
"""Bytes of a PUBLISH beside topic and body, at most."""
TOPIC_ROOM = 300
"""Bytes of our longest topic, at most (foundation/topics.py: names are up to 64 letters)."""
SMALLEST_BODY = 1_024
SUSPECT_BODY = 4_096
"""Bodies are not halved below this on suspicion alone."""
_TOO_LARGE = 0x95
_V5, _V311 = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311


def told_keepalive_s(keepalive_s: int) -> int:
    """Return what a broker is told, so that it says within 1.5 keepalives that a client fell silent.

    It has to wait for 1.5 times what it was told, and looks every five seconds (Mosquitto 2.0).
    """
    return max(2, keepalive_s - 4)


class MqttSettings(Frozen):
    """How to reach a broker, and the bounds of what is said to it."""

    model_config = ConfigDict(hide_input_in_errors=True)  # an error must not print the password beside it

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=1883, ge=1, le=65535)
    """8883 when `tls` is on and no port is given."""
    username: str | None = None
    password: SecretStr | None = None
    password_file: Path | None = None
    """A file that holds the password and nothing else; a newline at its end is ignored."""
    tls: bool = False
    ca_file: Path | None = None
    """The authority that signed the broker's certificate; the system's authorities when missing."""
    cert_file: Path | None = None
    key_file: Path | None = None
    insecure: bool = False
    """Do not verify the broker's certificate. For self-signed test beds only."""
    version: Literal["auto", "5", "3.1.1"] = "auto"
    """`auto` tries MQTT 5 and falls back to 3.1.1."""
    keepalive_s: int = Field(default=30, ge=5, le=3600)
    max_part_bytes: int = Field(default=120_000, ge=1_024, le=268_000_000)
    """Largest body of one publish, header included; 120,000 passes every broker we know, AWS IoT Core too.

    Where the broker says (MQTT 5) that it takes less, less is sent.
    """
    session_expiry_s: int = Field(default=86_400, ge=0, le=2**32 - 1)
    """MQTT 5: how long the broker keeps our session while we are away."""
    message_expiry_s: int = Field(default=3_600, ge=1, le=2**32 - 1)
    """MQTT 5: how long the broker keeps a letter that is not retained for someone who is away."""
    connect_timeout_s: float | None = Field(default=10.0, gt=0)
    """How long opening waits for the broker; `None` waits for ever and logs every few seconds."""
    patience_s: float = Field(default=60.0, gt=0)
    """How long publish and subscribe wait while the broker confirms nothing at all."""
    inbox_letters: int = Field(default=10_000, ge=1)
    inbox_bytes: int = Field(default=256 * 2**20, ge=2**20)
    """Bounds of one subscription's unread letters; what comes on top is dropped, counted and logged."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.password is not None and self.password_file is not None:
            raise ValueError("give mqtt.password or mqtt.password_file, not both")
        if self.username is None and (self.password is not None or self.password_file is not None):
            raise ValueError("an MQTT password needs mqtt.username beside it")
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("mqtt.key_file needs mqtt.cert_file beside it")
        if not self.tls and (self.ca_file or self.cert_file or self.insecure):
            raise ValueError("mqtt.ca_file, cert_file and insecure mean nothing without mqtt.tls = true")
        if self.tls and "port" not in self.model_fields_set:
            # Frozen for everyone else; inside validation the default may still follow another field.
            object.__setattr__(self, "port", 8883)
        return self

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read `mqtt://user:password@host:port` or `mqtts://…` (TLS).

        User and password may be percent-encoded. Raises `SettingsError` saying what is wrong, without the
        password.
        """
        shape = "write it as mqtt://[user:password@]host[:port], or mqtts:// for TLS"
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise SettingsError(f"the MQTT address cannot be read ({error}): {shape}") from error
        if parts.scheme not in ("mqtt", "mqtts"):
            raise SettingsError(f"the MQTT address must start with mqtt:// or mqtts://: {shape}")
        if not host:
            raise SettingsError(f"the MQTT address names no host: {shape}")
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise SettingsError(f"the MQTT address has something after the port: {shape}")
        tls = parts.scheme == "mqtts"
        try:
            return cls(
                host=host,
                port=port if port is not None else (8883 if tls else 1883),
                username=unquote(parts.username) if parts.username else None,
                password=SecretStr(unquote(parts.password)) if parts.password else None,
                tls=tls,
            )
        except ValidationError as error:
            reasons = "; ".join(problem["msg"] for problem in error.errors(include_input=False))
            raise SettingsError(f"the MQTT address cannot be used ({reasons}): {shape}") from error

    @property
    def address(self) -> str:
        """The broker for people and logs: scheme, host and port, no secrets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    def check_files(self) -> None:
        """Raise `SettingsError` naming the first file of these settings that cannot be read."""
        for name in ("password_file", "ca_file", "cert_file", "key_file"):
            path: Path | None = getattr(self, name)
            if path is not None and not path.is_file():
                raise SettingsError(f"mqtt.{name} = {path}: there is no such file")

    def secret(self) -> str | None:
        """Return the password, from the setting or its file; `SettingsError` where that cannot be read."""
        if self.password_file is None:
            return self.password.get_secret_value() if self.password else None
        try:
            return self.password_file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"mqtt.password_file = {self.password_file} cannot be read: {error}"
            ) from error

    def tls_context(self) -> ssl.SSLContext | None:
        """Return the TLS context, `None` without TLS; `SettingsError` for files that are no certificates."""
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=str(self.ca_file) if self.ca_file else None)
            # A broker's own certificate may stand in ca_file, without the authority that signed it.
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            if self.cert_file:
                context.load_cert_chain(self.cert_file, self.key_file)
        except OSError as error:  # ssl.SSLError is one too
            raise SettingsError(
                f"the TLS files cannot be used ({error}): check that mqtt.ca_file, cert_file and key_file are"
                " PEM files, and that the key belongs to the certificate"
            ) from error
        if self.insecure:
            logger.warning("mqtt.insecure is on: anyone in between can be the broker at %s", self.address)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        context.sslsocket_class = _TidySSLSocket
        return context


class _TidySSLSocket(ssl.SSLSocket):
    """Closes itself when the handshake fails; paho would leave that to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


class Letters:
    """One subscription: an async iterator over its letters that ends when the transport closes.

    One task reads it. `aclose()` gives the subscription up before that.
    """

    def __init__(self, patterns: tuple[str, ...], max_letters: int, max_bytes: int) -> None:
        self.patterns = patterns
        self.dropped = 0
        self._max_letters, self._max_bytes = max_letters, max_bytes
        self._letters: deque[Letter] = deque()
        self._bytes = 0
        self._ended = False
        self._something = asyncio.Event()
        self._release: Callable[[Letters], None] | None = None

    def wants(self, topic: str) -> bool:
        """Whether one of the patterns matches."""
        return any(matches(pattern, topic) for pattern in self.patterns)

    def put(self, letter: Letter) -> None:
        """Queue a letter, or drop it, count it and say so when the reader is too far behind."""
        if len(self._letters) >= self._max_letters or self._bytes + len(letter.body) > self._max_bytes:
            self.dropped += 1
            if self.dropped & (self.dropped - 1) == 0:  # 1, 2, 4, 8, ...: seen, without flooding the log
                logger.warning(
                    "inbox of %s is full (%d letters, %d bytes): %d dropped so far, last on %s",
                    ", ".join(self.patterns) or "unclaimed letters",
                    len(self._letters),
                    self._bytes,
                    self.dropped,
                    letter.topic,
                )
            return
        self._letters.append(letter)
        self._bytes += len(letter.body)
        self._something.set()

    def take(self, wanted: Letters) -> None:
        """Move to `wanted` what it asks for, in order."""
        kept: deque[Letter] = deque()
        for letter in self._letters:
            if wanted.wants(letter.topic):
                self._bytes -= len(letter.body)
                wanted.put(letter)
            else:
                kept.append(letter)
        self._letters = kept

    def on_close(self, release: Callable[[Letters], None]) -> None:
        """Set what `aclose` tells; the transport calls this once."""
        self._release = release

    def end(self) -> None:
        """End the iterator after the letters already queued."""
        self._ended = True
        self._something.set()

    async def aclose(self) -> None:
        """Give up the subscription: unread letters are discarded, the broker is told when it is there."""
        self._letters.clear()
        self._bytes = 0
        self.end()
        if self._release is not None:
            self._release(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Letter:
        while not self._letters:
            if self._ended:
                raise StopAsyncIteration
            self._something.clear()
            await self._something.wait()
        letter = self._letters.popleft()
        self._bytes -= len(letter.body)
        return letter


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """What a broker said at connect; `None` where it said nothing, which is all that 3.1.1 says."""

    version: Literal["5", "3.1.1"]
    packet_bytes: int | None = None
    """Largest packet it takes."""
    receive: int | None = None
    """Publishes with QoS 1 that it takes before it has acknowledged any."""
    qos: int | None = None
    """Highest quality of service."""
    retains: bool = True
    keepalive_s: int | None = None
    """The keepalive it sets in place of ours."""
    shares: bool = False
    """Whether several clients can share a subscription, which MQTT 5 has."""

    @classmethod
    def of(cls, properties: Properties | None, *, five: bool) -> Self:
        """Read the properties of a CONNACK."""
        if not five or properties is None:
            return cls("5" if five else "3.1.1")
        return cls(
            "5",
            packet_bytes=getattr(properties, "MaximumPacketSize", None),
            receive=getattr(properties, "ReceiveMaximum", None),
            qos=getattr(properties, "MaximumQoS", None),
            retains=bool(getattr(properties, "RetainAvailable", 1)),
            keepalive_s=getattr(properties, "ServerKeepAlive", None),
            shares=bool(getattr(properties, "SharedSubscriptionAvailable", 1)),
        )

    @property
    def body_bytes(self) -> int | None:
        """Largest body that a packet holds beside any topic of ours."""
        return None if self.packet_bytes is None else self.packet_bytes - PACKET_ROOM - TOPIC_ROOM

    def wanting(self) -> str:
        """Say what we need and this broker does not give; empty where it gives all."""
        if self.qos is not None and self.qos < 1:
            return "the broker offers QoS 0 only, and nothing here works without acknowledgements"
        if not self.retains:
            return "the broker retains nothing, and who is present is told by retained letters"
        if self.body_bytes is not None and self.body_bytes < SMALLEST_BODY:
            return (
                f"the broker takes packets of at most {self.packet_bytes} bytes, and we need"
                f" {SMALLEST_BODY + PACKET_ROOM + TOPIC_ROOM}; raise its largest packet size"
            )
        return ""


@dataclass(slots=True, eq=False)
class _Parcel:
    """A publish with QoS 1 between its caller and its acknowledgement."""

    topic: str
    body: bytes
    retain: bool
    done: asyncio.Future[None] | None = None
    """Resolved for the caller who waits; `None` for what is said again after a reconnect."""


class MqttTransport:
    """A `Transport` over a real broker, in MQTT 5 or 3.1.1; sessions kept unless `clean`.

    `will` is (topic, body): the broker publishes it, retained and with QoS 1, when this connection breaks
    without a goodbye. Delivery to the broker is at least once: a publish that raised `NotConnected` may still
    arrive later. Around a broken connection letters may come twice and out of order, and a broker that was
    killed acknowledges what nobody has subscribed to again yet; the layer above numbers and asks again.
    """

    def __init__(
        self,
        settings: MqttSettings,
        client_id: str,
        *,
        will: tuple[str, bytes] | None = None,
        clean: bool = False,
    ) -> None:
        """Check settings, files and will, open nothing; `SettingsError`, `ValueError` or `FrameTooLarge`."""
        if not client_id:
            raise ValueError("an MQTT client needs an id of its own")
        settings.check_files()
        self._settings = settings
        self._client_id = client_id
        self._will = will
        self._clean = clean
        self.limits: BrokerLimits | None = None
        """What the broker said at the last connect; `None` before the first."""
        self._learnt_bytes: int | None = None
        if will is not None:
            self._check(will[0], will[1], 1)
        self._link: _Link | None = None
        self._connected = asyncio.Event()
        self._kept: dict[str, bytes] = {}
        self._inboxes: list[Letters] = []
        self.reconnects = 0
        """Connections made after the first one."""
        self.dropped = 0
        """Publishes with QoS 0 that were given up because there was no connection, or a slow one."""
        self._reset()

    def _reset(self) -> None:
        """Forget what belongs to one opening; what is retained under our name stays."""
        self._connected = asyncio.Event()
        self._ended = asyncio.Event()
        self._trouble = "no answer yet"
        self._first: asyncio.Future[None] | None = None
        self._connections = 0
        self._quick_losses = 0
        self._one_by_one = False
        self._overflowed = 0
        self._since = self._said = 0.0
        self._progress = 0.0
        self._waiting: deque[_Parcel] = deque()
        self._unacked: dict[int, _Parcel] = {}
        self._loose: set[int] = set()
        self._subacks: dict[int, asyncio.Future[list[bool]]] = {}
        self._inboxes = []
        # Letters of a kept session come right after the connect, before anyone could subscribe again.
        self._early = self._inbox(())

    def _inbox(self, patterns: tuple[str, ...]) -> Letters:
        return Letters(patterns, self._settings.inbox_letters, self._settings.inbox_bytes)

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and the link has not been seen to break since."""
        return self._connected.is_set()

    @property
    def overflowed(self) -> int:
        """Letters dropped because their reader was too far behind."""
        return self._overflowed + self._early.dropped + sum(inbox.dropped for inbox in self._inboxes)

    @property
    def max_body_bytes(self) -> int:
        """Largest body to publish: of the setting, and what the broker has said or shown that it takes."""
        said = self.limits.body_bytes if self.limits else None
        bounds = (self._settings.max_part_bytes, said, self._learnt_bytes)
        return min(bound for bound in bounds if bound is not None)

    @property
    def window(self) -> int:
        """Publishes with QoS 1 that may wait for their acknowledgement at once, at this broker."""
        most = (self.limits.receive if self.limits else None) or WINDOW
        return 1 if self._one_by_one else min(WINDOW, most)

    # Opening and closing

    async def __aenter__(self) -> Self:
        """Connect; raises `NotConnected` saying what to check, at once when the broker says no."""
        if self._link is not None:
            raise TransportError("this transport is already open")
        self._reset()
        loop = asyncio.get_running_loop()
        self._progress = loop.time()
        self._first = loop.create_future()
        self._link = _Link(self, self._settings, self._client_id, self._will, self._clean, loop)
        self._link.start()
        try:
            await self._wait_for_broker(self._first)
        except BaseException:
            await self.close(goodbye=False)
            raise
        return self

    async def _wait_for_broker(self, first: asyncio.Future[None]) -> None:
        limit, waited = self._settings.connect_timeout_s, 0.0
        while True:
            step = SAY_AGAIN_S if limit is None else min(SAY_AGAIN_S, limit - waited)
            await asyncio.wait({first}, timeout=step)
            if first.done():
                return first.result()
            waited += step
            if limit is not None and waited >= limit:
                raise NotConnected(self._no_broker(f"within {limit:g} s"))
            logger.warning("waiting for the broker at %s: %s", self._settings.address, self._trouble)

    def _no_broker(self, when: str) -> str:
        return f"no connection to the broker at {self._settings.address} {when}: {self._trouble}"

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self, *, goodbye: bool = True) -> None:
        """Close the connection and end every iterator; without `goodbye` the broker publishes the last will.

        Publishes still waiting raise `NotConnected`. Closing a closed transport does nothing.
        """
        link, self._link = self._link, None
        if link is None:
            return
        link.stop(goodbye=goodbye and self.connected)
        try:
            async with asyncio.timeout(GOODBYE_S + 1 if goodbye else 1):
                await self._ended.wait()
            link.join(1.0)
        except TimeoutError:  # in the middle of a name look-up or a TCP connect: it ends itself after that
            logger.debug("the network thread of %s is still connecting; it ends by itself", self._client_id)
        for parcel in [*self._waiting, *self._unacked.values()]:
            if parcel.done is not None and not parcel.done.done():
                parcel.done.set_exception(
                    NotConnected(f"the transport was closed before {parcel.topic} was sent")
                )
        self._waiting.clear()
        self._unacked.clear()
        self._lose_subacks()
        self._connected.set()  # wakes who waits to subscribe; they find the link gone
        self._connected.clear()
        for inbox in self._inboxes:
            inbox.end()

    # Publishing

    async def publish(self, topic: str, body: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Publish; with QoS 1 it returns on the broker's acknowledgement, with QoS 0 at once.

        A retained body is remembered and published again after every reconnect; an empty one is forgotten.
        With QoS 0 and no connection the body is dropped and counted. Raises `NotConnected` when the broker
        has confirmed nothing for `patience_s`, `PublishRefused` when it said no (MQTT 5 only: in 3.1.1 it
        keeps that to itself), `FrameTooLarge` over `max_body_bytes`, `ValueError` for a topic with wildcards.
        """
        self._check(topic, body, qos)
        link = self._link
        if link is None:
            raise NotConnected("the MQTT transport is not open: publish inside `async with`")
        body = bytes(body)
        if retain and body:
            self._kept[topic] = body
        elif retain:
            self._kept.pop(topic, None)
        if qos == 0:
            self._fire(link, topic, body, retain=retain)
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        parcel = _Parcel(topic, body, retain, done)
        self._waiting.append(parcel)
        self._pump()
        try:
            await self._patiently(done, topic)
        finally:
            done.cancel()
            # What paho already has stays in the window until it is acknowledged: so the window bounds memory.
            if parcel in self._waiting:
                self._waiting.remove(parcel)

    def _check(self, topic: str, body: bytes, qos: int) -> None:
        if qos not in (0, 1):
            raise ValueError(f"QoS {qos} is not offered: use 0 or 1")
        if not topic or "+" in topic or "#" in topic or "\0" in topic or len(topic.encode()) > 65_535:
            raise ValueError(f"cannot publish to {topic[:200]!r}: a topic is not empty and has no wildcards")
        if len(body) > self.max_body_bytes:
            # paho would send it again after each reconnect for ever, and block all that is behind it.
            raise self._too_large(topic, body)

    def _too_large(self, topic: str, body: bytes) -> FrameTooLarge:
        bound, ours = self.max_body_bytes, self._settings.max_part_bytes
        whose = f"mqtt.max_part_bytes = {ours}" if bound == ours else f"the {bound} that the broker takes"
        return FrameTooLarge(f"{len(body)} bytes for {topic} are over {whose}: send it in parts")

    def _fire(self, link: _Link, topic: str, body: bytes, *, retain: bool) -> None:
        if not self.connected or len(self._loose) >= LOOSE:
            self.dropped += 1
            logger.debug("dropped %s with QoS 0: no connection, or a slow one", topic)
            return
        info = link.publish(topic, body, qos=0, retain=retain)
        if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._loose.add(info.mid)
        else:
            self.dropped += 1

    def _pump(self) -> None:
        """Hand waiting parcels to paho while there is a connection and room in the window."""
        while self._waiting and self.connected and self._link and len(self._unacked) < self.window:
            parcel = self._waiting.popleft()
            if len(parcel.body) > self.max_body_bytes:  # the broker came back with a smaller limit
                _settle(parcel, self._too_large(parcel.topic, parcel.body))
                continue
            if not self._hand_over(self._link, parcel):
                self._waiting.appendleft(parcel)
                asyncio.get_running_loop().call_later(0.05, self._pump)
                return

    def _hand_over(self, link: _Link, parcel: _Parcel) -> bool:
        """Give one parcel to paho, which resends it until it is acknowledged; false when paho has no room."""
        info = link.publish(parcel.topic, parcel.body, qos=1, retain=parcel.retain)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            return False
        # The acknowledgement reaches us through the event loop, so it cannot come before this line.
        self._unacked[info.mid] = parcel
        return True

    async def _patiently(self, done: asyncio.Future[None], what: str) -> None:
        """Wait for `done`; give up when nothing at all has been confirmed for `patience_s`."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while not done.done():
            left = max(begun, self._progress) + self._settings.patience_s - loop.time()
            if left <= 0:
                state = "confirms nothing" if self.connected else f"is away: {self._trouble}"
                raise NotConnected(
                    f"{what} was not confirmed: for {self._settings.patience_s:g} s the broker at"
                    f" {self._settings.address} {state}"
                )
            await asyncio.wait({done}, timeout=left)
        done.result()

    # Subscribing

    async def subscribe(self, *patterns: str) -> AsyncIterator[Letter]:
        """Subscribe with QoS 1; returns when the broker has confirmed, with a `Letters` iterator.

        Letters that a kept session held for these patterns come first. Raises `TransportError` naming the
        pattern the broker refused, `NotConnected` when it does not answer within `patience_s`, `ValueError`
        for what is no pattern.
        """
        for pattern in patterns:
            _check_pattern(pattern)
        if not patterns:
            raise ValueError("subscribe to at least one pattern")
        if self._link is None:
            raise NotConnected("the MQTT transport is not open: subscribe inside `async with`")
        inbox = self._inbox(tuple(patterns))
        self._early.take(inbox)
        self._inboxes.append(inbox)
        try:
            await self._ask(inbox.patterns)
        except BaseException:
            self._release(inbox)
            raise
        inbox.on_close(self._release)
        return inbox

    async def _ask(self, patterns: tuple[str, ...]) -> None:
        names = ", ".join(patterns)
        try:
            async with asyncio.timeout(self._settings.patience_s):
                granted: list[bool] | None = None
                while granted is None:
                    await self._connected.wait()
                    granted = await self._ask_once(patterns)
        except TimeoutError as error:
            raise NotConnected(
                f"the subscription to {names} was not confirmed within {self._settings.patience_s:g} s by the"
                f" broker at {self._settings.address}" + ("" if self.connected else f": {self._trouble}")
            ) from error
        refused = [pattern for pattern, good in zip(patterns, granted, strict=True) if not good]
        if refused:
            raise TransportError(self._refusal(refused))

    async def _ask_once(self, patterns: tuple[str, ...]) -> list[bool] | None:
        """Send one SUBSCRIBE and wait; `None` when the connection broke before the answer."""
        if self._link is None:
            raise NotConnected("the transport was closed")
        answer = self._send_subscribe(self._link, patterns)
        if answer is None:
            await asyncio.sleep(0.05)  # paho has seen the loss, the event loop not yet
            return None
        await asyncio.wait({answer})
        return None if answer.cancelled() else answer.result()

    def _send_subscribe(self, link: _Link, patterns: Sequence[str]) -> asyncio.Future[list[bool]] | None:
        code, mid = link.client.subscribe([(pattern, 1) for pattern in patterns])
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            return None
        answer: asyncio.Future[list[bool]] = asyncio.get_running_loop().create_future()
        self._subacks[mid] = answer
        return answer

    def _refusal(self, refused: list[str]) -> str:
        who = f"user {self._settings.username or '(anonymous)'}, client id {self._client_id}"
        return (
            f"the broker at {self._settings.address} refused the subscription to {', '.join(refused)}: its"
            f" ACL must let {who}, read it"
        )

    def _release(self, inbox: Letters) -> None:
        """Forget an inbox, and tell the broker about the patterns nobody asks for any more."""
        if inbox in self._inboxes:
            self._inboxes.remove(inbox)
            self._overflowed += inbox.dropped
        wanted = {pattern for other in self._inboxes for pattern in other.patterns}
        unwanted = [pattern for pattern in inbox.patterns if pattern not in wanted]
        if unwanted and self._link is not None:
            self._link.client.unsubscribe(unwanted)

    def _lose_subacks(self) -> None:
        for answer in self._subacks.values():
            answer.cancel()
        self._subacks.clear()

    # What the network thread reports; all of it runs on the event loop

    def on_renewed(self) -> None:
        """The link goes on with a new client: what the old one held unacknowledged waits again, in order."""
        held = [parcel for parcel in self._unacked.values() if parcel.done is not None]
        self._unacked.clear()
        self._waiting.extendleft(reversed(held))

    def on_connected(self, limits: BrokerLimits, *, session_present: bool) -> None:
        """Subscribe again, say again what is retained, then let the waiting publishes go."""
        link = self._link
        if link is None:
            return
        self.limits = limits
        self._since = asyncio.get_running_loop().time()
        self._connections += 1
        self.reconnects += self._connections > 1
        log = logger.info if self._connections > 1 else logger.debug
        log(
            "connected to %s as %s with MQTT %s, session kept: %s; bodies of up to %d bytes",
            self._settings.address,
            self._client_id,
            limits.version,
            session_present,
            self.max_body_bytes,
        )
        self._subscribe_again(link)
        self._publish_again(link)
        self._connected.set()
        if self._first is not None and not self._first.done():
            self._first.set_result(None)
        self._pump()

    def _subscribe_again(self, link: _Link) -> None:
        patterns = list(dict.fromkeys(pattern for inbox in self._inboxes for pattern in inbox.patterns))
        answer = self._send_subscribe(link, patterns) if patterns else None
        if answer is not None:
            answer.add_done_callback(lambda done: self._subscribed_again(done, patterns))

    def _subscribed_again(self, answer: asyncio.Future[list[bool]], patterns: list[str]) -> None:
        if answer.cancelled():
            return
        refused = [pattern for pattern, good in zip(patterns, answer.result(), strict=True) if not good]
        if refused:
            logger.error("%s", self._refusal(refused))

    def _publish_again(self, link: _Link) -> None:
        # What paho still holds unacknowledged it resends by itself, and has done so already.
        resent = {parcel.topic: parcel.body for parcel in self._unacked.values() if parcel.retain}
        for topic, body in self._kept.items():
            said = resent.get(topic) == body or self._hand_over(link, _Parcel(topic, body, retain=True))
            if not said:
                logger.error("no room to publish the retained %s again", topic)

    def on_trouble(self, trouble: str, *, final: bool) -> None:
        """An attempt failed; `final` when trying again will not help (the broker said no)."""
        self._trouble = trouble
        logger.debug("%s: %s", self._settings.address, trouble)
        now = asyncio.get_running_loop().time()
        if self._connections and now - self._said >= REPEAT_S:
            self._said = now
            logger.log(logging.ERROR if final else logging.WARNING, "%s", self._no_broker("any more"))
        waits = self._settings.connect_timeout_s is None
        if final and not waits and self._first is not None and not self._first.done():
            self._first.set_exception(NotConnected(self._no_broker("was made")))

    def on_lost(self, trouble: str) -> None:
        """The connection broke; the thread is already on its way to a new one."""
        self._trouble = trouble
        if not self.connected:
            return
        self._connected.clear()
        self._loose.clear()
        self._lose_subacks()
        if self._link is None:
            return
        self._said = asyncio.get_running_loop().time()
        quick = self._said - self._since < QUICK_S
        self._quick_losses = self._quick_losses + 1 if quick else 0
        self._one_by_one = self._one_by_one and quick
        self._suspect_size(self._link)
        hint = f"; is another client called {self._client_id}?" if self._quick_losses >= 3 else ""
        logger.warning(
            "lost the broker at %s (%s), connecting again%s", self._settings.address, trouble, hint
        )

    def _suspect_size(self, link: _Link) -> None:
        """Try half the size where connection after connection ends on something large, never confirmed.

        A broker may say no more than that to a packet over its limit; paho would send it again for ever.
        A bad link looks the same while several are on their way, as their confirmations go with it: so
        first they go one by one.
        """
        largest = max((len(parcel.body) for parcel in self._unacked.values()), default=0)
        if self._quick_losses < 3 or self._progress > self._since or largest < 2 * SUSPECT_BODY:
            return
        self._quick_losses = 0
        if self._one_by_one:
            self._learn_size(largest)
        self._one_by_one = True
        link.renew()

    def _learn_size(self, too_large: int) -> None:
        self._learnt_bytes = max(SMALLEST_BODY, too_large // 2)
        logger.warning(
            "%s seems to take no body of %d bytes; %d from now on (mqtt.max_part_bytes says what it takes)",
            self._settings.address,
            too_large,
            self.max_body_bytes,
        )

    def on_acknowledged(self, mid: int) -> None:
        """A QoS 1 publish is at the broker, or a QoS 0 one has left."""
        self._loose.discard(mid)
        parcel = self._unacked.pop(mid, None)
        if parcel is None:
            return
        self._progress = asyncio.get_running_loop().time()
        self._one_by_one = self._one_by_one and self._progress - self._since < QUICK_S
        _settle(parcel, None)
        self._pump()

    def on_publish_refused(self, mid: int, code: int, reason: str) -> None:
        """The broker answered a publish with a no; 3.1.1 has no way to."""
        parcel = self._unacked.pop(mid, None)
        if parcel is None:
            return
        self._progress = asyncio.get_running_loop().time()
        error: TransportError | FrameTooLarge
        if code == _TOO_LARGE and len(parcel.body) > SMALLEST_BODY:
            self._learn_size(len(parcel.body))
            error = self._too_large(parcel.topic, parcel.body)
        else:
            who = f"user {self._settings.username or '(anonymous)'}, client id {self._client_id}"
            hint = f": its ACL must let {who}, write it" if code == 0x87 else ""
            error = PublishRefused(
                f"the broker at {self._settings.address} refused the publish to {parcel.topic}"
                f" ({reason.lower()}){hint}"
            )
        if parcel.done is None or parcel.done.done():
            logger.error("%s", error)
        _settle(parcel, error)
        self._pump()

    def on_subscribed(self, mid: int, granted: list[bool]) -> None:
        """The broker answered a SUBSCRIBE."""
        answer = self._subacks.pop(mid, None)
        if answer is not None and not answer.done():
            answer.set_result(granted)

    def on_letter(self, letter: Letter) -> None:
        """Hand a letter to everyone who asked for it; keep it where nobody has asked yet."""
        wanted = [inbox for inbox in self._inboxes if inbox.wants(letter.topic)]
        for inbox in wanted or [self._early]:
            inbox.put(letter)

    def on_ended(self) -> None:
        """The network thread ended: as asked, or for no good reason, and then it is started again."""
        link = self._link
        if link is None:
            self._ended.set()
            return
        logger.error("the network thread of %s ended unasked; starting it again", self._client_id)
        self.on_lost("the network thread ended")
        link.join(1.0)
        link.start()


class _Link:
    """The network thread: one paho client that is connected again after every loss, until it is stopped.

    paho's own thread is not used: it cannot be watched, and its waits between attempts cannot be interrupted.
    """

    def __init__(
        self,
        owner: MqttTransport,
        settings: MqttSettings,
        client_id: str,
        will: tuple[str, bytes] | None,
        clean: bool,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._owner, self._settings, self._loop = owner, settings, loop
        self._client_id, self._will, self._clean = client_id, will, clean
        self._version = _V311 if settings.version == "3.1.1" else _V5
        self._settled = settings.version != "auto"
        """Whether the version is known to be right: it was set, or has connected."""
        self._other_version = False
        self._body_bytes: int | None = None
        """The largest body the broker took at the last connect."""
        self._inflight = WINDOW
        self._smaller = False
        self._goodbye = ""
        self._events: deque[Callable[[], None]] = deque()
        self._stopping = threading.Event()
        self._deadline = 0.0
        self._was_connected = False
        self._refused = False
        self._opened = False
        """Whether the broker's port took the connection, whatever came then."""
        self._thread: threading.Thread | None = None
        self._name = f"mqtt-{client_id}"
        self.client = self._new_client()

    def _new_client(self) -> paho.Client:
        five = self._version == _V5
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=None if five else self._clean,
            protocol=self._version,
            reconnect_on_failure=False,  # ours does it; this also keeps paho from falling back to MQTT 3.1
        )
        client.suppress_exceptions = True  # logged by paho; otherwise one would end the thread in silence
        client.enable_logger(paho_logger)
        client.max_queued_messages_set(1_000)
        client.max_inflight_messages_set(self._inflight)
        client.connect_timeout = TCP_CONNECT_S
        if self._settings.username is not None:
            client.username_pw_set(self._settings.username, self._settings.secret())
        self._context = self._settings.tls_context()
        if self._context is not None:
            client.tls_set_context(self._context)
        if self._will is not None:
            client.will_set(self._will[0], self._will[1], qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_disconnect = self._on_disconnect
        client.on_socket_open = _tune
        # Without this paho writes to the socket from the event loop's thread as well as from ours.
        client.on_socket_register_write = _nothing
        s = self._settings
        keepalive = told_keepalive_s(s.keepalive_s)
        if five:
            properties = _properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = 0 if self._clean else s.session_expiry_s
            client.connect_async(
                s.host, s.port, keepalive=keepalive, clean_start=self._clean, properties=properties
            )
        else:
            client.connect_async(s.host, s.port, keepalive=keepalive)
        return client

    # Called from the event loop

    def publish(self, topic: str, body: bytes, *, qos: int, retain: bool) -> paho.MQTTMessageInfo:
        """Hand a publish to paho, with what MQTT 5 adds to it."""
        properties = None
        if self._version == _V5:
            properties = _publish_properties(None if retain else self._settings.message_expiry_s)
        return self.client.publish(topic, body, qos=qos, retain=retain, properties=properties)

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def stop(self, *, goodbye: bool) -> None:
        """Ask the thread to end, after a DISCONNECT where `goodbye`."""
        client = self.client  # the thread lets go of it once it stops
        self._deadline = time.monotonic() + (GOODBYE_S if goodbye else 0)
        self._stopping.set()
        if goodbye:
            client.disconnect()
        elif isinstance(open_socket := client.socket(), socket.socket):
            with contextlib.suppress(OSError):  # it may be gone already
                open_socket.shutdown(socket.SHUT_RDWR)  # wakes the thread

    def renew(self) -> None:
        """Go on with a new client after the connection that was just lost."""
        self._smaller = True

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to be gone."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    # The thread

    def _run(self) -> None:
        wait_s = BACKOFF_S[0]
        try:
            while not self._stopping.is_set():
                self._was_connected = False
                self._connection()
                self._hang_up()
                if self._renew():
                    continue
                wait_s = BACKOFF_S[0] if self._was_connected else min(2 * wait_s, BACKOFF_S[1])
                # Many agents lose one broker at once and must not all come back in the same instant.
                self._stopping.wait(wait_s * random.uniform(0.5, 1.0))
                self._renew()
        finally:
            if self._stopping.is_set():
                # paho closes its inner pair of sockets when the client goes: now, not at some collection.
                del self.client
            self._post(self._owner.on_ended)
            self._flush()

    def _renew(self) -> bool:
        """Take a new client where the version was wrong or packets became smaller; true to go on at once."""
        at_once = self._other_version or self._smaller
        silent = not (self._settled or self._was_connected or self._refused or at_once) and self._opened
        self._opened = False
        if self._stopping.is_set() or not (at_once or silent):
            return False
        if not self._smaller:
            self._version = _V311 if self._version == _V5 else _V5
            logger.debug("%s: trying MQTT %d", self._settings.address, self._version)
        self._other_version = self._smaller = False
        self.client = self._new_client()
        self._post(self._owner.on_renewed)
        return at_once

    def _connection(self) -> None:
        """Connect and serve one connection until it is gone or we are stopped."""
        try:
            self._refused = self._opened = False
            self._goodbye = ""
            self._show_newest()
            self.client.reconnect()
            self._opened = True
            trouble = self._serve()
        except OSError as error:
            trouble = _in_words(error)
        except Exception as error:  # the thread outlives whatever paho raises; logged, and reported as a loss
            logger.exception("the MQTT connection to %s failed", self._settings.address)
            trouble = f"{type(error).__name__}: {error}"
        if self._was_connected:
            self._post(lambda: self._owner.on_lost(trouble))
        elif not self._refused:
            self._post(lambda: self._owner.on_trouble(trouble, final=False))
        self._flush()

    def _show_newest(self) -> None:
        """Read the client certificate again, which somebody may have renewed; an unreadable one is said."""
        s = self._settings
        if self._context is not None and s.cert_file is not None:
            try:
                self._context.load_cert_chain(s.cert_file, s.key_file)
            except OSError as error:
                logger.error(
                    "mqtt.cert_file = %s cannot be read, the last one is shown: %s", s.cert_file, error
                )

    def _serve(self) -> str:
        """Run paho until the connection ends; returns why in words."""
        open_socket = self.client.socket()
        if open_socket is not None and open_socket.fileno() >= SELECT_FILES:
            return f"this process has {SELECT_FILES} files open and more; run fewer agents in one process"
        patience_s = CONNACK_S if self._settled or self._version == _V311 else TRY_S
        connack_by = time.monotonic() + patience_s
        while not (self._stopping.is_set() and time.monotonic() >= self._deadline):
            code = self.client.loop(1.0 if not self._stopping.is_set() else 0.1)
            self._flush()
            if code != MQTTErrorCode.MQTT_ERR_SUCCESS or self.client.socket() is None:
                if code == MQTTErrorCode.MQTT_ERR_PROTOCOL and not self._settled and self._version == _V5:
                    self._other_version = True  # a broker of 3.1.1 that answers MQTT 5 in its own way
                if self._was_connected:
                    words = (
                        paho.error_string(code).rstrip(".").lower() if code else "the connection was closed"
                    )
                    return self._goodbye or words
                return "the connection was closed before the broker answered; is TLS needed there, or not?"
            if not self._was_connected and time.monotonic() > connack_by:
                return f"something accepts the connection but does not answer MQTT within {patience_s:g} s"
        return "closed"

    def _hang_up(self) -> None:
        """Close the socket where paho has not: without a DISCONNECT, so the broker publishes the will."""
        open_socket = self.client.socket()
        if open_socket is not None:
            open_socket.close()

    def _post(self, event: Callable[[], None]) -> None:
        self._events.append(event)

    def _flush(self) -> None:
        """Let the event loop handle what happened, in order."""
        if not self._events:
            return
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:  # the event loop is closed: nobody is left to be told
            logger.debug("the event loop is gone; the MQTT thread ends")
            self._events.clear()
            self._stopping.set()

    def _drain(self) -> None:
        while self._events:
            self._events.popleft()()

    def _on_connect(
        self,
        client: paho.Client,
        userdata: object,
        flags: paho.ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.getName() == "Unsupported protocol version" and self._settings.version == "auto":
            self._other_version, self._settled = self._version == _V5, False
            if self._other_version:
                return
        if reason.is_failure:
            self._refused = True
            trouble, final = _connack_in_words(reason.getName(), self._settings)
            self._post(lambda: self._owner.on_trouble(trouble, final=final))
            return
        limits = BrokerLimits.of(properties, five=self._version == _V5)
        if wanting := limits.wanting():
            self._refused = True
            self._post(lambda: self._owner.on_trouble(wanting, final=True))
            client.disconnect()
            return
        self._settled = True
        if self._shrunk(limits):
            self._hang_up()
            return
        self._was_connected = True
        self._post(lambda: self._owner.on_connected(limits, session_present=flags.session_present))

    def _shrunk(self, limits: BrokerLimits) -> bool:
        """Whether the broker takes less than paho counts on: it would end the connection over that."""
        before = self._body_bytes, self._inflight
        self._inflight = min(self._inflight, limits.receive or self._inflight)
        self._body_bytes = min(self._settings.max_part_bytes, limits.body_bytes or sys.maxsize)
        # paho holds nothing at the first connection, and takes another window for a new client only.
        self._smaller = self._body_bytes < (before[0] or 0) or self._inflight < before[1]
        return self._smaller

    def _on_disconnect(
        self,
        client: paho.Client,
        userdata: object,
        flags: paho.DisconnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._goodbye = f"the broker said: {reason.getName().lower()}"

    def _on_publish(
        self,
        client: paho.Client,
        userdata: object,
        mid: int,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            code, name = reason.value, reason.getName()
            self._post(lambda: self._owner.on_publish_refused(mid, code, name))
        else:
            self._post(lambda: self._owner.on_acknowledged(mid))

    def _on_subscribe(
        self,
        client: paho.Client,
        userdata: object,
        mid: int,
        reasons: list[ReasonCode],
        properties: Properties | None,
    ) -> None:
        granted = [not reason.is_failure for reason in reasons]
        self._post(lambda: self._owner.on_subscribed(mid, granted))

    def _on_message(self, client: paho.Client, userdata: object, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            logger.warning(
                "the broker sent %d bytes on a topic that is not UTF-8; dropped", len(message.payload)
            )
            return
        _look_at_protocol(topic, message.properties)
        letter = Letter(topic, bytes(message.payload), bool(message.retain))
        self._post(lambda: self._owner.on_letter(letter))


def _check_pattern(pattern: str) -> None:
    """Raise `ValueError` for what is no MQTT topic filter; brokers close the connection on it."""
    levels = pattern.split("/")
    bad = "#" in "".join(levels[:-1]) or any(len(level) > 1 and set(level) & {"+", "#"} for level in levels)
    if not pattern or "\0" in pattern or bad or len(pattern.encode()) > 65_535:
        raise ValueError(
            f"{pattern[:200]!r} is not a topic pattern: '+' stands for one whole level, '#' at the end for"
            " the rest"
        )


def _properties(packet: int) -> Properties:
    """Return properties that name our protocol."""
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    properties.UserProperty = ("hedgerow", str(PROTOCOL))
    return properties


@lru_cache(maxsize=8)
def _publish_properties(expiry_s: int | None) -> Properties:
    properties = _properties(PacketTypes.PUBLISH)
    if expiry_s is not None:
        properties.MessageExpiryInterval = expiry_s
    return properties


_foreign: set[str] = set()


def _look_at_protocol(topic: str, properties: Properties | None) -> None:
    """Say, once for each, that a letter is of another protocol than ours; it may still be understood."""
    for name, value in getattr(properties, "UserProperty", None) or ():
        if name == "hedgerow" and value != str(PROTOCOL) and value not in _foreign and len(_foreign) < 16:
            _foreign.add(value)
            logger.warning(
                "a letter on %s is of protocol %.20s, this is %d: update the older side",
                topic,
                value,
                PROTOCOL,
            )


def _settle(parcel: _Parcel, error: Exception | None) -> None:
    """Tell the caller who waits for a parcel how it ended."""
    if parcel.done is None or parcel.done.done():
        return
    if error is None:
        parcel.done.set_result(None)
    else:
        parcel.done.set_exception(error)


def _tune(client: paho.Client, userdata: object, sock: paho.SocketLike) -> None:
    """Small packets leave at once, and a dead link is noticed soon."""
    if isinstance(sock, socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


def _nothing(client: paho.Client, userdata: object, sock: paho.SocketLike) -> None:
    """Stand in for an external event loop's callback."""


def _in_words(error: OSError) -> str:
    """Say what a failed connect means and what to check."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted ({error.verify_message}); check mqtt.ca_file and mqtt.host"
    if isinstance(error, ssl.SSLError):
        why = error.reason or error
        return f"TLS failed ({why}); is this the broker's TLS port, and does it want a certificate?"
    if isinstance(error, socket.gaierror):
        return f"the name does not resolve ({error.strerror}); check mqtt.host"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there; is the broker running, and are mqtt.host and mqtt.port right?"
    if isinstance(error, TimeoutError):
        return "the machine does not answer; check mqtt.host, the network and the firewall"
    return f"{error.strerror or error}; check mqtt.host, mqtt.port and the network"


def _connack_in_words(reason: str, settings: MqttSettings) -> tuple[str, bool]:
    """Say what the broker's no means, and whether it is final."""
    who = f"user {settings.username!r}" if settings.username else "a client without user name"
    match reason:
        case "Bad user name or password" | "Not authorized":
            return (
                f"the broker refused {who} ({reason.lower()}); check mqtt.username and mqtt.password or"
                " mqtt.password_file, and the broker's list of users",
                True,
            )
        case "Client identifier not valid" | "Unsupported protocol version":
            hint = '; set mqtt.version = "auto"' if reason.startswith("Unsupported") else ""
            return f"the broker refused the connection ({reason.lower()}){hint}", True
        case _:
            return f"the broker is not ready ({reason.lower()})", False
