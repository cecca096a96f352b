"""The coordinator's word about a device's models: done once, told, and second to the owner's."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edge_agent import orders
from edge_agent.serving import owner, record
from edge_agent.serving.predictor import Predictor
from export.folder import ORDERED, PINNED, SERVING, linked
from foundation.codec import assignment_from, frame_of
from foundation.errors import UnknownVerb, WireError
from foundation.messages import Assignment, Command, command_of
from tests.artifacts import Artifact, Family, family
from tests.foundation.test_messages import ASSIGNMENT


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("family"))


class Device:
    """A folder of artifacts, what follows it, and commands by number."""

    def __init__(self, root: Path, made: Family) -> None:
        self.root, self.made, self.number = root, made, 0
        self.models: dict[int, Artifact] = {}

    def publish(self, round: int) -> str:
        self.models[round] = self.made.variant(round)
        self.models[round].publish(self.root)
        return self.models[round].sha256

    def order(self, verb: Any, round: int | None = None, **more: Any) -> tuple[bool, str]:
        self.number += 1
        model = "" if round is None else self.models[round].sha256
        command = Command(verb=verb, id=f"c{self.number}", model=model, **more)
        done = orders.carry_out(self.root, command)
        assert orders.carry_out(self.root, command) == done, "said twice, done once"
        return done.done, done.said

    def serves(self) -> int:
        """Look as a server does, also as one that has just started."""
        served = Predictor(self.root).manifest.round
        assert Predictor(self.root).manifest.round == served
        return served


@pytest.fixture
def device(tmp_path: Path, made: Family) -> Device:
    found = Device(tmp_path / "artifacts", made)
    found.publish(2)
    assert found.serves() == 2
    return found


def test_a_held_model_waits_for_its_release_also_over_restarts(device: Device) -> None:
    orders.hold(device.root, True)
    device.publish(3)
    running = Predictor(device.root)
    assert running.manifest.round == 2
    assert device.serves() == 2
    (two, three) = orders.told(device.root, serves=True).kept
    assert (two.waits, three.waits) == (False, True)
    assert device.order("release", 3)[0]
    assert running.reload().changed
    assert device.serves() == 3
    assert not any(one.waits for one in orders.told(device.root, serves=True).kept)


def test_the_first_model_of_a_device_does_not_wait_and_neither_does_one_that_serves(
    tmp_path: Path, made: Family
) -> None:
    fresh = Device(tmp_path / "fresh" / "artifacts", made)
    orders.hold(fresh.root, True)
    fresh.publish(2)
    assert fresh.serves() == 2, "there is nothing else that could answer"
    fresh.publish(3)
    assert fresh.serves() == 2
    orders.hold(fresh.root, False)
    assert fresh.serves() == 3
    orders.hold(fresh.root, True)
    assert fresh.serves() == 3, "it was taken before"


def test_a_model_that_was_never_let_go_is_nothing_to_go_back_to(device: Device) -> None:
    orders.hold(device.root, True)
    device.publish(3)
    device.publish(4)
    device.order("release", 4)
    assert device.serves() == 4
    owner.roll_back(device.root)
    assert device.serves() == 2


def test_the_coordinators_pin_gives_way_to_the_owners(device: Device) -> None:
    device.publish(3)
    assert device.order("pin", 2, by="anna") == (True, f"pinned round 2 ({device.models[2].sha256[:12]}…)")
    assert device.serves() == 2
    assert record.read(device.root).actions[-1].by == "coordinator: anna"
    owner.pin(device.root, "3")
    assert device.serves() == 3
    done, said = device.order("pin", 2)
    assert not done
    assert "this device's owner has pinned" in said
    assert not device.order("rollback", 3)[0]
    done, said = device.order("unpin")
    assert done
    assert "its owner has pinned" in said
    assert linked(device.root, ORDERED) is None
    assert linked(device.root, PINNED) == device.models[3].sha256
    owner.unpin(device.root)
    assert device.serves() == 3


def test_an_owner_rolls_back_from_what_the_coordinator_pinned(device: Device) -> None:
    device.publish(3)
    assert device.serves() == 3
    device.order("pin", 3)
    assert device.serves() == 3
    owner.roll_back(device.root)
    assert linked(device.root, ORDERED) is None
    assert device.serves() == 2


def test_rolling_back_names_its_model_so_that_twice_is_once(device: Device) -> None:
    device.publish(3)
    assert device.serves() == 3
    assert device.order("rollback", 3, reason="odd")[0]
    assert device.serves() == 2
    assert device.order("rollback", 3) == (True, f"{device.models[3].sha256[:12]}… was barred already")
    assert device.serves() == 2
    device.publish(4)
    done, said = device.order("rollback", 4)
    assert done
    assert "did not serve, and will not" in said
    assert device.serves() == 2


@pytest.mark.parametrize("verb", ["release", "pin", "rollback"])
def test_a_model_that_is_not_there_is_refused_by_name(device: Device, verb: str) -> None:
    done = orders.carry_out(device.root, Command.model_validate({"verb": verb, "id": "x", "model": "f" * 64}))
    assert not done.done
    assert done.said == "there is no model ffffffffffff… on this device any more"
    assert linked(device.root, SERVING) == device.models[2].sha256


def test_a_manifest_that_cannot_be_told_is_left_out(device: Device) -> None:
    device.publish(3)
    path = device.root / device.models[3].sha256 / "manifest.json"
    told = json.loads(path.read_text())
    for change in ({"run": "r" * 65}, {"round": -1}, {"round": "x"}):
        path.write_text(json.dumps(told | change))
        assert [one.round for one in orders.told(device.root, serves=True).kept] == [2]


def test_a_device_without_models_answers_too(tmp_path: Path) -> None:
    found = orders.told(tmp_path / "artifacts", serves=False)
    assert (found.serves, found.kept, found.done) == (False, (), ())
    done = orders.carry_out(tmp_path / "artifacts", Command(verb="unpin", id="x"))
    assert (done.done, done.said) == (True, "nothing was pinned from elsewhere")
    assert orders.told(tmp_path / "artifacts", serves=False).done == (done,)


# --- the letters -----------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["verb", "run", "round", "reason", "id", "model", "by", "more"])


def refused_or_a_command(body: bytes) -> None:
    with suppress(WireError):
        assert isinstance(command_of(body), Command)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_command_or_refused(body: bytes) -> None:
    refused_or_a_command(body)


@given(st.dictionaries(KEYS, VALUES | st.sampled_from(["cancel", "pin", "release", "unpin", "rollback"])))
def test_any_fields_are_a_command_or_refused(told: dict[str, Any]) -> None:
    refused_or_a_command(json.dumps(told).encode())


def test_a_verb_of_a_newer_version_says_so_and_a_long_letter_is_not_read() -> None:
    with pytest.raises(
        UnknownVerb, match="does not know the command 'dance': install a newer version"
    ) as told:
        command_of(b'{"verb": "dance", "id": "7", "steps": [1]}')
    assert (told.value.verb, told.value.id) == ("dance", "7")
    with pytest.raises(WireError, match="larger than 4096"):
        command_of(b" " * 5000)


def test_what_older_agents_know_is_what_they_are_sent() -> None:
    assert json.loads(Command(verb="cancel", run="r", round=2, reason="x").body()) == {
        "verb": "cancel", "run": "r", "round": 2, "reason": "x",
    }  # fmt: skip
    plain, held = Assignment(**ASSIGNMENT), Assignment(**ASSIGNMENT, hold=True)
    assert "hold" not in plain.model_dump()
    assert b'"hold"' not in frame_of(plain)
    assert assignment_from(frame_of(plain)) == plain
    assert assignment_from(frame_of(held)).hold


@given(st.binary(max_size=300))
def test_a_damaged_record_holds_nothing_back(content: bytes) -> None:
    found = record.parse(content)
    assert isinstance(found, record.Record)


def test_a_record_of_before_rings_is_read() -> None:
    assert record.parse(b'{"schema_version": 1, "barred": ["a"]}').barred == ("a",)
    with pytest.raises(ValidationError):
        record.Record.model_validate({"released": ["x"] * 17})
