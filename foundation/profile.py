"""What type of device this is, what an agent may use of it, and how its energy is known.

A profile is one TOML file in `firmware_profiles/` (its README.md is the schema), or a file of the user's own.
Every number in it says where it is from; what nobody knows is `unknown`, never 0.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from foundation.calibration import Calibration, Correction, FittedLink, ProfileFacts, full_at
from foundation.energy import Scope
from foundation.errors import SettingsError
from foundation.frozen import Frozen

F = TypeVar("F", bound=Frozen)

UNKNOWN = "unknown-linux"
"""The profile of a machine that nobody recognised: no power model, so no joules."""
MODEL_SENSOR = "utilisation"
"""The sensor that reckons with `[model]`."""

_VIRTUAL = re.compile(
    r"qemu|kvm|bochs|virtualbox|innotek|vmware|xen|parallels|virtual machine|amazon ec2|google compute engine"
    r"|openstack|cloud hypervisor|firecracker|bhyve",
    re.IGNORECASE,
)


class Number(Frozen):
    """A figure with how it is known (`kind`), where the meter sat (`scope`) and who says so (`src`)."""

    v: float | tuple[float, ...] | tuple[str, ...] | None = None
    range: tuple[float, float] | None = None
    kind: Literal["measured", "datasheet", "derived", "modelled", "unknown"]
    scope: Scope | None = None
    src: str | None = None
    note: str = ""
    verified: bool = True

    @model_validator(mode="after")
    def _whole(self) -> Number:
        if self.kind == "unknown":
            if self.v is not None or self.range is not None:
                raise ValueError("an unknown number has neither v nor range")
            return self
        if self.v is None or self.src is None:
            raise ValueError(f"a {self.kind} number needs v and src")
        if self.range is not None:
            low, high = self.range
            if not isinstance(self.v, float) or not low <= self.v <= high:
                raise ValueError(f"v must lie in range [{low}, {high}]")
        return self


class PowerModel(Frozen):
    """Watts of a device from how busy its processor is: p_idle + (p_full - p_idle) * u ** exponent."""

    scope: Scope
    basis: Literal["published", "derived", "placeholder", "calibrated"]
    p_idle_w: Number
    p_cpu_full_w: Number
    exponent: float = Field(1.0, ge=0.3, le=1.5)
    u_rel_gross: Number
    """Error bar of all joules, relative, k = 2."""
    u_rel_net: Number
    """Error bar of the joules above idle, relative, k = 2."""
    full_w_by_mhz: tuple[tuple[float, float], ...] = ()
    """(MHz, W) of all cores busy by clock, from a calibration; else one figure for all clocks."""
    gpu_full_w: float | None = Field(None, ge=0)
    """What a busy GPU draws on top, from a calibration; `None`: the model does not see the GPU."""
    link: tuple[str, float, float] | None = None
    """Interface, and W per Mbit/s up and down that its traffic draws on top, from a calibration."""
    governor: str | None = None
    """Of a calibration: with another one idle and load differ."""
    flags: tuple[str, ...] = ()
    """What a reading by this model says of it."""

    @field_validator("p_idle_w", "p_cpu_full_w", "u_rel_gross", "u_rel_net")
    @classmethod
    def _single(cls, number: Number) -> Number:
        if not isinstance(number.v, float) or number.v < 0:
            raise ValueError("must be one known number, not below 0; without it leave [model] out")
        return number

    @model_validator(mode="after")
    def _rises(self) -> PowerModel:
        if self.full_w < self.idle_w:
            raise ValueError("p_cpu_full_w is below p_idle_w")
        for number in (self.p_idle_w, self.p_cpu_full_w):
            if number.scope not in (None, self.scope):
                raise ValueError(f"the model is at {self.scope}, a number of it at {number.scope}")
        return self

    @property
    def idle_w(self) -> float:
        """Watts when nothing runs."""
        return _single(self.p_idle_w)

    @property
    def full_w(self) -> float:
        """Watts when all cores are busy."""
        return _single(self.p_cpu_full_w)

    def watts(self, utilisation: float, mhz: float | None = None, gpu: float | None = None) -> float:
        """Return watts at busy shares of all cores and of the GPU, and a clock (default: the highest).

        Shares outside 0..1 are taken as 0 or 1.
        """
        u = min(1.0, max(0.0, utilisation))
        full = full_at(self.full_w_by_mhz, mhz, self.full_w)
        above = (full - self.idle_w) * float(u**self.exponent)
        return self.idle_w + above + (self.gpu_full_w or 0.0) * min(1.0, max(0.0, gpu or 0.0))

    @property
    def relative_gross(self) -> float:
        """`u_rel_gross` as a plain number."""
        return _single(self.u_rel_gross)

    @property
    def relative_net(self) -> float:
        """`u_rel_net` as a plain number."""
        return _single(self.u_rel_net)


class Match(Frozen):
    """How a device is recognised; an empty match is never chosen by detection."""

    dt_model: tuple[str, ...] = ()
    """Regular expressions, searched in the device tree's model."""
    arch: tuple[str, ...] = ()
    has_battery: bool | None = None

    @field_validator("dt_model")
    @classmethod
    def _expressions(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return patterns


class AgentDefaults(Frozen):
    """What an agent on this device does unless its settings say otherwise; choices, not measurements."""

    threads: int | None = Field(None, ge=1)
    memory_mib: int | None = Field(None, ge=64)
    density_floor: float = Field(0.1, gt=0, le=1)
    """Smallest share of FFL units that pruning should leave."""
    int8: bool = False

    def threads_of(self, cores: int) -> int:
        """Return how many threads training may use: as the profile says, but one core is left to the rest.

        Threads that wait for a core they do not get cost far more than they bring: two agents with two
        threads each, on two busy cores, took 75 s for four rounds that took 12 s with one thread each.
        """
        return max(1, min(self.threads or cores - 1, cores - 1))


class SensorEntry(Frozen):
    """One energy sensor of the device; `name` is the file in `edge_agent/energy/` that reads it."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    scope: Scope | None = None
    numbers: dict[str, Number] = Field(default_factory=dict)
    paths: tuple[str, ...] = ()
    labels: dict[str, str] = Field(default_factory=dict)
    note: str = ""


class Source(Frozen):
    """Where numbers are from."""

    id: str
    text: str = Field(min_length=1)


class DeviceProfile(Frozen):
    """One type of device. `sensor` and `source` are named as their tables in the file."""

    schema_: Literal[1] = Field(alias="schema")
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    title: str
    match: Match = Match()
    agent: AgentDefaults = AgentDefaults()
    hardware: dict[str, Number | str] = Field(default_factory=dict)
    power: dict[str, Number] = Field(default_factory=dict)
    model: PowerModel | None = None
    thermal: dict[str, Number] = Field(default_factory=dict)
    net: dict[str, dict[str, Number]] = Field(default_factory=dict)
    sensor: tuple[SensorEntry, ...] = ()
    source: tuple[Source, ...] = ()
    correction: Correction | None = None
    """Of one device's own sensor: a calibration puts it here, no file has it."""

    @model_validator(mode="after")
    def _sourced(self) -> DeviceProfile:
        if self.correction is not None:
            raise ValueError("correction: that is one device's, of its calibration, and no profile's")
        check_sources(self.numbers(), self.source)
        return self

    def numbers(self) -> Iterator[tuple[str, Number]]:
        """Yield every number of the profile with its dotted key."""
        tables: dict[str, dict[str, Any]] = {
            "hardware": dict(self.hardware),
            "power": dict(self.power),
            "model": dict(self.model) if self.model else {},
            "thermal": dict(self.thermal),
            **{f"net.{link}": dict(numbers) for link, numbers in self.net.items()},
            **{f"sensor.{entry.name}": dict(entry.numbers) for entry in self.sensor},
        }
        for table, items in tables.items():
            for key, value in items.items():
                if isinstance(value, Number):
                    yield f"{table}.{key}", value

    @property
    def facts(self) -> ProfileFacts:
        """Its id, and a hash of what it says: comments and order of tables do not count."""
        said = self.model_dump_json(by_alias=True, exclude_defaults=True)
        return ProfileFacts(id=self.id, sha256=hashlib.sha256(said.encode()).hexdigest())

    def calibrated(self, calibration: Calibration) -> DeviceProfile:
        """Return this profile with the calibration's power model in place of its own, and its correction.

        A profile that listed no model gets it as its last sensor. Whether the calibration may be used is for
        `Calibration.unfit` to say, with the facts of the profile as it was published.
        """
        fitted, scope = calibration.model, calibration.meter.scope
        source = Source(
            id=f"calibration-{calibration.made:%Y-%m-%d}",
            text=f"hedgerow agent calibrate on {calibration.agent}, against {calibration.meter.name}",
        )
        model = PowerModel(
            scope=scope,
            basis="calibrated",
            p_idle_w=Number(v=fitted.p_idle_w.v, kind="measured", scope=scope, src=source.id),
            p_cpu_full_w=Number(v=fitted.p_full_w.v, kind="measured", scope=scope, src=source.id),
            exponent=fitted.exponent,
            u_rel_gross=Number(v=fitted.u_rel_gross, kind="derived", src=source.id),
            u_rel_net=Number(v=fitted.u_rel_net, kind="derived", src=source.id),
            full_w_by_mhz=tuple((at.mhz, at.full_w.v) for at in fitted.clock),
            gpu_full_w=fitted.gpu_w.v if fitted.gpu_w else None,
            link=_link(fitted.link),
            governor=calibration.device.governor,
            flags=("calibrated",),
        )
        listed = any(entry.name == MODEL_SENSOR for entry in self.sensor)
        sensors = self.sensor if listed else (*self.sensor, SensorEntry(name=MODEL_SENSOR))
        found = {"model": model, "sensor": sensors, "source": (*self.source, source)}
        return self.model_copy(update={**found, "correction": calibration.correction})

    def flagged(self, *flags: str) -> DeviceProfile:
        """Return this profile with flags on what its power model says; without a model, itself."""
        if self.model is None:
            return self
        return self.model_copy(update={"model": self.model.model_copy(update={"flags": flags})})

    @classmethod
    def load(cls, which: str | Path) -> DeviceProfile:
        """Read a profile by its id, or from a path (a `Path`, or text that ends in .toml or holds a slash).

        Raises `SettingsError` that names the file and the key, or the ids there are.
        """
        if isinstance(which, Path) or which.endswith(".toml") or "/" in which:
            path = Path(which)
            try:
                return _parse(path.read_bytes(), str(path))
            except OSError as error:
                raise SettingsError(f"the device profile {path} cannot be read: {error.strerror}") from error
        ids = available()
        if which not in ids:
            raise SettingsError(
                f"there is no device profile {which!r} in firmware_profiles; there are {', '.join(ids)};"
                " or give the path of a .toml file"
            )
        file = resources.files("firmware_profiles") / f"{which}.toml"
        return _parse(file.read_bytes(), f"firmware_profiles/{which}.toml")

    @classmethod
    def detect(cls, root: Path = Path("/")) -> DeviceProfile:
        """Recognise the device from its file system; a virtual or unlisted machine is `unknown-linux`.

        Boards are recognised by the device tree, bare x86 machines by what is left. A virtual machine
        has no power of its own that could be modelled.
        """
        profiles = [cls.load(name) for name in available()]
        board = _board(root)
        for profile in profiles:
            if any(re.search(pattern, board) for pattern in profile.match.dt_model):
                return profile
        if not board and not _is_virtual(root):
            arch, battery = _arch(root), _has_battery(root)
            for profile in profiles:
                if arch in profile.match.arch and profile.match.has_battery in (None, battery):
                    return profile
        return cls.load(UNKNOWN)


def available() -> tuple[str, ...]:
    """Return the ids of the profiles that ship with Hedgerow, sorted."""
    names = (entry.name for entry in resources.files("firmware_profiles").iterdir())
    return tuple(sorted(n.removesuffix(".toml") for n in names if n.endswith(".toml") and n[0] != "_"))


def check_sources(numbers: Iterable[tuple[str, Number]], sources: Iterable[Source]) -> None:
    """Raise `ValueError` with the key of the first number whose source is not among `sources`."""
    known = {source.id for source in sources}
    for key, number in numbers:
        if number.src is not None and number.src not in known:
            raise ValueError(f"{key}: there is no [[source]] with id {number.src!r}")


def parsed(kind: type[F], data: bytes, what: str) -> F:
    """Return a TOML file as `kind`; raises `SettingsError` that says `what` it is, and names the key."""
    try:
        return kind.model_validate(tomllib.loads(data.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{what} is not TOML: {error}") from error
    except ValidationError as error:
        # A number may be text or table: pydantic then reports both, and names the branch in the key.
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()
        )
        raise SettingsError(f"{what} is wrong: {problems}") from error


def _parse(data: bytes, file: str) -> DeviceProfile:
    return parsed(DeviceProfile, data, f"the device profile {file}")


def _link(fitted: FittedLink | None) -> tuple[str, float, float] | None:
    return None if fitted is None else (fitted.interface, fitted.up.v, fitted.down.v if fitted.down else 0.0)


def _single(number: Number) -> float:
    # PowerModel's validator let only single known numbers in.
    assert isinstance(number.v, float)
    return number.v


def _text(path: Path) -> str:
    """Return a system file's text without NUL and blanks at its ends; empty where it cannot be read."""
    try:
        return path.read_bytes().decode(errors="replace").strip("\0 \n")
    except OSError:
        return ""


def _board(root: Path) -> str:
    places = ("proc/device-tree/model", "sys/firmware/devicetree/base/model")
    return next((text for place in places if (text := _text(root / place))), "")


def _is_virtual(root: Path) -> bool:
    dmi = (_text(root / "sys/class/dmi/id" / key) for key in ("sys_vendor", "product_name", "bios_vendor"))
    return "hypervisor" in _cpu_flags(root) or any(_VIRTUAL.search(text) for text in dmi)


def _arch(root: Path) -> str:
    # The "lm" flag (long mode) exists on x86 only; the interpreter's own platform would not follow `root`.
    return "x86_64" if "lm" in _cpu_flags(root) else ""


def _cpu_flags(root: Path) -> frozenset[str]:
    found = re.search(r"^flags\s*:(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def _has_battery(root: Path) -> bool:
    return any((root / "sys/class/power_supply").glob("BAT*"))
