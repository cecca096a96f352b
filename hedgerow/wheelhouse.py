"""`hedgerow wheelhouse`: every wheel that a board without internet needs, fetched on another machine."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib.metadata import version
from pathlib import Path

from foundation.errors import HedgerowError, SettingsError

CHECKOUT = Path(__file__).parents[1]
OLDEST_GLIBC = 17
"""The 2.17 of manylinux2014: what is built for an older one is built for this as well."""
PIP_S = 3_600.0
EXTRAS = ("train", "serve", "join", "sign", "export", "images", "coordinator", "nvml", "postgres", "s3")
_EXTRA = re.compile(r"""\s*;\s*extra\s*==\s*['"]([\w-]+)['"]\s*$""")


class NoWheelError(HedgerowError):
    """Something has no wheel for the platform; the text names it."""


@dataclass(frozen=True)
class Target:
    """The board: its processor, its Python, its C library."""

    platform: str
    """aarch64 or x86_64."""
    python: str
    """3.11, 3.12 and so on."""
    glibc: str = "2.31"
    """2.36 of Debian 12 and Raspberry Pi OS 12, 2.35 of Ubuntu 22.04, 2.31 of Debian 11 and Ubuntu 20.04."""

    def options(self) -> list[str]:
        """Return what pip is told of it; raises `SettingsError` for what is none."""
        python, glibc = re.fullmatch(r"3\.(\d+)", self.python), re.fullmatch(r"2\.(\d+)", self.glibc)
        if self.platform not in ("aarch64", "x86_64"):
            raise SettingsError(f"--platform {self.platform}: aarch64 or x86_64 (`uname -m` says it)")
        if python is None or int(python[1]) < 11:
            raise SettingsError(f"--python {self.python}: 3.11 or newer (`python3 --version` says it)")
        if glibc is None or int(glibc[1]) < OLDEST_GLIBC:
            raise SettingsError(f"--glibc {self.glibc}: 2.{OLDEST_GLIBC} or newer (`ldd --version` says it)")
        names = [f"manylinux_2_{n}_{self.platform}" for n in range(int(glibc[1]), OLDEST_GLIBC - 1, -1)]
        names += [f"manylinux2014_{self.platform}"]
        told = ["--only-binary", ":all:", "--python-version", self.python, "--implementation", "cp"]
        for abi in (f"cp3{python[1]}", "abi3", "none"):
            told += ["--abi", abi]
        for name in names:
            told += ["--platform", name]
        return told


def run_command(
    target: Target,
    extras: Sequence[str],
    out: Path,
    *,
    wheel: Path | None,
    constraints: Path | None,
    index: Sequence[str],
    as_json: bool,
) -> int:
    """Fill the folder and say what is in it; returns the exit code."""
    try:
        made = fill(target, extras, out, wheel=wheel, constraints=constraints, index=index)
    except SettingsError as error:
        sys.stderr.write(f"hedgerow wheelhouse: {error}\n")
        return 2
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow wheelhouse: {error}\n")
        return 1
    size = sum(path.stat().st_size for path in made)
    if as_json:
        told = {"folder": str(out), "wheels": [path.name for path in made], "bytes": size}
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
        return 0
    sys.stdout.write(
        f"{len(made)} wheels, {size / 1e6:.1f} MB, for Python {target.python} on {target.platform} in {out}\n"
        f"take the folder to the board and run there: sh {out.name}/install.sh /opt/hedgerow\n"
    )
    sys.stderr.write(_told_of_markers(target))
    return 0


def fill(
    target: Target,
    extras: Sequence[str],
    out: Path,
    *,
    wheel: Path | None = None,
    constraints: Path | None = None,
    index: Sequence[str] = (),
) -> list[Path]:
    """Fetch all wheels into `out`, and write beside them what installs them; returns the wheels, by name.

    `wheel` is Hedgerow's own; without it that of the checkout is built. `constraints` pins versions; without
    it the checkout's own. `index` goes to pip as it is. Raises `SettingsError` for a wrong wish and
    `NoWheelError` naming what has no wheel for the target.
    """
    options = target.options()
    if unknown := sorted(set(extras) - set(EXTRAS)):
        raise SettingsError(f"no extra called {', '.join(unknown)}: there are {', '.join(EXTRAS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"{out} is there and not empty: choose another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    own = wheel or _built(out)
    there = CHECKOUT / "constraints.txt"
    pinned = constraints or (there if there.is_file() else None)
    options += index
    options += [] if pinned is None else ["--constraint", str(pinned)]
    done = _pip(
        ["download", "--dest", str(out), *options, f"{own.resolve()}{_in_brackets(extras)}"], shown=True
    )
    if done.returncode:
        raise NoWheelError(_what_is_missing(options, own, extras, target) or _last_words(done.stderr))
    made = sorted(out.glob("*.whl"))
    _write_installer(out, made, extras, target)
    return made


def requirements_of(wheel: Path, extras: Iterable[str]) -> list[str]:
    """Return what a wheel of ours asks for with these extras, extras of extras resolved, sorted.

    Raises `SettingsError` where the file is no wheel of Hedgerow.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [
                n for n in archive.namelist() if re.fullmatch(r"hedgerow-[^/]+\.dist-info/METADATA", n)
            ]
            lines = HeaderParser().parsestr(archive.read(name).decode("utf-8")).get_all("Requires-Dist") or []
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SettingsError(f"{wheel} is no wheel of Hedgerow: {error}") from error
    by_extra: dict[str, list[str]] = {}
    for line in lines:
        match = _EXTRA.search(line)
        by_extra.setdefault(match[1] if match else "", []).append(_EXTRA.sub("", line))
    found, left, seen = set(), ["", *extras], set()
    while left:
        if (extra := left.pop()) in seen:
            continue
        seen.add(extra)
        for one in by_extra.get(extra, []):
            inner = re.fullmatch(r"hedgerow\[([\w,-]+)\]", one)
            left += inner[1].split(",") if inner else []
            found |= set() if inner else {one}
    return sorted(found)


def _built(out: Path) -> Path:
    """Build the checkout's wheel into `out`."""
    if not (CHECKOUT / "pyproject.toml").is_file():
        raise SettingsError(
            f"this is no checkout: name Hedgerow's own wheel of {version('hedgerow')} with --wheel FILE"
        )
    done = _pip(["wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(CHECKOUT)])
    found = sorted(out.glob("hedgerow-*.whl"))
    if done.returncode or not found:
        raise HedgerowError(f"Hedgerow's wheel was not built: {_last_words(done.stderr)}")
    return found[0]


def _what_is_missing(options: list[str], own: Path, extras: Sequence[str], target: Target) -> str:
    """Ask for each requirement alone, as pip stops at the first without a wheel; "" where all have one."""
    missing = []
    for wish in requirements_of(own, extras):
        with tempfile.TemporaryDirectory() as folder:
            done = _pip(["download", "--dest", folder, *options, wish])
        if done.returncode:
            names = re.findall(r"No matching distribution found for ([^\s(]+)", done.stderr)
            inner = f" (it needs {names[0]})" if names and not names[0].startswith(wish) else ""
            missing.append(f"{wish}{inner}")
    if not missing:
        return ""
    return (
        f"no wheel for Python {target.python} on {target.platform} with glibc {target.glibc}:"
        f" {'; '.join(missing)}. Leave out the extra that asks for it, try another --python or a newer"
        " --glibc, or put a wheel of your own into a folder and name that with --find-links"
    )


INSTALLER = """#!/bin/sh
# Installs Hedgerow from this folder alone: sh install.sh [FOLDER] [PYTHON].
set -eu
here=$(cd "$(dirname "$0")" && pwd)
into=${1:-/opt/hedgerow}
python=${2:-python@PYTHON@}
if [ "$(uname -m)" != "@PLATFORM@" ]; then
  echo "these wheels are for @PLATFORM@, this is $(uname -m)"
  exit 2
fi
(cd "$here" && sha256sum --quiet -c SHA256SUMS)
"$python" -m venv "$into"
"$into/bin/pip" install --disable-pip-version-check --no-index --find-links "$here" \\
  -c "$here/constraints.txt" "hedgerow@EXTRAS@"
"$into/bin/hedgerow" --version
"""


def _write_installer(out: Path, wheels: Sequence[Path], extras: Sequence[str], target: Target) -> None:
    """Write constraints, checksums and the script that installs without asking anybody."""
    names = [path.name.split("-")[:2] for path in wheels]
    pins = "".join(f"{name.replace('_', '-')}=={release}\n" for name, release in names)
    (out / "constraints.txt").write_text(pins, encoding="utf-8")
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in wheels)
    (out / "SHA256SUMS").write_text(sums, encoding="utf-8")
    text = INSTALLER.replace("@PYTHON@", target.python).replace("@PLATFORM@", target.platform)
    (out / "install.sh").write_text(text.replace("@EXTRAS@", _in_brackets(extras)), encoding="utf-8")


def _in_brackets(extras: Sequence[str]) -> str:
    return f"[{','.join(extras)}]" if extras else ""


def _told_of_markers(target: Target) -> str:
    """Return what a person should know: pip reads some conditions of the machine that it runs on."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}", platform.machine()
    if here == (target.python, target.platform):
        return ""
    return (
        f"note: pip reads conditions of packages (python_version, platform_machine) as of this machine,"
        f" Python {here[0]} on {here[1]}: a package that only the board needs may be missing\n"
    )


def _pip(words: Sequence[str], *, shown: bool = False) -> subprocess.CompletedProcess[str]:
    """Run pip; `shown` lets its progress through to the terminal's error output."""
    command = [sys.executable, "-m", "pip", *words, "--disable-pip-version-check", "--no-input"]
    try:
        return subprocess.run(
            command,
            check=False,
            text=True,
            timeout=PIP_S,
            stdout=sys.stderr if shown and sys.stderr.isatty() else subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HedgerowError(f"pip did not end well: {error}") from error


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("WARNING")]
    return " ".join(lines[-3:]) or "pip said nothing"
