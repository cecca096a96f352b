"""Which calibration an agent has, and whether it may use it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edge_agent.calibration.host import facts
from foundation.calibration import Calibration, read_calibration
from foundation.errors import SettingsError
from foundation.profile import DeviceProfile

logger = logging.getLogger(__name__)

FOLDER = "calibration"


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

    One that has expired, or was made for something else, is not used, for the reason that comes with it.
    Raises `SettingsError` for a given file that is not there or damaged.
    """
    path = given if given is not None else default
    if path is None or (given is None and not path.is_file()):
        return Use(profile)
    try:
        found = read_calibration(path)
    except SettingsError as error:
        if given is not None:
            raise
        return Use(profile, path, reason=str(error))
    reason = found.unfit(profile.facts, facts(root), now or datetime.now(UTC))
    if reason is not None:
        return Use(profile, path, reason=f"the calibration {path} {reason}")
    return Use(profile.calibrated(found), path, found)


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
