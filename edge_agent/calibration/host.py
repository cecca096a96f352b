"""What a calibration depends on, read from the system: serial, firmware, USB devices, power mode."""

from __future__ import annotations

import hashlib
from pathlib import Path

import psutil

from edge_agent.energy.board import EVER, NOW
from edge_agent.energy.clocks import governor, range_mhz
from edge_agent.energy.files import text_of
from edge_agent.energy.power_mode import power_mode
from foundation.calibration import DeviceFacts

SERIALS = ("proc/device-tree/serial-number", "etc/machine-id")
"""Readable for every user, so that the agent sees what a calibration run by root saw."""
FIRMWARE = ("proc/device-tree/chosen/bootloader/version", "sys/class/dmi/id/bios_version")


def facts(root: Path = Path("/")) -> DeviceFacts:
    """Return what identifies this device; what cannot be read stays unknown."""
    serial, clock = _first(root, SERIALS), range_mhz(root)
    return DeviceFacts(
        serial_sha256=_hash(f"hedgerow {serial}") if serial else None,
        cores=psutil.cpu_count() or 1,
        kernel=(text_of(root / "proc/sys/kernel/osrelease") or "")[:500],
        firmware=_first(root, FIRMWARE),
        power_mode=power_mode(root),
        governor=governor(root),
        least_mhz=clock[0] if clock else None,
        most_mhz=clock[1] if clock else None,
        peripherals_sha256=_hash("\n".join(usb_ids(root))),
    )


def usb_ids(root: Path) -> list[str]:
    """Return `vendor:product` of every USB device, sorted."""
    places = (root / "sys/bus/usb/devices").glob("*/idVendor")
    return sorted(f"{text_of(place)}:{text_of(place.with_name('idProduct'))}" for place in places)


def throttled_between(before: int | None, after: int | None) -> bool | None:
    """Whether the firmware limits now, or did since `before`; `None` where nothing says."""
    if after is None:
        return None
    return bool(after & NOW or after & ~(before or 0) & EVER)


def _first(root: Path, places: tuple[str, ...]) -> str | None:
    texts = (text_of(root / place) for place in places)
    return next((text[:500] for text in texts if text), None)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
