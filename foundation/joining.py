"""How a device joins: a one-time token, one question, one answer, and keys that only the two have.

    device        hedgerow/v1/{federation}/join/{user}/request      who I want to be, my public key
    coordinator   hedgerow/v1/{federation}/join/{user}/answer       its public key, and the password in a box

`user` is `join-` and the invitation's number: a broker user that may do just this. Both letters carry an HMAC
with the token's secret. Both sides then have the same X25519 secret (RFC 7748), and derive from it the seal
keys of both directions and the key of the box (HKDF, RFC 5869): the broker learns none of them.

A token names federation, invitation and secret, and may pin the broker's certificate by its SHA-256.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from pydantic import Field, ValidationError

from foundation.errors import JoinRefused, SettingsError
from foundation.frozen import Frozen
from foundation.seal import SealKeys, hkdf
from foundation.topics import ROOT, checked_name

PREFIX = "hg1."
SECRET_BYTES, PIN_BYTES, ID_BYTES, SUM_BYTES = 16, 32, 8, 4
LETTER_BYTES = 65_536
"""Longest question or answer."""
_HEX32 = r"^[0-9a-f]{64}$"


@dataclass(frozen=True, slots=True)
class Token:
    """What an invitation is handed over as."""

    federation: str
    invite: str
    """16 hexadecimal digits."""
    secret: bytes
    """16 bytes."""
    pin: bytes | None = None
    """SHA-256 of the broker's certificate (DER)."""

    def text(self) -> str:
        """Return the token as people copy it."""
        name = self.federation.encode()
        body = bytes([len(name)]) + name + bytes.fromhex(self.invite) + self.secret + (self.pin or b"")
        return PREFIX + base64.urlsafe_b64encode(body + _sum(body)).decode().rstrip("=")

    @classmethod
    def of(cls, text: str) -> Self:
        """Read a token; raises `SettingsError` when it is not whole."""
        text = text.strip()
        wrong = SettingsError("this is not a whole join token: copy all of it, from hg1. to the end")
        if not text.startswith(PREFIX) or len(text) > 400:
            raise wrong
        try:
            raw = base64.b64decode(text.removeprefix(PREFIX) + "===", altchars=b"-_", validate=False)
        except (binascii.Error, ValueError) as error:
            raise wrong from error
        body, given = raw[:-SUM_BYTES], raw[-SUM_BYTES:]
        length = body[0] if body else 0
        rest = body[1 + length :]
        if given != _sum(body) or len(rest) not in (
            ID_BYTES + SECRET_BYTES,
            ID_BYTES + SECRET_BYTES + PIN_BYTES,
        ):
            raise wrong
        invite, secret, pin = rest[:ID_BYTES], rest[ID_BYTES:][:SECRET_BYTES], rest[ID_BYTES + SECRET_BYTES :]
        federation = checked_name(body[1 : 1 + length].decode("utf-8", "replace"), "the token's federation")
        return cls(federation, invite.hex(), secret, pin or None)

    @property
    def user(self) -> str:
        """The broker user that may only join."""
        return f"join-{self.invite}"

    @property
    def password(self) -> str:
        """Its password."""
        return hkdf(self.secret, b"", b"hedgerow join password 1", 16).hex()

    def topic(self, what: str) -> str:
        """Return the topic of the `request` or the `answer`."""
        return f"{ROOT}/{self.federation}/join/{self.user}/{what}"


class Certificate(Frozen):
    """A device's client certificate at the broker."""

    pem: str = Field(max_length=8_192)
    issued: float
    expires: float
    """UTC seconds."""


class CertificateAsked(Frozen):
    """A joined device's letter before its certificate expires; sealed."""

    request: str = Field(max_length=4_096)
    """PKCS #10, PEM."""


class CertificateGiven(Frozen):
    """What it is answered; sealed."""

    certificate: Certificate | None = None
    refused: str = Field("", max_length=2_000)


class Request(Frozen):
    """What a device asks."""

    name: str = Field(max_length=64)
    public: str = Field(pattern=_HEX32)
    """X25519."""
    certificate: str = Field("", max_length=4_096)
    """A request for a client certificate (PKCS #10, PEM), where the device wants one."""


class Box(Frozen):
    """What is for the device alone."""

    username: str
    password: str


class Grant(Frozen):
    """What it is told: `refused`, or all the rest."""

    refused: str | None = Field(None, max_length=2000)
    name: str = Field("", max_length=64)
    asked: str = Field("", max_length=64)
    """The public key that this answers."""
    public: str = Field("", max_length=64)
    """The coordinator's, X25519."""
    signing: str = Field("", max_length=64)
    """Its Ed25519 key: what artifacts it signs are checked with."""
    authority: str = Field("", max_length=16_384)
    """PEM of the authority that signs the broker's certificate; empty where it is somebody else's."""
    box: str = Field("", max_length=8_192)
    """A `Box`, as nonce and ciphertext in hexadecimal digits."""
    certificate: Certificate | None = None
    """The device's own, where the broker asks for one."""
    port: int | None = Field(None, ge=1, le=65_535)
    """The broker's for those who have joined, where it is another than that for joining."""


L = TypeVar("L", Request, Grant)


class Vouched(Frozen):
    """A letter with its HMAC."""

    body: str = Field(max_length=LETTER_BYTES)
    mac: str = Field(pattern=_HEX32)


def vouched(letter: Request | Grant, secret: bytes) -> bytes:
    """Return a letter that proves that its writer has the token's secret."""
    body = letter.model_dump_json(exclude_defaults=True)  # an earlier version knows no newer fields
    return Vouched(body=body, mac=_mac(type(letter).__name__, body, secret).hex()).model_dump_json().encode()


def read_request(letter: bytes, secret: bytes) -> Request:
    """Read what a device asks; raises `JoinRefused`."""
    return _read(letter, Request, secret)


def read_grant(letter: bytes, secret: bytes) -> Grant:
    """Read what the coordinator answers; raises `JoinRefused`."""
    return _read(letter, Grant, secret)


def _read(letter: bytes, kind: type[L], secret: bytes) -> L:
    if len(letter) > LETTER_BYTES:
        raise JoinRefused(f"a letter of {len(letter):,} bytes is too long for one about joining")
    try:
        found = Vouched.model_validate_json(letter)
    except ValidationError as error:
        raise JoinRefused("what came is no letter about joining") from error
    if not hmac.compare_digest(_mac(kind.__name__, found.body, secret), bytes.fromhex(found.mac)):
        raise JoinRefused("whoever wrote this does not have the token's secret")
    try:
        return kind.model_validate_json(found.body)
    except ValidationError as error:
        raise JoinRefused(f"the letter cannot be read: {error.errors()[0]['msg']}") from error


def _mac(kind: str, body: str, secret: bytes) -> bytes:
    return hmac.digest(hkdf(secret, b"", f"hedgerow join {kind} 1".encode()), body.encode(), "sha256")


def _sum(body: bytes) -> bytes:
    return hashlib.sha256(b"hedgerow token" + body).digest()[:SUM_BYTES]


# --- keys -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class Shared:
    """What two sides derive from each other's public keys."""

    seals: SealKeys
    box: bytes


def public_of(private: bytes) -> bytes:
    """Return the public half of an X25519 key (32 bytes)."""
    made: bytes = _x25519().X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    return made


def shared(
    private: bytes, other: bytes, *, federation: str, name: str, device: bytes, coordinator: bytes
) -> Shared:
    """Return the keys of one device and its coordinator; `JoinRefused` for a public key of small order.

    `device` and `coordinator` are the public keys; `private` is the own one and `other` the other's.
    """
    module = _x25519()
    try:
        secret = module.X25519PrivateKey.from_private_bytes(private).exchange(
            module.X25519PublicKey.from_public_bytes(other)
        )
    except ValueError as error:
        raise JoinRefused("the other side's public key is none") from error
    salt = hashlib.sha256(b"\0".join([federation.encode(), name.encode(), device, coordinator])).digest()
    up, down, box = (hkdf(secret, salt, f"hedgerow {what} 1".encode()) for what in ("up", "down", "box"))
    return Shared(SealKeys(up, down), box)


def boxed(box: Box, key: bytes) -> str:
    """Encrypt with ChaCha20-Poly1305 (RFC 8439)."""
    nonce = secrets.token_bytes(12)
    sealed: bytes = _cipher(key).encrypt(nonce, box.model_dump_json().encode(), b"")
    return (nonce + sealed).hex()


def unboxed(text: str, key: bytes) -> Box:
    """Decrypt; raises `JoinRefused`."""
    from cryptography.exceptions import InvalidTag

    try:
        raw = bytes.fromhex(text)
        return Box.model_validate_json(_cipher(key).decrypt(raw[:12], raw[12:], b""))
    except (ValueError, InvalidTag) as error:
        raise JoinRefused("the box with the password cannot be opened") from error


def _cipher(key: bytes) -> Any:
    _x25519()
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key)


def _x25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import x25519
    except ImportError as error:
        raise SettingsError(
            "joining needs the package `cryptography`, and nothing else does: pip install 'hedgerow[join]'"
        ) from error
    return x25519
