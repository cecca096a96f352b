"""Blobs: the same laws in a folder and in an S3-compatible store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coordinator.store.blobs import Blobs, BlobStore
from coordinator.store.place import S3Settings, StoreSettings
from coordinator.store.records import RunRecord
from coordinator.store.s3 import S3Blobs
from coordinator.store.sql import Store
from foundation.errors import StoreError

Spoil = Callable[[str, bytes | None], None]
"""Puts other bytes, or none, where a blob is, behind the back of what keeps it."""


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@pytest.fixture(params=["folder", "s3"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[BlobStore, Spoil]:
    if request.param == "folder":
        blobs = Blobs(tmp_path)

        def spoil(digest: str, body: bytes | None) -> None:
            path = blobs._path(digest)
            path.unlink() if body is None else path.write_bytes(body)

        return blobs, spoil
    settings: S3Settings = request.getfixturevalue("s3")
    remote = S3Blobs(settings)

    def spoil_there(digest: str, body: bytes | None) -> None:
        place = {"Bucket": settings.bucket, "Key": f"fleet/one/{digest[:2]}/{digest}"}
        remote._client.delete_object(**place) if body is None else remote._client.put_object(
            **place, Body=body
        )

    return remote, spoil_there


def test_what_is_put_is_there_once(kept: tuple[BlobStore, Spoil]) -> None:
    blobs, _ = kept
    bodies = [b"", b"one", b"two" * 100_000]
    assert [blobs.put(body) for body in bodies] == [sha(body) for body in bodies]
    assert blobs.put(b"one") == sha(b"one")
    assert sorted(blobs.all()) == sorted(sha(body) for body in bodies)
    assert [blobs.get(sha(body)) for body in bodies] == bodies


def test_what_is_damaged_or_missing_is_named_and_can_be_put_again(kept: tuple[BlobStore, Spoil]) -> None:
    blobs, spoil = kept
    digest = blobs.put(b"state")
    for other in (b"stale", b"st", b""):
        spoil(digest, other)
        with pytest.raises(StoreError, match=f"blob {digest} is damaged"):
            blobs.get(digest)
        assert blobs.put(b"state") == digest
        assert blobs.get(digest) == b"state"
    spoil(digest, None)
    with pytest.raises(StoreError, match=f"blob {digest} is missing"):
        blobs.get(digest)
    assert [*blobs.all()] == []


def test_discarding_and_sweeping_count_what_was_there(kept: tuple[BlobStore, Spoil]) -> None:
    blobs, _ = kept
    a, b, c = (blobs.put(body) for body in (b"a", b"b", b"c"))
    assert blobs.discard([a, sha(b"never")]) == 1
    assert blobs.sweep({b}) == 1
    assert [*blobs.all()] == [b]
    assert blobs.sweep({b, c}) == 0


def test_names_cannot_lead_elsewhere(kept: tuple[BlobStore, Spoil]) -> None:
    for name in ("../../etc/passwd", "", "a" * 63, "A" * 64):
        with pytest.raises(StoreError, match="not the name of a blob"):
            kept[0].get(name)
        with pytest.raises(StoreError, match="not the name of a blob"):
            kept[0].discard([name])


def test_many_threads_put_and_get_at_once(kept: tuple[BlobStore, Spoil]) -> None:
    blobs, _ = kept

    def one(i: int) -> bytes:
        return blobs.get(blobs.put(b"%d" % (i % 5)))

    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(one, range(20))] == [b"%d" % (i % 5) for i in range(20)]


def test_prefixes_keep_stores_in_one_bucket_apart(s3: S3Settings) -> None:
    other = S3Blobs(s3.model_copy(update={"prefix": "fleet/one/more"}))
    mine, bare = S3Blobs(s3), S3Blobs(s3.model_copy(update={"prefix": ""}))
    other.put(b"theirs")
    bare.put(b"bare")
    mine.put(b"mine")
    assert mine.sweep(set()) == 1
    assert bare.sweep(set()) == 1
    assert other.get(sha(b"theirs")) == b"theirs"


def test_a_bucket_that_cannot_be_reached_says_what_to_do(s3: S3Settings) -> None:
    with pytest.raises(StoreError, match=r"'no-such-bucket' cannot be reached; make it, and give AWS_"):
        S3Blobs(s3.model_copy(update={"bucket": "no-such-bucket"}))


def test_a_store_keeps_its_blobs_in_a_bucket_and_commands_find_it(tmp_path: Path, s3: S3Settings) -> None:
    with Store.open(tmp_path, place=StoreSettings(s3=s3)) as store:
        store.open_run(RunRecord("r", "fedavg", "{}", "{}", 3, 7))
        store.save_initial_state("r", b"zero")
        store.open_round("r", 1, ["a"], 0)
        store.add_update("r", 1, "a", b"frame", {})
        S3Blobs(s3).put(b"left by a crash")
        assert store.sweep() == 1
    assert not (tmp_path / "blobs").exists()
    with Store.open_to_read(tmp_path) as store:
        assert store.update_frame("r", 1, "a") == b"frame"
        assert store.latest_state("r") == (0, b"zero")
