"""Devices' certificates: who gets one, and which are on the list of those taken back."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from coordinator.fleet.brokers.access import Access, Account, Listener, broker_files
from coordinator.fleet.certificates import ISSUED, MOST, REVOKED, Certificates, own
from coordinator.fleet.records import Device
from edge_agent.certificate import request_of
from foundation.errors import JoinRefused, SettingsError
from foundation.joining import Certificate

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)


def device(name: str, key: str = "aa", revoked: float | None = None) -> Device:
    return Device(name, key * 32, "salt", 0.0, revoked, "")


@pytest.fixture
def made(tmp_path: Path) -> Certificates:
    (tmp_path / "broker").mkdir()
    return Certificates(tmp_path / "broker", tmp_path, days=90)


def on_the_list(text: str) -> set[int]:
    return {one.serial_number for one in x509.load_pem_x509_crl(text.encode())}


def serial(given: Certificate) -> int:
    return x509.load_pem_x509_certificate(given.pem.encode()).serial_number


def test_a_certificate_has_the_devices_name_its_key_and_a_time(made: Certificates, tmp_path: Path) -> None:
    request = request_of(tmp_path, "whatever it calls itself")
    given = made.issue(request, device("pi-garden"), now=NOW)
    found = x509.load_pem_x509_certificate(given.pem.encode())
    assert found.subject.rfc4514_string() == "CN=pi-garden", "as it joined, and not as it asks"
    assert found.public_key() == x509.load_pem_x509_csr(request.encode()).public_key()
    assert found.not_valid_after_utc == NOW + timedelta(days=90)
    assert (given.issued, given.expires) == (NOW.timestamp(), (NOW + timedelta(days=90)).timestamp())
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [one.dotted_string for one in usage] == ["1.3.6.1.5.5.7.3.2"], "a client's, and no server's"
    authority = x509.load_pem_x509_certificate((tmp_path / "broker/authority.pem").read_bytes())
    found.verify_directly_issued_by(authority)


def csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "d0")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def test_what_is_no_request_of_the_keys_holder_is_not_signed(made: Certificates, tmp_path: Path) -> None:
    good = request_of(tmp_path, "d0")
    other = csr(ec.generate_private_key(ec.SECP384R1())).decode()
    long = csr(rsa.generate_private_key(65537, 2048)).decode()
    der = bytearray(x509.load_pem_x509_csr(good.encode()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM).decode()
    for request in ("", "x" * 5_000, "ü", good[:100], other, long, forged):
        with pytest.raises(JoinRefused, match="cannot be signed"):
            made.issue(request, device("d0"), now=NOW)
    assert not (tmp_path / ISSUED).exists()


def test_who_left_is_on_the_list_until_it_would_have_expired(made: Certificates, tmp_path: Path) -> None:
    request = request_of(tmp_path, "d0")
    first, second = (made.issue(request, device("d0"), now=NOW) for _ in range(2))
    other = made.issue(request, device("d1", "bb"), now=NOW)
    both = [device("d0"), device("d1", "bb")]
    text = made.revoked(both, now=NOW)
    assert on_the_list(text) == set()
    (tmp_path / "broker" / REVOKED).write_text(text)
    assert made.revoked(both, now=NOW) == text, "the broker is told of changes only"

    text = made.revoked([device("d0", revoked=1.0), device("d1", "bb")], now=NOW)
    assert on_the_list(text) == {serial(first), serial(second)}
    replaced = made.revoked([device("d0"), device("d1", "cc")], now=NOW)
    assert on_the_list(replaced) == {serial(other)}, "another device took the name"
    assert on_the_list(made.revoked([], now=NOW + timedelta(days=91))) == set()
    crl = x509.load_pem_x509_crl(text.encode())
    assert crl.next_update_utc is not None
    assert crl.next_update_utc > NOW + timedelta(days=3000), "a list out of date would keep everybody out"


def test_one_device_does_not_fill_the_book_and_a_broken_one_is_said(
    made: Certificates, tmp_path: Path
) -> None:
    request = request_of(tmp_path, "d0")
    for _ in range(MOST):
        made.issue(request, device("d0"), now=NOW)
    with pytest.raises(JoinRefused, match="asks too often"):
        made.issue(request, device("d0"), now=NOW)
    later = NOW + timedelta(days=91)
    made.issue(request, device("d0"), now=later)
    assert len(json.loads((tmp_path / ISSUED).read_bytes())["issued"]) == 1, "what has expired is forgotten"
    (tmp_path / ISSUED).write_bytes(b"{")
    with pytest.raises(SettingsError, match="Put it back"):
        made.revoked([], now=NOW)


def test_the_coordinators_own_is_renewed_when_it_is_old(tmp_path: Path) -> None:
    text = own(tmp_path, "coordinator", now=NOW)
    (tmp_path / "coordinator.pem").write_text(text)
    assert own(tmp_path, "coordinator", now=NOW + timedelta(days=300)) == text
    assert own(tmp_path, "coordinator", now=NOW + timedelta(days=380)) != text


def test_mosquitto_asks_for_certificates_and_lets_invitations_in_elsewhere(tmp_path: Path) -> None:
    from coordinator.fleet.authority import certified

    module, tls = broker_files("mosquitto"), certified(tmp_path, ["broker.local"])
    access = Access(
        "green",
        Account("coordinator", "c"),
        [Account("d0", "d")],
        [Account("join-00", "j")],
        certificates=True,
    )
    files = module.users(tmp_path, access)
    assert [line.partition(":")[0] for line in files["passwords"].splitlines()[:2]] == ["coordinator", "d0"]
    assert "join-00" not in files["passwords"]
    assert "d0:" not in files["joining"]
    conf = module.config(tmp_path, Listener(8883, tls, joining_port=8884), access)["mosquitto.conf"]
    before, main, joining = conf.partition("listener 8883")[0], *conf.split("listener 88")[1:]
    assert "per_listener_settings true" in before
    assert "require_certificate true" in main
    assert "crlfile" in main
    assert "/passwords" in main
    assert "require_certificate" not in joining
    assert "/joining" in joining
