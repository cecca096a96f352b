"""The Open Inference Protocol (V2) over HTTP, a page and an address for people, and counters.

Bodies are read raw, within bounds of size and time, and parsed once. Errors are `{"error": "..."}`, as
the protocol's clients expect. The application loads numpy, onnxruntime and fastapi, and no training code.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from importlib import metadata

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_agent.serving import card, protocol
from edge_agent.serving.metrics import Metrics
from edge_agent.serving.predictor import Handle, Prediction, Predictor
from edge_agent.serving.pressure import Pressure
from foundation.errors import DataError, FrameTooLarge, WireError
from foundation.parameters import Array

logger = logging.getLogger(__name__)

LARGEST_BODY_BYTES = 8 << 20
BODY_S = 30.0
"""Seconds that a client has to send its body."""
INLINE_MS = 2.0
"""A model that runs faster than this answers on the event loop; a thread would cost more than it saves."""
MOST_PROBABLE = 20
"""Probabilities that `/predict` lists per sample."""

_HEADER_LENGTH = "Inference-Header-Content-Length"


def create_app(
    predictor: Predictor,
    name: str = "model",
    *,
    watch_s: float | None = 1.0,
    pressure: Pressure | None = None,
) -> FastAPI:
    """Return the application that serves a predictor under a model name.

    `watch_s` is how often it looks whether the folder's `current` artifact has moved, and how a model on
    trial does; `None` never does. `pressure` is told how long every answer took.
    """
    server = _Server(predictor, name, pressure)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watcher = asyncio.create_task(server.watch(watch_s)) if watch_s else None
        yield
        if watcher:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher

    app = FastAPI(title="Hedgerow", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(_Counted, metrics=server.metrics)
    app.add_exception_handler(HTTPException, _http_error)
    for refusal in (WireError, DataError):
        app.add_exception_handler(refusal, _refused)
    app.add_exception_handler(Exception, _failed)
    routes: tuple[tuple[str, str, Callable[..., Awaitable[Response]]], ...] = (
        ("GET", "/", server.card),
        ("GET", "/metrics", server.counters),
        ("POST", "/predict", server.predict),
        ("GET", "/v2", server.server_metadata),
        ("GET", "/v2/health/live", server.live),
        ("GET", "/v2/health/ready", server.live),
        ("POST", "/v2/repository/index", server.index),
        ("GET", "/v2/models/{model}", server.model_metadata),
        ("GET", "/v2/models/{model}/ready", server.model_ready),
        ("POST", "/v2/models/{model}/infer", server.infer),
        ("GET", "/v2/models/{model}/versions/{version}", server.model_metadata),
        ("GET", "/v2/models/{model}/versions/{version}/ready", server.model_ready),
        ("POST", "/v2/models/{model}/versions/{version}/infer", server.infer),
    )
    for method, path, handler in routes:
        app.add_api_route(path, handler, methods=[method], response_model=None)
    return app


class _Counted:
    """Counts every answer by its status; plain ASGI, as it stands in the way of every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # what is answered for a handler that raises

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._metrics.requests[status] += 1


class _Server:
    """The handlers, and what they share."""

    def __init__(self, predictor: Predictor, name: str, pressure: Pressure | None) -> None:
        self._predictor = predictor
        self._pressure = pressure
        self._name = name
        self.metrics = Metrics()
        self._thread = asyncio.Semaphore(1)

    async def watch(self, every_s: float) -> None:
        """Look for a newer artifact again and again; loading and proving happen in a thread."""
        last: str | None = None
        while True:
            await asyncio.sleep(every_s)
            try:
                found = await asyncio.to_thread(self._predictor.reload)
            except Exception:  # the watch outlives whatever went wrong with one artifact
                logger.exception("looking for a newer artifact failed")
                continue
            self.metrics.swaps += found.changed
            self.metrics.rollbacks += found.rolled_back is not None
            self.metrics.refused_artifacts += found.refusal is not None and found.refusal != last
            last = found.refusal

    # --- for people -----------------------------------------------------------------------------

    async def card(self) -> Response:
        """Show the model card."""
        return HTMLResponse(card.page(self._name, self._predictor.handle))

    async def counters(self) -> Response:
        """Show the counters."""
        return PlainTextResponse(self.metrics.text(self._predictor.handle))

    async def predict(self, request: Request) -> Response:
        """Answer `{"inputs": [...]}` with labels and probabilities."""
        body, handle = await _body(request), self._predictor.handle
        prediction = await self._predicted(protocol.samples(body, handle.manifest), handle)
        manifest = prediction.manifest
        return JSONResponse(
            {
                "model": {"agent": manifest.agent, "round": manifest.round, "sha256": manifest.sha256},
                "predictions": [
                    _for_people(label, values, manifest.labels)
                    for label, values in zip(prediction.labels, prediction.probabilities, strict=True)
                ],
            }
        )

    # --- the protocol ---------------------------------------------------------------------------

    async def live(self) -> Response:
        """Say that the process answers; it only does once a model has proven itself, so it is ready too."""
        return JSONResponse({"live": True, "ready": True})

    async def server_metadata(self) -> Response:
        """Describe the server."""
        return JSONResponse({"name": "hedgerow", "version": _version(), "extensions": ["binary_tensor_data"]})

    async def index(self) -> Response:
        """List the one model that is here."""
        version = self._predictor.handle.version
        return JSONResponse([{"name": self._name, "version": version, "state": "READY", "reason": ""}])

    async def model_metadata(self, model: str, version: str | None = None) -> Response:
        """Describe the model."""
        self._known(model, version)
        return JSONResponse(protocol.model_metadata(self._name, self._predictor.manifest))

    async def model_ready(self, model: str, version: str | None = None) -> Response:
        """Say that the model answers."""
        self._known(model, version)
        return JSONResponse({"name": self._name, "ready": True})

    async def infer(self, request: Request, model: str, version: str | None = None) -> Response:
        """Answer a V2 inference request, as JSON or with tensors appended as bytes."""
        self._known(model, version)
        body, header = await _body(request), request.headers.get(_HEADER_LENGTH)
        handle = self._known(model, version)  # again: another may serve by now
        asked = protocol.decode(body, header, handle.manifest)
        prediction = await self._predicted(asked.x, handle)
        answer, length = protocol.encode(self._name, prediction, asked)
        if length is None:
            return Response(answer, media_type="application/json")
        return Response(answer, media_type="application/octet-stream", headers={_HEADER_LENGTH: str(length)})

    def _known(self, model: str, version: str | None) -> Handle:
        if model != self._name:
            raise HTTPException(404, f"there is no model {model[:64]!r}; the model here is {self._name!r}")
        handle = self._predictor.handle
        if version not in (None, handle.version):
            raise HTTPException(404, f"{model!r} is at version {handle.version!r}, not {str(version)[:64]!r}")
        return handle

    async def _predicted(self, x: Array, handle: Handle) -> Prediction:
        start = time.perf_counter()
        if handle.run_ms * max(1, len(x)) < INLINE_MS:
            prediction = self._predictor.predict(x, handle)
        else:
            # One at a time: the model has one thread, and others on the device train.
            async with self._thread:
                prediction = await asyncio.to_thread(self._predictor.predict, x, handle)
        seconds = time.perf_counter() - start
        self.metrics.inferred(len(x), seconds)
        if self._pressure is not None:
            self._pressure.answered(seconds)
        return prediction


async def _body(request: Request) -> bytes:
    """Read a body within its bounds of size and time, whatever its headers claim."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise HTTPException(415, "compressed bodies are not taken")
    too_large = FrameTooLarge(f"a body has at most {LARGEST_BODY_BYTES} bytes")
    claimed = request.headers.get("Content-Length", "0")
    if claimed.isdigit() and int(claimed) > LARGEST_BODY_BYTES:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > LARGEST_BODY_BYTES:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        raise HTTPException(408, f"the body did not arrive within {BODY_S:.0f} s") from error
    return b"".join(parts)


def _for_people(label: str, probabilities: Array, labels: tuple[str, ...]) -> dict[str, object]:
    """Return the label, its probability and those of the likeliest others; for text, of what follows."""
    values = probabilities if probabilities.ndim == 1 else probabilities[-1]
    likeliest = (-values).argsort(kind="stable")[:MOST_PROBABLE]
    return {
        "label": label,
        "probability": float(values.max()),
        "probabilities": {labels[i]: float(values[i]) for i in likeliest},
    }


def _version() -> str:
    try:
        return metadata.version("hedgerow")
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed


async def _refused(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 413 if isinstance(error, FrameTooLarge) else 400)


async def _http_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _failed(_: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return JSONResponse({"error": "the server failed; its log says why"}, 500)
