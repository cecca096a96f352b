"""Whether a calibration may be used: every rule that it breaks, by how much, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from edge_agent.calibration.meters import NEEDS
from foundation.calibration import FittedModel, MeterFacts, Step
from foundation.profile import DeviceProfile

LEAST_STEPS = 8
SPREAD = 0.4
"""A line through loads nearer together than this says little about idle and full load."""
IDLE_REPEATS = 0.03
IDLE_BUSY = 0.10
IDLE_OF_PROFILE = 0.40
HOTTEST_C = 75.0
DIP = 0.02
"""Power may fall by so much between two loads, or by their error bars, and still count as level."""


@dataclass(frozen=True, slots=True)
class Breach:
    """One rule that is broken."""

    rule: str
    says: str
    """By how much."""
    mend: str
    may_force: bool = False

    def __str__(self) -> str:
        return f"{self.rule}: {self.says}"


def breaches(
    steps: Sequence[Step], model: FittedModel, meter: MeterFacts, profile: DeviceProfile
) -> list[Breach]:
    """Return every rule that a calibration breaks, those that `--force` cannot let pass first."""
    found = [
        *_steps(steps),
        *_heat(steps),
        *_idle(steps, model),
        *_monotonic(steps),
        *_clock(model),
        *_hold_out(model, meter),
        *_short(steps),
        *_busy_idle(steps),
        *_profile(model, profile),
    ]
    return sorted(found, key=lambda breach: breach.may_force)


def _steps(steps: Sequence[Step]) -> Iterator[Breach]:
    if len(steps) < LEAST_STEPS:
        yield Breach("steps", f"{len(steps)} steps, {LEAST_STEPS} are the least", "run all steps")
    busy = [step.utilisation for step in steps if not step.hold_out]
    if max(busy, default=0.0) - min(busy, default=0.0) < SPREAD:
        yield Breach(
            "spread",
            f"the processor was between {min(busy, default=0.0):.0%} and {max(busy, default=0.0):.0%} busy in"
            f" all steps, {SPREAD:.0%} must lie between",
            "stop other programs: they keep the processor busy in every step",
        )


def _heat(steps: Sequence[Step]) -> Iterator[Breach]:
    slowed = sorted({step.name for step in steps if step.throttled})
    if slowed:
        mend = "a better supply or cable, or cooling; then calibrate again"
        yield Breach("throttled", f"the firmware slowed the processor in {', '.join(slowed)}", mend)
    hottest = max((step.temperature_c for step in steps if step.temperature_c is not None), default=0.0)
    if hottest >= HOTTEST_C:
        mend = "a heat sink or a fan: a hot chip draws more, and is about to be slowed"
        yield Breach("heat", f"{hottest:.0f} °C, it must stay below {HOTTEST_C:.0f}", mend)


def _idle(steps: Sequence[Step], model: FittedModel) -> Iterator[Breach]:
    """Compare the idle holds, each less what its measured utilisation accounts for."""
    zero = model.p_idle_w.v
    idle = [s.watts - (model.watts_of(s) - zero) for s in steps if s.block == "idle"]
    mean = sum(idle) / len(idle) if idle else 0.0
    if len(idle) < 2 or mean <= 0:
        yield Breach("idle", "there are no two idle holds with a power to compare", "run all steps")
        return
    spread = (max(idle) - min(idle)) / mean
    if spread > IDLE_REPEATS:
        yield Breach(
            "idle repeats",
            f"idle power drifted by {spread:.1%}, {IDLE_REPEATS:.0%} is the most",
            "let the device warm up first, unplug what comes and goes (disks, screens), and hold longer",
        )


def _monotonic(steps: Sequence[Step]) -> Iterator[Breach]:
    curves = [step for step in steps if step.block in ("cores", "duty", "clock")]
    for _, group in groupby(sorted(curves, key=_curve), key=_curve):
        alike = [*group, *(step for step in steps if step.block == "idle")]
        loads = sorted(alike, key=lambda step: step.utilisation)
        highest = loads[0] if loads else None
        for step in loads:
            assert highest is not None
            dip, level = highest.watts - step.watts, max(DIP * highest.watts, highest.u_w + step.u_w)
            if dip > level:
                yield Breach(
                    "monotonic",
                    f"{step.watts:.2f} W at {step.utilisation:.0%} busy ({step.name}), but"
                    f" {highest.watts:.2f} W at {highest.utilisation:.0%} ({highest.name})",
                    "the clock falls under full load, or something else draws on this meter: cool the device,"
                    " set a fixed frequency, and put nothing else on the meter",
                )
                break
            highest = max(highest, step, key=lambda one: one.watts)


def _curve(step: Step) -> tuple[str, float]:
    """Return which steps make one curve of watts over load: those of a kind, at one clock."""
    return step.block, step.most_mhz or 0.0


def _clock(model: FittedModel) -> Iterator[Breach]:
    for low, high in pairwise(model.clock):
        if low.full_w.v > (1 + DIP) * high.full_w.v:
            yield Breach(
                "clock",
                f"{low.full_w.v:.2f} W at {low.mhz:.0f} MHz, but {high.full_w.v:.2f} W at {high.mhz:.0f} MHz",
                "the clock is not what the kernel shows, or something else draws on this meter",
            )


def _hold_out(model: FittedModel, meter: MeterFacts) -> Iterator[Breach]:
    most = NEEDS[meter.kind].hold_out
    if model.hold_out_error > most:
        yield Breach(
            "hold-out",
            f"the steps that were not fitted are off by up to {model.hold_out_error:.1%}, {most:.0%} is the"
            f" most with a meter of kind {meter.kind}",
            "stop other programs, hold longer (--hold), and look at the steps for one that stands out",
        )


def _short(steps: Sequence[Step]) -> Iterator[Breach]:
    short = [step for step in steps if step.hold_s < 0.99 * step.least_hold_s]
    if short:
        worst = max(short, key=lambda step: step.least_hold_s / step.hold_s)
        yield Breach(
            "short hold",
            f"{len(short)} holds are too short for this meter: {worst.name} {worst.hold_s:.0f} s of"
            f" {worst.least_hold_s:.0f} s",
            "leave out --hold, or give a longer one",
            may_force=True,
        )


def _busy_idle(steps: Sequence[Step]) -> Iterator[Breach]:
    busiest = max((step.utilisation for step in steps if step.block == "idle"), default=0.0)
    if busiest > IDLE_BUSY:
        yield Breach(
            "busy at idle",
            f"the processor was {busiest:.0%} busy in an idle hold, {IDLE_BUSY:.0%} is the most",
            "stop other programs (the agent, a desktop, updates)",
            may_force=True,
        )


def _profile(model: FittedModel, profile: DeviceProfile) -> Iterator[Breach]:
    if profile.model is None or profile.model.idle_w <= 0:
        return
    published = profile.model.idle_w
    off = model.p_idle_w.v / published - 1
    if abs(off) > IDLE_OF_PROFILE:
        yield Breach(
            "idle of the profile",
            f"{model.p_idle_w.v:.2f} W idle is {off:+.0%} from the {published:.2f} W (at"
            f" {profile.model.scope.value}) of {profile.id}, {IDLE_OF_PROFILE:.0%} is the most",
            "is it the right plug, the right profile, and nothing else on the meter? If so, --force",
            may_force=True,
        )
