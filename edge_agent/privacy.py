"""Clipping and Gaussian noise on what leaves the device, and what that has spent of its privacy.

An update's change, all arrays together as one vector, is scaled down to the norm `clip` and then gets
Gaussian noise of deviation `noise` * `clip` on every value. What is protected is all of the device's data at
once, towards everybody, the coordinator included: whatever its data, two updates differ by at most 2 `clip`
before the noise, so that one release is mu-Gaussian differentially private with mu = 2 / `noise`, and T of
them, each chosen after the ones before, are so with sqrt(T) mu (Dong, Roth and Su, "Gaussian Differential
Privacy", JRSS-B 2022). Nothing is subsampled, so that is exact, and epsilon follows from delta in closed form
(Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018, theorem 8):

    delta(epsilon) = Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu)

The noise comes from the system's source of secrets. It is a float64 Box-Muller, whose last bits an attacker
who sees float64 could use (Mironov 2012); what leaves is rounded to float32 or less afterwards.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.settings import PrivacySettings
from foundation.durable import write_whole
from foundation.errors import SettingsError, WorkRefused
from foundation.parameters import Array, Parameters, role_of
from foundation.work import LocalWork

FILE = "privacy.json"
CHUNK = 1 << 16
Draw = Callable[[int], Array]
"""Returns so many standard normal numbers, float64."""


def secret_noise(count: int) -> Array:
    """Draw standard normal numbers (Box and Muller) from the system's source of secrets."""
    found = np.empty(count, np.float64)
    for start in range(0, count, CHUNK):
        part = found[start : start + CHUNK]
        words = np.frombuffer(os.urandom(16 * len(part)), np.uint64).reshape(2, -1)
        uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0, never 1
        part[:] = np.sqrt(-2 * np.log(uniform[0])) * np.cos(2 * math.pi * uniform[1])
    return found


def delta_of(epsilon: float, mu: float) -> float:
    """Return the delta at which mu-Gaussian privacy is (epsilon, delta)-differential privacy."""
    if mu <= 0:
        return 0.0
    tail = _log_phi(-mu / 2 - epsilon / mu)
    return max(0.0, math.exp(_log_phi(mu / 2 - epsilon / mu)) - math.exp(min(0.0, epsilon + tail)))


def epsilon_of(mu: float, delta: float) -> float:
    """Return the smallest epsilon at which mu-Gaussian privacy is (epsilon, delta)-differential privacy."""
    low, high = 0.0, 1.0
    if delta_of(low, mu) <= delta:
        return 0.0
    while delta_of(high, mu) > delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, mu) > delta else (low, middle)
    return high


def _log_phi(x: float) -> float:
    """Return the logarithm of the standard normal distribution function, also far out."""
    if x > -30:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) - 1 / x**2  # Mills' ratio: error x^-4


@dataclass
class Spent:
    """What all releases of this device's life have spent; in the vault before anything leaves."""

    path: Path
    delta: float
    releases: int = 0
    square: float = 0.0
    """mu of all releases together, squared."""

    @classmethod
    def load(cls, vault: Path, delta: float) -> Spent:
        """Read it; raises `SettingsError` for a file that cannot be read: nothing spent would be a lie."""
        path = vault / FILE
        if not path.exists():
            return cls(path, delta)
        try:
            told = json.loads(path.read_text())
            releases, square = int(told["releases"]), float(told["square"])
            if not (releases >= 0 and 0 <= square < math.inf):
                raise ValueError("numbers that cannot be")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"{path} cannot be read ({error}): put it back from a copy, as what was spent stays spent"
            ) from error
        return cls(path, delta, releases, square)

    def epsilon(self, noise: float | None = None) -> float:
        """Return epsilon so far; with `noise`, what it would be after one more release."""
        more = 0.0 if noise is None else (2 / noise) ** 2
        return epsilon_of(math.sqrt(self.square + more), self.delta)

    def spend(self, noise: float) -> None:
        """Count a release, on disk when this returns: one that never left counts as well."""
        self.releases += 1
        self.square += (2 / noise) ** 2
        told = {"releases": self.releases, "square": self.square}
        write_whole(self.path, json.dumps(told).encode())


class Privacy:
    """What stands between the trained model and the outbox."""

    def __init__(self, settings: PrivacySettings, vault: Path, draw: Draw = secret_noise) -> None:
        """Bound and blur as the settings say; `draw` is anything else in tests only."""
        self._settings, self._draw = settings, draw
        self.spent = Spent.load(vault, settings.delta) if settings.noise else None

    @property
    def silent(self) -> bool:
        """Whether figures about the data (accuracy, losses, the exported model) stay on the device."""
        return self.spent is not None and not self._settings.metrics

    def allow(self, work: LocalWork) -> None:
        """Raise `WorkRefused` for work whose answer could not be protected, or that would spend too much."""
        s = self._settings
        if self.spent is None:
            return
        if work.pruning() is not None or work.importance() is not None:
            raise WorkRefused(
                "privacy: the work prunes units, and which ones stay tells of the data: choose a strategy"
                " that does not prune, or target = 0"
            )
        if s.epsilon is not None and self.spent.epsilon(s.noise) > s.epsilon:
            raise WorkRefused(
                f"privacy: epsilon {self.spent.epsilon():.3g} of {s.epsilon:g} is spent (delta {s.delta:g}),"
                " and another update would go beyond it"
            )

    def released(self, parameters: Parameters, sent: Mapping[str, Array], work: LocalWork) -> Parameters:
        """Return what may leave in place of what was asked; counts it as spent.

        Raises `WorkRefused` for an array that has nothing to be a change of.
        """
        clip, noise = self._settings.clip, self._settings.noise
        if clip is None or not parameters:
            return parameters
        changes = {name: _change(name, array, sent, work) for name, array in parameters.items()}
        norm = math.sqrt(sum(float(np.square(c).sum()) for c in changes.values()))
        scale = min(1.0, clip / norm) if norm else 1.0
        if self.spent is not None:
            self.spent.spend(noise)
        found = {}
        for name, change in changes.items():
            change = scale * change
            if noise:
                change = change + clip * noise * self._draw(change.size).reshape(change.shape)
            told = change if _is_change(name, work) else np.asarray(sent[name], np.float64) - change
            found[name] = told.astype(np.float32)
        return Parameters(found)

    def told(self) -> dict[str, float]:
        """Return what an update says of it, among its metrics."""
        if self.spent is None:
            return {}
        return {"epsilon": self.spent.epsilon(), "delta": self.spent.delta}


def _is_change(name: str, work: LocalWork) -> bool:
    return work.layout == "flat" or name.startswith("teacher/") or role_of(name) in work.change


def _change(name: str, array: Array, sent: Mapping[str, Array], work: LocalWork) -> Array:
    """Return sent - trained, float64."""
    if _is_change(name, work):
        return np.asarray(array, np.float64)
    if name not in sent:
        raise WorkRefused(f"privacy: nothing was sent that {name} could be a change of, so it has no bound")
    return np.asarray(sent[name], np.float64) - array
