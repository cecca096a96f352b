"""The description of the API: kept in docs/openapi.json, with an example of every answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from coordinator.live import Live
from coordinator.web.described import EXAMPLES
from tests.coordinator.api_examples import DESCRIPTION, application, written
from tests.coordinator.filled_store import Clock, Engine

AGAIN = "run `python -m tests.coordinator.api_examples`, look at what changed, and commit it"
FOUND: dict[str, Any] = json.loads(EXAMPLES.read_text("utf-8"))


@pytest.fixture(scope="module")
def app() -> FastAPI:
    store: Any = None  # no route is called
    return application(store, Live(), Engine(store, Live()), Clock())


def test_the_description_in_the_docs_is_the_applications(app: FastAPI) -> None:
    assert DESCRIPTION.read_text("utf-8") == written(app.openapi()), AGAIN


def operations(app: FastAPI) -> dict[str, dict[str, Any]]:
    paths = app.openapi()["paths"]
    return {f"{verb.upper()} {path}": said for path, verbs in paths.items() for verb, said in verbs.items()}


def test_every_operation_has_an_example_words_and_problems(app: FastAPI) -> None:
    found = operations(app)
    assert found.keys() == FOUND.keys(), AGAIN
    for name, said in found.items():
        assert said.get("description"), f"{name} says nothing"
        assert said["tags"], name
        for code, answer in said["responses"].items():
            if code.startswith("2"):
                assert "example" in next(iter(answer["content"].values())), name
            else:
                assert [*answer["content"]] == ["application/problem+json"], f"{name} {code}"


def routes(app: FastAPI) -> dict[str, Any]:
    seen = [
        *app.routes,
        *(one for r in app.routes for one in getattr(getattr(r, "original_router", r), "routes", ())),
    ]
    found: dict[str, Any] = {}
    for route in seen:
        if isinstance(route, APIRoute) and route.include_in_schema:
            found |= {f"{method} {route.path}": route.response_model for method in route.methods}
    return found


def test_examples_are_what_they_stand_for(app: FastAPI) -> None:
    checked = 0
    for name, model in routes(app).items():
        if not isinstance(FOUND[name], str):
            TypeAdapter(model).validate_json(json.dumps(FOUND[name]))
            checked += 1
    assert checked == len(FOUND) - 1, "all but the stream of events"
