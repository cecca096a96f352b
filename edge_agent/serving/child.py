"""Starts `python -m edge_agent.serving` beside the agent: a process of its own, without torch."""

from __future__ import annotations

import logging
import os
import ssl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from socket import create_server
from time import monotonic, sleep

from edge_agent.serving.pressure import Gauge, Load
from foundation.errors import HedgerowError
from foundation.process import bound_to_parent

logger = logging.getLogger(__name__)

START_S = 20.0


class ServingChild:
    """The serving process of one agent; started once, it follows `artifacts/current` by itself.

    `options` are more of `hedgerow serve`'s.
    """

    def __init__(self, host: str, port: int, artifacts: Path, options: Sequence[str] = ()) -> None:
        self._host, self._port, self._artifacts = host, port, artifacts
        self._options = list(options)
        self._scheme = "https" if any(one.startswith("--tls-cert") for one in options) else "http"
        self._process: subprocess.Popen[bytes] | None = None
        self._gauge: Gauge | None = None
        self._answers = False

    @property
    def address(self) -> str | None:
        """Where it answers, once it does and while it runs."""
        if not self._answers or self._process is None or self._process.poll() is not None:
            return None
        return f"{self._scheme}://{self._host}:{self._port}"

    @property
    def died(self) -> bool:
        """Whether it was started and has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def load(self) -> Load | None:
        """Return how long answers take at present, while it runs."""
        return self._gauge.load() if self._gauge is not None else None

    def start(self) -> str:
        """Start it if it does not run; returns its address, raises `HedgerowError` if it does not answer."""
        if self.address:
            return self.address
        self._answers = False
        if self._port == 0:
            with create_server((self._host, 0)) as probe:
                self._port = probe.getsockname()[1]
        log = self._artifacts.parent / "serving.log"
        command = [sys.executable, "-m", "edge_agent.serving", str(self._artifacts)]
        command += ["--host", self._host, "--port", str(self._port), *self._options]
        reading, writing = os.pipe()
        command += ["--report", str(writing)]
        self._gauge = Gauge(reading)
        try:
            with log.open("ab") as file:
                self._process = subprocess.Popen(
                    bound_to_parent(command), stdout=file, stderr=file, pass_fds=(writing,)
                )
        finally:
            os.close(writing)
        deadline = monotonic() + START_S
        while monotonic() < deadline and self._process.poll() is None:
            if self._ready():
                self._answers = True
                logger.info("serving", extra={"address": self.address})
                return f"{self._scheme}://{self._host}:{self._port}"
            sleep(0.05)
        self.stop()
        last = (log.read_text("utf-8", "replace").splitlines() or ["it said nothing"])[-1]
        raise HedgerowError(f"serving did not start: {last[:300]}; its log is {log}")

    def _ready(self) -> bool:
        import urllib.error  # with what it brings, a megabyte of an agent that serves nothing
        import urllib.request

        try:
            url = f"{self._scheme}://{self._host}:{self._port}/v2/health/ready"
            with urllib.request.urlopen(url, timeout=1, context=_own()) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False  # not listening yet: asked again until the deadline

    def stop(self) -> None:
        """Stop it, kindly, then firmly."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._gauge is not None:
            self._gauge.join(1)


def _own() -> ssl.SSLContext:
    """Return a context that does not ask who answers: it is the child, and all it is asked is whether."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
