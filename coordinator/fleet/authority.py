"""A certificate authority for one broker: its own key, and a certificate for the broker's names.

ECDSA on P-256, which brokers and small devices have long had. The authority lives ten years, the broker's
certificate `DAYS`; writing the broker's files again makes a new one when a month or less is left.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from foundation.durable import SECRET, write_whole
from foundation.errors import SettingsError

AUTHORITY, AUTHORITY_KEY = "authority.pem", "authority.key"
SERVER, SERVER_KEY = "server.pem", "server.key"
DAYS, AUTHORITY_DAYS, LEFT_DAYS = 397, 3650, 30


@dataclass(frozen=True, slots=True)
class Certified:
    """Files of a broker's TLS, and the SHA-256 of its certificate."""

    authority: Path
    certificate: Path
    key: Path
    pin: bytes


def certified(folder: Path, hosts: Sequence[str], *, now: datetime | None = None) -> Certified:
    """Return the TLS files of a broker called `hosts` (names or addresses), making what is missing or old."""
    now = now or datetime.now(UTC)
    if not hosts:
        raise SettingsError("a certificate needs the broker's names: --host broker.local --host 192.168.1.10")
    folder.mkdir(parents=True, exist_ok=True)
    authority, key = _authority(folder, now)
    certificate = _known(folder / SERVER)
    if certificate is None or not _good(certificate, hosts, now) or not (folder / SERVER_KEY).exists():
        certificate = _server(folder, hosts, authority, key, now)
    der = certificate.public_bytes(encoding().DER)
    return Certified(folder / AUTHORITY, folder / SERVER, folder / SERVER_KEY, hashlib.sha256(der).digest())


def signer_of(folder: Path, now: datetime) -> tuple[Any, Any]:
    """Return the authority's certificate and its key, made where there is none."""
    return _authority(folder, now)


def pin_of(folder: Path) -> bytes | None:
    """Return the SHA-256 of the broker's certificate in a folder, `None` where there is none."""
    known = _known(folder / SERVER)
    return None if known is None else hashlib.sha256(known.public_bytes(encoding().DER)).digest()


def _authority(folder: Path, now: datetime) -> tuple[Any, Any]:
    x509, _, ec, serialization = modules()
    known = _known(folder / AUTHORITY)
    if known is not None and (folder / AUTHORITY_KEY).exists():
        try:
            key = serialization.load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), None)
        except (OSError, ValueError) as error:
            raise SettingsError(f"{folder / AUTHORITY_KEY} cannot be read: {error}") from error
        return known, key
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Hedgerow fleet authority")])
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = (
        begun(name, name, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, sha256())
    )
    _write_key(folder / AUTHORITY_KEY, key)
    write_whole(folder / AUTHORITY, made.public_bytes(encoding().PEM))
    return made, key


def _server(folder: Path, hosts: Sequence[str], authority: Any, signer: Any, now: datetime) -> Any:
    x509, oid, ec, _ = modules()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, hosts[0][:64])])
    made = (
        begun(name, authority.subject, key.public_key(), now, DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([oid.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(signer, sha256())
    )
    _write_key(
        folder / SERVER_KEY, key, mode=0o640, group=folder.stat().st_gid
    )  # the broker's group reads it
    write_whole(folder / SERVER, made.public_bytes(encoding().PEM))
    return made


def begun(name: Any, issuer: Any, public: Any, now: datetime, days: float) -> Any:
    """Return the beginning of any certificate, good for `days`."""
    x509, *_ = modules()
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # boards without a clock of their own wake up in the past
        .not_valid_after(now + timedelta(days=days))
    )


def _good(certificate: Any, hosts: Sequence[str], now: datetime) -> bool:
    x509, *_ = modules()
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    enough = certificate.not_valid_after_utc - now > timedelta(days=LEFT_DAYS)
    return enough and set(names) == {_alternative(host) for host in hosts}


def _alternative(host: str) -> Any:
    x509, *_ = modules()
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _known(path: Path) -> Any:
    x509, *_ = modules()
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} is not a certificate that can be read: {error}") from error


def _write_key(path: Path, key: Any, *, mode: int = SECRET, group: int | None = None) -> None:
    _, _, _, serialization = modules()
    pem = key.private_bytes(encoding().PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_whole(path, pem, mode=mode, group=group)


def encoding() -> Any:
    """Return how files are written."""
    return modules()[3].Encoding


def sha256() -> Any:
    """Return the hash that is signed."""
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA256()


def modules() -> tuple[Any, Any, Any, Any]:
    """Return x509, names of usages, curves, serialization; `SettingsError` where they are not here."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise SettingsError(
            "certificates need the package `cryptography`: pip install 'hedgerow[coordinator]'"
        ) from error
    return x509, x509.oid.ExtendedKeyUsageOID, ec, serialization
