"""Virtual devices that attack: what they send is what they say, and the coordinator notices."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from coordinator.store.sql import Store
from foundation.codec import frame_of, update_from
from foundation.errors import FrameCorrupt, SettingsError
from foundation.messages import Update
from foundation.parameters import Parameters
from foundation.work import Encoding
from hedgerow.hostile import ATTACKS, poisoned, with_nan
from hedgerow.simulate import simulate, simulation_of
from hedgerow.simulate_report import SimulationReport
from hedgerow.simulate_tables import show
from hedgerow.virtual import RUN
from tests.toys import toy_data


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
def test_a_spoilt_frame_holds_what_no_encoder_writes(encoding: Encoding) -> None:
    arrays = {"head.weight": np.ones((2, 3), np.float32), "head.bias": np.ones(2, np.float32)}
    update = Update(run="r", round=1, agent="a", examples=1, parameters=Parameters(arrays))
    frame = frame_of(update, encoding)
    assert update_from(frame).parameters["head.bias"].tolist() == [1, 1]
    with pytest.raises(FrameCorrupt, match="not finite"):
        update_from(with_nan(frame))
    empty = frame_of(update.model_copy(update={"parameters": Parameters()}))
    assert with_nan(empty) == empty


def test_labels_are_called_by_each_others_names() -> None:
    data = toy_data(0)
    turned = poisoned(data, "label_flip")
    assert (turned.train.y == 2 - data.train.y).all()
    assert turned.test is data.test
    assert all(poisoned(data, attack) is data for attack in ATTACKS if attack != "label_flip")


def test_a_simulation_rehearses_attacks(tmp_path: Path) -> None:
    simulation = simulation_of(
        devices=5,
        rounds=2,
        strategy="fedavg",
        limit=400,
        partition="iid",
        settings={"epochs": 1},
        model={"width": 8, "depth": 1, "heads": 2, "patch": 4},
        hostile={0: "nan", "3": "huge"},
        robust={"outlier": 3.0},
    )
    report = simulate(simulation, tmp_path)
    assert all(math.isfinite(d.accuracy) for d in report.devices)
    with Store.open(tmp_path / "coordinator") as store:
        found = {(c.agent, c.round, c.cause) for c in store.quarantine.cases(RUN)}
    assert found == {
        *(("device-0", n, "malformed") for n in (1, 2)),
        *(("device-3", n, "outside") for n in (1, 2)),
    }


def test_a_simulation_says_who_was_quarantined(tmp_path: Path) -> None:
    simulation = simulation_of(
        devices=4,
        rounds=4,
        strategy="fedavg",
        limit=300,
        partition="iid",
        settings={"epochs": 1},
        model={"width": 8, "depth": 1, "heads": 2, "patch": 4},
        hostile={0: "nan"},
    )
    report = simulate(simulation, tmp_path)
    (case,) = report.quarantined
    assert (case.agent, case.cause, case.rounds, case.updates) == ("device-0", "malformed", (1, 2, 3), 3)
    assert case.set_aside
    assert "device-0" not in {d.agent for d in report.devices}
    console = Console(width=200, record=True)
    show(report, console)
    said = console.export_text()
    assert "quarantined: 3 updates of device-0, then set aside (malformed; round 1, 2, 3): array" in said
    assert SimulationReport.model_validate_json(report.model_dump_json()).quarantined == report.quarantined


def test_what_cannot_attack_is_said_by_name() -> None:
    with pytest.raises(SettingsError, match="no device 9 among 0 to 4"):
        simulation_of(devices=5, hostile={9: "nan"})
    with pytest.raises(SettingsError, match=r"hostile\.0: .*'nan', 'huge', 'sign_flip' or 'label_flip'"):
        simulation_of(devices=5, hostile={"0": "lie"})
