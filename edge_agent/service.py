"""The agent as a systemd service: a unit that may write its vault and nothing else."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from foundation.errors import SettingsError

NAME = "hedgerow-agent.service"
COMMAND_S = 60.0


def unit(config: Path, vault: Path, *, user: str, python: str = sys.executable) -> str:
    """Return the unit's text; `python` is the interpreter that runs the agent."""
    text = files("edge_agent").joinpath("systemd", NAME).read_text("utf-8")
    names = {"PYTHON": python, "CONFIG": config.resolve(), "VAULT": vault.resolve(), "USER": user}
    for name, value in names.items():
        if any(c in str(value) for c in '"\n%\\'):
            raise SettingsError(f"{value} cannot stand in a unit file: choose a path without quotes, %, \\")
        text = text.replace(f"@{name}@", str(value))
    return text


def install(config: Path, vault: Path, *, user: str, root: Path = Path("/")) -> str:
    """Write the unit, make its user, give it the vault, start it; returns the unit's name.

    Raises `SettingsError` saying what to do by hand where a step fails. `root` is for tests: files go below.
    """
    systemctl = shutil.which("systemctl")
    if systemctl is None:
        raise SettingsError(
            "joined, but there is no systemd here (no systemctl): start `hedgerow agent --config"
            f" {config}` with what this system has instead"
        )
    if os.geteuid() != 0:
        raise SettingsError(f"joined, but a service is installed as root: sudo {' '.join(sys.argv)}")
    _make_user(user)
    _give(config, vault, user)
    path = root / "etc" / "systemd" / "system" / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(unit(config, vault, user=user), encoding="utf-8")
    for words in (["daemon-reload"], ["enable", NAME], ["restart", NAME]):
        _run([systemctl, *words])
    return NAME


def _make_user(user: str) -> None:
    try:
        pwd.getpwnam(user)
    except KeyError:
        _run(["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", user])


def _give(config: Path, vault: Path, user: str) -> None:
    """Make the vault and the settings the service user's."""
    entry = pwd.getpwnam(user)
    for path in [vault, *vault.rglob("*")]:
        os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)
    os.chown(config, entry.pw_uid, entry.pw_gid)


def _run(words: list[str]) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=COMMAND_S)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or "").strip()
        raise SettingsError(f"joined, but `{' '.join(words)}` did not work: {said or error}") from error
