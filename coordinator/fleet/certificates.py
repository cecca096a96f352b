"""Devices' client certificates: made from a request of the device's, written down, and taken back by a CRL.

The key is the device's own and never comes here. What was made is in `certificates.json` in the coordinator's
folder; whoever is not among the devices any more, or joined anew, is on the list of those taken back.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from coordinator.fleet.authority import begun, encoding, modules, sha256, signer_of
from coordinator.fleet.records import Device
from foundation.durable import SECRET, write_whole
from foundation.errors import JoinRefused, SettingsError
from foundation.frozen import Frozen
from foundation.joining import Certificate

ISSUED, REVOKED, OWN = "certificates.json", "revoked.pem", "coordinator.pem"
OWN_DAYS, OWN_LEFT_DAYS = 397, 30
REQUEST_BYTES = 4_096
MOST = 50
"""Certificates of one device that are good at once; it needs two."""


class _Issued(Frozen):
    name: str
    public: str
    """The device's X25519 key: another device of the same name has another."""
    serial: str
    """Hexadecimal."""
    expires: float


class _Book(Frozen):
    issued: tuple[_Issued, ...] = Field(())


class Certificates:
    """Makes certificates for devices, and the list of those that are worth nothing any more."""

    def __init__(self, files: Path, folder: Path, *, days: float) -> None:
        """`files` has the authority and is the broker's; `folder` is the coordinator's."""
        self._files, self._path, self._days = files, folder / ISSUED, days
        self._lock = threading.Lock()

    def issue(self, request: str, device: Device, *, now: datetime | None = None) -> Certificate:
        """Return a device's certificate; raises `JoinRefused` for a request that cannot be signed.

        It is written down before anybody has it.
        """
        now = now or datetime.now(UTC)
        public = _public_of(request)
        made, _ = _signed(self._files, device.agent, public, now, self._days)
        expires = made.not_valid_after_utc.timestamp()
        row = _Issued(
            name=device.agent, public=device.public, serial=f"{made.serial_number:x}", expires=expires
        )
        with self._lock:
            kept = [one for one in self._book().issued if one.expires > now.timestamp()]
            if sum(one.public == device.public for one in kept) >= MOST:
                raise JoinRefused(f"{device.agent} has {MOST} certificates that are good: it asks too often")
            write_whole(self._path, _Book(issued=(*kept, row)).model_dump_json().encode(), mode=SECRET)
        pem = made.public_bytes(encoding().PEM).decode("ascii")
        return Certificate(pem=pem, issued=now.timestamp(), expires=expires)

    def revoked(self, devices: Sequence[Device], *, now: datetime | None = None) -> str:
        """Return the list (PEM) of certificates that are good by date and by nothing else.

        As it is on the disk where nothing has changed: a signature is another one every time.
        """
        x509 = modules()[0]
        now = now or datetime.now(UTC)
        good = {(device.agent, device.public) for device in devices if device.revoked is None}
        live = [one for one in self._book().issued if one.expires > now.timestamp()]
        serials = {int(one.serial, 16) for one in live if (one.name, one.public) not in good}
        authority, key = signer_of(self._files, now)
        path = self._files / REVOKED
        if path.is_file():
            known = x509.load_pem_x509_crl(path.read_bytes())
            fits = known.is_signature_valid(authority.public_key())
            if fits and {one.serial_number for one in known} == serials:
                return str(path.read_text("ascii"))
        # Nobody is let in by a list that is out of date: it lasts as long as the authority.
        builder = x509.CertificateRevocationListBuilder().issuer_name(authority.subject)
        builder = builder.last_update(now - timedelta(days=1)).next_update(authority.not_valid_after_utc)
        for serial in sorted(serials):
            row = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
            builder = builder.add_revoked_certificate(row)
        text: str = builder.sign(key, sha256()).public_bytes(encoding().PEM).decode("ascii")
        return text

    def _book(self) -> _Book:
        try:
            return _Book.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return _Book()
        except (OSError, ValidationError) as error:
            raise SettingsError(
                f"{self._path} cannot be read ({error}): it says which certificates there are. Put it back,"
                " or remove it, make a new authority with broker-config and let all devices join anew"
            ) from error


def own(files: Path, name: str, *, now: datetime | None = None) -> str:
    """Return key and certificate (PEM) of the coordinator itself at the broker, new where they are old."""
    x509, _, ec, serialization = modules()
    now, path = now or datetime.now(UTC), files / OWN
    authority, _ = signer_of(files, now)
    if path.is_file():
        text = path.read_text("ascii")
        known = x509.load_pem_x509_certificate(text.encode())
        left = known.not_valid_after_utc - now
        if left > timedelta(days=OWN_LEFT_DAYS) and known.issuer == authority.subject:
            return text
    key = ec.generate_private_key(ec.SECP256R1())
    made, _ = _signed(files, name, key.public_key(), now, OWN_DAYS)
    secret = key.private_bytes(
        encoding().PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return bytes(secret + made.public_bytes(encoding().PEM)).decode("ascii")


def _signed(files: Path, name: str, public: Any, now: datetime, days: float) -> tuple[Any, Any]:
    x509, usage, *_ = modules()
    authority, key = signer_of(files, now)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    made = (
        begun(subject, authority.subject, public, now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage.CLIENT_AUTH]), critical=False)
        .add_extension(issuer, critical=False)
        .sign(key, sha256())
    )
    return made, key


def _public_of(request: str) -> Any:
    """Return the key that a request is for, once its holder has shown that he has it."""
    x509, _, ec, _ = modules()
    try:
        if len(request) > REQUEST_BYTES:
            raise ValueError(f"{len(request)} bytes are too many")
        found = x509.load_pem_x509_csr(request.encode("ascii"))
        public = found.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
            raise ValueError("its key is not of P-256")
        if not found.is_signature_valid:
            raise ValueError("its signature is wrong")
    except (ValueError, TypeError) as error:  # UnicodeEncodeError is one, too
        raise JoinRefused(f"the request for a certificate cannot be signed: {error}") from error
    return public
