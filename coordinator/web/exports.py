"""The API of models as files; it takes an operator: weights tell more than figures, and take work to make."""

from __future__ import annotations

import asyncio
import base64
from typing import Protocol

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel

from coordinator.store.sql import Store
from coordinator.web.api import PREFIX, problems


class Exports(Protocol):
    """What makes the files of a device's model (coordinator/exports.py)."""

    async def files(self, run: str, device: str) -> dict[str, bytes]:
        """Return them by name; raises `WorkRefused` where the whole model is not here."""
        ...


class ModelFiles(BaseModel):
    """An artifact: a model, what it says of itself, and the probe that proves it."""

    run: str
    device: str
    files: dict[str, str]
    """By name, in base64: model.onnx, manifest.json, probe.npz, and signature.json where it is signed."""


def routes(store: Store, exports: Exports) -> APIRouter:
    """Return the route that makes a device's model."""
    router = APIRouter(tags=["models"])

    @router.post(PREFIX + "/runs/{run}/devices/{agent}/export", responses=problems(403, 404, 409, 422))
    async def export(run: str, agent: str) -> ModelFiles:
        """Make the model that the coordinator would send a device next, where it has the whole of it."""
        if not await asyncio.to_thread(store.has_run, run):
            raise HTTPException(404, f"there is no run {run!r} in this store")
        if agent not in await asyncio.to_thread(store.cards):
            raise HTTPException(404, f"no device {agent!r} has introduced itself")
        files = await exports.files(run, agent)
        told = {name: base64.b64encode(content).decode() for name, content in files.items()}
        return ModelFiles(run=run, device=agent, files=told)

    return router
