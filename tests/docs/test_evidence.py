"""docs/evidence.md says what docs/evidence.json holds, and what follows from it for every bar."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.evidence_bars import bars
from bench.evidence_page import renewed
from tests.docs.pages import ROOT

TITLE = "Fashion-MNIST, 10 devices, pathological:2"
COST = "Cost: Fashion-MNIST, 10 devices, pathological:2, width 64"


def _row(label: str, **figures: Any) -> dict[str, Any]:
    one = {
        "seeds": [0, 1],
        "sent": [0.9, 0.8],
        "served": [0.9, 0.8],
        "kept": [0.1, 0.1],
        "reach": [None, None],
    }
    costs = {
        "cpu_s": [1.0, 1.0],
        "joules": [100.0, 100.0],
        "down_bytes": [10.0, 10.0],
        "up_bytes": [10.0, 10.0],
    }
    return {"label": label, **one, **costs, **figures}


def _verdicts(*rows: dict[str, Any], title: str = TITLE) -> dict[str, tuple[bool | None, str]]:
    return {bar.claim: (bar.met, bar.seen) for bar in bars({title: {"rows": list(rows)}})}


def test_the_page_is_what_the_figures_say() -> None:
    found = json.loads((ROOT / "docs" / "evidence.json").read_text())
    text = (ROOT / "docs" / "evidence.md").read_text()
    assert renewed(text, found) == text, "run bench/evidence.py --pages"


@pytest.mark.parametrize(
    ("sent", "kept", "met"), [(0.891, 0.1, True), (0.88, 0.1, False), (0.9, 0.12, False)]
)
def test_pruning_is_judged_by_accuracy_and_by_what_is_gone(sent: float, kept: float, met: bool) -> None:
    mine = _row("pfl_tpp", sent=[sent, sent - 0.1], kept=[kept, kept])
    (verdict,) = [v for c, v in _verdicts(mine, _row("fedtp")).items() if c.startswith("pruning")]
    assert verdict[0] is met


def test_hedgerow_is_held_against_the_best_of_its_rivals() -> None:
    rivals = [_row("local"), _row("fedper", served=[0.95, 0.93]), _row("fedtp"), _row("fedavg + fine-tuning")]
    found = _verdicts(_row("hedgerow", served=[0.931, 0.94]), *rivals)
    (verdict,) = [v for c, v in found.items() if c.startswith("`hedgerow` − best")]
    assert verdict == (True, "-0.45 against fedper (2 seeds)")
    assert found["the same, mean of these"] == (False, "-0.45 points")


def test_what_is_not_reached_by_every_seed_is_not_met() -> None:
    reach = {"cpu": 99.0, "joules": 99.0, "bytes": 99.0}
    for reaches, met in (([reach, reach], True), ([reach, None], False), ([None, None], False)):
        found = _verdicts(_row("hedgerow", reach=reaches), title=COST)
        (verdict,) = [v for c, v in found.items() if c.startswith("to FedAvg's best")]
        assert verdict[0] is met


def test_costs_are_held_against_fedper_run_for_run() -> None:
    mine = _row("hedgerow", joules=[30.0, 50.0], down_bytes=[1.0, 1.0], up_bytes=[3.0, 3.0])
    found = _verdicts(mine, _row("fedper"), title=COST)
    (verdict,) = [v for c, v in found.items() if c.startswith("a round of `hedgerow`")]
    assert verdict == (True, "40 %, 20 %")


def test_units_need_more_than_a_standard_error_over_both() -> None:
    title = "CIFAR-10, 4 devices, iid: which units are kept"
    dense, random = _row("dense, 256 units", sent=[0.3, 0.3]), _row("random units", sent=[0.27, 0.27])
    narrow = _row("narrow dense", sent=[0.26, 0.26])
    for learned, met in (([0.29, 0.28], True), ([0.29, 0.25], False)):
        rows = (dense, _row("learned thresholds", sent=learned), random, narrow)
        ((seen, _),) = _verdicts(*rows, title=title).values()
        assert seen is met
