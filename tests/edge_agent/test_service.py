"""The agent as a service: the unit, and what is done to install it."""

from __future__ import annotations

import configparser
import os
import pwd
from pathlib import Path

import pytest

from edge_agent.service import NAME, install, unit
from foundation.errors import SettingsError


def parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def test_the_unit_runs_this_python_and_may_write_the_vault_alone(tmp_path: Path) -> None:
    service = parsed(unit(tmp_path / "agent.toml", tmp_path / "vault", user="pi"))["Service"]
    assert service["ExecStart"].endswith(f'-m edge_agent --config "{tmp_path}/agent.toml"')
    assert service["ReadWritePaths"] == f'"{tmp_path}/vault"'
    assert service["ProtectSystem"] == "strict"
    assert service["NoNewPrivileges"] == "true"
    assert service["User"] == "pi"
    assert "@" not in service["ExecStart"]


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a%b"])
def test_paths_that_would_write_other_lines_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="unit file"):
        unit(tmp_path / name, tmp_path, user="pi")


@pytest.mark.skipif(os.geteuid() != 0, reason="installing a service needs root")
def test_installing_writes_the_unit_gives_the_vault_away_and_starts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, vault = tmp_path / "bin", tmp_path / "vault"
    programs.mkdir()
    (vault / "trusted").mkdir(parents=True)
    (tmp_path / "agent.toml").write_text("")
    (programs / "systemctl").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    (programs / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert install(tmp_path / "agent.toml", vault, user="nobody", root=tmp_path / "root") == NAME
    assert (tmp_path / "said").read_text().splitlines() == [
        "daemon-reload", f"enable {NAME}", f"restart {NAME}",
    ]  # fmt: skip
    assert (vault / "trusted").stat().st_uid == pwd.getpwnam("nobody").pw_uid
    assert (tmp_path / "root/etc/systemd/system" / NAME).read_text().startswith("[Unit]")
    (programs / "systemctl").write_text("#!/bin/sh\necho no such unit >&2; exit 1\n")
    with pytest.raises(SettingsError, match="daemon-reload` did not work: no such unit"):
        install(tmp_path / "agent.toml", vault, user="nobody", root=tmp_path / "root")


def test_without_systemd_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match="no systemd here"):
        install(tmp_path / "agent.toml", tmp_path, user="pi")
