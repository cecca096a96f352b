"""What OpenAPI says beside the routes: errors as they are, that a token may be asked for, and examples.

The examples are what a filled coordinator answered; `python -m tests.coordinator.api_examples` asks it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from coordinator.web.models import Problem

PROBLEM = "application/problem+json"
EVERYWHERE = {
    "401": "A token is asked for, or this one is not known.",
    "403": "This token may look and not change, or a page from elsewhere asked.",
    "429": "Too many requests, or too many wrong tokens, from this address.",
    "500": "Something went wrong here; the coordinator's log has it.",
}
"""Answers that the door and the handlers of errors give on any route of the API."""
EXAMPLES = Path(__file__).with_name("examples.json")
STREAM = "text/event-stream"
JSON = "application/json"
OPEN = "/healthz"
"""Asked for no token, and answered before anything could be wrong with one."""


def describe(app: FastAPI) -> None:
    """Make the description of `app` true about errors, and give an example of every answer."""
    made: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = made()
            _correct(described)
            _exemplify(described)
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _correct(described: dict[str, Any]) -> None:
    parts = described.setdefault("components", {})
    schemas = parts.setdefault("schemas", {})
    schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operation in _operations(described):
        if path != OPEN:
            operation["security"] = [{"token": []}, {}]  # on loopback nobody is asked
        responses = operation["responses"]
        for code, text in _also(path, operation).items():
            responses.setdefault(code, {"description": text})
        for response in (one for code, one in responses.items() if code >= "400"):
            response["content"] = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}


def _also(path: str, operation: dict[str, Any]) -> dict[str, str]:
    """Return what others than the route itself may answer."""
    found = EVERYWHERE if path != OPEN else {code: EVERYWHERE[code] for code in ("429", "500")}
    return found | ({"400": "The body cannot be read."} if "requestBody" in operation else {})


def _operations(described: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in described["paths"].items():
        for operation in methods.values():
            yield path, operation


def _exemplify(described: dict[str, Any]) -> None:
    for operation, example in json.loads(EXAMPLES.read_text("utf-8")).items():
        method, _, path = operation.partition(" ")
        found = described["paths"].get(path, {}).get(method.lower())
        if found is not None:  # a coordinator without models has no addresses for them
            _answer(found)["example"] = example


def _answer(operation: dict[str, Any]) -> dict[str, Any]:
    """Return what is said of an operation's good answer."""
    code = next(code for code in operation["responses"] if code.startswith("2"))
    content: dict[str, dict[str, Any]] = operation["responses"][code]["content"]
    return content[STREAM if STREAM in content else JSON]
