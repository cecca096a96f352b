"""The JSON API under /api/v1, and errors as problem+json."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from coordinator.ledger.entries import read
from coordinator.ledger.report import EnergyReport, energy_report
from coordinator.live import AgentStatus, Live, Status
from coordinator.store.quarantine import Case
from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
from coordinator.web.described import PROBLEM
from coordinator.web.models import (
    AgentView,
    Control,
    Health,
    Page,
    PauseRun,
    Problem,
    RefusalView,
    RoundView,
    RunAnswer,
    RunView,
    StartRun,
    StopRun,
    T,
    UpdateView,
    views,
)
from foundation.artifact import Manifest
from foundation.errors import HedgerowError, RoundError, SettingsError, StoreError, WorkRefused

logger = logging.getLogger(__name__)

PREFIX = "/api/v1"
STATUS_OF: tuple[tuple[type[HedgerowError], HTTPStatus], ...] = (
    (SettingsError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (RoundError, HTTPStatus.CONFLICT),
    (WorkRefused, HTTPStatus.CONFLICT),
    (StoreError, HTTPStatus.INTERNAL_SERVER_ERROR),
)

LARGEST = 2**53 - 1
"""Of a number in an address: what JavaScript and the database can still count."""
Offset = Annotated[int, Query(ge=0, le=LARGEST)]
RoundNumber = Annotated[int, Path(ge=0, le=LARGEST)]
Limit = Annotated[int, Query(ge=1, le=1000, description="Most items to return.")]
After = Annotated[str | None, Query(max_length=200, description="`next` of the page before.")]


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return which errors a route answers, for OpenAPI; `described` adds what they look like."""
    return {code: {"description": HTTPStatus(code).phrase} for code in codes}


def routes(store: Store, live: Live, control: Control, clock: Callable[[], float]) -> APIRouter:
    """Return all routes of the API except the event stream. `clock` gives UTC seconds since the epoch."""
    router = APIRouter()
    _add_fleet(router, store, live)
    _add_runs(router, store)
    _add_lists(router, store)
    _add_control(router, store, live, control, clock)
    _add_pause(router, store, live, control)

    @router.get("/healthz", tags=["health"], responses=problems(500))
    def healthz() -> Health:
        """Whether the database answers."""
        store.check()
        return Health()

    return router


def _add_fleet(router: APIRouter, store: Store, live: Live) -> None:
    # Async, as the live picture belongs to the event loop; what reads the store goes to a thread.
    @router.get(PREFIX + "/status", tags=["live"], responses=problems(422))
    async def status(
        since: Annotated[int, Query(le=LARGEST, description="Only agents changed after this version.")] = -1,
    ) -> Status:
        """Return the whole picture: run, round, phase, time left, and every agent as last heard."""
        return live.snapshot(since)

    @router.get(PREFIX + "/fleet", tags=["live"], responses=problems(422))
    async def fleet(limit: Limit = 200, after: After = None) -> Page[AgentStatus]:
        """Return the agents, by name."""
        agents = [agent for agent in live.snapshot().agents if after is None or agent.agent > after]
        return page(agents, limit, lambda agent: agent.agent)

    @router.get(PREFIX + "/fleet/{agent}", tags=["live"], responses=problems(404, 422))
    async def one_agent(agent: str) -> AgentView:
        """Return everything that is known of one agent."""
        status = live.agent(agent)
        if status is None:
            raise HTTPException(404, f"no agent {agent!r} was ever heard of")
        records = await asyncio.to_thread(store.agents)
        artifacts = await asyncio.to_thread(lambda: store.artifacts(agent=agent, limit=20))
        found = next((record for record in records if record.card.agent == agent), None)
        return AgentView(
            status=status,
            card=found and found.card,
            first_seen=found and found.first_seen,
            artifacts=artifacts,
        )


def _add_runs(router: APIRouter, store: Store) -> None:
    @router.get(PREFIX + "/runs", tags=["runs"], responses=problems(422))
    def runs(limit: Limit = 50, after: After = None) -> Page[RunView]:
        """Return the runs, newest first."""
        records = store.runs()
        names = [record.run for record in records]
        start = names.index(after) + 1 if after in names else 0
        return page([RunView.of(record) for record in records[start:]], limit, lambda view: view.run)

    @router.get(PREFIX + "/runs/{run}", tags=["runs"], responses=problems(404, 422))
    def one_run(run: str) -> RunView:
        """Return one run."""
        return RunView.of(_known(store, run))

    @router.get(PREFIX + "/runs/{run}/rounds", tags=["runs"], responses=problems(404, 422))
    def rounds(run: str, limit: Limit = 200, after: Offset = 0) -> Page[RoundView]:
        """Return the rounds of a run, with accuracy, joules and bytes over their updates."""
        _known(store, run)
        records = store.rounds(run, after=after, limit=limit + 1)
        updates = [UpdateView.of(u) for record in records[:limit] for u in store.updates(run, record.round)]
        found = views(records[:limit], updates)
        return Page[RoundView](items=found, next=str(found[-1].round) if len(records) > limit else None)

    @router.get(PREFIX + "/runs/{run}/energy", tags=["runs"], responses=problems(404, 422))
    def energy(
        run: str,
        accuracy: Annotated[float | None, Query(gt=0, le=1, description="What did reaching it take?")] = None,
        against: Annotated[str | None, Query(description="Another run, to stand beside.")] = None,
        radio_km: Annotated[
            float | None, Query(gt=0, le=1000, description="Of a radio, for radiated energy.")
        ] = None,
    ) -> EnergyReport:
        """Return joules, seconds and bytes by device, round and stage, split by kind and scope."""
        _known(store, run)
        other = None if against is None else read(store, _known(store, against).run)
        return energy_report(read(store, run), accuracy=accuracy, other=other, radio_km=radio_km)

    @router.get(PREFIX + "/runs/{run}/rounds/{n}/updates", tags=["runs"], responses=problems(404, 422))
    def round_updates(run: str, n: RoundNumber) -> list[UpdateView]:
        """Return the updates of one round, by agent."""
        _known(store, run)
        if store.round_record(run, n) is None:
            raise HTTPException(404, f"run {run!r} has no round {n}")
        return [UpdateView.of(record) for record in store.updates(run, n)]

    @router.get(PREFIX + "/runs/{run}/updates", tags=["runs"], responses=problems(400, 404, 422))
    def updates(run: str, limit: Limit = 200, after: After = None) -> Page[UpdateView]:
        """Return the updates of a run by round and agent; `after` is written round/agent."""
        _known(store, run)
        records = store.history(run, after=_key(after), limit=limit + 1)
        return page([UpdateView.of(record) for record in records], limit, lambda u: f"{u.round}/{u.agent}")


def _add_lists(router: APIRouter, store: Store) -> None:
    @router.get(PREFIX + "/artifacts", tags=["artifacts"], responses=problems(422))
    def artifacts(run: str | None = None, limit: Limit = 100, after: Offset = 0) -> Page[Manifest]:
        """Return what agents said about the models they serve, newest first."""
        found = store.artifacts(run, after=after, limit=limit + 1)
        return Page[Manifest](items=found[:limit], next=str(after + limit) if len(found) > limit else None)

    @router.get(PREFIX + "/refusals", tags=["runs"], responses=problems(422))
    def refusals(run: str | None = None, limit: Limit = 100, after: Offset = 0) -> Page[RefusalView]:
        """Return refusals, oldest first."""
        found = [RefusalView.of(r) for r in store.refusals(run, after_id=after, limit=limit + 1)]
        return page(found, limit, lambda refusal: str(refusal.id))

    @router.get(PREFIX + "/quarantine", tags=["runs"], responses=problems(422))
    def quarantine(run: str | None = None, limit: Limit = 100, after: After = None) -> Page[Case]:
        """Return updates that were kept apart and not merged, newest first."""
        found = store.quarantine.cases(run)
        ids = [case.id for case in found]
        start = ids.index(after) + 1 if after in ids else 0
        return page(found[start:], limit, lambda case: case.id)


def _add_control(
    router: APIRouter, store: Store, live: Live, control: Control, clock: Callable[[], float]
) -> None:
    @router.post(PREFIX + "/runs", tags=["control"], status_code=202, responses=problems(403, 409, 422))
    async def start(request: StartRun) -> RunAnswer:
        """Begin a run; what is not given is as in the coordinator's settings."""
        named = request.named(datetime.fromtimestamp(clock(), UTC))
        if await asyncio.to_thread(store.has_run, named.name):
            raise HTTPException(409, f"there is a run {named.name!r} already: choose another name")
        await control.start(named)
        return await _standing(store, named.name)

    @router.post(PREFIX + "/runs/{run}/stop", tags=["control"], responses=problems(403, 404, 409, 422))
    async def stop(run: str, request: StopRun) -> RunAnswer:
        """End the run that is under way; what its closed rounds made stays."""
        if live.snapshot(live.version).run != run:
            await asyncio.to_thread(_known, store, run)
            raise HTTPException(409, f"run {run!r} is not the one under way")
        await control.stop(request.reason)
        answer = await _standing(store, run)
        return answer if answer.state != "waiting" else RunAnswer(run=run, state="stopped")


def _add_pause(router: APIRouter, store: Store, live: Live, control: Control) -> None:
    @router.post(PREFIX + "/runs/{run}/pause", tags=["control"], responses=problems(403, 404, 409, 422))
    async def pause(run: str, request: PauseRun) -> RunAnswer:
        """Let the round under way end by its usual rules, and open no other until resumed."""
        if live.snapshot(live.version).run != run:
            await asyncio.to_thread(_known, store, run)
        await control.pause(run, request.reason)
        return await _standing(store, run)

    @router.post(PREFIX + "/runs/{run}/resume", tags=["control"], responses=problems(403, 404, 409, 422))
    async def resume(run: str) -> RunAnswer:
        """Go on with a paused run."""
        if live.snapshot(live.version).run != run:
            await asyncio.to_thread(_known, store, run)
        await control.resume(run)
        return await _standing(store, run)


async def _standing(store: Store, run: str) -> RunAnswer:
    # The engine puts a run among the runs when its agents are there, as the model depends on them.
    if not await asyncio.to_thread(store.has_run, run):
        return RunAnswer(run=run, state="waiting")
    return RunAnswer(run=run, state=(await asyncio.to_thread(store.run, run)).state)


def _known(store: Store, run: str) -> RunRecord:
    if not store.has_run(run):
        raise HTTPException(404, f"there is no run {run!r} in this store")
    return store.run(run)


def page(items: Sequence[T], limit: int, key: Callable[[T], str]) -> Page[T]:
    """Return the first `limit` items, and where the next page begins."""
    shown = list(items[:limit])
    return Page(items=shown, next=key(shown[-1]) if len(items) > limit else None)


def _key(after: str | None) -> tuple[int, str] | None:
    if after is None:
        return None
    round, slash, agent = after.partition("/")
    if not slash or not round.isdecimal() or int(round) > LARGEST:
        raise HTTPException(400, f"after={after!r} is not written round/agent")
    return int(round), agent


def problem(status: int, detail: str, request: Request) -> JSONResponse:
    """Return an error as RFC 9457 writes it."""
    told = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, instance=request.url.path)
    return JSONResponse(told.model_dump(), status, media_type=PROBLEM)


def install_problems(app: FastAPI) -> None:
    """Make every error of `app` a problem; errors of ours keep their words, others do not leak theirs."""

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        return problem(error.status_code, str(error.detail), request)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        told = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()]
        return problem(422, "; ".join(told), request)

    async def ours(request: Request, error: Exception) -> JSONResponse:
        status = next(
            (s for kind, s in STATUS_OF if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR
        )
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem(status, str(error), request)

    async def bug(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem(500, "something went wrong here; the coordinator's log has it", request)

    app.add_exception_handler(StarletteHTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HedgerowError, ours)
    app.add_exception_handler(Exception, bug)
