"""What bench/evidence.py runs: tables of one fleet each, and the methods in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RATES = (5e-4, 1.5e-3, 4e-3)
PROFILE = "generic-x86-server"
"""The power model of all runs: joules are modelled from the CPU time of the machine that simulates."""


@dataclass(frozen=True)
class Method:
    """A row: a strategy with its settings."""

    label: str
    strategy: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    fleet: Mapping[str, Any] = field(default_factory=dict)
    """What differs in the fleet, such as the model."""
    rates: tuple[float, ...] = ()
    """Learning rates that are tried; the table's alone without."""
    by: str = "best"
    """What the rate is chosen by: validation `sent`, `after`, or the better of the two (`best`)."""
    served: str = "best"
    """Which accuracy is the method's own where one figure is wanted: `sent`, `after`, or by validation."""
    seeds: tuple[int, ...] = ()
    """Seeds that it is run with; the table's without."""


@dataclass(frozen=True)
class Table:
    """Methods on one fleet."""

    title: str
    fleet: Mapping[str, Any]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    rate: float = 1.5e-3
    """Learning rate of what is not tuned."""
    note: str = ""


def fleet(dataset: str, partition: str, devices: int, rounds: int, **more: Any) -> dict[str, Any]:
    """Return the fields of `Simulation` that a table shares."""
    named = {"dataset": dataset, "partition": partition, "devices": devices, "rounds": rounds}
    return {**named, "profile": PROFILE, **more}


MAIN = (
    Method("local", "local", rates=RATES, by="after", served="after"),
    Method("fedavg", "fedavg", rates=RATES, by="sent", served="sent"),
    Method("fedavg + fine-tuning", "fedavg", rates=RATES, by="after", served="after"),
    Method("fedper", "fedper", rates=RATES),
    Method("fedtp", "fedtp", rates=RATES),
    Method("pfl_tpp", "pfl_tpp", {"target": 0.92}, rates=RATES),
    Method("hedgerow", "hedgerow", rates=(1.5e-3, 3e-3, 6e-3)),
)
"""The methods of every table, with their baselines."""

OTHERS = (
    Method("pfl_tpp, lean, int8", "pfl_tpp", {"target": 0.92, "lean": True, "encoding": "int8"}),
    Method("hedgerow, one epoch a round", "hedgerow", {"epochs": 1, "learning_rate": 3e-3}),
    Method("hedgerow, gates learned", "hedgerow", {"gate_rate": 0.2, "learning_rate": 3e-3}),
    Method("fedprox", "fedprox", seeds=(0,)),
    Method("pfedhn", "pfedhn", seeds=(0,)),
    Method("pfedla", "pfedla", seeds=(0,)),
    Method("heurpfedla, K = 2", "pfedla", {"heuristic": 2}, seeds=(0,)),
    Method("adaptive_pruning", "adaptive_pruning", seeds=(0,)),
)

BESIDE = "One run at a time and nothing beside; every seed through all methods before the next."
SPLITS = ("pathological:2", "dirichlet:0.3")
LEAN = {"target": 0.92, "lean": True, "warm_up": 0}
COSTS = (
    Method("fedavg", "fedavg", by="sent", served="sent"),
    Method("fedper", "fedper"),
    Method("pfl_tpp, lean", "pfl_tpp", LEAN),
    Method("pfl_tpp, lean, int8", "pfl_tpp", {**LEAN, "encoding": "int8", "encoding_down": "int8"}),
    Method("hedgerow", "hedgerow", {"learning_rate": 3e-3}),
    Method("hedgerow, one epoch a round", "hedgerow", {"epochs": 1, "learning_rate": 3e-3}),
)
LONG = {"epochs": 3, "learning_rate": 3e-3}
CONTROL = {"personal_head": False, "ffl": "mean_of_keepers", "target": 0.9, **LONG}
UNITS = (
    Method("dense, 256 units", "fedtp", LONG),
    Method("learned thresholds, 10 % kept", "pfl_tpp", {**CONTROL, "warm_up": 4}),
    Method("random units, 10 % kept", "pfl_tpp", {**CONTROL, "warm_up": 4, "importance": "random"}),
    Method("narrow dense, 26 units", "fedtp", LONG, {"model": {"ffl_ratio": 0.4}}),
)
CELL = {"bandwidth_hz": 1e5}
SIZES = ({"width": 32, "depth": 2}, {"width": 64, "depth": 2}, {"width": 64, "depth": 3})


def _unequal(label: str, sizes: tuple[dict[str, int], ...], **settings: Any) -> Method:
    return Method(label, "mh_pfedhn", settings, {"device_models": list(sizes)}, served="best")


SECTIONS: dict[str, tuple[Table, ...]] = {
    "fashion": tuple(
        Table(
            f"Fashion-MNIST, 10 devices, {split}",
            fleet("fashion-mnist", split, 10, 10, limit=4000),
            MAIN,
        )
        for split in SPLITS
    ),
    "others": tuple(
        Table(
            f"Fashion-MNIST, 10 devices, {split}: the other methods",
            fleet("fashion-mnist", split, 10, 10, limit=4000),
            (Method("fedavg", "fedavg", by="sent", served="sent"), *OTHERS),
        )
        for split in SPLITS
    ),
    "har": (Table("UCI HAR, 10 people, by:subject", fleet("uci-har", "by:subject", 10, 12), MAIN),),
    "shakespeare": (
        Table(
            "Shakespeare, 10 roles, by:role",
            fleet("shakespeare", "by:role", 10, 12, limit=2400),
            MAIN,
            rate=4e-3,
        ),
    ),
    "cifar": tuple(
        Table(
            f"CIFAR-10 (10k/4k subset), 10 devices, {split}",
            fleet("cifar10", split, 10, 10, limit=4000),
            MAIN,
        )
        for split in SPLITS
    ),
    "units": (
        Table(
            "CIFAR-10, 4 devices, iid: which units are kept", fleet("cifar10", "iid", 4, 8, limit=6000), UNITS
        ),
    ),
    "unequal": (
        Table(
            "Fashion-MNIST, 9 devices, pathological:2: unequal models",
            fleet("fashion-mnist", "pathological:2", 9, 10, limit=4000),
            (
                _unequal("three sizes mixed", SIZES),
                _unequal("three sizes mixed, with teacher", SIZES, teacher=True),
                *(_unequal(f"width {s['width']}, depth {s['depth']} alone", (s,)) for s in SIZES),
                Method("local, width 64, depth 2", "local", served="after"),
            ),
        ),
    ),
    "allocation": (
        Table(
            "Fashion-MNIST, 10 devices, pathological:2: a cell of 100 kHz",
            fleet("fashion-mnist", "pathological:2", 10, 10, limit=4000),
            (
                Method("adaptive_pruning, shortest round", "adaptive_pruning", {**CELL, "tightness": 1.0}),
                Method("adaptive_pruning, half way", "adaptive_pruning", {**CELL, "tightness": 0.5}),
                Method("adaptive_pruning, not pruned", "adaptive_pruning", {**CELL, "tightness": 0.0}),
            ),
        ),
    ),
    "late": (
        Table(
            "Fashion-MNIST, 12 devices, dirichlet:0.3: the last 2 join after round 8",
            fleet("fashion-mnist", "dirichlet:0.3", 12, 9, limit=4800, late=2, late_after=8),
            (
                Method("fedavg", "fedavg", {"epochs": 1}),
                Method("fedtp, cold start", "fedtp", {"cold_start_local": 1}),
                Method("hedgerow", "hedgerow", {"learning_rate": 3e-3}),
            ),
        ),
    ),
    "cost": (
        *(
            Table(
                f"Cost: Fashion-MNIST, 10 devices, {split}, width 64",
                fleet("fashion-mnist", split, 10, 10, limit=4001),
                COSTS,
                seeds=(0, 1),
                note=BESIDE,
            )
            for split in SPLITS
        ),
        Table(
            "Cost: Fashion-MNIST, 10 devices, pathological:2, width 128",
            fleet("fashion-mnist", "pathological:2", 10, 10, limit=4001, model={"width": 128}),
            COSTS,
            seeds=(0,),
            note=BESIDE,
        ),
    ),
    "fashion20": tuple(
        Table(
            f"Fashion-MNIST, 20 devices, {split}",
            fleet("fashion-mnist", split, 20, 10, limit=4000),
            MAIN,
        )
        for split in SPLITS
    ),
}
