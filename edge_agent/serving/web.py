"""The web server below the application: uvicorn without its ticks, and a short way for what is plain.

uvicorn wakes ten times a second to look whether it should end; here the end is waited for. Its parser, h11,
takes a tenth of a millisecond for a request. A request that arrives whole, with nothing in its head that
changes how it is read, is taken apart here instead, in a fifth of that; everything else is left to h11.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import sys
from collections.abc import Callable, MutableMapping
from http import HTTPStatus
from types import FrameType
from typing import Any, NamedTuple

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

LONGEST_HEAD_BYTES = 8192
_REQUEST = re.compile(rb"(GET|POST) (/[!-$&-~]*) HTTP/1\.1")  # no percent sign: those are left to h11
_NAME = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_NOT_PLAIN = frozenset({b"connection", b"expect", b"transfer-encoding", b"upgrade"})
_USUAL = b"connection", b"keep-alive"
"""Holds anyway, and most clients say it."""
_ONCE = frozenset({b"content-length", b"host"})
_STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}

Message = MutableMapping[str, Any]


class Plain(NamedTuple):
    """A request that needs no more than this to be read."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


def plain(data: bytes) -> Plain | None:
    """Take apart what arrived; `None` unless it is one whole plain request and nothing else.

    Whatever could be understood in two ways is not plain: a length that is not said once in digits, a name
    or value with other characters, a folded line, a body that is longer or shorter than its head says.
    """
    end = data.find(b"\r\n\r\n", 0, LONGEST_HEAD_BYTES)
    if end < 0:
        return None
    first, *lines = data[:end].split(b"\r\n")
    request = _REQUEST.fullmatch(first)
    headers = [_header(line) for line in lines]
    names = [header[0] for header in headers if header is not None]
    told = {name: value for name, value in filter(None, headers) if name in _ONCE}
    length = told.get(b"content-length", b"0")
    if (
        request is None
        or len(names) != len(headers)
        or sum(name in _ONCE for name in names) != len(told)
        or b"host" not in told
        or not (length.isdigit() and len(length) < 16 and int(length) == len(data) - end - 4)
    ):
        return None
    path, _, query = request[2].partition(b"?")
    found = [header for header in headers if header is not None]
    return Plain(request[1].decode(), path.decode(), query, found, data[end + 4 :])


def _header(line: bytes) -> tuple[bytes, bytes] | None:
    name, colon, value = line.partition(b":")
    if not colon or _NAME.fullmatch(name) is None or _VALUE.fullmatch(value) is None:
        return None
    name, value = name.lower(), value.strip(b" \t")
    if name in _NOT_PLAIN and (name, value.lower()) != _USUAL:
        return None
    return name, value


class Server(uvicorn.Server):
    """Says where it answers, once it does; calls `leaving` once it is told to end."""

    def __init__(self, config: uvicorn.Config, leaving: Callable[[], None]) -> None:
        super().__init__(config)
        self._leaving = leaving
        self._told: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as usual, then print one line with the address."""
        await super().startup(sockets)
        scheme = "https" if self.config.is_ssl else "http"
        for bound in sockets or []:
            host, port = bound.getsockname()[:2]
            sys.stdout.write(f"serving {scheme}://{f'[{host}]' if ':' in host else host}:{port}\n")
        sys.stdout.flush()

    async def main_loop(self) -> None:
        """Wait until it is told to end; nothing is done in between."""
        self._told = asyncio.get_running_loop(), asyncio.Event()
        await self.on_tick(0)  # sets the headers of all answers, of which there are none
        while not self.should_exit:
            await self._told[1].wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End: what is being answered is answered, health says 503."""
        self._leaving()
        super().handle_exit(sig, frame)
        if self._told is not None:
            loop, event = self._told
            loop.call_soon_threadsafe(event.set)  # a signal does not wake the loop by itself


class Protocol(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, and plain requests the short way.

    The application has to answer with a `content-length` and one piece of body, as ours does.
    """

    _busy = False
    """A plain request is being answered; what comes meanwhile waits."""
    _ends = False
    _waiting = b""

    def data_received(self, data: bytes) -> None:
        """Answer a plain request, or leave what arrived to h11."""
        if self._busy:
            self._waiting += data
            self.flow.pause_reading()
            return
        asked = plain(data) if self._idle() else None
        if asked is None:
            super().data_received(data)
            return
        self._unset_keepalive_if_required()
        self._busy = True
        task = self.loop.create_task(self._answer(asked))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def shutdown(self) -> None:
        """End the connection, after the request in hand."""
        if self._busy:
            self._ends = True
        else:
            super().shutdown()

    def _idle(self) -> bool:
        """Whether nothing is under way, and there is room; where there is none, uvicorn refuses."""
        most = self.limit_concurrency
        return (
            (self.cycle is None or self.cycle.response_complete)
            and self.conn.our_state is h11.IDLE
            and self.conn.their_state is h11.IDLE
            and not self.conn.trailing_data[0]
            and (most is None or (len(self.connections) < most and len(self.tasks) < most))
        )

    async def _answer(self, asked: Plain) -> None:
        try:
            await self.app(self._scope(asked), _Once(asked.body), self._send)
        except Exception:
            logger.exception("a request failed")
            self.transport.close()
        self._busy = False
        self.server_state.total_requests += 1
        if self._ends:
            super().shutdown()
        if self.transport.is_closing():
            return
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )
        if self._waiting:
            waiting, self._waiting = self._waiting, b""
            self.flow.resume_reading()
            self.data_received(waiting)

    def _scope(self, asked: Plain) -> Message:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "method": asked.method,
            "root_path": "",
            "path": asked.path,
            "raw_path": asked.path.encode(),
            "query_string": asked.query,
            "headers": asked.headers,
        }

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            lines = [b"%s: %s\r\n" % header for header in message["headers"]]
            self._head = b"".join([_STATUS[message["status"]], *lines, b"\r\n"])
        elif not self.transport.is_closing():
            self.transport.write(self._head + message["body"])


class _Once:
    """What an application receives: the whole body, and then that nobody is there any more."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": body, "more_body": False}
