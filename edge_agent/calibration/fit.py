"""Fits the power model to the steps of a calibration: weighted least squares without negative coefficients.

    P = p_idle + d(f) * u ** a + memory * [the load is memory-bound] + gpu * u_gpu
        + up * Mbit/s sent + down * Mbit/s received

d is linear between the clocks f at which the processor was held; where it was not, it is one figure.

Each step weighs 1 / u². u is its scatter and resolution, and never less than a tenth of the meter's accuracy:
no step is known better than the meter is linear. The steps of the hold-out are not fitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from foundation.calibration import AtClock, Figure, FittedLink, FittedModel, FittedSensor, Step
from foundation.energy import Scope
from foundation.errors import SensorError

Floats = NDArray[np.float64]

EXPONENTS = tuple(round(0.30 + 0.05 * step, 2) for step in range(25))
BETTER = 0.8
"""An exponent other than 1 must bring the hold-out error below this share of what 1 gives."""
WORTH = 0.02
"""A line that misses no step by more than this needs no other exponent."""
APART = 1.05
"""Clocks nearer together than this are one: the clock did not follow."""
LINEAR = 0.1
"""Least error bar of a step, as a share of the meter's accuracy."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients, before anybody has judged them."""

    exponent: float
    terms: tuple[str, ...]
    """What each coefficient is of: `idle`, `full`, `clock` for every lower clock, and `memory`, `gpu`, `up`
    and `down` where there were such steps."""
    knots: tuple[float, ...]
    """Clocks in MHz, rising; empty where they were not told apart."""
    coefficients: Floats
    """In watts, none below 0; those of `full` and `clock` are above idle."""
    covariance: Floats
    """Of the coefficients, W²."""
    residual: float
    """Weighted sum of squares over the fitted steps."""
    hold_out_error: float
    """Largest relative error over the steps that were not fitted."""
    worst: float
    """Largest relative error over all steps but the memory-bound, fitted or not."""
    rmse_w: float
    """Of all steps, by the model as it will be used: without the memory term."""


def nnls(a: Floats, y: Floats, weights: Floats) -> tuple[Floats, tuple[int, ...]]:
    """Return the coefficients >= 0 of least weighted squares, and which of them are free (not held at 0).

    a is (n, k) with few k and no two columns alike; every subset of columns is tried, so it is exact.
    """
    count = a.shape[1]
    root = np.sqrt(weights)
    best, least = np.zeros(count), float(np.sum(weights * y**2))
    free: tuple[int, ...] = ()
    whole: Floats = np.linalg.lstsq(a * root[:, None], y * root, rcond=None)[0].astype(np.float64)
    if np.all(whole > 0):
        return whole, tuple(range(count))  # nothing wants to be negative, so nothing is held
    for size in range(1, count + 1):
        for columns in combinations(range(count), size):
            found, *_ = np.linalg.lstsq(a[:, columns] * root[:, None], y * root, rcond=None)
            rest = float(np.sum(weights * (a[:, columns] @ found - y) ** 2))
            if np.all(found >= 0) and rest < least:
                best, free, least = np.zeros(count), columns, rest
                best[list(columns)] = found
    return best, free


def fit(steps: Sequence[Step], accuracy: float) -> Fit:
    """Fit the model; the exponent is 1 unless another one predicts the hold-out clearly better.

    Which other one is chosen by the fitted steps alone, so that the hold-out stays a judge. Raises
    `SensorError` where there is too little to fit or to judge by.
    """
    fitted = [step for step in steps if not step.hold_out]
    loads = {round(step.utilisation, 2) for step in fitted}
    if len(fitted) < 4 or len(loads) < 2 or len(fitted) == len(steps):
        raise SensorError("too few different steps for a fit: idle, several loads and a hold-out are needed")
    straight = _fit(steps, accuracy, 1.0)
    curved = min((_fit(steps, accuracy, a) for a in EXPONENTS), key=lambda found: found.residual)
    clearly = curved.hold_out_error < BETTER * straight.hold_out_error
    return curved if clearly and straight.worst > WORTH else straight


def _fit(steps: Sequence[Step], accuracy: float, exponent: float) -> Fit:
    knots = knots_of(steps)
    terms = _terms(steps, knots)
    fitted = [step for step in steps if not step.hold_out]
    a, y = _columns(fitted, terms, knots, exponent), _watts(fitted)
    weights = 1.0 / _variances(fitted, accuracy)
    coefficients, free = nnls(a, y, weights)
    residual = float(np.sum(weights * (a @ coefficients - y) ** 2))
    covariance = np.zeros((len(coefficients), len(coefficients)))
    if free:
        inner = a[:, list(free)]
        spread = max(1.0, residual / max(1, len(y) - len(free)))
        covariance[np.ix_(free, free)] = spread * np.linalg.pinv(inner.T @ (inner * weights[:, None]))
    found = Fit(exponent, terms, knots, coefficients, covariance, residual, 0.0, 0.0, 0.0)
    used = coefficients * np.array([term != "memory" for term in terms])
    errors = _columns(steps, terms, knots, exponent) @ used - _watts(steps)
    relative = np.abs(errors) / np.array([max(step.watts, 1e-9) for step in steps])
    return dataclasses.replace(
        found,
        hold_out_error=float(np.max(relative[[step.hold_out for step in steps]])),
        worst=float(np.max(relative[[step.block != "memory" for step in steps]])),
        rmse_w=float(np.sqrt(np.mean(errors**2))),
    )


def knots_of(steps: Sequence[Step]) -> tuple[float, ...]:
    """Return the clocks (MHz) at which all cores were loaded, rising; empty where there are no two.

    Those that the clock was held to count as it really ran. Raises `SensorError` where a clock is not known.
    """
    held = [step for step in steps if step.block == "clock"]
    if not held:
        return ()
    if any(step.mhz is None for step in steps if step.block != "idle"):
        raise SensorError("the processor's clock could not be read in every step: leave out clocks")
    free = [step for step in steps if step.block in ("cores", "duty") and step.most_mhz is None]
    groups = [free, *([s for s in held if s.most_mhz == most] for most in {s.most_mhz for s in held})]
    clocks = sorted(_loaded(group) for group in groups if group)
    knots = [
        mhz for mhz, above in zip(clocks, [*clocks[1:], float("inf")], strict=True) if above > APART * mhz
    ]
    return tuple(knots) if len(knots) > 1 else ()


def _loaded(steps: Sequence[Step]) -> float:
    """Return the clock of the busiest of some steps."""
    busiest = max(step.utilisation for step in steps)
    return fmean(step.mhz for step in steps if step.mhz is not None and step.utilisation >= 0.9 * busiest)


def _terms(steps: Sequence[Step], knots: Sequence[float]) -> tuple[str, ...]:
    blocks = {step.block for step in steps if not step.hold_out}
    terms = ["idle", "full"] + (["memory"] if "memory" in blocks else [])
    terms += ["clock"] * max(0, len(knots) - 1)
    if "gpu" in blocks:
        if any(step.gpu is None for step in steps):
            raise SensorError("how busy the GPU is could not be read in every step: leave it out")
        terms.append("gpu")
    if "network" in blocks:
        terms += _ways(steps)
    return tuple(terms)


def _ways(steps: Sequence[Step]) -> list[str]:
    """Return the ways that traffic is told apart by; over loopback each byte goes both ways."""
    up, down = [step.up_mbit_s for step in steps], [step.down_mbit_s for step in steps]
    if None in up or None in down:
        raise SensorError("the interface's bytes could not be read in every step: leave out --net")
    alike = np.allclose(np.array(up, float), np.array(down, float), rtol=0.02, atol=0.1)
    return ["up"] if alike else ["up", "down"]


def _columns(steps: Sequence[Step], terms: Sequence[str], knots: Sequence[float], exponent: float) -> Floats:
    """Return a row for each step and a column for each term; `full` is that of the highest clock."""
    u = np.array([step.utilisation for step in steps]) ** exponent
    hats = _hats(steps, knots)
    lower = iter(range(len(knots)))
    columns = []
    for term in terms:
        match term:
            case "idle":
                columns.append(np.ones_like(u))
            case "full":
                columns.append(u * hats[:, -1])
            case "clock":
                columns.append(u * hats[:, next(lower)])
            case "memory":
                columns.append(np.array([float(step.block == "memory") for step in steps]))
            case "gpu":
                columns.append(np.array([step.gpu or 0.0 for step in steps]))
            case "up":
                columns.append(np.array([step.up_mbit_s or 0.0 for step in steps]))
            case _:
                columns.append(np.array([step.down_mbit_s or 0.0 for step in steps]))
    return np.stack(columns, axis=1)


def _hats(steps: Sequence[Step], knots: Sequence[float]) -> Floats:
    """Return how much of each step's clock lies at each knot: neighbours share it, and rows add up to 1."""
    if not knots:
        return np.ones((len(steps), 1))
    clocks = [knots[-1] if step.mhz is None else step.mhz for step in steps]
    return np.stack([np.interp(clocks, knots, row) for row in np.eye(len(knots))], axis=1)


def _watts(steps: Sequence[Step]) -> Floats:
    return np.array([step.watts for step in steps])


def _variances(steps: Sequence[Step], accuracy: float) -> Floats:
    bars = np.array([max(step.u_w, LINEAR * accuracy * step.watts, 1e-6) for step in steps])
    return np.square(bars / 2)


def model_of(found: Fit, steps: Sequence[Step], accuracy: float, interface: str = "") -> FittedModel:
    """Return the fit as it is written down, with error bars at k = 2 that hold the meter's own error.

    `interface` is the one whose bytes the steps tell.

    Raises `SensorError` where power does not rise with load: then there is no model to write down.
    """
    slope = float(found.coefficients[1])
    if slope <= 0:
        raise SensorError(
            "power does not rise with load: the meter does not see this device, or something else on it"
            " draws more than the load does"
        )
    to = np.eye(len(found.coefficients))
    for row, term in enumerate(found.terms):
        if term in ("full", "clock"):
            to[row, 0] = 1.0  # p_full is idle + slope
    covariance = to @ found.covariance @ to.T
    values = to @ found.coefficients
    figures = [
        Figure(v=float(v), u=float(np.sqrt(4 * max(0.0, covariance[i, i]) + (accuracy * v) ** 2)))
        for i, v in enumerate(values)
    ]
    mean = float(np.mean([step.watts for step in steps]))
    lower = [figure for figure, term in zip(figures, found.terms, strict=True) if term == "clock"]
    named = dict(zip(found.terms, figures, strict=True))
    up = named.get("up")
    clock = zip(found.knots, [*lower, figures[1]], strict=True) if found.knots else ()
    return FittedModel(
        p_idle_w=figures[0],
        p_full_w=figures[1],
        memory_w=named.get("memory"),
        clock=tuple(AtClock(mhz=mhz, full_w=full_w) for mhz, full_w in clock),
        gpu_w=named.get("gpu"),
        link=FittedLink(interface=interface, up=up, down=named.get("down")) if up else None,
        exponent=found.exponent,
        covariance=tuple(tuple(map(float, row)) for row in covariance),
        rmse_w=found.rmse_w,
        hold_out_error=found.hold_out_error,
        u_rel_gross=max(2 * found.rmse_w / mean, accuracy),
        u_rel_net=max(2 * found.rmse_w / slope, accuracy),
    )


def sensor_of(steps: Sequence[Step], accuracy: float, name: str, scope: Scope) -> FittedSensor | None:
    """Fit P_meter = gain * P_sensor + offset over all steps; `None` where the sensor saw too few of them."""
    known = [(step, step.sensor_w) for step in steps if step.sensor_w is not None]
    if len(known) < 4 or len({round(watts, 2) for _, watts in known}) < 2:
        return None
    y = np.array([step.watts for step, _ in known])
    a = np.stack([np.array([watts for _, watts in known]), np.ones(len(known))], axis=1)
    weights = 1.0 / _variances([step for step, _ in known], accuracy)
    normal = a.T @ (a * weights[:, None])
    found = np.linalg.pinv(normal) @ (a.T @ (weights * y))
    rest = a @ found - y
    spread = max(1.0, float(np.sum(weights * rest**2)) / max(1, len(y) - 2))
    covariance = spread * np.linalg.pinv(normal)
    bars = 2 * np.sqrt(np.clip(np.diag(covariance), 0, None))
    return FittedSensor(
        name=name,
        scope=scope,
        gain=Figure(v=float(found[0]), u=float(np.hypot(bars[0], accuracy * found[0]))),
        offset_w=Figure(v=float(found[1]), u=float(np.hypot(bars[1], accuracy * found[1]))),
        covariance=tuple(tuple(map(float, row)) for row in covariance),
        error=float(np.max(np.abs(rest) / np.maximum(y, 1e-9))),
    )
