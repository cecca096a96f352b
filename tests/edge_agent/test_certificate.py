"""A device's client certificate: asked for again before it expires, kept whole, never another key's."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from coordinator.fleet.certificates import Certificates
from coordinator.fleet.records import Device
from edge_agent.certificate import KEY, PEM, Renewal, keep, request_of, validity
from foundation.errors import JoinRefused
from foundation.joining import CertificateAsked, CertificateGiven, Request, read_request, vouched
from foundation.topics import Topics
from foundation.transport import MemoryBroker, MemoryTransport

pytest.importorskip("cryptography")
pytestmark = pytest.mark.anyio
NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
TOPICS = Topics("green")
D0 = Device("d0", "aa" * 32, "salt", 0.0, None, "")


@pytest.fixture
def authority(tmp_path: Path) -> Certificates:
    (tmp_path / "broker").mkdir()
    return Certificates(tmp_path / "broker", tmp_path, days=90)


@pytest.fixture
def vault(tmp_path: Path, authority: Certificates) -> Path:
    folder = tmp_path / "vault"
    folder.mkdir()
    keep(folder, authority.issue(request_of(folder, "d0"), D0, now=NOW))
    return folder


def test_the_key_is_made_once_and_the_certificate_is_beside_it(vault: Path, authority: Certificates) -> None:
    key, before = (vault / KEY).read_bytes(), (vault / PEM).read_bytes()
    assert before.startswith(key)
    assert (vault / PEM).stat().st_mode & 0o077 == 0
    request = request_of(vault, "d0")
    keep(vault, authority.issue(request, D0, now=NOW))
    assert (vault / KEY).read_bytes() == key
    assert (vault / PEM).read_bytes() != before
    (vault / "device.csr").unlink()  # killed between the two
    keep(vault, authority.issue(request_of(vault, "d0"), D0, now=NOW))
    assert (vault / KEY).read_bytes() == key


def test_a_certificate_of_another_key_is_not_kept(
    vault: Path, authority: Certificates, tmp_path: Path
) -> None:
    before = (vault / PEM).read_bytes()
    (tmp_path / "other").mkdir()
    foreign = authority.issue(request_of(tmp_path / "other", "d0"), D0, now=NOW)
    for wrong in (foreign, foreign.model_copy(update={"pem": "no certificate"})):
        with pytest.raises(JoinRefused, match="none for this device's key"):
            keep(vault, wrong)
    assert (vault / PEM).read_bytes() == before
    assert sorted(p.name for p in vault.iterdir()) == [
        "device.csr",
        "device.json",
        "device.key",
        "device.pem",
    ]


@pytest.mark.parametrize(("days", "renewed"), [(0, False), (59, False), (61, True), (100, True)])
async def test_with_a_third_left_it_asks_and_keeps_asking(
    vault: Path, authority: Certificates, days: float, renewed: bool
) -> None:
    broker = MemoryBroker()
    now = NOW.timestamp() + days * 86_400
    before, asked = (vault / PEM).read_bytes(), asyncio.Event()
    async with MemoryTransport(broker) as device, MemoryTransport(broker) as coordinator:
        letters = await coordinator.subscribe(TOPICS.every("renew"))

        async def answer() -> None:
            first = True
            async for letter in letters:
                asked.set()
                request = CertificateAsked.model_validate_json(letter.body).request
                given = CertificateGiven(refused="the disk is full")
                if not first:
                    given = CertificateGiven(
                        certificate=authority.issue(request, D0, now=datetime.fromtimestamp(now, UTC))
                    )
                first = False
                await coordinator.publish(TOPICS.of("d0", "certificate"), given.model_dump_json().encode())

        life = asyncio.create_task(Renewal(vault, "d0", TOPICS, device, clock=lambda: now).run())
        answering = asyncio.create_task(answer())
        try:
            if renewed:
                async with asyncio.timeout(20):
                    while (vault / PEM).read_bytes() == before:
                        await asyncio.sleep(0.02)
                    while (found := validity(vault)) is None or found.issued != now:
                        await asyncio.sleep(0.02)
            else:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.3):
                        await asked.wait()
        finally:
            life.cancel()
            answering.cancel()
            await asyncio.gather(life, answering, return_exceptions=True)


async def test_a_device_without_a_certificate_asks_for_none(tmp_path: Path) -> None:
    async with MemoryTransport(MemoryBroker()) as transport:
        await Renewal(tmp_path, "d0", TOPICS, transport).run()


def test_an_earlier_coordinator_understands_a_device_that_wants_no_certificate() -> None:
    secret = bytes(16)
    letter = vouched(Request(name="d0", public="0" * 64), secret)
    assert b"certificate" not in letter
    assert read_request(letter, secret).certificate == ""
