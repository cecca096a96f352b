"""`hedgerow agent doctor`: what this device can measure and do, what is missing, and what mends it."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

from edge_agent.calibration.use import Use, calibrated, place_beside
from edge_agent.energy.board import NOW, firmware_bits
from edge_agent.energy.clocks import governor, range_mhz
from edge_agent.energy.files import NumberFile
from edge_agent.energy.ina3221 import rails_of
from edge_agent.energy.inline_ina import meters_of
from edge_agent.energy.power_mode import power_mode
from edge_agent.energy.rapl import FOLDER, zones_of
from edge_agent.energy.sensor import find_sensors
from edge_agent.settings import AgentSettings
from edge_agent.surroundings import temperatures
from foundation import settings
from foundation.errors import HedgerowError, SettingsError, TransportError
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.profile import UNKNOWN, DeviceProfile

Verdict = Literal["good", "note", "bad"]
MARKS: dict[Verdict, str] = {
    "good": "[green]ok[/green]",
    "note": "[yellow]note[/yellow]",
    "bad": "[red]bad[/red]",
}
LEAST_DISK = 200 << 20
LEAST_YEAR = 2024
"""A clock before this was never set: a board without a battery for it, and without the network."""
RULE = (
    'echo \'SUBSYSTEM=="powercap", ACTION=="add", RUN+="/bin/chgrp -R users /sys%p",'
    ' RUN+="/bin/chmod -R g=u /sys%p"\' | sudo tee /etc/udev/rules.d/70-hedgerow-rapl.rules && sudo udevadm'
    " trigger --action=add --subsystem-match=powercap"
)
PARTS = ("torch", "onnx", "onnxruntime", "fastapi")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    verdict: Verdict
    says: str
    mend: str = ""
    """A command, or what to do, as exactly as can be said."""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="hedgerow agent doctor",
        description="Look at what this device can measure and do; say what is missing and how to mend it.",
        epilog="With --config the broker, the vault and the profile of that agent are looked at as well. Ends"
        " with 1 if something is bad.",
    )
    result.add_argument("--config", type=Path, help="agent.toml")
    result.add_argument(
        "--profile", help="id or .toml file of a device profile (default: the config's, or auto)"
    )
    result.add_argument("--json", action="store_true", help="findings as JSON, for machines")
    result.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Look and tell; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        told = _settings(arguments.config) if arguments.config else None
        which = arguments.profile or (told.profile if told else "auto")
        profile = DeviceProfile.detect(arguments.root) if which == "auto" else DeviceProfile.load(which)
        found = list(findings(profile, arguments.root, told))
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow agent doctor: {error}\n")
        return 2 if isinstance(error, SettingsError) else 1
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in found], indent=2) + "\n")
    else:
        show(found, console or Console())
    return int(any(finding.verdict == "bad" for finding in found))


def _settings(path: Path) -> AgentSettings:
    return settings.load(AgentSettings, path, os.environ, (), prefix="AGENT")[0]


def findings(profile: DeviceProfile, root: Path, told: AgentSettings | None) -> Iterator[Finding]:
    """Give all findings, in the order in which a person would mend them."""
    yield _device(profile)
    use = _use(profile, root, told)
    yield from energy(use.profile, root)
    if told is not None:
        yield from calibration(use)
    yield _speed(root)
    yield from _heat(profile, root)
    yield clock(time.time())
    yield _memory(profile)
    yield disk(told.vault if told else Path())
    yield software()
    if told is not None:
        yield broker(told.mqtt, f"{told.agent}-doctor")


def _device(profile: DeviceProfile) -> Finding:
    if profile.id == UNKNOWN:
        return Finding(
            "device",
            "note",
            "not recognised: time is counted, joules are not",
            "choose a profile of firmware_profiles/ with `profile = ...` in agent.toml, or write one",
        )
    return Finding("device", "good", f"{profile.title} ({profile.id})")


# --- energy --------------------------------------------------------------------------------------


def energy(profile: DeviceProfile, root: Path) -> Iterator[Finding]:
    """Say for every sensor that the profile lists whether it is there, and if not, why."""
    there = {sensor.name: sensor for sensor in find_sensors(profile, root)}
    for entry in profile.sensor:
        sensor, name = there.get(entry.name), f"energy: {entry.name}"
        if sensor is None:
            says, mend = MISSING.get(entry.name, _not_there)(root)
            yield Finding(name, "note", says, mend)
            continue
        bar = "error unknown" if sensor.u_rel is None else f"± {sensor.u_rel:.0%} (k = 2)"
        first = ", the one that counts" if sensor is next(iter(there.values())) else ""
        yield Finding(name, "good", f"{sensor.kind.value} at {sensor.scope.value}, {bar}{first}")
    if not there and profile.sensor:
        yield Finding("energy", "bad", "no source of this device's profile answers: joules will be unknown")


def _use(profile: DeviceProfile, root: Path, told: AgentSettings | None) -> Use:
    """Return which calibration that agent would use; none is looked for without its settings."""
    if told is None:
        return Use(profile)
    given, default = told.energy.calibration, place_beside(told.vault, told.agent)
    try:
        return calibrated(profile, given, default, root=root)
    except SettingsError as error:
        return Use(profile, given, reason=f"{error}; the agent will not start with it")


def calibration(use: Use) -> Iterator[Finding]:
    """Say whether an agent's calibration is used, and if not, why; nothing where there is no model."""
    again = "hedgerow agent calibrate --config agent.toml --meter ..."
    if use.calibration is not None:
        made, bar = use.calibration, use.calibration.model.u_rel_gross
        forced = f", forced past {len(made.forced)} rules" if made.forced else ""
        says = f"of {made.made:%Y-%m-%d} against {made.meter.name}, ± {bar:.1%} (k = 2){forced}: {use.path}"
        yield Finding("calibration", "note" if made.forced else "good", says)
    elif use.reason is not None:
        yield Finding("calibration", "bad", f"{use.reason}; the published model is used", again)
    elif use.profile.model is not None:
        bar = use.profile.model.relative_gross
        says = f"none: the power model of the profile is used, ± {bar:.0%} (k = 2)"
        yield Finding("calibration", "note", says, again)


def _not_there(root: Path) -> tuple[str, str]:
    return "not here", ""


def _rapl(root: Path) -> tuple[str, str]:
    zones = zones_of(root)
    if not zones:
        where = "a virtual machine, or no kernel module intel_rapl"
        return f"no zones in /{FOLDER} ({where})", "sudo modprobe intel_rapl_msr"
    if any(NumberFile(folder / "energy_uj").read() is None for folder in zones):
        return "its counters are for root alone (CVE-2020-8694)", RULE
    return "no package among its zones", ""


def _ina3221(root: Path) -> tuple[str, str]:
    rails = rails_of(root)
    if not rails:
        return "no such chip is shown by the kernel; the 2 GB Nano has none", ""
    watts = {name: rail.watts() for name, rail in rails.items()}
    told = ", ".join(f"{name} {'?' if w is None else f'{w:.2f} W'}" for name, w in watts.items())
    return f"rails that cannot be believed or are not this module's: {told}", "compare with tegrastats"


def _inline(root: Path) -> tuple[str, str]:
    found = meters_of(root)
    if len(found) > 1:
        return (
            f"{len(found)} of them, which cannot be told apart",
            "unbind those that are not in the supply line",
        )
    return (
        "none in the supply line",
        "an INA226 on I2C and `dtoverlay=i2c-sensor,ina226` would measure the board",
    )


def _pmic(root: Path) -> tuple[str, str]:
    places = [place for place in (root / "dev/vcio_gencmd", root / "dev/vcio") if place.exists()]
    if not places:
        return "no firmware mailbox (/dev/vcio)", ""
    if not any(os.access(place, os.R_OK | os.W_OK) for place in places):
        return "the firmware mailbox is for the group video", "sudo usermod -aG video $USER, and log in again"
    return "the mailbox does not answer pmic_read_adc", "vcgencmd pmic_read_adc says why"


def _battery(root: Path) -> tuple[str, str]:
    if not any((root / "sys/class/power_supply").glob("BAT*")):
        return "there is none", ""
    return "on mains: what the device draws does not come from it", "unplug the charger to measure by it"


def _nvml(root: Path) -> tuple[str, str]:
    if not (root / "dev/nvidiactl").exists():
        return "no NVIDIA driver", ""
    return "the driver is there, its library is not", "pip install 'hedgerow[nvml]'"


def _tegrastats(root: Path) -> tuple[str, str]:
    return (
        "no fresh log",
        "sudo tegrastats --interval 200 --logfile /run/tegrastats.log, if ina3221 is hidden",
    )


MISSING: dict[str, Callable[[Path], tuple[str, str]]] = {
    "rapl": _rapl,
    "ina3221": _ina3221,
    "inline_ina": _inline,
    "pi5_pmic": _pmic,
    "battery": _battery,
    "nvml": _nvml,
    "tegrastats": _tegrastats,
}
"""Why a sensor is not there, and what would mend it."""


# --- the rest ------------------------------------------------------------------------------------


def _speed(root: Path) -> Finding:
    """Say at which speed the processor may run; joules and seconds are of this speed."""
    told = power_mode(root), governor(root), range_mhz(root)
    if told == (None, None, None):
        return Finding("speed", "note", "nobody says: neither power mode nor clock can be read")
    mode, how, clock = told
    words = [] if mode is None else [f"power mode {mode}"]
    words += [] if how is None else [f"governor {how}"]
    words += [] if clock is None else [f"{clock[0]:.0f} to {clock[1]:.0f} MHz"]
    return Finding("speed", "good", ", ".join(words))


def _heat(profile: DeviceProfile, root: Path) -> Iterator[Finding]:
    degrees = temperatures(root)
    if degrees:
        number = profile.thermal.get("throttle_c")
        limit = number.v if number is not None and isinstance(number.v, float) else 80.0
        hot = max(degrees) >= limit - 5
        mend = (
            "a heat sink or a fan; the clock falls at the limit, and with it every time and joule"
            if hot
            else ""
        )
        yield Finding("heat", "note" if hot else "good", f"{max(degrees):.0f} °C of {limit:.0f}", mend)
    bits = firmware_bits(root)
    if bits is not None:
        now = bits & NOW
        says = "throttled or under-voltage now" if now else "not throttled now"
        yield Finding("throttling", "bad" if now else "good", f"{says} (0x{bits:x})",
                      "a better supply or cable, or cooling" if now else "")  # fmt: skip


def clock(now: float) -> Finding:
    """Say whether this clock was ever set; `now` is in UTC seconds."""
    year = time.gmtime(now).tm_year
    if year < LEAST_YEAR:
        return Finding("clock", "bad", f"it says {year}: TLS will refuse", "sudo timedatectl set-ntp true")
    return Finding("clock", "good", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)))


def _memory(profile: DeviceProfile) -> Finding:
    free = psutil.virtual_memory().available / (1 << 20)
    wanted = profile.agent.memory_mib or 330
    if free >= wanted:
        return Finding("memory", "good", f"{free:.0f} MiB free, training may take {wanted}")
    return Finding(
        "memory",
        "bad",
        f"{free:.0f} MiB free, training may take {wanted}",
        "stop other programs, or add swap",
    )


def disk(vault: Path) -> Finding:
    """Say how much room there is for a vault."""
    place = next(folder for folder in (vault, *vault.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    says = f"{free / 1e9:.1f} GB free for the vault"
    return Finding("disk", "good", says) if free >= LEAST_DISK else Finding("disk", "bad", says, "make room")


def software() -> Finding:
    """Say which versions are here, and what is missing."""
    there = [f"{name} {version(name)}" for name in PARTS if importlib.util.find_spec(name) is not None]
    says = ", ".join([f"hedgerow {version('hedgerow')}", f"Python {platform.python_version()}", *there])
    missing = [name for name in ("torch", "onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        return Finding(
            "software", "bad", f"{says}; no {', '.join(missing)}", "pip install 'hedgerow[train,serve]'"
        )
    return Finding("software", "good", says)


def broker(mqtt: MqttSettings, name: str) -> Finding:
    """Connect as the agent would, and go again."""
    quick = mqtt.model_copy(update={"connect_timeout_s": 5.0})

    async def connect() -> None:
        async with MqttTransport(quick, name, clean=True):
            pass

    try:
        asyncio.run(connect())
    except TransportError as error:
        return Finding("broker", "bad", str(error), "check [mqtt] in agent.toml; docs/operations.md, Broker")
    return Finding("broker", "good", f"{mqtt.address} lets this agent in")


def show(found: Sequence[Finding], console: Console) -> None:
    """Print findings, one a line."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in found:
        says = finding.says + (f"\n[dim]{finding.mend}[/dim]" if finding.mend else "")
        table.add_row(MARKS[finding.verdict], finding.what, says)
    console.print(table)
