"""Which calibration an agent has, and whether it may use it."""

from __future__ import annotations

import glob
import hashlib
import logging
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edge_agent.calibration.host import facts
from foundation.calibration import Calibration, read_calibration
from foundation.errors import SettingsError
from foundation.profile import DeviceProfile

logger = logging.getLogger(__name__)

FOLDER = "calibration"
OTHER_MODE = "calibration_other_mode"
"""Flag of a reading by the published model, where the calibrations are of other power modes."""


REFUSED = ".refused.toml"
"""End of the name of a file that is only to be looked at."""


@dataclass(frozen=True, slots=True)
class Use:
    """A profile, and what became of the calibration that was meant for it."""

    profile: DeviceProfile
    """With the calibration's model where that may be used, else as published."""
    path: Path | None = None
    """The file; `None` where there is none."""
    calibration: Calibration | None = None
    """What is used; `None` where it is not."""
    reason: str | None = None
    """Why it is not used."""


def place_beside(vault: Path, agent: str) -> Path:
    """Return where an agent's calibration is looked for, and written, unless its settings say otherwise."""
    return vault.parent / FOLDER / f"{agent}.toml"


def calibrated(
    profile: DeviceProfile,
    given: Path | None,
    default: Path | None = None,
    *,
    root: Path = Path("/"),
    now: datetime | None = None,
) -> Use:
    """Return the profile with the calibration of `given`, or of `default` if that file is there.

    Beside it may be those of other power modes; of those that hold now, the newest is used. One that has
    expired, or was made for something else, is not used, for the reason that comes with it.
    Raises `SettingsError` for a given file that is not there or damaged.
    """
    path = given if given is not None else default
    if path is None:
        return Use(profile)
    files = ([path] if given is not None or path.is_file() else []) + of_other_modes(path)
    device, moment = facts(root), now or datetime.now(UTC)
    fitting: list[tuple[Path, Calibration]] = []
    reasons: list[str] = []
    elsewhere: list[str] = []
    for file in files:
        try:
            found = read_calibration(file)
        except SettingsError as error:
            if file == given:
                raise
            reasons.append(str(error))
            continue
        reason = found.unfit(profile.facts, device, moment)
        if reason is None:
            fitting.append((file, found))
        else:
            (reasons if found.of_mode(device) else elsewhere).append(f"the calibration {file} {reason}")
    if fitting:
        file, found = max(fitting, key=lambda one: one[1].made)
        return Use(profile.calibrated(found), file, found)
    used = profile.flagged(OTHER_MODE) if elsewhere else profile
    return Use(used, path if files else None, reason="; ".join(reasons or elsewhere) or None)


def of_other_modes(path: Path) -> list[Path]:
    """Return the files beside a calibration that hold those of other power modes: `NAME@MODE.toml`."""
    found = path.parent.glob(f"{glob.escape(path.stem)}@*.toml")
    return sorted(file for file in found if not file.name.endswith(REFUSED))


def place_for(out: Path, mode: str | None) -> Path:
    """Return where a calibration of a power mode is written: `out`, unless another mode's is there."""
    try:
        there = read_calibration(out) if out.is_file() else None
    except SettingsError:
        there = None  # nothing in it can be used
    if there is None or there.device.power_mode == mode:
        return out
    name = mode or "none"
    plain = re.sub(r"[^A-Za-z0-9._+-]", "_", name)[:60]
    mark = "" if plain == name else "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return out.with_name(f"{out.stem}@{plain}{mark}.toml")


def logged(use: Use) -> DeviceProfile:
    """Return the profile to use, and log which calibration it has, or why it has none."""
    if use.reason is not None:
        logger.warning(
            "a calibration is not used, the published power model is",
            extra={"reason": use.reason, "do": "hedgerow agent calibrate"},
        )
    elif use.calibration is not None:
        made, bar = use.calibration.made, use.calibration.model.u_rel_gross
        own = {} if use.calibration.sensor is None else {"sensor": use.calibration.sensor.name}
        facts = {"file": str(use.path), "made": f"{made:%Y-%m-%d}", "u_rel": bar}
        logger.info("calibrated", extra=facts | own)
    return use.profile
