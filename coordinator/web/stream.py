"""Server-sent events: what happened, resumable by id, and the picture about once a second while it changes.

A message without a name is an event of the store; its id is what `Last-Event-ID` asks to go on after. A
message named `status` is a Status whose `agents` are those that changed since the one before; it has no id.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, HTTPException, Query
from sse_starlette import EventSourceResponse, ServerSentEvent

from coordinator.live import Event, Listener, Live
from coordinator.web.api import problems

STATUS_EVERY_S = 1.0
HEARTBEAT_S = 15
RETRY_MS = 2000
GRACE_S = 1.0
"""How long a stream may take to end by itself when the server stops."""


def routes(live: Live, *, status_every_s: float = STATUS_EVERY_S) -> APIRouter:
    """Return the route of the stream."""
    router = APIRouter()

    @router.get(
        "/api/v1/events",
        tags=["live"],
        response_class=EventSourceResponse,
        responses={
            200: {"content": {"text/event-stream": {}}, "description": "A stream that does not end."},
            **problems(400, 422),
        },
    )
    async def events(
        last_event_id: Annotated[str | None, Header()] = None,
        after: Annotated[str | None, Query(description="As the header Last-Event-ID.")] = None,
    ) -> EventSourceResponse:
        """Follow what happens; reconnect with the last id to miss nothing."""
        listener = live.listen(_id(last_event_id or after))
        # Named here, as a listener hears from its first moment on, not from the first byte that is sent.
        closing = anyio.Event()
        return EventSourceResponse(
            follow(live, listener, status_every_s, closing),
            ping=HEARTBEAT_S,
            shutdown_event=closing,
            shutdown_grace_period=GRACE_S,
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    return router


async def follow(
    live: Live, listener: Listener, status_every_s: float, closing: anyio.Event
) -> AsyncIterator[ServerSentEvent]:
    """Yield events as they come and, at most every `status_every_s`, what changed in the picture.

    Ends with the listener, or when `closing` is set.
    """
    clock = asyncio.get_running_loop().time
    incoming = aiter(listener)
    waiting = asyncio.ensure_future(anext(incoming, None))
    end = asyncio.ensure_future(closing.wait())
    version, due = -1, clock()
    try:
        while not closing.is_set():
            timeout = max(0.0, due - clock())
            await asyncio.wait({waiting, end}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                event = waiting.result()
                if event is None:
                    return
                yield _sent(event)
                waiting = asyncio.ensure_future(anext(incoming, None))
            if clock() >= due:
                due = clock() + status_every_s
                if live.version != version:
                    status = live.snapshot(since=version)
                    version = status.version
                    yield ServerSentEvent(status.model_dump_json(), event="status", retry=RETRY_MS)
    finally:
        listener.close()
        waiting.cancel()
        end.cancel()


def _sent(event: Event) -> ServerSentEvent:
    return ServerSentEvent(event.model_dump_json(), id=None if event.id is None else str(event.id))


def _id(text: str | None) -> int | None:
    if text is None or text == "":
        return None
    if not text.isdecimal() or len(text) > 18:
        raise HTTPException(400, f"{text[:40]!r} is not the id of an event")
    return int(text)
