"""Asks the serving process of this device over loopback HTTP; asyncio and nothing else.

The agent stays without onnxruntime (some 45 MB) and without an HTTP library: one kept connection, one request
at a time, as the model has one thread. A request is sent again when the process died under it: a prediction
changes nothing, so asking twice is harmless.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from foundation.errors import DataError, HedgerowError

TIMEOUT_S = 10.0
"""For one answer."""
ATTEMPTS = 4
PAUSE_S = 0.1
"""Between two attempts, longer each time: a process that was killed is gone only a moment later."""
LARGEST_ANSWER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Reply:
    """What the serving process answered."""

    status: int
    body: dict[str, Any]


class Loopback:
    """One kept connection to the serving process; `address` starts the process where it does not run."""

    def __init__(self, address: Callable[[], Awaitable[str]], key_file: Path | None = None) -> None:
        """Take what returns the process's address, and raises `HedgerowError` where there is none.

        `key_file` holds the key that the process asks for, if it asks for one. Over TLS its certificate is
        not checked: it is this agent's own child, on this device.
        """
        self._address, self._key_file = address, key_file
        self._line: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._of: str | None = None
        self._turn = asyncio.Lock()

    async def predict(self, inputs: Any) -> dict[str, Any]:
        """Ask for predictions of raw samples; returns the answer of `/predict`.

        Raises `DataError` where the model cannot take them, and `HedgerowError` where nobody answers.
        """
        return _checked(await self._ask("POST", "/predict", json.dumps({"inputs": inputs}).encode()))

    async def model(self) -> dict[str, Any]:
        """Return the manifest of the model that serves; raises `HedgerowError` where nobody answers."""
        return _checked(await self._ask("GET", "/manifest", b""))

    async def close(self) -> None:
        """Hang up, and wait until the line is closed."""
        writer = self._hang_up()
        if writer is not None:
            with suppress(OSError):  # the other side may have died first
                await writer.wait_closed()

    def _hang_up(self) -> asyncio.StreamWriter | None:
        line, self._line = self._line, None
        if line is None:
            return None
        line[1].transport.abort()  # nobody waits for what is not sent yet
        return line[1]

    async def _ask(self, method: str, path: str, body: bytes) -> Reply:
        trouble: Exception = EOFError()
        async with self._turn:
            for attempt in range(ATTEMPTS):
                address = await self._address()
                try:
                    async with asyncio.timeout(TIMEOUT_S):
                        return await self._once(address, method, path, body)
                except TimeoutError:
                    self._hang_up()
                    raise HedgerowError(
                        f"the serving process did not answer within {TIMEOUT_S:g} s"
                    ) from None
                except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
                    self._hang_up()
                    trouble = error
                except asyncio.CancelledError:
                    self._hang_up()  # what comes on this line is no answer to the next question
                    raise
                await asyncio.sleep(PAUSE_S * attempt)
            raise HedgerowError(f"the serving process does not answer: {trouble or type(trouble).__name__}")

    async def _once(self, address: str, method: str, path: str, body: bytes) -> Reply:
        if self._line is None or self._of != address:
            self._hang_up()
            where = urlsplit(address)
            context = _own() if where.scheme == "https" else None
            self._line = await asyncio.open_connection(_reachable(where.hostname), where.port, ssl=context)
            self._of = address
        reader, writer = self._line
        headers = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(body))}
        if self._key_file is not None:
            headers["Authorization"] = f"Bearer {self._key_file.read_text().strip()}"
        lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
        writer.write(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body)
        await writer.drain()
        return await _reply(reader)


async def _reply(reader: asyncio.StreamReader) -> Reply:
    """Read one answer; raises `ValueError` for what is no HTTP with JSON, `EOFError` for an end before it."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    status, length = int(first.partition(" ")[2][:3]), int(headers.get("content-length", ""))
    if not 0 <= length <= LARGEST_ANSWER_BYTES:
        raise ValueError(f"an answer of {length} bytes")
    body = json.loads(await reader.readexactly(length))
    if not isinstance(body, dict):
        raise ValueError("an answer that is no object")
    return Reply(status, body)


def _checked(reply: Reply) -> dict[str, Any]:
    if reply.status == 200:
        return reply.body
    said = str(reply.body.get("error", f"status {reply.status}"))[:1000]
    if 400 <= reply.status < 500:
        raise DataError(said)
    raise HedgerowError(f"the serving process failed: {said}")


def _own() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _reachable(host: str | None) -> str:
    """Return where a server that listens everywhere is reached from this device."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", None: "127.0.0.1"}.get(host, str(host))
