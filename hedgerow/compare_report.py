"""What a comparison found, as one value with a versioned schema; tables, page and CSV are views of it.

Rounds and what they cost. The model that is evaluated "as sent" in round r was trained in rounds 1 to r - 1
and came down in round r. So accuracy as sent in round r costs training and uplink of the rounds before r and
the downlink up to and with r; accuracy after local training costs the training of round r as well. "To reach"
is counted so for every strategy alike. "At the last round" is everything that all rounds took.

Costs are sums over devices. CPU seconds are those of training and pruning: evaluating is measuring, not work.
Joules are those of training, pruning, receiving and sending, with kind and scope: kinds and scopes are never
added, and a saving in joules is given only where both sides have the same single kind.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Self

from foundation.artifact import Manifest
from foundation.energy import EnergyReading, Kind, Scope, Stage
from foundation.frozen import Frozen
from foundation.messages import Json
from foundation.spec import ModelSpec

SCHEMA_VERSION = 1


class Over(Frozen):
    """A figure over seeds."""

    median: float
    min: float
    max: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """Return median and range, or `None` when one of the values is unknown, or there is none."""
        found = list(values)
        known = [value for value in found if value is not None]
        if not known or len(known) < len(found):
            return None
        return cls(median=statistics.median(known), min=min(known), max=max(known), seeds=len(known))


class Spread(Frozen):
    """An accuracy (share of 1) over the devices of a round: unweighted."""

    mean: float
    worst_tenth: float
    """Mean over the worst tenth of the devices, at least one."""
    worst: float
    deviation: float
    """Standard deviation over the devices."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of at least one value."""
        worst = sorted(values)[: max(1, math.ceil(len(values) / 10))]
        return cls(
            mean=statistics.fmean(values),
            worst_tenth=statistics.fmean(worst),
            worst=worst[0],
            deviation=statistics.pstdev(values),
        )


class EnergySum(Frozen):
    """Joules of one kind and one scope, and the seconds of their windows."""

    kind: Kind
    scope: Scope
    joules: float | None
    """`None` for windows that nobody knows."""
    seconds: float


class Cost(Frozen):
    """What something took, all devices together."""

    cpu_s: float | None = 0.0
    """CPU seconds; `None` when a device did not tell them."""
    wall_s: float = 0.0
    """Wall seconds of the same work, each device by itself."""
    energy: tuple[EnergySum, ...] = ()
    down_bytes: int = 0
    up_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes in both directions."""
        return self.down_bytes + self.up_bytes

    @property
    def joules(self) -> EnergySum | None:
        """The joules when they are of one kind and one scope throughout; `None` otherwise."""
        found = [part for part in self.energy if part.seconds > 0 or part.joules]
        return found[0] if len(found) == 1 and found[0].joules is not None else None

    def __add__(self, other: Cost) -> Cost:
        """Add, kinds and scopes apart."""
        unknown = self.cpu_s is None or other.cpu_s is None
        return Cost(
            cpu_s=None if unknown else (self.cpu_s or 0.0) + (other.cpu_s or 0.0),
            wall_s=self.wall_s + other.wall_s,
            energy=energy_sums((*self.energy, *other.energy)),
            down_bytes=self.down_bytes + other.down_bytes,
            up_bytes=self.up_bytes + other.up_bytes,
        )


def energy_sums(parts: Iterable[EnergySum | EnergyReading]) -> tuple[EnergySum, ...]:
    """Return sums of joules and seconds by kind and scope; unknown joules keep a kind of their own."""
    sums: dict[tuple[Kind, Scope], list[EnergySum | EnergyReading]] = {}
    for part in parts:
        key = (Kind.NONE, Scope.UNKNOWN) if part.joules is None else (part.kind, part.scope)
        sums.setdefault(key, []).append(part)
    return tuple(
        EnergySum(
            kind=kind,
            scope=scope,
            joules=None if kind is Kind.NONE else math.fsum(part.joules or 0.0 for part in found),
            seconds=math.fsum(part.seconds for part in found),
        )
        for (kind, scope), found in sorted(sums.items())
    )


class StageSum(EnergySum):
    """The same of one stage."""

    stage: Stage


class RoundFigures(Frozen):
    """One round of one run."""

    round: int
    devices: int
    sent: Spread
    """Accuracy of the model as it was sent, on each device's own test part."""
    after: Spread
    """After local training."""
    validation_sent: float | None
    validation: float | None
    """Mean accuracy on the devices' validation parts: what settings are chosen by."""
    kept_units: tuple[float, ...]
    """FFL units kept by block, mean over the devices that have that block."""
    received: Cost
    worked: Cost
    sent_back: Cost
    seconds: float | None
    """From opening to closing on the machine that simulated, its other work and pauses included."""

    @property
    def cost(self) -> Cost:
        """Everything of the round."""
        return self.received + self.worked + self.sent_back


class StageFigures(Frozen):
    """One stage of one device in one round."""

    seconds: float
    joules: float | None
    kind: Kind
    scope: Scope


class DeviceFigures(Frozen):
    """One device in one round."""

    round: int
    agent: str
    examples: int
    accuracy_sent: float
    accuracy: float
    validation_sent: float | None
    validation: float | None
    kept_units: tuple[int, ...]
    down_bytes: int
    up_bytes: int
    down_role_bytes: dict[str, int]
    up_role_bytes: dict[str, int]
    cpu_s: float | None
    stages: dict[Stage, StageFigures]


class ModelFigures(Frozen):
    """One device's exported ONNX model, and the same without any unit cut."""

    agent: str
    bytes: int
    dense_bytes: int
    parameters: int
    dense_parameters: int
    latency_ms: float | None
    dense_latency_ms: float | None
    """Median of one sample, one thread, on the machine that simulated."""
    parity: float

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Take what a comparison shows from a manifest."""
        return cls(**{name: getattr(manifest, name) for name in cls.model_fields})


class RunFigures(Frozen):
    """One strategy with one seed."""

    label: str
    seed: int
    spec: ModelSpec
    rounds: tuple[RoundFigures, ...]
    devices: tuple[DeviceFigures, ...]
    stages: tuple[StageSum, ...]
    """Of all devices and rounds."""
    models: tuple[ModelFigures, ...]
    refusals: tuple[str, ...]

    @property
    def last(self) -> RoundFigures:
        """The last round."""
        return self.rounds[-1]

    @property
    def cost(self) -> Cost:
        """Everything that all rounds took."""
        return sum((each.cost for each in self.rounds), Cost())


class CurvePoint(Frozen):
    """An accuracy, and all it took until then."""

    round: int
    accuracy: float
    cost: Cost


class Curve(Frozen):
    """One row of the comparison with one seed: accuracy by what it took."""

    label: str
    run: str
    """Label of the run it is of."""
    seed: int
    tuned: bool
    """Whether accuracy is that after local training, as for `fedavg + fine-tuning`, and not as sent."""
    points: tuple[CurvePoint, ...]

    @property
    def best(self) -> float:
        """The best accuracy of all rounds."""
        return max(point.accuracy for point in self.points)


class Saved(Frozen):
    """Per cent less than the reference took; negative where it is more, `None` where it cannot be said."""

    cpu: float | None
    joules: float | None
    bytes: float | None


class Reach(Frozen):
    """Whether and at what cost one row reached the reference's best accuracy as sent, of the same seed."""

    label: str
    seed: int
    target: float
    best: float
    round: int | None
    """The first round with that accuracy; `None` when there is none."""
    cost: Cost | None
    saved: Saved | None


class Total(Frozen):
    """What all rounds of one row took, against the reference of the same seed."""

    label: str
    seed: int
    cost: Cost
    saved: Saved | None


class Summary(Frozen):
    """One row over its seeds."""

    label: str
    tuned: bool
    sent: Over | None
    """At the last round; for a fine-tuned FedAvg, after local training, as its models are used so."""
    sent_worst_tenth: Over | None
    sent_deviation: Over | None
    after: Over | None
    after_worst_tenth: Over | None
    best: Over | None
    reached: int
    """Seeds in which it reached the reference's best accuracy as sent."""
    seeds: int
    short: Over | None
    """By how much its best fell short (share of 1), over the seeds in which it did."""
    round: Over | None
    reach_cpu_s: Over | None
    reach_joules: Over | None
    reach_bytes: Over | None
    reach_saved_cpu: Over | None
    reach_saved_joules: Over | None
    reach_saved_bytes: Over | None
    """Of the seeds in which it was reached."""
    cpu_s: Over | None
    wall_s: Over | None
    seconds: Over | None
    joules: Over | None
    down_bytes: Over | None
    up_bytes: Over | None
    saved_cpu: Over | None
    saved_joules: Over | None
    saved_bytes: Over | None
    """Of all rounds."""
    kind: Kind
    """Of the joules; `mixed` also where runs differ, `none` where they are unknown."""


class Worst(Frozen):
    """A device that a strategy served badly in the last round."""

    label: str
    seed: int
    agent: str
    examples: int
    accuracy_sent: float
    accuracy: float


class Failure(Frozen):
    """A run that did not come to its end."""

    label: str
    seed: int
    reason: str


class ComparisonReport(Frozen):
    """The whole comparison."""

    schema_version: int = SCHEMA_VERSION
    hedgerow: str
    machine: Json
    comparison: Json
    reference: str | None
    runs: tuple[RunFigures, ...]
    curves: tuple[Curve, ...]
    reaches: tuple[Reach, ...]
    totals: tuple[Total, ...]
    summaries: tuple[Summary, ...]
    """Every row over its seeds; what the tables show."""
    failures: tuple[Failure, ...] = ()

    @property
    def labels(self) -> list[str]:
        """The rows, in order: every strategy, FedAvg followed by FedAvg with fine-tuning."""
        return [summary.label for summary in self.summaries]

    @property
    def own_labels(self) -> list[str]:
        """The rows that are runs of their own."""
        return [summary.label for summary in self.summaries if not summary.tuned]

    def runs_of(self, label: str) -> list[RunFigures]:
        """Return the runs of a strategy, by seed."""
        return [run for run in self.runs if run.label == label]

    def curves_of(self, label: str) -> list[Curve]:
        """Return a row's curves, by seed."""
        return [curve for curve in self.curves if curve.label == label]
