"""The coordinator's API in Python: what it is asked, its pages, its events, its errors.

    from hedgerow.client import Client
    client = Client("https://laptop.lan:8080", token_file=Path("token"))
    for run in client.pages("runs"): ...

The standard library is enough for this, and so the terminal works wherever hedgerow is installed.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from foundation.errors import HedgerowError, SettingsError

ADDRESS = "http://127.0.0.1:8080"
TOKEN = "HEDGEROW_TOKEN"
"""Variable with the API token, where one is asked for."""
TIMEOUT_S = 30.0
SILENT_S = 45.0
"""A stream that says nothing for so long is dead: it has a heartbeat every 15 s."""
_LARGEST_ANSWER = 64 << 20
_LONGEST_LINE = 16 << 20
_AGAIN_S = 2.0

Query: TypeAlias = Mapping[str, str | int | float]

ADVICE = {
    401: "give --token-file, or set HEDGEROW_TOKEN",
    403: "use an operator's token: `hedgerow coordinator token NAME --role operator`",
    429: "wait a little",
    500: "look into the coordinator's log",
}
"""What to do next, where the coordinator's words do not say it."""


class ApiProblem(HedgerowError):  # noqa: N818
    """The coordinator refused, or failed: its problem (RFC 9457), in words."""

    def __init__(self, status: int, detail: str, instance: str = "") -> None:
        advice = ADVICE.get(status)
        super().__init__(f"{detail}: {advice}" if advice else detail)
        self.status, self.detail, self.instance = status, detail, instance

    @property
    def is_refusal(self) -> bool:
        """Whether it was understood and not done: not allowed, or not now."""
        return self.status in (401, 403, 409, 429)

    @property
    def passes(self) -> bool:
        """Whether asking again later may be answered."""
        return self.status == 429 or self.status >= 500


class NoAnswer(HedgerowError):  # noqa: N818
    """The coordinator cannot be reached, or what answers is not one."""


@dataclass(frozen=True, slots=True)
class Event:
    """A message of the stream: something that happened, or (`status`) the picture."""

    name: str
    id: int | None
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Client:
    """Where a coordinator's API is, and how it is asked; safe to share, as it keeps nothing open."""

    address: str = ADDRESS
    token_file: Path | None = None
    cacert: Path | None = None
    """PEM of the authority that vouches for it; the system's otherwise."""
    token: str | None = None
    """Instead of `token_file` or the variable HEDGEROW_TOKEN."""

    def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Query | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> Any:
        """Return what a GET, or with `body` a POST, is answered; `timeout_s` bounds each silence.

        Raises `SettingsError` for an address, token or authority that cannot be used, `ApiProblem` with the
        coordinator's words, `NoAnswer` where it does not answer.
        """
        try:
            with self._open(path, body, query, timeout_s) as answer:
                return _read(answer.read(_LARGEST_ANSWER))
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._silent(error) from error

    def pages(self, path: str, query: Query | None = None) -> Iterator[dict[str, Any]]:
        """Yield every item of a list, page after page; raises as `ask`."""
        asked = dict(query or {})
        while True:
            page = self.ask(path, query=asked)
            try:
                yield from page["items"]
                following = page["next"]
            except (KeyError, TypeError) as error:
                raise NoAnswer(f"{self.address} answered {path} with no page of a list") from error
            if following is None:
                return
            if following == asked.get("after"):
                raise NoAnswer(f"{self.address} answers {path} with the same page again")
            asked["after"] = following

    def events(
        self, after: int | None = None, *, wait: Callable[[float], None] = time.sleep
    ) -> Iterator[Event]:
        """Yield events without end; a lost stream is taken up again after the last id.

        Raises as `ask` for the first connection. Later a coordinator that is away, busy or failing is asked
        again, and only `ApiProblem` for what asking again does not change is raised; `wait` takes seconds.
        """
        last, connected = after, False
        while True:
            try:
                with self._open("events", None, {} if last is None else {"after": last}, SILENT_S) as answer:
                    connected = True
                    for event in read_events(_lines(answer)):
                        last = last if event.id is None else event.id
                        yield event
            except ApiProblem as problem:
                if not connected or not problem.passes:
                    raise
            except (NoAnswer, OSError, ValueError, http.client.HTTPException) as error:
                if not connected:
                    raise self._silent(error) from error
            wait(_AGAIN_S)

    def _open(self, path: str, body: Mapping[str, Any] | None, query: Query | None, timeout_s: float) -> Any:
        if not self.address.startswith(("http://", "https://")):
            raise SettingsError(f"{self.address} is no address of a coordinator: give one like {ADDRESS}")
        url = f"{self.address.rstrip('/')}/api/v1/{path}"
        if query:
            url += ("&" if "?" in path else "?") + urllib.parse.urlencode(query)
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **self._headers()})
        try:
            return _opener(self._context()).open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise _problem(error) from error

    def _silent(self, error: Exception) -> HedgerowError:
        if isinstance(error, NoAnswer):
            return error
        return NoAnswer(
            f"the coordinator at {self.address} does not answer ({error}): is it running there, with"
            " http.enabled? --coordinator names another address"
        )

    def _headers(self) -> dict[str, str]:
        token = self.token or os.environ.get(TOKEN, "")
        if self.token is None and self.token_file is not None:
            try:
                token = self.token_file.read_text("ascii").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"the token in {self.token_file} cannot be read: {error}") from error
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _context(self) -> ssl.SSLContext | None:
        if not self.address.startswith("https://"):
            return None
        try:
            return ssl.create_default_context(cafile=self.cacert)
        except OSError as error:
            raise SettingsError(f"the authority in {self.cacert} cannot be used: {error}") from error


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the token would go along, and a change would come out as a question."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        fp.close()
        there = newurl.partition("/api/v1/")[0]
        raise SettingsError(
            f"{req.full_url.partition('/api/v1/')[0]} sends elsewhere, to {there[:200]!r}: nothing was sent"
            " there. If you trust it, give --coordinator that address"
        )


def _opener(context: ssl.SSLContext | None) -> urllib.request.OpenerDirector:
    https = [] if context is None else [urllib.request.HTTPSHandler(context=context)]
    return urllib.request.build_opener(_StayHere, *https)


def read_events(lines: Iterable[str]) -> Iterator[Event]:
    """Yield the messages that lines of a stream are; raises `ValueError` for one that is not ours."""
    name, id, data = "message", None, list[str]()
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield Event(name, id, _object("\n".join(data)))
            name, id, data = "message", None, []
        elif field == "event":
            name = value
        elif field == "id":
            id = int(value)
        elif field == "data":
            data.append(value)


def _read(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _object(text: str) -> dict[str, Any]:
    found = _read(text)
    if not isinstance(found, dict):
        raise ValueError("a message of the stream is no object")
    return found


def _lines(answer: Any) -> Iterator[str]:
    while line := answer.readline(_LONGEST_LINE):
        if not line.endswith(b"\n"):
            raise ValueError("the stream was cut off in a line, or has one without end")
        yield line.decode("utf-8").rstrip("\r\n")


def _problem(error: urllib.error.HTTPError) -> ApiProblem:
    """Return what a problem says; its status where it says nothing."""
    try:
        told = _read(error.read(65_536))
        return ApiProblem(error.code, str(told["detail"]), str(told.get("instance", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ApiProblem(error.code, f"the coordinator answered {error.code} {error.reason}")
