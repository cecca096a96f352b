"""What a device's link carries for the bandwidth it is given: over the air, or through a shared access point.

Rates rise with bandwidth and bend down, which is what the allocation of wireless.py rests on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from foundation.parameters import Array

NOISE_DBM_HZ = -174.0
"""Thermal noise at room temperature."""
TINY = 1e-200
"""Stands for no bandwidth where one divides by it."""


@dataclass(frozen=True, slots=True)
class Radio:
    """An uplink over the air: bandwidth in Hz, rate B log2(1 + s / B)."""

    power_dbm: float
    distance_km: float
    noise_dbm_hz: float = NOISE_DBM_HZ

    @property
    def snr_hz(self) -> float:
        """Bandwidth over which the noise is as strong as the signal; path loss as 3GPP has it for cells."""
        loss_db = 128.1 + 37.6 * math.log10(self.distance_km)
        return float(10 ** ((self.power_dbm - loss_db - self.noise_dbm_hz) / 10))

    @property
    def power_w(self) -> float:
        """Radiated power."""
        return float(10 ** (self.power_dbm / 10) / 1000)


@dataclass(frozen=True, slots=True)
class Wire:
    """An uplink through a shared access point: bandwidth in bit/s, rate min(B, link)."""

    link_bps: float
    """What this device's own link carries."""


Link: TypeAlias = Radio | Wire


def rate_bps(link: Link, bandwidth: float) -> float:
    """Return the rate of a link that has this bandwidth (Hz for `Radio`, bit/s for `Wire`)."""
    return float(channel_of([link]).rate(np.array([bandwidth]))[0])


class Channel(Protocol):
    """Rates of several links at once."""

    def rate(self, bandwidth: Array) -> Array:
        """Return bit/s."""
        ...

    def slope(self, bandwidth: Array) -> Array:
        """Return the rate's derivative."""
        ...

    def curve(self, bandwidth: Array) -> Array:
        """Return its second derivative."""
        ...

    def inverse(self, rate: Array, most: float) -> Array:
        """Return the least bandwidth with that rate; infinite where `most` does not give it."""
        ...

    def useful(self) -> Array:
        """Return the bandwidth beyond which the rate does not rise."""
        ...


@dataclass(frozen=True, slots=True)
class _Air:
    s: Array

    def rate(self, bandwidth: Array) -> Array:
        b = np.maximum(bandwidth, TINY)
        result: Array = b * np.log1p(self.s / b) / math.log(2)
        return result

    def slope(self, bandwidth: Array) -> Array:
        x = self.s / np.maximum(bandwidth, TINY)
        result: Array = (np.log1p(x) - x / (1 + x)) / math.log(2)
        if np.any(small := x < 1e-3):  # the difference cancels there
            y = x[small]
            result[small] = y * y * (1 / 2 - y * (2 / 3 - y * (3 / 4 - y * 4 / 5))) / math.log(2)
        return result

    def curve(self, bandwidth: Array) -> Array:
        b = np.maximum(bandwidth, TINY)
        result: Array = -np.square(self.s / (b + self.s)) / (b * math.log(2))
        return result

    def inverse(self, rate: Array, most: float) -> Array:
        enough = self.rate(np.full_like(rate, most)) >= rate
        target, b = np.where(enough, rate, 0.0), np.zeros_like(rate)
        for _ in range(200):  # Newton from the left: the rate bends down, so no step goes too far
            nearer = np.clip(b + (target - self.rate(b)) / self.slope(b), b, most)
            if np.all(nearer <= b * (1 + 1e-15)):
                break
            b = nearer
        least: Array = np.where(rate == 0, 0.0, np.where(enough, b, np.inf))
        return least

    def useful(self) -> Array:
        return np.full(self.s.shape, np.inf)


@dataclass(frozen=True, slots=True)
class _Access:
    link: Array

    def rate(self, bandwidth: Array) -> Array:
        return np.minimum(bandwidth, self.link)

    def slope(self, bandwidth: Array) -> Array:
        return np.where(bandwidth <= self.link, 1.0, 0.0)

    def curve(self, bandwidth: Array) -> Array:
        return np.zeros_like(bandwidth)

    def inverse(self, rate: Array, most: float) -> Array:
        return np.where(rate <= np.minimum(most, self.link), rate, np.inf)

    def useful(self) -> Array:
        return self.link


def channel_of(links: Sequence[Link]) -> Channel:
    """Return these links as one; raises `ValueError` when some share hertz and others bit/s."""
    radios = [link.snr_hz for link in links if isinstance(link, Radio)]
    wires = [link.link_bps for link in links if isinstance(link, Wire)]
    if radios and wires:
        raise ValueError("radios share hertz and wires bit/s: allocate to one kind at a time")
    return _Access(np.array(wires)) if wires else _Air(np.array(radios))
