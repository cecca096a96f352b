"""Fits the power model to the steps of a calibration: weighted least squares without negative coefficients.

    P = p_idle + (p_full - p_idle) * u ** a + memory * [the load is memory-bound]

Each step weighs 1 / u². u is its scatter and resolution, and never less than a tenth of the meter's accuracy:
no step is known better than the meter is linear. The steps of the hold-out are not fitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from foundation.calibration import Figure, FittedModel, FittedSensor, Step
from foundation.energy import Scope
from foundation.errors import SensorError

Floats = NDArray[np.float64]

EXPONENTS = tuple(round(0.30 + 0.05 * step, 2) for step in range(25))
BETTER = 0.8
"""An exponent other than 1 must bring the hold-out error below this share of what 1 gives."""
WORTH = 0.02
"""A line that misses no step by more than this needs no other exponent."""
LINEAR = 0.1
"""Least error bar of a step, as a share of the meter's accuracy."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients, before anybody has judged them."""

    exponent: float
    coefficients: Floats
    """Idle, slope, and memory where there was a memory-bound step; none below 0."""
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

    def watts(self, utilisation: float) -> float:
        """Return the model's watts."""
        return float(self.coefficients[0] + self.coefficients[1] * utilisation**self.exponent)


def nnls(a: Floats, y: Floats, weights: Floats) -> tuple[Floats, tuple[int, ...]]:
    """Return the coefficients >= 0 of least weighted squares, and which of them are free (not held at 0).

    a is (n, k) with k <= 3 and no two columns alike; every subset of columns is tried, so it is exact.
    """
    count = a.shape[1]
    root = np.sqrt(weights)
    best, least = np.zeros(count), float(np.sum(weights * y**2))
    free: tuple[int, ...] = ()
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
    a, y, weights = _system([step for step in steps if not step.hold_out], accuracy, exponent)
    coefficients, free = nnls(a, y, weights)
    residual = float(np.sum(weights * (a @ coefficients - y) ** 2))
    covariance = np.zeros((len(coefficients), len(coefficients)))
    if free:
        inner = a[:, list(free)]
        spread = max(1.0, residual / max(1, len(y) - len(free)))
        covariance[np.ix_(free, free)] = spread * np.linalg.pinv(inner.T @ (inner * weights[:, None]))
    found = Fit(exponent, coefficients, covariance, residual, 0.0, 0.0, 0.0)
    errors = np.array([found.watts(step.utilisation) - step.watts for step in steps])
    relative = np.abs(errors) / np.array([max(step.watts, 1e-9) for step in steps])
    return dataclasses.replace(
        found,
        hold_out_error=float(np.max(relative[[step.hold_out for step in steps]])),
        worst=float(np.max(relative[[step.block != "memory" for step in steps]])),
        rmse_w=float(np.sqrt(np.mean(errors**2))),
    )


def _system(steps: Sequence[Step], accuracy: float, exponent: float) -> tuple[Floats, Floats, Floats]:
    """Return columns, watts and weights of the fitted steps."""
    u = np.array([step.utilisation for step in steps])
    y = np.array([step.watts for step in steps])
    bound = np.array([float(step.block == "memory") for step in steps])
    columns = [np.ones_like(u), u**exponent] + ([bound] if bound.any() else [])
    return np.stack(columns, axis=1), y, 1.0 / _variances(steps, accuracy)


def _variances(steps: Sequence[Step], accuracy: float) -> Floats:
    bars = np.array([max(step.u_w, LINEAR * accuracy * step.watts, 1e-6) for step in steps])
    return np.square(bars / 2)


def model_of(found: Fit, steps: Sequence[Step], accuracy: float) -> FittedModel:
    """Return the fit as it is written down, with error bars at k = 2 that hold the meter's own error.

    Raises `SensorError` where power does not rise with load: then there is no model to write down.
    """
    slope = float(found.coefficients[1])
    if slope <= 0:
        raise SensorError(
            "power does not rise with load: the meter does not see this device, or something else on it"
            " draws more than the load does"
        )
    to = np.eye(len(found.coefficients))
    to[1, 0] = 1.0  # p_full is idle + slope
    covariance = to @ found.covariance @ to.T
    values = to @ found.coefficients
    figures = [
        Figure(v=float(v), u=float(np.sqrt(4 * max(0.0, covariance[i, i]) + (accuracy * v) ** 2)))
        for i, v in enumerate(values)
    ]
    mean = float(np.mean([step.watts for step in steps]))
    return FittedModel(
        p_idle_w=figures[0],
        p_full_w=figures[1],
        memory_w=figures[2] if len(figures) > 2 else None,
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
