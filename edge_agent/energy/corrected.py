"""A device's own sensor, corrected by a calibration: gain * P + offset is what that one's meter would say.

Its joules sit where that meter sat. The covariance of gain and offset is in the error bar: where one is too
large the other is too small, so near the powers of the calibration the line is known better than either.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Self

from edge_agent.energy.sensor import EnergySensor
from foundation.calibration import Correction
from foundation.energy import Kind, Scope
from foundation.profile import DeviceProfile

logger = logging.getLogger(__name__)

MOST_ERROR = 0.05
"""A line that misses one of its own steps by more is no correction."""


class CorrectedSensor:
    """Another sensor's watts, on the scale and at the place of the meter that it was compared with."""

    def __init__(self, sensor: EnergySensor, correction: Correction) -> None:
        """Wrap `sensor`; whether the correction is its own is for `why_not` to say."""
        fitted = correction.fitted
        gain, offset = fitted.gain.v, fitted.offset_w.v
        (c_gg, c_go), (_, c_oo) = fitted.covariance
        self.kind: Kind = sensor.kind
        self.scope: Scope = correction.scope
        self.name = sensor.name
        self.cumulative = sensor.cumulative
        self.idle_w: float | None = None if sensor.idle_w is None else gain * sensor.idle_w + offset
        # The variance of gain * p + offset as a polynomial in what comes out: a P² + 2 b P + d.
        a, b = c_gg / gain**2, c_go / gain - c_gg * offset / gain**2
        d = max(0.0, c_oo - 2 * c_go * offset / gain + c_gg * offset**2 / gain**2)
        self.u_rel: float | None = math.hypot(correction.accuracy, 2 * math.sqrt(max(0.0, a)))
        self.u_rel_net: float | None = None
        self.offset_w = math.hypot(2 * math.sqrt(d), gain * sensor.offset_w)
        self.cross_w = 8 * b
        self.delay_s = sensor.delay_s
        self.flags: tuple[str, ...] = (*sensor.flags, f"corrected_{correction.made:%Y-%m-%d}")
        self._sensor, self._gain, self._offset = sensor, gain, offset
        self._last: tuple[float, float] | None = None
        self._joules = 0.0

    @property
    def sampled_w(self) -> float | None:
        """Corrected watts of the last read; `None` for a counter."""
        watts = self._sensor.sampled_w
        return None if watts is None else self._gain * watts + self._offset

    @property
    def breaks(self) -> int:
        """As many as the sensor's own."""
        return self._sensor.breaks

    @classmethod
    def probe(cls, profile: DeviceProfile, root: Path) -> Self | None:
        """Return `None`: this is no sensor of a profile, `corrected` puts it around one."""
        return None

    def joules(self, now_s: float) -> float | None:
        """Return corrected joules since opened; an error of the sensor, or a power below 0, is one here."""
        joules = self._sensor.joules(now_s)
        if joules is None:
            return None
        if self._last is not None:
            then_s, before = self._last
            more = self._gain * (joules - before) + self._offset * (now_s - then_s)
            if more < 0:
                return None  # far below all that it was compared at: nobody knows
            self._joules += more
        self._last = now_s, joules
        return self._joules


def corrected(sensor: EnergySensor, correction: Correction | None) -> EnergySensor:
    """Return the sensor with its own correction, or as it is; what is not its own is logged."""
    if correction is None or correction.fitted.name != sensor.name:
        return sensor
    why = why_not(sensor, correction)
    if why is not None:
        made = f"{correction.made:%Y-%m-%d}"
        logger.warning("sensor not corrected", extra={"sensor": sensor.name, "made": made, "reason": why})
        return sensor
    return CorrectedSensor(sensor, correction)


def why_not(sensor: EnergySensor, correction: Correction) -> str | None:
    """Return why a sensor of the correction's name must not be corrected by it; `None` if it may."""
    fitted = correction.fitted
    square = len(fitted.covariance) == 2 and all(len(row) == 2 for row in fitted.covariance)
    reasons = {
        f"it sits at {sensor.scope}, it was compared at {fitted.scope}": sensor.scope is not fitted.scope,
        f"it is {sensor.kind}": sensor.kind is not Kind.MEASURED,
        "the fitted gain is not above 0": fitted.gain.v <= 0,
        "the fit has no covariance of gain and offset": not square,
        f"the fit misses a step of its own by {fitted.error:.0%}": fitted.error > MOST_ERROR,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
