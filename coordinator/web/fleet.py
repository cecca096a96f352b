"""The API of who takes part: invitations, and devices that are shut out."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, field_validator

from coordinator.fleet.desk import MOST_HOURS, Desk
from coordinator.web.api import PREFIX, problems
from coordinator.web.models import Body
from coordinator.web.rollout import asker
from foundation.errors import SettingsError
from foundation.topics import checked_name


class Invite(Body):
    """For whom there is to be a place."""

    name: str | None = None
    """The only name that the device may take."""
    replace: bool = False
    """Whether a device of that name gives way."""
    hours: float = Field(24.0, gt=0, le=MOST_HOURS)
    """How long the token is good."""

    @field_validator("name")
    @classmethod
    def _can_be_a_name(cls, name: str | None) -> str | None:
        try:
            return name and checked_name(name, "device")
        except SettingsError as error:
            raise ValueError(str(error)) from error


class InviteAnswer(BaseModel):
    """A token, told once: it is not kept anywhere."""

    line: str
    """What is typed on the device."""
    token: str
    expires: float
    """UTC seconds."""
    broker: str
    """What was done for the broker, in words."""


class Revoke(Body):
    """Why a device is shut out."""

    reason: str = Field(min_length=1, max_length=500)


class RevokeAnswer(BaseModel):
    """A device that is shut out."""

    device: str
    revoked: float
    """UTC seconds."""
    reason: str
    broker: str


def routes(desk: Desk) -> APIRouter:
    """Return the routes of invitations and revocations; both are written down with who asked."""
    router = APIRouter(tags=["fleet"])

    @router.post(PREFIX + "/invites", status_code=201, responses=problems(403, 422))
    async def invite(request: Invite, asked: Request) -> InviteAnswer:
        """Make a one-time token for one device to join with."""
        who, name, replace = asker(asked), request.name or None, request.replace
        made = await asyncio.to_thread(
            lambda: desk.invite(name=name, replace=replace, hours=request.hours, who=who)
        )
        return InviteAnswer(
            line=made.lines[0], token=made.tokens[0], expires=made.expires, broker=made.broker
        )

    @router.post(PREFIX + "/devices/{agent}/revoke", responses=problems(403, 422))
    async def revoke(agent: str, request: Revoke, asked: Request) -> RevokeAnswer:
        """Shut a device out: its key and its broker user are no longer taken."""
        who = asker(asked)
        device, done = await asyncio.to_thread(lambda: desk.revoke(agent, request.reason, who=who))
        return RevokeAnswer(
            device=device.agent, revoked=device.revoked or 0.0, reason=device.reason, broker=done
        )

    return router
