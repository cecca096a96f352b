"""A calibration: one device's own power model, fitted against a meter, as a file that says how it came to be.

`hedgerow agent calibrate` writes it; `DeviceProfile.calibrated` puts its model in place of the published one.
It holds for the device, the profile, the firmware and the peripherals it was made with, and for 180 days.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
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
Block = Literal["idle", "cores", "duty", "memory", "training"]
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
    governor: Text | None = None
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


class FittedModel(Frozen):
    """p_idle + (p_full - p_idle) * u ** exponent, and how well it holds."""

    p_idle_w: Figure
    p_full_w: Figure
    memory_w: Figure | None = None
    """What memory-bound load draws on top; the model cannot see such load, so it is in the error bars."""
    exponent: float = Field(1.0, ge=0.3, le=1.5)
    covariance: tuple[tuple[float, ...], ...]
    """W², of p_idle, p_full and, where it is there, memory; without the meter's own error."""
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
        size = 2 if self.memory_w is None else 3
        if len(self.covariance) != size or any(len(row) != size for row in self.covariance):
            raise ValueError(f"covariance must be {size} x {size}")
        return self


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
