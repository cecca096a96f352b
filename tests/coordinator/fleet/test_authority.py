"""The broker's certificates."""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from coordinator.fleet.authority import certified, pin_of
from foundation.errors import SettingsError

pytest.importorskip("cryptography")


def shaken(folder: Path, trusted: Path, name: str) -> str:
    """Shake hands as a broker with these files and a client that trusts `trusted`; the outcome in words."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.pem", folder / "server.key")
    client = ssl.create_default_context(cafile=str(trusted))
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    here, there = socket.socketpair()
    outcome = []

    def serve() -> None:
        try:
            with server.wrap_socket(there, server_side=True) as link:
                link.recv(1)
        except (ssl.SSLError, ConnectionError) as error:
            outcome.append(type(error).__name__)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(here, server_hostname=name) as link:
            link.send(b"x")
            return "good"
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    finally:
        here.close()
        thread.join()


def test_a_client_that_trusts_the_authority_is_let_to_the_brokers_names_and_no_other(tmp_path: Path) -> None:
    made = certified(tmp_path, ["broker.local", "192.168.1.10"])
    assert shaken(tmp_path, made.authority, "broker.local") == "good"
    assert shaken(tmp_path, made.authority, "192.168.1.10") == "good"
    assert "mismatch" in shaken(tmp_path, made.authority, "elsewhere.local")
    assert shaken(tmp_path, made.certificate, "broker.local") == "good", "as a joining device pins it"
    other = certified(tmp_path / "other", ["broker.local"])
    assert "unable to get" in shaken(tmp_path, other.authority, "broker.local")


def test_files_stay_until_names_change_or_the_end_is_near(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    first = certified(tmp_path, ["a"], now=now)
    assert pin_of(tmp_path) == first.pin
    assert first.pin == hashlib.sha256(ssl.PEM_cert_to_DER_cert(first.certificate.read_text())).digest()
    assert certified(tmp_path, ["a"], now=now + timedelta(days=300)).pin == first.pin
    authority = first.authority.read_bytes()
    assert certified(tmp_path, ["a", "b"], now=now).pin != first.pin
    assert certified(tmp_path, ["a", "b"], now=now + timedelta(days=380)).pin != first.pin
    assert first.authority.read_bytes() == authority, "devices that joined go on trusting the broker"


def test_keys_are_not_for_everybody_and_broken_files_are_named(tmp_path: Path) -> None:
    made = certified(tmp_path, ["a"])
    assert (tmp_path / "authority.key").stat().st_mode & 0o777 == 0o600
    assert made.key.stat().st_mode & 0o007 == 0
    made.certificate.write_text("nothing")
    with pytest.raises(SettingsError, match=r"server\.pem"):
        certified(tmp_path, ["a"])
    assert pin_of(tmp_path / "nowhere") is None
    with pytest.raises(SettingsError, match="--host"):
        certified(tmp_path, [])
