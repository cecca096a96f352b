"""`GET /metrics` on loopback, for a Prometheus agent on the device; nothing else is answered here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus

from foundation.errors import SettingsError
from foundation.hosts import names_loopback
from foundation.prometheus import CONTENT_TYPE

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
HEAD_BYTES = 8_192
"""Longest head of a request."""
PATIENCE_S = 5.0
"""For a request to arrive, and for its answer to be taken."""
AT_ONCE = 8
"""Requests at the same time; more are told to come again."""


@asynccontextmanager
async def metrics_on(port: int, text: Callable[[], str]) -> AsyncIterator[int]:
    """Answer with `text()` while this is open; yields the port, which the system chooses for 0.

    Raises `SettingsError` where the port is taken.
    """
    answering = _Answering(text)
    try:
        server = await asyncio.start_server(answering.connected, HOST, port, limit=HEAD_BYTES)
    except OSError as error:
        raise SettingsError(
            f"metrics.port = {port} cannot be opened ({error.strerror}): set it to another, or 0"
        ) from error
    chosen: int = server.sockets[0].getsockname()[1]
    logger.info("metrics", extra={"address": f"http://{HOST}:{chosen}/metrics"})
    async with server:
        yield chosen


class _Answering:
    """Answers connections, one request each."""

    def __init__(self, text: Callable[[], str]) -> None:
        self._text, self._open = text, 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection; one that says nothing, or nonsense, is closed."""
        self._open += 1
        try:
            async with asyncio.timeout(PATIENCE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            logger.debug("no request of metrics: %s", type(error).__name__)
        finally:
            self._open -= 1
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        if self._open > AT_ONCE:
            return _response(HTTPStatus.SERVICE_UNAVAILABLE, "too many at once")
        first, *lines = head.split(b"\r\n")
        words = first.split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response(HTTPStatus.BAD_REQUEST, "no request of HTTP/1.1")
        pairs = (line.partition(b":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if not names_loopback(headers.get(b"host", b"")):
            return _response(HTTPStatus.FORBIDDEN, "call this by 127.0.0.1 or localhost")
        if words[1].partition(b"?")[0] != b"/metrics":
            return _response(HTTPStatus.NOT_FOUND, "only /metrics is here")
        if words[0] != b"GET":
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is answered")
        return _response(HTTPStatus.OK, self._text(), CONTENT_TYPE)


def _response(status: HTTPStatus, text: str, kind: str = "text/plain; charset=utf-8") -> bytes:
    body = text.encode()
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
    ]
    lines += ["X-Content-Type-Options: nosniff", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + body
