"""The bench of a thousand agents, with twenty: a real broker, a real coordinator, real connections."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import thousand
from bench.thousand_agents import packet, text
from foundation.parameters import layout_size
from foundation.spec import ModelSettings
from hedgerow.broker import find_broker


@pytest.mark.skipif(find_broker("mosquitto") is None, reason="no mosquitto here")
def test_twenty_agents_go_through_the_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert thousand.main(["--quick", "--agents", "20", "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    (figures,) = told["figures"]
    assert figures["agents"] == 20
    assert figures["refused"] == figures["lost_connections"] == 0
    assert figures["update_kb"] == pytest.approx(100, rel=0.1)
    # Each update went over the wire once, and so did each assignment.
    assert figures["kb_up_per_update"] == pytest.approx(figures["update_kb"], rel=0.1)
    assert figures["kb_down_per_update"] == pytest.approx(figures["update_kb"], rel=0.1)
    assert all(bar["met"] for bar in told["bars"])
    assert "coordinator_mb" in capsys.readouterr().out


def test_a_bar_that_is_missed_is_said() -> None:
    small = {"agents": 100, "round_s": 2.0, "coordinator_mb": 150.0, "update_kb": 100.0}
    large = {"agents": 1000, "round_s": 61.0, "coordinator_mb": 180.0, "update_kb": 100.0}
    assert [met for _, met in thousand.verdicts([small, large])] == [False, True, False]
    assert [met for _, met in thousand.verdicts([small, large | {"coordinator_mb": 170.0}])] == [
        False,
        True,
        True,
    ]
    assert [met for _, met in thousand.verdicts([small | {"coordinator_mb": 501.0}])] == [True, False]


@pytest.mark.parametrize(
    ("encoding", "kb"), [("float32", 100), ("float16", 100), ("int8", 100), ("float32", 1000)]
)
def test_a_model_weighs_what_is_asked(encoding: str, kb: float) -> None:
    spec = ModelSettings(**thousand.model_of(kb, encoding)).spec("image", (1, 8, 8), 10)
    assert layout_size(spec.layout) * thousand.WIDTHS[encoding] == pytest.approx(1000 * kb, rel=0.1)


def test_lengths_of_packets_are_those_of_the_standard() -> None:
    # MQTT 3.1.1, 2.2.3: seven bits a byte, the lowest first.
    assert packet(3, 0, b"")[:2] == b"\x30\x00"
    assert packet(3, 0, bytes(127))[1:2] == b"\x7f"
    assert packet(3, 0, bytes(128))[1:3] == b"\x80\x01"
    assert packet(3, 0, bytes(16_384))[1:4] == b"\x80\x80\x01"
    assert text("ab") == b"\x00\x02ab"
