"""Request bodies within bounds: of one body, of all together, of what it unpacks to, and of time."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from edge_agent.serving.answers import Refused, busy
from foundation.errors import FrameTooLarge, WireError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

LARGEST_BODY_BYTES = 8 << 20
BODY_S = 30.0
"""Seconds that a client has to send its body."""
TOGETHER = 4
"""Largest bodies that may be in memory at once."""

# How zlib is told the container: gzip, or the zlib format that HTTP calls deflate.
_CONTAINERS = {b"gzip": 16 + zlib.MAX_WBITS, b"x-gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}


class Bodies:
    """Reads bodies of at most `most_bytes`, before and after unpacking."""

    def __init__(self, most_bytes: int = LARGEST_BODY_BYTES, seconds: float = BODY_S) -> None:
        self._most, self._seconds = most_bytes, seconds
        self._held = 0

    @asynccontextmanager
    async def read(self, headers: dict[bytes, bytes], receive: Receive) -> AsyncIterator[bytes]:
        """Yield a request's body, unpacked; its bytes count as held until the block ends.

        Raises `FrameTooLarge`, `WireError` for a damaged packing, and `Refused`: 408 for a body that takes
        too long, 415 for another packing, 503 while too many bytes are held, 400 when the client leaves.
        """
        container = _container(headers.get(b"content-encoding", b""))
        claimed = headers.get(b"content-length", b"0")
        if claimed.isdigit() and int(claimed) > self._most:
            raise self._too_large()
        arrived, unpacked = bytearray(), b""
        try:
            try:
                async with asyncio.timeout(self._seconds):
                    while await self._more(arrived, receive):
                        pass
            except TimeoutError as error:
                raise Refused(408, f"the body did not arrive within {self._seconds:g} s") from error
            if container is not None:
                unpacked = unpack(arrived, container, self._most)
                self._hold(len(unpacked))
            yield bytes(arrived) if container is None else unpacked
        finally:
            self._held -= len(arrived) + len(unpacked)

    async def _more(self, arrived: bytearray, receive: Receive) -> bool:
        """Take the next part; returns whether there are more."""
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the client left before its body had arrived")
        part = message.get("body", b"")
        arrived += part
        self._hold(len(part))
        if len(arrived) > self._most:
            raise self._too_large()
        return bool(message.get("more_body", False))

    def _hold(self, more: int) -> None:
        self._held += more
        if self._held > TOGETHER * self._most:
            raise busy("the bodies of other requests fill the memory that is set aside for them")

    def _too_large(self) -> FrameTooLarge:
        return FrameTooLarge(f"a body has at most {self._most} bytes, unpacked too")


def unpack(packed: bytes | bytearray, container: int, most: int) -> bytes:
    """Return what gzip or zlib packed, at most `most` bytes of it; `container` is zlib's `wbits`.

    Never makes more than it may return. Raises `FrameTooLarge`, and `WireError` for data that is damaged,
    cut off, or followed by something else.
    """
    unpacking = zlib.decompressobj(container)
    try:
        body = unpacking.decompress(packed, most + 1)
    except zlib.error as error:
        raise WireError(f"the body is not packed as its Content-Encoding says: {error}") from error
    if len(body) > most:
        raise FrameTooLarge(f"a body has at most {most} bytes, unpacked too")
    if not unpacking.eof:
        raise WireError("the packed body is cut off")
    if unpacking.unused_data:
        raise WireError(f"{len(unpacking.unused_data)} bytes follow the packed body")
    return body


def pack(body: bytes, accepted: bytes) -> tuple[bytes, str | None]:
    """Pack an answer for a client that accepts nothing but gzip or deflate; returns how it was packed.

    Browsers and most libraries accept several ways and gain nothing from packing what is this small; a
    client that names one alone asked for it.
    """
    container = _CONTAINERS.get(accepted.strip().lower())
    if container is None:
        return body, None
    packing = zlib.compressobj(1, zlib.DEFLATED, container)
    return packing.compress(body) + packing.flush(), "deflate" if container == zlib.MAX_WBITS else "gzip"


def _container(encoding: bytes) -> int | None:
    name = encoding.strip().lower()
    if name in (b"", b"identity"):
        return None
    if name not in _CONTAINERS:
        shown = name[:20].decode("latin-1")
        raise Refused(415, f"bodies may be packed with gzip or deflate, not {shown!r}")
    return _CONTAINERS[name]
