"""The Open Inference Protocol (V2) over HTTP, a page and an address for people, and counters.

A plain ASGI application: a framework would add a sixth to the time of an answer, and two fifths to that of
the start. Bodies are read raw, within bounds, and parsed once. Errors are `{"error": "..."}`, as the
protocol's clients expect. The process loads numpy and onnxruntime, and no training code.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from edge_agent.serving import admin, bodies, card, control, describe, people, pictures, protocol
from edge_agent.serving.answers import Answer, Refused, as_json, refusal
from edge_agent.serving.bodies import Bodies, Receive
from edge_agent.serving.guard import Guard
from edge_agent.serving.metrics import Metrics, Statistics
from edge_agent.serving.predictor import Predictor
from edge_agent.serving.runner import MOST_IN_FLIGHT, Runner
from export.proof import LARGEST_BATCH
from foundation.artifact import Manifest
from foundation.parameters import Array
from foundation.prometheus import CONTENT_TYPE

logger = logging.getLogger(__name__)

LARGEST_UPLOAD_BYTES = 64 << 20

_HEADER_LENGTH = "Inference-Header-Content-Length"

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a server can be told; `watch_s` 0 never looks for a newer artifact, `window_s` 0 never batches."""

    name: str = "model"
    watch_s: float = 1.0
    window_s: float = 0.0
    most_bytes: int = bodies.LARGEST_BODY_BYTES
    most_samples: int = LARGEST_BATCH
    most_in_flight: int = MOST_IN_FLIGHT
    control: Path | None = None
    """Folder of artifacts into which clients may send one, and whose model they may unload; or nothing."""


class Ask(NamedTuple):
    """One request."""

    method: str
    path: str
    headers: dict[bytes, bytes]
    receive: Receive
    start: float
    client: str = ""
    """Where it came from; empty where that is not known."""
    model: str = ""
    version: str | None = None


Handler = Callable[[Ask], Awaitable[Answer]]


class Application:
    """The ASGI application that serves a predictor.

    `load_s` is how long the predictor took to load; `answered` is told the seconds of every run.
    """

    def __init__(
        self,
        predictor: Predictor,
        settings: ServerSettings | None = None,
        guard: Guard | None = None,
        *,
        load_s: float | None = None,
        answered: Callable[[float], None] | None = None,
    ) -> None:
        self._predictor = predictor
        self._settings = settings = settings or ServerSettings()
        self._guard = guard or Guard()
        self.metrics = Metrics(load_s)
        self._answered = answered
        self._runner = Runner(
            predictor,
            self._ran,
            window_s=settings.window_s,
            most_samples=settings.most_samples,
            most_in_flight=settings.most_in_flight,
        )
        self._bodies = Bodies(settings.most_bytes)
        self._uploads = Bodies(max(LARGEST_UPLOAD_BYTES, settings.most_bytes))
        self._loaded, self._leaving = True, False
        self._watcher: asyncio.Task[None] | None = None
        self._known_refusal: str | None = None
        self._top = ("", 0.0)
        self._date = (0, b"")
        self._paths: dict[str, dict[str, Handler]] = {
            "/": {"GET": self._page},
            "/page.css": {"GET": self._asset},
            "/page.js": {"GET": self._asset},
            "/manifest": {"GET": self._manifest},
            "/metrics": {"GET": self._counters},
            "/predict": {"POST": self._predict},
            "/admin/models": {"GET": self._models},
            "/admin/pin": {"POST": self._decide},
            "/admin/unpin": {"POST": self._decide},
            "/admin/rollback": {"POST": self._decide},
            "/v2": {"GET": self._server},
            "/v2/health/live": {"GET": self._live},
            "/v2/health/ready": {"GET": self._ready},
            "/v2/models/stats": {"GET": self._statistics},
            "/v2/repository/index": {"POST": self._index},
        }
        self._verbs: dict[str, dict[str, Handler]] = {
            "": {"GET": self._metadata},
            "ready": {"GET": self._model_ready},
            "infer": {"POST": self._infer},
            "config": {"GET": self._configuration},
            "stats": {"GET": self._statistics},
        }
        self._controls: dict[str, dict[str, Handler]] = {
            "load": {"POST": self._load},
            "unload": {"POST": self._unload},
        }

    def leave(self) -> None:
        """Say from now on that it is not ready: the process is about to end."""
        self._leaving = True

    # --- ASGI -----------------------------------------------------------------------------------

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection's scope."""
        if scope["type"] == "lifespan":
            await self._live_through(receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _live_through(self, receive: Receive, send: Send) -> None:
        await receive()
        await asyncio.to_thread(self._runner.measure, self._predictor.handle)
        if self._settings.watch_s:
            self._watcher = asyncio.create_task(self._watch(self._settings.watch_s))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self._watcher:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
        await self._runner.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> None:
        ask = Ask(
            scope["method"].replace("HEAD", "GET"),
            scope["path"],
            dict(scope["headers"]),
            receive,
            time.perf_counter(),
            (scope.get("client") or ("",))[0],
        )
        try:
            self._guard.check(ask.method, ask.path, ask.headers)
            handler, ask = self._route(ask)
            answer = await handler(ask)
        except Exception as error:
            found = refusal(error)
            if found is None:
                logger.exception("a request failed")
                found = as_json({"error": "the server failed; its log says why"}, 500)
            answer = found
        self.metrics.requests[answer.status] += 1
        headers = [
            (b"date", self._now()),
            (b"content-type", answer.kind.encode()),
            (b"content-length", str(len(answer.body)).encode()),
            *((name.encode(), value.encode()) for name, value in answer.headers),
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    def _now(self) -> bytes:
        """Return the time as HTTP writes it."""
        second = int(time.time())
        if second != self._date[0]:
            self._date = (second, formatdate(second, usegmt=True).encode())
        return self._date[1]

    def _route(self, ask: Ask) -> tuple[Handler, Ask]:
        methods = self._paths.get(ask.path)
        if methods is None:
            methods, model, version = self._of_a_model(ask.path.split("/")[1:])
            ask = ask._replace(model=model, version=version)
        if methods is None:
            raise Refused(404, f"Not Found: there is nothing at {ask.path[:100]!r}")
        if ask.method not in methods:
            allowed = ", ".join(methods)
            raise Refused(405, f"Method Not Allowed: {ask.path[:100]} takes {allowed}", ("Allow", allowed))
        return methods[ask.method], ask

    def _of_a_model(self, parts: list[str]) -> tuple[dict[str, Handler] | None, str, str | None]:
        match parts:
            case ["v2", "models", model, "versions", version, *verb] if len(verb) <= 1:
                return self._verbs.get(verb[0] if verb else ""), model, version
            case ["v2", "models", model, *verb] if len(verb) <= 1:
                return self._verbs.get(verb[0] if verb else ""), model, None
            case ["v2", "repository", "models", model, verb]:
                return self._controls.get(verb), model, None
        return None, "", None

    # --- newer artifacts ------------------------------------------------------------------------

    async def _watch(self, every_s: float) -> None:
        """Look for a newer artifact again and again; where nothing has changed, that is two system calls."""
        while True:
            await asyncio.sleep(every_s)
            try:
                if not self._predictor.unchanged():
                    await self._look()
                if self._predictor.keeps_none:
                    await asyncio.to_thread(self._predictor.keep)
            except Exception:  # the watch outlives whatever went wrong with one artifact
                logger.exception("looking for a newer artifact failed")

    async def _look(self) -> str | None:
        """Move to a newer artifact if there is one; loading and proving happen in a thread.

        Returns why one was not taken.
        """
        start = time.perf_counter()
        found = await asyncio.to_thread(self._predictor.reload)
        if found.changed:
            self.metrics.load_s = time.perf_counter() - start
            self.metrics.swaps += 1
            self.metrics.rollbacks += found.rolled_back is not None
            await asyncio.to_thread(self._runner.measure, self._predictor.handle)
        self.metrics.refused_artifacts += found.refusal is not None and found.refusal != self._known_refusal
        self._known_refusal = found.refusal
        return found.refusal

    # --- for people -----------------------------------------------------------------------------

    async def _page(self, ask: Ask) -> Answer:
        """Show the model card and the form; without the key, where one is asked for, only a field for it."""
        handle = self._predictor.handle if self._guard.knows(ask.headers) else None
        top = self._largest_value() if handle else 0.0
        return card.page(self._settings.name, handle, top, keyed=self._guard.keyed)

    async def _asset(self, ask: Ask) -> Answer:
        return card.asset(ask.path.lstrip("/"))

    async def _counters(self, _: Ask) -> Answer:
        text = self.metrics.text(self._predictor.handle, self._runner.in_flight, loaded=self._loaded)
        return Answer(text.encode(), CONTENT_TYPE)

    async def _manifest(self, _: Ask) -> Answer:
        """Tell all that the artifact says about itself, in the types that it has."""
        return as_json(self._predictor.manifest.model_dump(mode="json"))

    async def _predict(self, ask: Ask) -> Answer:
        """Answer JSON, a picture or an .npy file with labels and probabilities."""
        self._answering()
        with self._runner.place():
            async with self._bodies.read(ask.headers, ask.receive) as body:
                handle = self._predictor.handle
                x = await self._raw_values(body, handle.manifest)
            ran = await self._runner.run(x, handle)
        self.metrics.total.add(time.perf_counter() - ask.start)
        return as_json(people.answer(ran))

    async def _raw_values(self, body: bytes, manifest: Manifest) -> Array:
        kind = pictures.kind(body)
        if kind == "picture":
            return await asyncio.to_thread(pictures.picture, body, manifest, self._largest_value())
        return people.array(body, manifest) if kind == "npy" else people.samples(body, manifest)

    def _largest_value(self) -> float:
        handle = self._predictor.handle
        if self._top[0] != handle.manifest.sha256:
            self._top = (handle.manifest.sha256, pictures.largest_value(handle.folder))
        return self._top[1]

    # --- the protocol: who and what -------------------------------------------------------------

    async def _live(self, _: Ask) -> Answer:
        return as_json({"live": True})

    async def _ready(self, _: Ask) -> Answer:
        """Say that the model answers; the server listens only once it has proven itself."""
        ready = self._loaded and not self._leaving
        return as_json({"ready": ready}, 200 if ready else 503)

    async def _server(self, _: Ask) -> Answer:
        return as_json({"name": "hedgerow", "version": _version(), "extensions": describe.EXTENSIONS})

    async def _index(self, _: Ask) -> Answer:
        version = self._predictor.handle.version
        return as_json(describe.index(self._settings.name, version, loaded=self._loaded))

    async def _metadata(self, ask: Ask) -> Answer:
        self._known(ask)
        return as_json(describe.metadata(self._settings.name, self._predictor.manifest))

    async def _configuration(self, ask: Ask) -> Answer:
        self._known(ask)
        told = self._settings
        manifest = self._predictor.manifest
        return as_json(describe.configuration(told.name, manifest, told.most_samples, told.window_s))

    async def _model_ready(self, ask: Ask) -> Answer:
        self._known(ask)
        ready = self._loaded and not self._leaving
        return as_json({"name": self._settings.name, "ready": ready}, 200 if ready else 503)

    async def _statistics(self, ask: Ask) -> Answer:
        if ask.model:
            self._known(ask)
        version = self._predictor.handle.version
        stats = self.metrics.statistics(version).as_json(self._settings.name, version)
        return as_json({"model_stats": [stats]})

    # --- the protocol: loading ------------------------------------------------------------------

    async def _load(self, ask: Ask) -> Answer:
        """Look for a newer artifact now; with files in the request, take those."""
        self._known(ask)
        reader = self._bodies if self._settings.control is None else self._uploads
        async with reader.read(ask.headers, ask.receive) as body:
            files = control.files_of(body)
        if files:
            await asyncio.to_thread(control.install, self._controlled(), files)
        if refusal := await self._look():
            raise Refused(409, f"not taken, the model before it serves on: {refusal}")
        self._loaded = True
        return as_json({})

    async def _unload(self, ask: Ask) -> Answer:
        self._known(ask)
        self._controlled()
        self._loaded = False
        return as_json({})

    def _controlled(self) -> Path:
        if self._settings.control is None:
            raise Refused(403, "clients may not change what is served here; --control lets them")
        return self._settings.control

    # --- for the owner ---------------------------------------------------------------------------

    async def _models(self, _: Ask) -> Answer:
        return as_json(await asyncio.to_thread(admin.models, self._predictor.root))

    async def _decide(self, ask: Ask) -> Answer:
        """Pin, unpin or roll back, look at once, and tell which model serves then."""
        root = self._predictor.root
        async with self._bodies.read(ask.headers, ask.receive) as body:
            done = await asyncio.to_thread(admin.ACTIONS[ask.path], root, body, f"http {ask.client}".strip())
        logger.info("%s by %s: %s", ask.path, ask.client or "nobody known", done)
        refusal = await self._look()
        serves = self._predictor.manifest
        return as_json({**done, "serves": serves.sha256, "serves_round": serves.round, "refusal": refusal})

    # --- the protocol: inference ----------------------------------------------------------------

    async def _infer(self, ask: Ask) -> Answer:
        """Answer a V2 inference request, as JSON or with tensors appended as bytes."""
        self._known(ask)
        self._answering()
        statistics = self.metrics.statistics(self._predictor.handle.version)
        try:
            with self._runner.place():
                answer = await self._inferred(ask, statistics)
        except Exception:
            statistics.stage("fail", time.perf_counter() - ask.start)
            raise
        spent = time.perf_counter() - ask.start
        statistics.stage("success", spent)
        self.metrics.total.add(spent)
        return answer

    async def _inferred(self, ask: Ask, statistics: Statistics) -> Answer:
        length = ask.headers.get(_HEADER_LENGTH.lower().encode())
        async with self._bodies.read(ask.headers, ask.receive) as body:
            start, handle = time.perf_counter(), self._predictor.handle
            asked = protocol.decode(
                body,
                None if length is None else length.decode("latin-1"),
                handle.manifest,
                json_alone=ask.headers.get(b"accept") == b"application/json",
            )
            decoded = time.perf_counter()
        ran = await self._runner.run(asked.x, handle)
        # A request for one version must not get the answer of another that came meanwhile.
        _of_version(ask, str(ran.prediction.manifest.round))
        run = time.perf_counter()
        content, head = protocol.encode(self._settings.name, ran.prediction, asked)
        content, packed = bodies.pack(content, ask.headers.get(b"accept-encoding", b""))
        for stage, spent in (
            ("compute_input", decoded - start),
            ("queue", ran.waited_s),
            ("compute_infer", ran.run_s),
            ("compute_output", time.perf_counter() - run),
        ):
            statistics.stage(stage, spent)
        headers = (("Content-Encoding", packed),) if packed else ()
        if head is None:
            return Answer(content, headers=headers)
        return Answer(content, "application/octet-stream", headers=((_HEADER_LENGTH, str(head)), *headers))

    def _ran(self, version: str, samples: int, requests: int, seconds: float) -> None:
        self.metrics.ran(version, samples, requests, seconds)
        if self._answered is not None:
            self._answered(seconds)

    def _known(self, ask: Ask) -> None:
        if ask.model != self._settings.name:
            name = self._settings.name
            raise Refused(404, f"there is no model {ask.model[:64]!r}; the model here is {name!r}")
        _of_version(ask, self._predictor.handle.version)

    def _answering(self) -> None:
        if not self._loaded:
            raise Refused(503, f"the model {self._settings.name!r} is unloaded: load it first")


def _of_version(ask: Ask, serving: str) -> None:
    if ask.version not in (None, serving):
        raise Refused(404, f"{ask.model!r} is at version {serving!r}, not {str(ask.version)[:64]!r}")


def _version() -> str:
    try:
        return metadata.version("hedgerow")
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed
