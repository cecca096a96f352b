"""Blobs in an S3-compatible store: one object each, named by the SHA-256 of its bytes below a prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from coordinator.store.blobs import checked, checked_name
from coordinator.store.place import S3Settings
from foundation.errors import StoreError

GONE = ("404", "NoSuchKey", "NotFound")
"""What a store says of an object that is not there."""


class S3Blobs:
    """A `BlobStore`. An object is there whole or not at all, and durable once it is acknowledged.

    Credentials come from the environment, as boto3 has it. All verbs may be called from any thread.
    """

    def __init__(self, settings: S3Settings) -> None:
        """Reach the bucket; raises `StoreError` saying what is in the way."""
        self._bucket, self._where = settings.bucket, f"the bucket {settings.bucket!r}"
        self._prefix = f"{settings.prefix.rstrip('/')}/" if settings.prefix else ""
        try:
            import boto3
            from botocore.config import Config
        except ModuleNotFoundError as error:
            raise StoreError(f"{self._where} needs boto3: pip install 'hedgerow[s3]'") from error
        config = Config(
            connect_timeout=10,
            read_timeout=60,
            retries={"mode": "standard", "max_attempts": 5},
            # Only where a store must have them: many that are not Amazon's know no newer checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        with self._told("reached; make it, and give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            self._client: Any = boto3.client(
                "s3", endpoint_url=settings.endpoint, region_name=settings.region, config=config
            )
            self._client.head_bucket(Bucket=self._bucket)

    def put(self, body: bytes) -> str:
        """Write a blob and return its digest; it is durable when this returns. Raises `StoreError`."""
        digest = hashlib.sha256(body).hexdigest()
        if self._length(digest) != len(body) or self._read(digest) != body:
            with self._told(f"given blob {digest} ({len(body)} bytes)"):
                self._client.put_object(Bucket=self._bucket, Key=self._key(digest), Body=body)
        return digest

    def get(self, digest: str) -> bytes:
        """Return a blob's bytes; raises `StoreError` by name when it is missing or damaged."""
        body = self._read(digest)
        if body is None:
            raise StoreError(f"blob {digest} is missing: restore {self._where} from a copy")
        return checked(digest, body)

    def all(self) -> Iterator[str]:
        """Yield every digest that has an object."""
        with self._told("listed"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                for found in page.get("Contents", ()):
                    name = found["Key"].rpartition("/")[2]
                    if found["Key"] == self._prefix + f"{name[:2]}/{name}" and _is_digest(name):
                        yield name

    def discard(self, digests: Collection[str]) -> int:
        """Remove blobs and return how many there were; raises `StoreError`."""
        gone = 0
        for digest in digests:
            there = self._length(digest) is not None
            with self._told(f"rid of blob {digest}"):
                self._client.delete_object(Bucket=self._bucket, Key=self._key(digest))
            gone += there
        return gone

    def sweep(self, referenced: Collection[str]) -> int:
        """Remove every blob not in `referenced`; returns how many went."""
        return self.discard([digest for digest in self.all() if digest not in referenced])

    def _key(self, digest: str) -> str:
        return f"{self._prefix}{checked_name(digest)[:2]}/{digest}"

    def _length(self, digest: str) -> int | None:
        """Return the bytes of an object, `None` where there is none."""
        from botocore.exceptions import ClientError

        key = self._key(digest)
        with self._told(f"asked for blob {digest}"):
            try:
                return int(self._client.head_object(Bucket=self._bucket, Key=key)["ContentLength"])
            except ClientError as error:
                if error.response["Error"]["Code"] in GONE:
                    return None
                raise

    def _read(self, digest: str) -> bytes | None:
        from botocore.exceptions import ClientError

        key = self._key(digest)
        with self._told(f"asked for blob {digest}"):
            try:
                return bytes(self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read())
            except ClientError as error:
                if error.response["Error"]["Code"] in GONE:
                    return None
                raise

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError, OSError) as error:
            raise StoreError(f"{self._where} cannot be {what}: {error}") from error


def _is_digest(name: str) -> bool:
    return len(name) == 64 and not set(name) - set("0123456789abcdef")
