"""Who may do what at the broker, whatever broker it is."""

from __future__ import annotations

import grp
import importlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from coordinator.fleet.authority import Certified
from foundation.durable import write_whole
from foundation.errors import SettingsError
from foundation.topics import ROOT, Topics

BROKERS = ("mosquitto", "nats", "emqx")
COORDINATOR = "coordinator"
"""The coordinator's user name at the broker; no device may have it."""
RELOAD_S = 30.0


@dataclass(frozen=True, slots=True)
class Account:
    """A user of the broker."""

    user: str
    password: str


@dataclass(frozen=True, slots=True)
class Access:
    """Everybody who may connect, and where."""

    federation: str
    coordinator: Account
    devices: Sequence[Account] = ()
    joining: Sequence[Account] = ()
    """Users of open invitations: they may ask to join, and read the answer."""
    coordinator_reads: Sequence[str] = ()
    """More patterns that the coordinator reads, such as those of smart plugs."""
    coordinator_writes: Sequence[str] = ()
    """More patterns that it writes."""
    devices_read: Sequence[str] = ()
    """More patterns that every device reads, such as those of its sensors."""
    home_prefix: str = "homeassistant"
    certificates: bool = False
    """Whether all but users of invitations show a client certificate."""

    @property
    def topics(self) -> Topics:
        """The federation's topics."""
        return Topics(self.federation)

    def join_topic(self, user: str, what: str) -> str:
        """Return where an invitation's user writes (`request`) and reads (`answer`)."""
        return f"{ROOT}/{self.federation}/join/{user}/{what}"


@dataclass(frozen=True, slots=True)
class Listener:
    """Where the broker listens; without `tls` for loopback and test beds only."""

    port: int
    tls: Certified | None
    host: str = ""
    """The address to bind; empty means all."""
    joining_port: int | None = None
    """Where devices without a certificate join; all others show one then."""


class BrokerFiles(Protocol):
    """What a broker's module has."""

    PID_FILE: str
    """Name of the file that holds the broker's process id while it runs with these files."""

    def config(self, folder: Path, listener: Listener, access: Access) -> Mapping[str, str]:
        """Return the files that a person may change afterwards, by name."""
        ...

    def users(self, folder: Path, access: Access) -> Mapping[str, str]:
        """Return the files that are written anew whenever somebody joins or leaves."""
        ...


def broker_files(name: str) -> BrokerFiles:
    """Return the module of a broker; raises `SettingsError` for one that there is none for."""
    if name not in BROKERS:
        raise SettingsError(
            f"there are no files for a broker called {name!r}: use one of {', '.join(BROKERS)}"
        )
    return cast(BrokerFiles, importlib.import_module(f"coordinator.fleet.brokers.{name}"))


def give(folder: Path, group: str, *, wanted: bool) -> None:
    """Let a group read and write in a folder; one that is not `wanted` by name may be missing.

    Brokers that are started as root become a user of their own before they read anything.
    """
    try:
        number = grp.getgrnam(group).gr_gid
        if os.geteuid() == 0 or wanted:
            os.chown(folder, -1, number)
    except KeyError as error:
        if wanted:
            raise SettingsError(f"there is no group {group!r} here") from error
    except OSError as error:
        raise SettingsError(f"{folder} cannot be given to the group {group!r}: {error}") from error
    folder.chmod(0o770)


def write(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Write files that hold secrets whole or not at all; returns the names of those that changed.

    They belong to the folder's group and are readable by it: give the folder to the broker's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    changed = []
    for name, text in files.items():
        path = folder / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        write_whole(path, text.encode(), mode=0o640, group=folder.stat().st_gid)
        changed.append(name)
    return changed


def reload(folder: Path, name: str, command: Sequence[str]) -> str:
    """Tell the broker to read its files again; returns what was done. Raises `SettingsError`.

    `command` does it where one is given; else the process of the pid file gets SIGHUP.
    """
    if command:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=RELOAD_S)
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", "") or "").strip()
            raise SettingsError(f"enrolment.reload did not work: {error} {said}".rstrip()) from error
        return f"ran {' '.join(command)}"
    path = folder / broker_files(name).PID_FILE
    try:
        os.kill(int(path.read_text()), signal.SIGHUP)
    except FileNotFoundError:
        return f"{name} does not run with these files yet: it reads them when it starts"
    except ProcessLookupError:
        return f"{name} does not run at present: it reads its files when it starts"
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{name} was not told of the change ({path}: {error}): set enrolment.reload to a command that"
            f' does, such as ["systemctl", "reload", "{name}"]'
        ) from error
    return f"told {name}"
