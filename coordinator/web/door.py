"""Who may see the page and use the API: tokens with roles, bounds on how often, and who did what.

On loopback everybody who is on this machine may do everything. Elsewhere a token is needed, as
`Authorization: Bearer` or as the cookie that `/login` gives a browser: a `viewer` looks, an `operator` also
changes. Every change is written down with the token's name.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.fleet.records import FleetRecords
from coordinator.fleet.tokens import ApiToken, ApiTokens
from coordinator.web import api
from coordinator.web.asker import LOOKS_ONLY

logger = logging.getLogger(__name__)

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN = ("/static/", "/login", "/healthz")
"""Answered without a token: whether it is alive, and the page that asks for one."""
COOKIE = "hedgerow_token"
FORM_BYTES = 2_048
WRONG = (5, 60.0)
"""So many wrong tokens in so many seconds are looked at, from one address."""
MOST_ADDRESSES = 10_000


class Buckets:
    """How often each address may ask: `most` at once, and that many again in `per_s` seconds."""

    def __init__(self, most: float, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._rate, self._clock = most, most / per_s, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """Take one and return 0, or return the seconds until there is one."""
        now = self._clock()
        left, since = self._left.pop(address, (self._most, now))
        left = min(self._most, left + (now - since) * self._rate)
        wait = 0.0 if left >= 1 else (1 - left) / self._rate
        self._left[address] = (left - 1 if wait == 0 else left, now)
        if len(self._left) > MOST_ADDRESSES:
            self._left.popitem(last=False)
        return wait


class Door:
    """ASGI middleware: lets a request in, or says why not."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        tokens: ApiTokens | None,
        records: FleetRecords | None,
        per_second: float,
        secure: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without `tokens` nobody is asked for one. `records` takes down changes.

        `per_second` bounds the requests of one address; `secure` says that the way here is TLS.
        """
        self._app, self._tokens, self._records, self._secure = app, tokens, records, secure
        self._asked = Buckets(10 * per_second, 10, clock)
        self._wrong = Buckets(*WRONG, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        address = request.client.host if request.client else ""
        if wait := self._asked.wait_s(address):
            await self._told(request, 429, "too many requests from this address", wait)(scope, receive, send)
            return
        if request.url.path == "/login" and self._tokens is not None:
            await (await self._login(request, address))(scope, receive, send)
            return
        LOOKS_ONLY.set(False)  # the server may answer several requests in one context
        who, refused = await self._who(request, address)
        if refused is not None:
            await refused(scope, receive, send)
            return
        await self._noting(scope, receive, send, who, request)

    async def _who(self, request: Request, address: str) -> tuple[str, Response | None]:
        """Return the name of who asks, and the refusal if there is one."""
        if self._tokens is None or request.url.path.startswith(OPEN):
            return "somebody on this machine", None
        given = _given(request.headers)
        token, wait = await self._found(given, address) if given else (None, 0.0)
        if wait:
            return "", self._told(request, 429, "too many wrong tokens from this address", wait)
        if token is None:
            if _is_page(request):
                return "", RedirectResponse("/login", 303)
            detail = (
                "this token is not known, or no longer" if given else "send a token as Authorization: Bearer"
            )
            return "", self._told(request, 401, detail)
        if token.role != "operator" and request.method not in SAFE:
            return "", self._told(
                request, 403, f"{token.name} may look and not change: that takes an operator"
            )
        LOOKS_ONLY.set(token.role != "operator")
        return token.name, None

    async def _found(self, given: str, address: str) -> tuple[ApiToken | None, float]:
        """Return the token, and how long to wait where too many were wrong."""
        assert self._tokens is not None
        token = await asyncio.to_thread(self._tokens.find, given)
        if token is not None:
            return token, 0.0
        return None, self._wrong.wait_s(address)

    async def _login(self, request: Request, address: str) -> Response:
        if request.method != "POST":
            return _page("")
        if not _same_origin(request):
            return self._told(request, 403, "a page from elsewhere may not log in here")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > FORM_BYTES:
                return self._told(request, 413, "a login is shorter than this")
        given = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0].strip()
        token, wait = await self._found(given, address)
        if wait:
            return self._told(request, 429, "too many wrong tokens from this address", wait)
        if token is None:
            return _page("This token is not known, or no longer.", 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, given, httponly=True, samesite="strict", secure=self._secure, path="/")
        return answer

    async def _noting(self, scope: Scope, receive: Receive, send: Send, who: str, request: Request) -> None:
        """Let the request through; what changed something is written down."""
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope["hedgerow.who"] = who
        await self._app(scope, receive, noted)
        if self._records is not None and request.method not in SAFE and status < 400:
            what = f"{request.method} {request.url.path}"[:300]
            await asyncio.to_thread(self._records.note, who, what, "", f"answered {status}")

    @staticmethod
    def _told(request: Request, status: int, detail: str, wait: float = 0.0) -> Response:
        answer = api.problem(status, detail, request)
        if status == 401:
            answer.headers["WWW-Authenticate"] = "Bearer"
        if wait:
            answer.headers["Retry-After"] = str(int(wait) + 1)
        return answer


def _given(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    try:
        found: Any = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""


def _is_page(request: Request) -> bool:
    return request.method == "GET" and "text/html" in request.headers.get("accept", "")


def _same_origin(request: Request) -> bool:
    origin = request.headers.get("origin")
    if origin is None or origin == "null":
        return request.headers.get("sec-fetch-site", "none") in ("same-origin", "none")
    return hmac.compare_digest(origin.partition("://")[2].lower(), request.headers.get("host", "").lower())


def _page(problem: str, status: int = 200) -> HTMLResponse:
    said = f'<p role="alert">{problem}</p>' if problem else ""
    return HTMLResponse(
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Hedgerow: log in</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/static/page.css"></head><body><main><h1>Hedgerow</h1>{said}
<form method="post" action="/login"><p><label>Token<br>
<input type="password" name="token" required autofocus autocomplete="current-password" size="50"></label></p>
<p><button>Log in</button></p></form>
<p>A token comes from <code>hedgerow coordinator token NAME --role viewer</code>, typed where the coordinator
runs.</p></main></body></html>""",
        status,
        {"Cache-Control": "no-store"},
    )
