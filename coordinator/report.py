"""Figures of a round and of an update: means over devices, the worst, bytes, joules split by kind."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from foundation.energy import Kind, split_by_kind
from foundation.messages import Update


def update_summary(update: Update, wire_bytes: int) -> dict[str, Any]:
    """Return what the store keeps of an update beside its frame; JSON-ready.

    Bytes are payload with part headers, as counted by whoever received them.
    """
    return {
        "examples": update.examples,
        "metrics": dict(update.metrics),
        "kept_units": list(update.kept_units),
        "ledger": {stage: r.model_dump(mode="json") for stage, r in update.ledger.items()},
        "received_bytes": update.received_bytes,
        "wire_bytes": wire_bytes,
        "problem": update.problem,
        "artifact": update.artifact.sha256 if update.artifact else None,
    }


def round_metrics(updates: Sequence[Update], *, asked: int, seconds: float) -> dict[str, float]:
    """Return a round's figures: unweighted means over devices, the worst device, joules by kind."""
    result = {"asked": float(asked), "updates": float(len(updates)), "seconds": seconds}
    for name in ("accuracy_sent", "accuracy", "loss_sent", "loss"):
        values = [u.metrics[name] for u in updates if name in u.metrics]
        if values:
            result[name] = statistics.fmean(values)
            result[f"{name}_worst"] = (min if name.startswith("accuracy") else max)(values)
    kept = [sum(u.kept_units) / len(u.kept_units) for u in updates if u.kept_units]
    if kept:
        result["kept_units"] = statistics.fmean(kept)
    return result | joules_of(updates)


def joules_of(updates: Sequence[Update]) -> dict[str, float]:
    """Return `joules_measured`, `joules_mixed`, `joules_modelled`: only the kinds that occur."""
    return named(split_by_kind(r for u in updates for r in u.ledger.values()))


def named(joules: Mapping[Kind, float]) -> dict[str, float]:
    """Return joules by kind under the names that figures have."""
    return {f"joules_{kind}": value for kind, value in joules.items()}
