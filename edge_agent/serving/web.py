"""uvicorn without its ticks: ten times a second it looks whether it should end; here that is waited for."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn


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
