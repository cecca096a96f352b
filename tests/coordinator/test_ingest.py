"""Ingest workers: parts that come to several, frames put together once, and what becomes of refused ones."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.fleet.records import FleetRecords
from coordinator.fleet.secret import FleetSecret
from coordinator.ingest.check import checked
from coordinator.ingest.seals import DrawnSealer, with_seals
from coordinator.ingest.worker import Worker, gaps_of
from coordinator.settings import CoordinatorSettings, EnrolmentSettings
from coordinator.store.place import StoreSettings
from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
from foundation.errors import DeliveryFailed, SettingsError, StoreError, WireError
from foundation.joining import public_of
from foundation.seal import Opener, Sealer, SealKeys
from foundation.sealed import SealedTransport
from foundation.transfer import Courier, Part, parts_of, span_of
from foundation.transport import MemoryBroker, MemoryTransport, Transport
from tests.fleet import TOPICS, fleet, memory, run_settings

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest) -> StoreSettings:
    if request.param == "sqlite":
        return StoreSettings()
    return StoreSettings(database=request.getfixturevalue("database"))


@pytest.fixture
def store(tmp_path: Path, place: StoreSettings) -> Iterator[Store]:
    with Store.open(tmp_path / "store", place=place, clock=lambda: NOON) as store:
        yield store


def parts(frame: bytes, size: int = 100, attempt: int = 1) -> list[Part]:
    digest, count = hashlib.sha256(frame).digest(), parts_of(len(frame), size)
    spans = [span_of(i, count, len(frame)) for i in range(count)]
    return [Part(digest, attempt, i, count, len(frame), frame[s.start : s.stop]) for i, s in enumerate(spans)]


def sha(frame: bytes) -> str:
    return hashlib.sha256(frame).hexdigest()


def test_parts_are_kept_once_and_make_the_frame(store: Store) -> None:
    frame = bytes(range(256)) * 4
    several = parts(frame)
    for part in [*several[5:], *several[:4], several[0], *several[2:7]]:
        standing = store.take_part("a", part, 10)
    assert standing.numbers == (0, 1, 2, 3, *range(5, 11)) or standing.numbers == tuple(range(11))
    assert not standing.kept
    store.take_part("a", several[4], 10)
    found = store.assembled("a", sha(frame))
    assert found is not None
    assert found[0] == frame
    assert store.take_part("b", several[0], 10).numbers == (0,), "another device's are its own"


def test_a_frame_arrives_once_and_goes_when_it_was_taken(store: Store) -> None:
    frame = b"frame" * 100
    for part in parts(frame):
        store.take_part("a", part, 161)
    assert store.arrive("a", frame, sha(frame), 805, worker="w0")
    assert not store.arrive("a", frame, sha(frame), 805, worker="w1")
    assert store.assembled("a", sha(frame)) is None
    assert store.take_part("a", parts(frame)[0], 161).kept, "sent again after a lost receipt"
    (one,) = store.arrivals(10)
    assert (one.agent, one.digest, one.wire_bytes, one.worker) == ("a", sha(frame), 805, "w0")
    assert store.sweep() == 0, "what waits for the coordinator is named"
    store.open_run(RunRecord("r", "fedavg", "{}", "{}", 3, 7))
    store.open_round("r", 1, ["a"], 0)
    assert store.add_update("r", 1, "a", store.arrived_frame(one.digest), {})
    store.drop_arrival("a", one.digest)
    assert store.arrivals(10) == []
    assert store.update_frame("r", 1, "a") == frame, "the update has the bytes now"
    assert store.take_part("a", parts(frame)[0], 161).kept
    store.arrive("b", b"unwanted", sha(b"unwanted"), 8, worker="w0", refused="why")
    assert not store.take_part("b", parts(b"unwanted")[0], 8).kept, "it may be offered again"
    store.drop_arrival("b", sha(b"unwanted"))
    assert sha(b"unwanted") not in {*store._blobs.all()}


def test_workers_that_bring_the_last_parts_at_once_see_that_all_are_there(
    tmp_path: Path, place: StoreSettings
) -> None:
    frames = [random.Random(i).randbytes(900) for i in range(8)]
    with (
        Store.open(tmp_path, place=place) as one,
        Store.open(tmp_path, place=place, sweep=False) as two,
        ThreadPoolExecutor(8) as pool,
    ):
        for frame in frames:
            turns = [((one, two)[i % 2], part) for i, part in enumerate(parts(frame))]
            seen = pool.map(lambda turn: len(turn[0].take_part("a", turn[1], 1).numbers), turns)
            assert max(seen) == 9
            found = one.assembled("a", sha(frame))
            assert found == (frame, 9)
            made = pool.map(lambda s: s.arrive("a", frame, sha(frame), 9, worker="w"), [one, two] * 2)  # noqa: B023
            assert sum(made) == 1


def test_unfinished_frames_of_a_device_are_bounded_and_forgotten(store: Store) -> None:
    frames = [bytes([i]) * 300 for i in range(6)]
    for frame in frames:
        store.take_part("a", parts(frame)[0], 1)
    with store.transaction() as connection:
        count = connection.exec_driver_sql("SELECT count(*) FROM transfers").scalar()
        assert count == connection.exec_driver_sql("SELECT count(*) FROM parts").scalar() == 4
    assert store.forget_silent(NOON) == 0
    assert store.forget_silent(NOON + 1) == 4
    other = parts(frames[0], size=60)
    store.take_part("a", parts(frames[0])[0], 1)
    assert store.take_part("a", other[1], 1).numbers == (1,), "in other pieces it begins anew"


@given(st.sets(st.integers(0, 30)), st.integers(0, 31))
def test_gaps_are_what_is_missing(there: set[int], upto: int) -> None:
    numbers = tuple(sorted(n for n in there if n < upto))
    gaps, told = gaps_of(numbers, upto)
    assert told == upto
    assert {i for a, b in gaps for i in range(a, b)} == {*range(upto)} - {*numbers}


def test_many_gaps_are_told_from_the_first_on() -> None:
    gaps, upto = gaps_of(tuple(range(1, 400, 2)), 400)
    assert len(gaps) == 64
    assert {i for a, b in gaps for i in range(a, b)} == {*range(0, upto, 2)}


@given(st.binary(max_size=400))
def test_any_bytes_are_a_named_refusal(frame: bytes) -> None:
    with pytest.raises(WireError):
        checked(None, "a", frame)  # type: ignore[arg-type] - it does not come as far as the store


def test_receipts_of_workers_are_one_sequence(store: Store, tmp_path: Path, place: StoreSettings) -> None:
    key, topic, opener = bytes(32), TOPICS.of("a", "receipt"), Opener()
    with Store.open(tmp_path / "store", place=place, sweep=False) as other:
        sealers = [DrawnSealer(store), DrawnSealer(other)]
        with pytest.raises(StoreError, match="has not begun its seals"):
            sealers[0].seal(topic, b"x", key)
        for epoch in (2**40, 2**40 + 5):
            store.begin_seals(epoch)
            for i in range(6):
                letter = sealers[i % 2].seal(topic, b"%d" % i, key)
                assert opener.open(topic, letter, key) == b"%d" % i


@pytest.mark.anyio
async def test_a_frame_through_two_workers_is_kept_and_confirmed(tmp_path: Path) -> None:
    """And one that is no update is refused with its reason, and kept for the coordinator's quarantine."""
    broker = MemoryBroker()
    with Store.open(tmp_path) as store:
        async with asyncio.TaskGroup() as tasks, MemoryTransport(broker) as t0, MemoryTransport(broker) as t1:
            working = [
                tasks.create_task(Worker("test", transport=t, store=store, name=f"w{i}").serve())
                for i, t in enumerate((t0, t1))
            ]
            async with MemoryTransport(broker) as mine, courier(mine) as sending:
                with pytest.raises(DeliveryFailed, match="a frame starts with") as caught:
                    await sending.send(TOPICS.of("a", "update"), b"no frame" * 100, deadline_s=20)
            assert caught.value.refused
            for task in working:
                task.cancel()
        (one,) = store.arrivals(10)
        assert one.refused == str(caught.value)
        assert store.arrived_frame(one.digest) == b"no frame" * 100


def courier(transport: Transport) -> Courier:
    async def nothing(topic: str, frame: bytes, wire_bytes: int) -> None:
        raise AssertionError("nobody sends here")

    return Courier(
        transport,
        frames=TOPICS.of("a", "assignment"),
        receipts=TOPICS.of("a", "receipt"),
        receipt_topic=lambda topic: TOPICS.of("a", "received"),
        handle=nothing,
        part_bytes=200,
        resend_s=0.3,
    )


@dataclass
class Keys:
    """A device's keyring."""

    keys: SealKeys

    def key_to_write(self, topic: str) -> bytes | None:
        return self.keys.of(topic)

    def key_to_read(self, topic: str) -> bytes | None:
        return self.keys.of(topic)


@pytest.mark.anyio
async def test_letters_of_a_device_that_joined_are_opened_and_receipts_sealed(tmp_path: Path) -> None:
    """Through two workers, whose receipts the device takes for one coordinator's; others' letters are not."""
    settings = CoordinatorSettings(
        federation="test", folder=tmp_path, workers=True, enrolment=EnrolmentSettings(enabled=True)
    )
    broker, private = MemoryBroker(), b"\x07" * 32
    with Store.open(tmp_path) as store:
        with pytest.raises(SettingsError, match=r"no fleet.key in .*: copy the coordinator's there"):
            with_seals(settings, MemoryTransport(broker), store)
        secret, records = FleetSecret.load(tmp_path, "test"), FleetRecords(store)
        (invite,) = records.invite(1, name="a", replace=False, expires_s=60, who="me")
        records.join(invite.invite, "a", public_of(private).hex())
        store.begin_seals(2**40)
        keys = Keys(secret.shared("a", public_of(private)).seals)
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as open_transports:
            working = []
            for name in ("w0", "w1"):
                transport = with_seals(settings, MemoryTransport(broker), store)
                await open_transports.enter_async_context(transport)
                worker = Worker("test", transport=transport, store=store, name=name)
                working.append(tasks.create_task(worker.serve()))
            device = SealedTransport(MemoryTransport(broker), keys, Sealer(5), Opener())
            async with device, courier(device) as sending:
                with pytest.raises(DeliveryFailed, match="a frame starts with") as caught:
                    await sending.send(TOPICS.of("a", "update"), b"no frame" * 100, deadline_s=20)
            assert caught.value.refused
            assert not device.refused, "every receipt was taken"
            async with MemoryTransport(broker) as stranger, courier(stranger) as sending:
                with pytest.raises(DeliveryFailed, match="not taken within"):
                    await sending.send(TOPICS.of("a", "update"), b"forged" * 100, deadline_s=1)
            for task in working:
                task.cancel()
        assert [one.agent for one in store.arrivals(10)] == ["a"]


@pytest.mark.anyio
async def test_a_run_through_workers_ends_in_the_bits_of_one_without(tmp_path: Path, s3: object) -> None:
    """Rows in SQLite, blobs in a bucket, and a worker that goes while the run is under way."""
    ends = []
    for workers in (0, 2):
        place = StoreSettings(s3=s3) if workers else StoreSettings()  # type: ignore[arg-type]
        more: dict[str, Any] = {"workers": workers, "place": place}
        folder, run = tmp_path / str(workers), run_settings(rounds=2)
        async with fleet(folder, memory(MemoryBroker()), run, **more) as whole:
            if workers:
                while whole.store is None or not whole.store.updates("r", 1):
                    await asyncio.sleep(0.01)
                await whole.cut("w0")
            assert await whole.finished(60) == "finished"
            ends.append(whole.state().to_bytes())
            assert whole.store is not None
            assert [len(whole.store.updates("r", n)) for n in (1, 2)] == [3, 3]
            while whole.store.arrivals(10):
                await asyncio.sleep(0.01)
    assert ends[0] == ends[1]
