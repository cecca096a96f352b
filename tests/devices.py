"""File trees of made-up devices: what they show of power modes, clocks, heat and throttling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

MODES = """\
# NAME=NO_MODE in a comment: < POWER_MODEL ID=0 NAME=COMMENT >
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
CPU_A78_0 MAX_FREQ 1510400
< POWER_MODEL ID=1 NAME=7W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=0 >
"""
CLOCK = "sys/devices/system/cpu/cpufreq/policy0"
STATUS = "var/lib/nvpmodel/status"
ORIN = {
    "etc/nvpmodel.conf": MODES,
    STATUS: "pmode:0000\n",
    f"{CLOCK}/scaling_governor": "schedutil\n",
    f"{CLOCK}/scaling_min_freq": "115200\n",
    f"{CLOCK}/scaling_max_freq": "1510400\n",
    f"{CLOCK}/scaling_cur_freq": "1510400\n",
    f"{CLOCK}/scaling_available_frequencies": "115200 729600 806400 1113600 1510400 \n",
    "sys/class/thermal/thermal_zone0/temp": "50000\n",
    "sys/class/thermal/thermal_zone1/temp": "48500\n",
    "sys/class/hwmon/hwmon3/name": "soctherm_oc\n",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "27\n",
}
"""A Jetson Orin Nano in the mode 15W."""


def written(root: Path, files: Mapping[str, str]) -> Path:
    """Write files below a root, and return the root."""
    for place, text in files.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(text)
    return root
