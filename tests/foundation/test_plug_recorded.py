"""Smart plugs on recorded messages: tests/fixtures/power/mqtt, each file with what it should say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foundation.plug import plug_of

FOLDER = Path(__file__).parents[1] / "fixtures" / "power" / "mqtt"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json")))
def test_a_recorded_conversation_gives_its_readings(name: str) -> None:
    told = json.loads((FOLDER / f"{name}.json").read_text())
    plug = plug_of(told["plug"])
    assert len(told["messages"]) == len(told["readings"])
    for at, (message, wanted) in enumerate(zip(told["messages"], told["readings"], strict=True)):
        retained = message.get("retained", False)
        reading = plug.take(message["topic"], message["payload"].encode(), float(at), retained=retained)
        if wanted is None:
            assert reading is None
            continue
        watts, joules = wanted
        assert reading is not None
        assert reading.watts == watts
        assert reading.joules == (None if joules is None else pytest.approx(joules))
    assert plug.breaks == told.get("breaks", 0)
