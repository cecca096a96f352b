"""What agents and coordinator say: frozen, closed, finite, and without arrays in their JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from foundation.energy import EnergyReading, Kind, Scope, Stage
from foundation.messages import (
    PROTOCOL,
    AgentCard,
    Assignment,
    Command,
    Presence,
    Refusal,
    Telemetry,
    Update,
)
from foundation.parameters import Parameters
from foundation.spec import ModelSpec
from foundation.work import LocalWork, Proximal, ThresholdPruning

SPEC = ModelSpec(input="text", shape=(8,), classes=30)
READING = EnergyReading(joules=3.0, seconds=2.0, kind=Kind.MODELLED, scope=Scope.BOARD_DC, sensor="psutil")
ASSIGNMENT: dict[str, Any] = {
    "run": "r",
    "round": 1,
    "agent": "a",
    "strategy": "fedavg",
    "spec": SPEC,
    "model_seed": 0,
    "seed": 0,
    "work": LocalWork(terms=(Proximal(mu=0.1), ThresholdPruning())),
    "deadline_s": 10,
}
UPDATE: dict[str, Any] = {
    "run": "r",
    "round": 1,
    "agent": "a",
    "examples": 5,
    "ledger": {Stage.TRAIN: READING},
}
MESSAGES = [
    AgentCard(agent="a", version="1", profile="pi", examples=3, labels=("x",), terms=frozenset({"proximal"})),
    Presence(state="online", session="s"),
    Refusal(run="r", round=1, agent="a", reason="no data"),
    Telemetry(agent="a", stage=Stage.TRAIN, progress=0.5),
    Command(verb="cancel", run="r", round=1),
    Assignment(**ASSIGNMENT),
    Update(**UPDATE),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_survives_its_json_and_nothing_may_be_added(message: BaseModel) -> None:
    kind, text = type(message), message.model_dump_json()
    assert kind.model_validate_json(text) == message
    with pytest.raises(ValidationError, match="extra"):
        kind.model_validate_json(text[:-1] + ', "surprise": 1}')
    with pytest.raises(ValidationError, match="frozen"):
        message.agent = "b"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Assignment, {**ASSIGNMENT, "round": 0}),
        (Assignment, {**ASSIGNMENT, "deadline_s": 0}),
        (Update, {**UPDATE, "examples": -1}),
        (Update, {**UPDATE, "metrics": {"loss": float("nan")}}),
        (Update, {**UPDATE, "ledger": {"sleep": READING}}),
        (Update, {**UPDATE, "parameters": {"head.weight": np.zeros(1)}}),
        (Presence, {"state": "asleep"}),
        (Command, {"verb": "explode", "run": "r", "round": 1}),
        (Telemetry, {"agent": "a", "stage": "train", "progress": 1.5}),
        (Telemetry, {"agent": "a", "stage": "train", "joules": float("inf")}),
        (Refusal, {"run": "r", "round": 1, "agent": "a", "reason": "x" * 2001}),
    ],
)
def test_what_cannot_be_meant_is_refused(kind: type[BaseModel], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind(**fields)


def test_arrays_stay_out_of_the_json() -> None:
    arrays = {"parameters": Parameters({"x": np.zeros(2)}), "masks": {"blocks.0.ffl": np.ones(2, np.bool_)}}
    for message in (Assignment(**ASSIGNMENT, **arrays), Update(**UPDATE, **arrays)):
        assert not {"parameters", "masks"} & message.model_dump().keys()
        assert message.parameters is arrays["parameters"]
        assert message.masks["blocks.0.ffl"].all()


def test_terms_are_told_apart_and_unknown_ones_refused_by_name() -> None:
    work = LocalWork.model_validate({"terms": [{"term": "proximal", "mu": 1}, {"term": "threshold_pruning"}]})
    assert work.proximal() == Proximal(mu=1)
    assert work.pruning() == ThresholdPruning()
    assert LocalWork().pruning() is None
    assert LocalWork().proximal() is None
    with pytest.raises(ValidationError, match="homework"):
        LocalWork.model_validate({"terms": [{"term": "homework"}]})


def test_a_card_says_which_protocol_it_speaks() -> None:
    assert AgentCard(agent="a", version="1", profile="pi", examples=0).protocol == PROTOCOL
