"""`hedgerow init`: a commented settings file to begin with, which never takes another's place unasked."""

from __future__ import annotations

import json
import shlex
import socket
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from foundation.errors import SettingsError
from hedgerow.exits import done
from hedgerow.files import check_writable, write_whole
from hedgerow.settings_file import text_of

STDOUT = Path("-")
HEAD = """\
# Everything that {what} can be told. What stands here as a comment is the default, or not set: take the
# "# " away and change it. The environment ({prefix}__MQTT__HOST=...) and --set mqtt.host=... win over it.
# `{command} --config {file} --print-settings` shows what holds, and where it came from.

"""
NEEDED: dict[str, dict[str, Any]] = {
    "coordinator": {
        "federation": "hedgerow",
        "folder": "coordinator-data",
        "mqtt.host": "127.0.0.1",
        "run.name": "first",
        "run.strategy": "pfl_tpp",
        "run.rounds": 10,
        "run.min_agents": 2,
    },
    "agent": {
        "agent": "",
        "federation": "hedgerow",
        "vault": "vault",
        "mqtt.host": "127.0.0.1",
        "data.kind": "builtin",
        "data.name": "digits",
    },
}
"""What a person has to look at, by what the file is for."""
NEXT = {
    "coordinator": (
        "say in it where the MQTT broker is (mqtt.host), and what to train (run)",
        "hedgerow coordinator --config {file} --print-settings",
        "hedgerow coordinator --config {file}",
        "hedgerow fleet --watch",
    ),
    "agent": (
        "say in it where the MQTT broker is (mqtt.host), and where the data are (data)",
        "hedgerow agent doctor --config {file}",
        "hedgerow agent --config {file}",
    ),
}


def run_command(
    kind: Literal["coordinator", "agent"], output: Path | None, *, force: bool, as_json: bool
) -> int:
    """Write the file, say what comes next, and return the exit code: 2 where there is one already."""
    return done("hedgerow init", lambda: _write(kind, output or Path(f"{kind}.toml"), force, as_json))


def _write(kind: Literal["coordinator", "agent"], file: Path, force: bool, as_json: bool) -> None:
    text = text_for(kind, file)
    if file == STDOUT:
        sys.stdout.write(text)
        return
    check_writable(file)
    if force:
        write_whole(file, text)
    else:
        _write_new(file, text)
    steps = [step.format(file=shlex.quote(str(file))) for step in NEXT[kind]]
    if as_json:
        print(json.dumps({"file": str(file), "next": steps}))
        return
    print(f"{file} is written. Next:")
    for number, step in enumerate(steps, 1):
        print(f"  {number}. {step}")


def _write_new(file: Path, text: str) -> None:
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError as error:
        raise SettingsError(
            f"{file} is there already, and stays as it is: name another with -o, or give --force"
        ) from error
    except OSError as error:
        raise SettingsError(f"{file} cannot be written ({error.strerror}): name another with -o") from error


def text_for(kind: Literal["coordinator", "agent"], file: Path) -> str:
    """Return the file for a coordinator or an agent of this machine; `file` is what it will be called."""
    given = dict(NEEDED[kind])
    if kind == "agent":
        given["agent"] = socket.gethostname().split(".")[0] or "agent"
    called = f"{kind}.toml" if file == STDOUT else shlex.quote(str(file))
    head = HEAD.format(
        what=f"the {kind}" if kind == "coordinator" else "an agent",
        prefix=kind.upper(),
        command=f"hedgerow {kind}",
        file=called,
    )
    return f"# {kind}.toml\n{head}{text_of(_model(kind), given)}"


def _model(kind: Literal["coordinator", "agent"]) -> type[BaseModel]:
    if kind == "agent":
        from edge_agent.settings import AgentSettings

        return AgentSettings
    from coordinator.settings import CoordinatorSettings

    return CoordinatorSettings
