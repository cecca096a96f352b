"""This device's client certificate at the broker: asked for when it joins, and again before it expires.

    vault/
      device.key     its key (EC, P-256), made here; it never leaves
      device.csr     the request that a certificate is made from, each time
      device.pem     key and certificate: `mqtt.cert_file`, read anew with every connection
      device.json    since when and until when that is good

Only making the key needs the package `cryptography`; asking again does not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from foundation.durable import SECRET, write_first, write_whole
from foundation.errors import JoinRefused, NotConnected, SettingsError, TransportError
from foundation.joining import Certificate, CertificateAsked, CertificateGiven
from foundation.topics import Topics
from foundation.transport import Letter, Transport

logger = logging.getLogger(__name__)

KEY, REQUEST, PEM, VALIDITY = "device.key", "device.csr", "device.pem", "device.json"
LEFT = 1 / 3
"""Of its life: with less it is asked for the next."""
LOOK_S = (1.0, 3_600.0)
"""Least and most seconds between two looks at that."""
ANSWER_S = 30.0


def request_of(vault: Path, name: str) -> str:
    """Return this device's request (PKCS #10, PEM), made with its key where there is none."""
    if not (vault / REQUEST).is_file() or not (vault / KEY).is_file():
        key, request = _made(name)
        if not (vault / KEY).exists():
            write_first(vault / KEY, key, mode=SECRET)
            write_whole(vault / REQUEST, request)
        else:  # killed between the two
            write_whole(vault / REQUEST, _made(name, (vault / KEY).read_bytes())[1])
    return (vault / REQUEST).read_text("ascii")


def keep(vault: Path, certificate: Certificate) -> None:
    """Write a certificate beside its key, whole or not at all; `JoinRefused` for one of another key."""
    import ssl

    both = (vault / KEY).read_bytes() + certificate.pem.encode()
    draft = vault / (PEM + ".new")
    write_whole(draft, both, mode=SECRET)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(draft)
    except OSError as error:
        raise JoinRefused(f"the certificate that came is none for this device's key: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
    write_whole(vault / PEM, both, mode=SECRET)
    bare = certificate.model_copy(update={"pem": ""})
    write_whole(vault / VALIDITY, bare.model_dump_json().encode())


def validity(vault: Path) -> Certificate | None:
    """Return since when and until when the certificate is good, `None` where this device has none."""
    try:
        return Certificate.model_validate_json((vault / VALIDITY).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise SettingsError(
            f"{vault / VALIDITY} cannot be read ({error}): join again with a new token"
        ) from error


class Renewal:
    """Asks for the next certificate in time, over the sealed way to the coordinator."""

    def __init__(
        self,
        vault: Path,
        name: str,
        topics: Topics,
        transport: Transport,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` gives UTC seconds."""
        self._vault, self._name, self._transport, self._clock = vault, name, transport, clock
        self._letters: AsyncIterator[Letter] | None = None
        self._ask, self._read = topics.of(name, "renew"), topics.of(name, "certificate")

    async def run(self) -> None:
        """Look, and ask where it is time, until cancelled; without a certificate there is nothing to do."""
        failed = 0
        while (now := await asyncio.to_thread(validity, self._vault)) is not None:
            life, left = now.expires - now.issued, now.expires - self._clock()
            good = left >= LEFT * life or await self._renew(left)
            failed = 0 if good else min(failed + 1, 12)
            pause = min(max(life / 20, LOOK_S[0]), LOOK_S[1])
            await asyncio.sleep(pause if good else min(pause, LOOK_S[0] * 2 ** (failed - 1)))

    async def _renew(self, left_s: float) -> bool:
        request = await asyncio.to_thread(request_of, self._vault, self._name)
        try:
            given = await self._answer(CertificateAsked(request=request).model_dump_json().encode())
            if given.certificate is None:
                raise JoinRefused(given.refused or "the answer is empty")
            await asyncio.to_thread(keep, self._vault, given.certificate)
        except (TransportError, TimeoutError, JoinRefused, ValidationError, OSError) as error:
            # It is asked again with the next look; the old one is good for as long as it says.
            logger.warning(
                "client certificate not renewed",
                extra={"left_s": round(left_s), "reason": str(error) or "no answer from the coordinator"},
            )
            return False
        logger.info("client certificate renewed", extra={"until": given.certificate.expires})
        return True

    async def _answer(self, question: bytes) -> CertificateGiven:
        if self._letters is None:
            self._letters = await self._transport.subscribe(self._read)
        async with asyncio.timeout(ANSWER_S):
            await self._transport.publish(self._ask, question)
            async for letter in self._letters:
                return CertificateGiven.model_validate_json(letter.body)
        self._letters = None  # the transport was closed
        raise NotConnected("the connection was closed before the answer came")


def _made(name: str, known: bytes | None = None) -> tuple[bytes, bytes]:
    """Return a key and a request that it has signed, both PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise SettingsError(
            "a certificate needs the package `cryptography`, once: pip install 'hedgerow[join]'"
        ) from error
    key: Any = (
        serialization.load_pem_private_key(known, None) if known else ec.generate_private_key(ec.SECP256R1())
    )
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    secret: bytes = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return secret, request.public_bytes(pem)
