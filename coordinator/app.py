"""The coordinator's web application: page, API and event stream over store, live picture and engine."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Sequence

from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.fleet.desk import Desk
from coordinator.fleet.records import FleetRecords
from coordinator.fleet.tokens import ApiTokens
from coordinator.live import Live
from coordinator.rollout.steward import Steward
from coordinator.store.sql import Store
from coordinator.web import api, described, exports, fleet, metrics, rollout, stream
from coordinator.web.door import Door
from coordinator.web.models import Control
from coordinator.web.pages import site
from coordinator.web.pages.shell import HERE as WEB
from foundation.settings import Row

# Everything comes from here. Plotly writes styles into the elements that it makes, hence the one exception.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:;"
    " connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
OWN = frozenset({"same-origin", "none"})


def create_app(
    store: Store,
    live: Live,
    control: Control,
    *,
    models: Steward | None = None,
    desk: Desk | None = None,
    maker: exports.Exports | None = None,
    settings: Sequence[Row] = (),
    hosts: Sequence[str] = (),
    tokens: ApiTokens | None = None,
    records: FleetRecords | None = None,
    per_second: float = 50.0,
    secure: bool = False,
    clock: Callable[[], float] = time.time,
    status_every_s: float = stream.STATUS_EVERY_S,
) -> FastAPI:
    """Return the application. It opens and closes nothing: store, live and engine belong to the caller.

    Without `tokens` nobody is asked who they are: bind it to loopback then. `records` takes down changes.
    `models` answers for devices' models, `desk` invites devices and shuts them out, `maker` makes models as
    files; without them there are no addresses for that. `settings` are shown on the page of that name.
    `hosts`, when given, are the only names that requests may call this machine by, which keeps a foreign page
    from reaching it through a name of its own. `per_second` bounds one address, `secure` says that it is TLS.
    """
    app = FastAPI(
        title="Hedgerow coordinator",
        version=importlib.metadata.version("hedgerow") if _is_installed() else "0",
        openapi_url=f"{api.PREFIX}/openapi.json",
        docs_url=None,  # both would load their scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(Door, tokens=tokens, records=records, per_second=per_second, secure=secure)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(Guard)
    api.install_problems(app)
    routers = [api.routes(store, live, control, clock)]
    if models is not None:
        routers.append(rollout.routes(store, models))
    if desk is not None:
        routers.append(fleet.routes(desk))
    if maker is not None:
        routers.append(exports.routes(store, maker))
    for router in (
        *routers,
        stream.routes(live, status_every_s=status_every_s),
        metrics.routes(store, live),
        site.routes(store, live, clock, _offered(routers), settings),
    ):
        app.include_router(router)
    app.mount("/static", StaticFiles(directory=WEB / "static"), name="static")
    described.describe(app)
    return app


def _offered(routers: Sequence[APIRouter]) -> frozenset[str]:
    """Return the routes of these routers, such as "POST /api/v1/runs"."""
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    return frozenset(f"{method} {route.path}" for route in routes for method in route.methods or ())


class Guard:
    """ASGI middleware: refuses changes that a foreign page asks for, and says what browsers may load."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        app: ASGIApp = self._app
        request = Request(scope)
        # Browsers say where a request comes from; programs say nothing and are let through.
        if request.method not in SAFE and request.headers.get("sec-fetch-site", "none") not in OWN:
            app = api.problem(403, "a page from elsewhere may not change anything here", request)
        await app(scope, receive, send_guarded)


def _is_installed() -> bool:
    try:
        importlib.metadata.version("hedgerow")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
