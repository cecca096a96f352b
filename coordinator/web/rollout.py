"""The API of models under control: which there are, how far a rollout is, pins and rollbacks."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal, TypeAlias

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from coordinator.rollout.picture import ModelView, pictures
from coordinator.rollout.steward import Steward
from coordinator.store.rollouts import (
    MemberState,
    Order,
    OrderState,
    Rollout,
    RolloutState,
    Verb,
)
from coordinator.store.sql import Store
from coordinator.web.api import PREFIX, After, Limit, page, problems
from coordinator.web.models import Body, Page
from foundation.errors import SettingsError

Asked: TypeAlias = Literal["pin", "unpin", "rollback"]
SOMEBODY = "somebody on this machine"
"""Who it was, where nobody is asked for a token."""


class OrderModels(Body):
    """Which devices, and which of their models."""

    devices: tuple[str, ...] | None = Field(None, min_length=1, max_length=10_000)
    """By name; instead of `all`."""
    all: bool = False
    """Every device that tells its models."""
    model: str | None = Field(None, min_length=1, max_length=64)
    """A round, or the beginning of a SHA-256; not given, the one that serves on each device."""
    reason: str = Field("", max_length=500)


class StopRollout(Body):
    """Why a rollout is to stop."""

    reason: str = Field("stopped by hand", min_length=1, max_length=500)


class OrderView(BaseModel):
    """One command to a device, and what came of it."""

    id: str
    device: str
    verb: Verb
    model: str
    who: str
    reason: str
    at: float
    """UTC seconds."""
    state: OrderState
    """`open` until the device has answered; one that is offline answers when it comes back."""
    said: str
    """The device's words."""

    @classmethod
    def of(cls, order: Order) -> OrderView:
        """Return the view of a row."""
        return cls(
            id=order.id,
            device=order.agent,
            verb=order.verb,
            model=order.model,
            who=order.who,
            reason=order.reason,
            at=order.at,
            state=order.state,
            said=order.said,
        )


class Ordered(BaseModel):
    """What was ordered, and for which devices nothing could be."""

    orders: list[OrderView]
    problems: dict[str, str]


class MemberView(BaseModel):
    """One device in a rollout."""

    device: str
    ring: int
    """From 1."""
    state: MemberState
    model: str | None
    before: str | None
    reason: str


class RolloutView(BaseModel):
    """How far the models of one round are let go."""

    run: str
    round: int
    state: RolloutState
    ring: int
    """The last one that was let go, from 1."""
    rings: int
    reason: str
    waits: str | None
    """What the next ring waits for, while it is under way."""
    members: list[MemberView]


def routes(store: Store, steward: Steward) -> APIRouter:
    """Return the routes; changes go through the steward, and are written down with who asked."""
    router = APIRouter(tags=["models"])

    @router.get(PREFIX + "/models", responses=problems(422))
    def models(
        device: str | None = None, run: str | None = None, limit: Limit = 200, after: After = None
    ) -> Page[ModelView]:
        """Return what is known of every device's personal models, by device, newest first."""
        found = pictures(store, device=device, run=run)
        keys = [view.key for view in found]
        start = keys.index(after) + 1 if after in keys else 0
        return page(found[start:], limit, lambda view: view.key)

    @router.get(PREFIX + "/orders", responses=problems(422))
    def orders(
        device: str | None = None,
        ids: Annotated[list[str] | None, Query(max_length=1000, alias="id")] = None,
        limit: Limit = 200,
    ) -> list[OrderView]:
        """Return the newest commands to devices, oldest first, and what they answered."""
        return [OrderView.of(one) for one in store.orders(agent=device, ids=ids, limit=limit)]

    @router.post(PREFIX + "/models/{verb}", status_code=202, responses=problems(403, 409, 422))
    async def order(
        verb: Literal["pin", "unpin", "rollback"], request: OrderModels, asked: Request
    ) -> Ordered:
        """Pin, unpin or roll back models on one device, several, or all; a device's owner has precedence."""
        if (request.devices is None) != request.all:
            raise SettingsError("name `devices`, or say `all`: one of the two")
        devices = None if request.all else request.devices
        made, without = await steward.order(
            verb, devices, request.model, reason=request.reason, who=asker(asked)
        )
        return Ordered(orders=[OrderView.of(one) for one in made], problems=without)

    @router.get(PREFIX + "/rollouts", responses=problems(422))
    async def rollouts(limit: Limit = 20) -> list[RolloutView]:
        """Return the newest rollouts, newest first."""
        found = await asyncio.to_thread(store.rollouts, limit)
        return [await asyncio.to_thread(_view, store, one, steward.waits) for one in found]

    @router.post(PREFIX + "/rollouts/stop", responses=problems(403, 409, 422))
    async def stop(request: StopRollout, asked: Request) -> RolloutView:
        """End the rollout under way; its devices go back to the model before."""
        await steward.stop(request.reason, who=asker(asked))
        return await _newest(store, steward)

    @router.post(PREFIX + "/rollouts/go", responses=problems(403, 409, 422))
    async def go(asked: Request) -> RolloutView:
        """Let the next ring go now, whatever it waits for."""
        await steward.go(who=asker(asked))
        return await _newest(store, steward)

    return router


async def _newest(store: Store, steward: Steward) -> RolloutView:
    newest = (await asyncio.to_thread(store.rollouts, 1))[0]
    return await asyncio.to_thread(_view, store, newest, steward.waits)


def _view(store: Store, rollout: Rollout, waits: str | None) -> RolloutView:
    members = store.members(rollout.run, rollout.round)
    return RolloutView(
        run=rollout.run,
        round=rollout.round,
        state=rollout.state,
        ring=rollout.ring + 1,
        rings=1 + max((member.ring for member in members), default=0),
        reason=rollout.reason,
        waits=waits if rollout.state == "open" else None,
        members=[
            MemberView(
                device=m.agent,
                ring=m.ring + 1,
                state=m.state,
                model=m.model,
                before=m.before,
                reason=m.reason,
            )
            for m in members
        ],
    )


def asker(request: Request) -> str:
    """Return the name of whose token came with a request (coordinator/web/door.py)."""
    return str(request.scope.get("hedgerow.who") or SOMEBODY)
