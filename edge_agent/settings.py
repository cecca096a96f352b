"""What an agent can be told."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal

from pydantic import Field

from edge_agent.datasets import DataSettings
from foundation.frozen import Frozen
from foundation.mqtt import MqttSettings
from foundation.spec import ModelSettings


def _hostname() -> str:
    return socket.gethostname().split(".")[0] or "agent"


class ServeSettings(Frozen):
    """Answering requests with the personal model, in a process of its own without torch."""

    enabled: bool = False
    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535)
    """0 lets the system choose; the card says which."""


class EnergySettings(Frozen):
    """How joules are counted."""

    share: Literal["device", "process"] = "device"
    """`device` charges this agent the whole board; `process` its share of a shared machine."""
    agents_on_host: int = Field(1, ge=1)
    """With `process`: among how many agents the machine's idle power is divided."""
    rate_hz: float = Field(5.0, gt=0, le=100)


class AgentSettings(Frozen):
    """Everything in `agent.toml`."""

    agent: str = Field(default_factory=_hostname)
    """Name of this agent in topics: letters, digits, '.', '_', '-'."""
    federation: str = "hedgerow"
    vault: Path = Path("vault")
    """Folder of everything that stays on this device."""
    profile: str = "auto"
    """A device profile's id or file; `auto` looks at the hardware."""
    data_dir: Path | None = None
    """Folder of the built-in data sets (or HEDGEROW_DATA)."""
    threads: int | None = Field(None, ge=1)
    """Threads for training; the profile's number when not set."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    mqtt: MqttSettings = MqttSettings()
    data: DataSettings
    model: ModelSettings | None = None
    """This device's own model, where the strategy lets devices differ; else the run's is everybody's."""
    serve: ServeSettings = ServeSettings()
    energy: EnergySettings = EnergySettings()
