"""The HTTP API against its own description: schemathesis asks what OpenAPI allows, and what it does not.

Few examples an operation, always the same; with HEDGEROW_LONG=1 many more, drawn anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.python import asgi
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from coordinator.app import create_app
from coordinator.fleet.records import FleetRecords
from coordinator.fleet.tokens import ApiTokens
from coordinator.live import Live
from coordinator.rollout.steward import Steward
from coordinator.roster import Roster
from coordinator.settings import RolloutSettings
from coordinator.store.sql import Store
from coordinator.web.described import PROBLEM
from tests.coordinator.filled_store import Clock, Engine, enliven, fill

LONG = os.environ.get("HEDGEROW_LONG") == "1"
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    positive_data_acceptance,
)
LEFT_OUT = {
    # What is meant is looked at here, too: strategies that there are, devices that are known.
    "/api/v1/runs": (positive_data_acceptance,),
    "/api/v1/models/{verb}": (positive_data_acceptance,),
    # A single text in place of a list of them is a list of one in an address.
    "/api/v1/orders": (negative_data_rejection,),
}
STREAM = "/api/v1/events"
"""Does not end; what it answers to wrong ids is in test_api.py."""


@dataclass
class House:
    app: FastAPI
    client: Any
    headers: dict[str, dict[str, str]]
    operations: list[Any]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    clock = Clock()
    with Store.open(tmp_path_factory.mktemp("schema"), clock=clock) as store:
        live = Live(store, clock=clock, monotonic=clock)
        fill(store, clock, rounds=2)
        enliven(live, clock, 2)
        store.set_run_state("greenhouse-1", "finished")
        tokens = ApiTokens(store)

        async def send(agent: str, body: bytes) -> None: ...

        steward = Steward(
            RolloutSettings(enabled=True), store=store, live=live, roster=Roster(), send=send, clock=clock
        )
        app = create_app(
            store, live, Engine(store, live), models=steward, tokens=tokens, records=FleetRecords(store),
            per_second=1e9, clock=clock,
        )  # fmt: skip
        made = {role: tokens.make(role, role, expires_s=None) for role in ("viewer", "operator")}
        headers = {role: {"Authorization": f"Bearer {token}"} for role, token in made.items()}
        described = schemathesis.openapi.from_asgi("/api/v1/openapi.json", app, headers=headers["viewer"])
        found = [result.ok() for result in described.get_all_operations()]
        with asgi.get_client(app) as client:
            yield House(app, client, {"nobody": {}, **headers}, [o for o in found if o.path != STREAM])


@pytest.mark.parametrize(
    ("role", "mode", "examples"),
    [
        ("nobody", POSITIVE, 2),
        ("viewer", POSITIVE, 4),
        ("operator", POSITIVE, 10),
        ("operator", NEGATIVE, 6),
    ],
    ids=lambda value: getattr(value, "value", value),
)
def test_answers_are_as_described(house: House, role: str, mode: GenerationMode, examples: int) -> None:
    counts: dict[int, int] = {}
    asked = [o.label for o in house.operations if _asked(house, o, role, mode, examples, counts)]
    assert len(asked) >= (len(house.operations) if mode is POSITIVE else 12), asked
    if role == "nobody":
        assert set(counts) == {200, 401}, "only whether it is alive is for everybody"
    else:
        assert {200, 404, 422} & set(counts), counts


def _asked(
    house: House, operation: Any, role: str, mode: GenerationMode, examples: int, counts: dict[int, int]
) -> bool:
    """Ask one operation; whether anything could be asked: what takes any text cannot be asked wrongly."""
    left_out = LEFT_OUT.get(operation.path, ())
    checks = [check for check in CHECKS if check not in left_out]

    @seed(7)
    @settings(
        max_examples=50 * examples if LONG else examples, database=None, deadline=None, derandomize=not LONG,
        phases=[Phase.generate], suppress_health_check=[*HealthCheck],
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Case) -> None:
        answer = case.call(session=house.client, headers=house.headers[role])
        counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
        case.validate_response(answer, checks=checks)
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == [PROBLEM]
        if role == "viewer" and operation.method != "get":
            assert answer.status_code == 403

    try:
        ask()
    except Unsatisfiable:
        return False
    return True


@pytest.mark.parametrize("name", ["..%2f", "a%00b", "%F0%9F%8C%B1", "%ff%fe", "x" * 5000, "' or 1=1 --"])
def test_a_hostile_name_is_not_found_and_nothing_else(house: House, name: str) -> None:
    for path in (
        "fleet/{}",
        "runs/{}",
        "runs/{}/rounds",
        "runs/{}/energy",
        "runs/{}/updates",
        "runs/{}/rounds/1/updates",
    ):
        answer = house.client.get("/api/v1/" + path.format(name), headers=house.headers["viewer"])
        assert answer.status_code == 404, (path, answer.text)
        assert answer.headers["content-type"] == PROBLEM
    for number in ("0", "-1", "9" * 18, "9" * 19, "9" * 400):
        answer = house.client.get(
            f"/api/v1/runs/greenhouse-1/rounds/{number}/updates", headers=house.headers["viewer"]
        )
        assert answer.status_code in (404, 422), (number, answer.text)
        answer = house.client.get(
            "/api/v1/runs/greenhouse-1/rounds", params={"after": number}, headers=house.headers["viewer"]
        )
        assert answer.status_code in (200, 422), (number, answer.text)


@pytest.mark.parametrize("address", ["runs/greenhouse-1/rounds/{}", "parts/runs/greenhouse-1/rounds/{}"])
def test_a_page_of_a_round_that_cannot_be_is_not_found(house: House, address: str) -> None:
    for number in ("-1", "9" * 19, "9" * 400, "x"):
        answer = house.client.get("/" + address.format(number), headers=house.headers["viewer"])
        assert answer.status_code in (404, 422), (number, answer.text)


def test_errors_are_described_as_problems_and_as_nothing_else(house: House) -> None:
    described = house.app.openapi()
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            wrong = {code: r for code, r in operation["responses"].items() if code >= "400"}
            assert all(list(r["content"]) == [PROBLEM] for r in wrong.values()), (method, path)
            assert path == "/healthz" or {"401", "403", "429", "500"} <= set(wrong), (method, path)
    assert "HTTPValidationError" not in described["components"]["schemas"]
