"""The application as OpenAPI describes it: with an example of every answer, from `examples.json`.

The examples are what a filled coordinator answered; `python -m tests.coordinator.api_examples` asks it again.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from coordinator.web.api import PROBLEM

EXAMPLES = Path(__file__).with_name("examples.json")
STREAM = "text/event-stream"
JSON = "application/json"


class Described(FastAPI):
    """An application whose description has examples."""

    def openapi(self) -> dict[str, Any]:
        """Return the description, made once."""
        if self.openapi_schema is None:
            found = super().openapi()
            for operation, example in json.loads(EXAMPLES.read_text("utf-8")).items():
                method, _, path = operation.partition(" ")
                described = found["paths"].get(path, {}).get(method.lower())
                if described is not None:  # a coordinator without models has no addresses for them
                    _answer(described)["example"] = example
            for path, verbs in found["paths"].items():
                for described in verbs.values():
                    _tell_problems(described["responses"], (429,) if path == "/healthz" else (401, 429))
        assert self.openapi_schema is not None
        return self.openapi_schema


def _tell_problems(responses: dict[str, Any], more: tuple[int, ...]) -> None:
    """Let every error be a problem alone, as FastAPI adds its own type; add what the door says."""
    for answer in responses.values():
        if PROBLEM in answer["content"]:
            answer["content"].pop(JSON, None)
    responses |= {str(code): _problem(code) for code in more}


def _problem(code: int) -> dict[str, Any]:
    """Return what the door says (coordinator/web/door.py), which belongs to no operation."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": HTTPStatus(code).phrase, "content": {PROBLEM: {"schema": schema}}}


def _answer(operation: dict[str, Any]) -> dict[str, Any]:
    """Return what is said of an operation's good answer."""
    code = next(code for code in operation["responses"] if code.startswith("2"))
    content: dict[str, dict[str, Any]] = operation["responses"][code]["content"]
    return content[STREAM if STREAM in content else JSON]
