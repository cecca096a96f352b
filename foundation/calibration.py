"""A calibration: one device's own power model, fitted against a meter, as a file that says how it came to be.

`hedgerow agent calibrate` writes it; `DeviceProfile.calibrated` puts its model in place of the published one.
It holds for the device, the profile, the firmware, the peripherals and the power mode it was made with, and
for 180 days. A device with several power modes has several, each a file of its own.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field, ValidationError, field_validator, model_validator

from foundation.energy import Scope
from foundation.errors import SettingsError
from foundation.frozen import Frozen

LIFE = timedelta(days=180)
SLACK = timedelta(days=1)
"""A calibration may be so much ahead of the clock; further, and the clock is wrong."""
MOST_BYTES = 1 << 20

Text = Annotated[str, Field(max_length=500)]
Positive = Annotated[float, Field(ge=0)]
Block = Literal["idle", "cores", "duty", "memory", "clock", "gpu", "network", "training"]
"""A kind of load."""
MeterKind = Literal["plug", "sysfs", "csv", "manual"]


class Figure(Frozen):
    """A fitted value and its error bar at k = 2, the meter's own error included."""

    v: float
    u: Positive


class Step(Frozen):
    """One hold of one load: what the meter and the device said over the same time."""

    name: Text
    block: Block
    hold_out: bool = False
    """Kept out of the fit, to judge it by."""
    start: AwareDatetime
    settle_s: Positive
    seconds: float = Field(gt=0)
    """Length of the time that the meter's watts and the utilisation are means over."""
    hold_s: float = Field(gt=0)
    least_hold_s: Positive
    """How long this meter would have needed at these watts."""
    utilisation: float = Field(ge=0, le=1)
    watts: Positive
    u_w: Positive
    """Error bar of the watts at k = 2 without the meter's own error: resolution and scatter."""
    how: Literal["counter", "mean", "read"]
    samples: int = Field(ge=1)
    mhz: float | None = Field(None, gt=0)
    """Mean clock of the processor while it was busy; `None` where it does not say."""
    most_mhz: float | None = Field(None, gt=0)
    """What the clock was held down to, where it was."""
    gpu: float | None = Field(None, ge=0, le=1)
    """Busy share of the GPU; `None` where nobody says."""
    up_mbit_s: Positive | None = None
    down_mbit_s: Positive | None = None
    """Through the interface towards the broker, all programs together; `None` where nobody says."""
    sensor_w: Positive | None = None
    """What the device's own sensor said."""
    temperature_c: float | None = None
    """The hottest zone at the end."""
    throttled: bool | None = None
    """Whether the firmware slowed the processor during the step; `None` where it does not say."""


class DeviceFacts(Frozen):
    """What identifies a device and what its watts depend on, as far as it can be seen."""

    serial_sha256: Text | None = None
    cores: int = Field(ge=1)
    kernel: Text = ""
    firmware: Text | None = None
    power_mode: Text | None = None
    """A Jetson's, by name."""
    governor: Text | None = None
    least_mhz: Positive | None = None
    most_mhz: Positive | None = None
    """The range that the clock was allowed."""
    peripherals_sha256: Text = ""
    """Of the sorted ids of all USB devices."""


class MeterFacts(Frozen):
    """The meter that was believed."""

    name: Text
    kind: MeterKind
    scope: Scope
    accuracy: float = Field(gt=0, le=1)
    """Relative error of its watts at k = 2."""


class ProfileFacts(Frozen):
    """The published profile that was calibrated."""

    id: Text
    sha256: Text


class AtClock(Frozen):
    """What all cores busy draw at one clock."""

    mhz: float = Field(gt=0)
    full_w: Figure


class FittedLink(Frozen):
    """What traffic through one interface draws beyond the processor's work."""

    interface: Text
    up: Figure
    """W per Mbit/s."""
    down: Figure | None = None
    """The same; `None` where each byte goes both ways, as over loopback, and `up` is of both."""


class FittedModel(Frozen):
    """p_idle + (p_full(f) - p_idle) * u ** exponent + gpu * u_gpu + link * Mbit/s, and how well it holds."""

    p_idle_w: Figure
    p_full_w: Figure
    memory_w: Figure | None = None
    """What memory-bound load draws on top; the model cannot see such load, so it is in the error bars."""
    clock: tuple[AtClock, ...] = Field((), max_length=20)
    """p_full by clock, rising, linear between; without it one for all clocks. The last one is `p_full_w`."""
    gpu_w: Figure | None = None
    """What a busy GPU draws on top."""
    link: FittedLink | None = None
    exponent: float = Field(1.0, ge=0.3, le=1.5)
    covariance: tuple[tuple[float, ...], ...]
    """W², of p_idle, p_full and, where they are there, memory, p_full at the lower clocks, GPU and link;
    without the meter's own error."""
    rmse_w: Positive
    """Of all steps."""
    hold_out_error: Positive
    """Largest relative error over the steps that were not fitted."""
    u_rel_gross: float = Field(gt=0)
    u_rel_net: float = Field(gt=0)

    @model_validator(mode="after")
    def _sound(self) -> FittedModel:
        if not 0 <= self.p_idle_w.v <= self.p_full_w.v:
            raise ValueError("p_full_w is below p_idle_w, or p_idle_w below 0")
        clocks = [at.mhz for at in self.clock]
        if clocks != sorted(set(clocks)) or any(at.full_w.v < self.p_idle_w.v for at in self.clock):
            raise ValueError("clock must rise, and each full_w be at least p_idle_w")
        if self.clock and self.clock[-1].full_w != self.p_full_w:
            raise ValueError("the full_w of the highest clock must be p_full_w")
        more = [self.memory_w, self.gpu_w, self.link, self.link.down if self.link else None]
        size = 2 + sum(figure is not None for figure in more) + max(0, len(self.clock) - 1)
        if len(self.covariance) != size or any(len(row) != size for row in self.covariance):
            raise ValueError(f"covariance must be {size} x {size}")
        return self

    def watts_of(self, step: Step) -> float:
        """Return watts at the processor's and GPU's load, the clock and the traffic of a step."""
        up, down = step.up_mbit_s or 0.0, step.down_mbit_s or 0.0
        link = self.link.up.v * up if self.link else 0.0
        link += self.link.down.v * down if self.link and self.link.down else 0.0
        return self.watts(step.utilisation, step.mhz, step.gpu) + link

    def watts(self, utilisation: float, mhz: float | None = None, gpu: float | None = None) -> float:
        """Return watts at busy shares of processor and GPU, and a clock (default: the highest)."""
        full = full_at([(at.mhz, at.full_w.v) for at in self.clock], mhz, self.p_full_w.v)
        above = (full - self.p_idle_w.v) * float(utilisation**self.exponent)
        return self.p_idle_w.v + above + (self.gpu_w.v * (gpu or 0.0) if self.gpu_w else 0.0)


class FittedSensor(Frozen):
    """The device's own sensor against the meter: P_meter = gain * P_sensor + offset."""

    name: Text
    scope: Scope
    gain: Figure
    offset_w: Figure
    covariance: tuple[tuple[float, ...], ...]
    error: Positive
    """Largest relative error over all steps."""


class Correction(Frozen):
    """A fitted sensor as it is applied: its readings become those of the meter that it was fitted against."""

    fitted: FittedSensor
    scope: Scope
    """Where that meter sat."""
    accuracy: Positive
    """Relative error of what comes out at k = 2: the meter's, or how badly the line fits if that is more."""
    made: AwareDatetime


class Calibration(Frozen):
    """Everything in `calibration/<agent>.toml`."""

    schema_: Literal[1] = Field(alias="schema")
    agent: Text
    made: AwareDatetime
    hedgerow: Text
    seed: int
    quick: bool = False
    not_measured: tuple[Text, ...] = ()
    forced: tuple[Text, ...] = ()
    """Rules that it breaks, and that `--force` let pass."""
    refused: tuple[Text, ...] = ()
    """Rules that it breaks: kept to be looked at, never used."""
    device: DeviceFacts
    profile: ProfileFacts
    meter: MeterFacts
    model: FittedModel
    sensor: FittedSensor | None = None
    step: tuple[Step, ...] = Field(max_length=200)

    @field_validator("made")
    @classmethod
    def _in_utc(cls, made: datetime) -> datetime:
        try:
            return made.astimezone(UTC)
        except OverflowError as error:
            raise ValueError("is no date") from error

    @property
    def correction(self) -> Correction | None:
        """What this makes of the device's own sensor; `None` where none was compared."""
        if self.sensor is None:
            return None
        accuracy = max(self.meter.accuracy, self.sensor.error)
        return Correction(fitted=self.sensor, scope=self.meter.scope, accuracy=accuracy, made=self.made)

    def unfit(self, profile: ProfileFacts, device: DeviceFacts, now: datetime) -> str | None:
        """Return why this must not be used for a profile on a device at a time; `None` if it may."""
        mine = self.device
        reasons: Mapping[str, bool] = {
            f"was refused ({'; '.join(self.refused)})": bool(self.refused),
            "was made on another device": _differ(mine.serial_sha256, device.serial_sha256),
            f"was made in {_mode(mine)}, now it is in {_mode(device)}": not self.of_mode(device),
            f"was made for {mine.cores} cores, there are {device.cores}": mine.cores != device.cores,
            f"is {(now - self.made).days} days old, {LIFE.days} are the most": now - self.made > LIFE,
            "was made in the future: one of the clocks is wrong": self.made - now > SLACK,
            f"was made for the profile {self.profile.id} as it was then, not for {profile.id} as it is": (
                self.profile != profile
            ),
            "was made with other USB devices": mine.peripherals_sha256 != device.peripherals_sha256,
            f"was made with firmware {mine.firmware}, now it is {device.firmware}": _differ(
                mine.firmware, device.firmware
            ),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def of_mode(self, device: DeviceFacts) -> bool:
        """Whether it was made in the power mode that a device is in; a mode that nobody knows is its own."""
        return self.device.power_mode == device.power_mode

    def toml(self) -> str:
        """Return the file's text."""
        return _toml(self.model_dump(by_alias=True, exclude_none=True))


def read_calibration(path: Path) -> Calibration:
    """Read a calibration; raises `SettingsError` that names the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"the calibration {path} cannot be read: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise SettingsError(f"the calibration {path} is no calibration: over {MOST_BYTES} bytes")
    try:
        return Calibration.model_validate(tomllib.loads(data.decode()))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()[:5]
        )
        raise SettingsError(f"the calibration {path} is wrong: {problems}") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are the first
        raise SettingsError(f"the calibration {path} is not TOML: {error}") from error


def full_at(points: Sequence[tuple[float, float]], mhz: float | None, otherwise: float) -> float:
    """Return watts at a clock, between points of (MHz, W) that rise in MHz; at their ends what stands there.

    Without points or clock it is `otherwise`.
    """
    if mhz is None or not points:
        return otherwise
    below = [point for point in points if point[0] <= mhz]
    above = [point for point in points if point[0] > mhz]
    if not below or not above:
        return (below[-1] if below else above[0])[1]
    (f0, w0), (f1, w1) = below[-1], above[0]
    return w0 + (w1 - w0) * (mhz - f0) / (f1 - f0)


def _mode(device: DeviceFacts) -> str:
    return (
        "no power mode that is known" if device.power_mode is None else f"the power mode {device.power_mode}"
    )


def _differ(mine: str | None, other: str | None) -> bool:
    """Whether both are known, and not the same."""
    return mine is not None and other is not None and mine != other


def _toml(data: Mapping[str, Any]) -> str:
    """Return TOML: plain keys first, then tables, then tables that repeat; what is deeper stands inline."""
    tables = {key: value for key, value in data.items() if isinstance(value, Mapping)}
    many = {key: value for key, value in data.items() if _is_tables(value)}
    lines = [f"{key} = {_value(value)}" for key, value in data.items() if key not in tables | many]
    headed = [(f"[{key}]", table) for key, table in tables.items()]
    headed += [(f"[[{key}]]", table) for key, several in many.items() for table in several]
    for head, table in headed:
        lines += ["", head, *(f"{key} = {_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _is_tables(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], Mapping)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Enum):
        value = value.value
    # JSON's numbers, booleans and strings are TOML's, but for one control character.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
