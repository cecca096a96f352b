"""Figures of a round and of an update: means over devices, the worst, bytes by role, joules split by kind."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from foundation.codec import array_bytes
from foundation.energy import Kind, split_by_kind
from foundation.messages import Update
from foundation.parameters import role_of

MASK = "mask"
"""What packed masks count under, beside the roles."""
_WORDS = {"hypernet": "hypernetwork"}
_WHOLE = ("flat", "embedding")
"""Arrays that stand for themselves: a model without names, and where a hypernetwork looks it up."""


def role_bytes(frame: bytes) -> dict[str, int]:
    """Return a frame's payload bytes by what they are for; the largest first.

    Counted as they travel: values times the width of their encoding, scales and bitmaps included, kept units
    only where masks come along; before compression, and without the header's JSON and the parts' own headers.
    So the sum is not the bytes on the wire, which `received_bytes` and `wire_bytes` are. Names with a prefix
    count under it (`teacher`, `hypernetwork`), packed masks under `mask`.
    """
    result: dict[str, int] = {}
    for name, size in array_bytes(frame).items():
        part = part_of(name)
        result[part] = result.get(part, 0) + size
    return dict(sorted(result.items(), key=lambda item: (-item[1], item[0])))


def part_of(name: str) -> str:
    """Return what an array is for: its prefix, `mask`, `flat`, `embedding`, or the role of its name."""
    prefix, slash, _ = name.partition("/")
    if slash:
        return _WORDS.get(prefix, prefix)
    if name.endswith("|mask"):
        return MASK
    return name if name in _WHOLE else str(role_of(name))


def update_summary(
    update: Update, wire_bytes: int, *, up: bytes | None = None, down: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Return what the store keeps of an update beside its frame; JSON-ready.

    Bytes are payload with part headers, as counted by whoever received them. Bytes by role are those of the
    frame `up` (the update), and `down` (of the assignment that it answers), where they are given.
    """
    return {
        "examples": update.examples,
        "metrics": dict(update.metrics),
        "kept_units": list(update.kept_units),
        "ledger": {stage: r.model_dump(mode="json") for stage, r in update.ledger.items()},
        "timing": None if update.timing is None else update.timing.model_dump(mode="json"),
        "received_bytes": update.received_bytes,
        "wire_bytes": wire_bytes,
        "interface": update.interface,
        "interface_received_bytes": update.interface_received_bytes,
        "interface_sent_bytes": update.interface_sent_bytes,
        "state": None if update.state is None else update.state.model_dump(mode="json", exclude_none=True),
        "up_role_bytes": {} if up is None else role_bytes(up),
        "down_role_bytes": dict(down or {}),
        "problem": update.problem,
        "artifact": update.artifact.sha256 if update.artifact else None,
    }


def update_words(update: Update) -> str:
    """Return what an update says of itself, in words."""
    accuracy, epsilon = update.metrics.get("accuracy"), update.metrics.get("epsilon")
    words = "accuracy not told" if accuracy is None else f"accuracy {accuracy:.3f}"
    return words if epsilon is None else f"{words}, privacy spent: epsilon {epsilon:.3g}"


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
