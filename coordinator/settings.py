"""What a coordinator can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from foundation.errors import SettingsError
from foundation.frozen import Frozen
from foundation.mqtt import MqttSettings
from foundation.spec import ModelSpec
from foundation.work import Encoding

IMAGE_TOKENS = 16
SERIES_TOKENS = 8


class ModelSettings(Frozen):
    """The transformer, but for its input, which the agents' data decide."""

    width: int = Field(64, ge=4, le=4096)
    depth: int = Field(2, ge=1, le=64)
    heads: int = Field(4, ge=1, le=64)
    ffl_ratio: float = Field(4.0, gt=0, le=16)
    patch: int | None = Field(None, ge=1)
    """Side of a patch, or steps per token; when not set, the largest that gives 16 (8) tokens."""
    pool: Literal["mean", "cls"] = "mean"

    def spec(self, kind: str, shape: tuple[int, ...], classes: int) -> ModelSpec:
        """Return the whole spec; raises `SettingsError` when model and data do not fit."""
        fields = self.model_dump(exclude={"patch"})
        patch = self.patch or fitting_patch(kind, shape)
        try:
            return ModelSpec(input=kind, shape=shape, classes=classes, patch=patch, **fields)
        except ValueError as error:
            raise SettingsError(f"the model does not fit the agents' data: {error}") from error


def fitting_patch(kind: str, shape: tuple[int, ...]) -> int:
    """Return the largest patch that divides the sample and leaves enough tokens; 1 when none does."""
    if kind == "image":
        _, height, width = shape
        fits = [
            p
            for p in range(1, min(height, width) + 1)
            if height % p == 0 and width % p == 0 and (height // p) * (width // p) >= IMAGE_TOKENS
        ]
    elif kind == "series":
        fits = [p for p in range(1, shape[0] + 1) if shape[0] % p == 0 and shape[0] // p >= SERIES_TOKENS]
    else:
        fits = []
    return max(fits, default=1)


class RunSettings(Frozen):
    """One federation from its first round to its last."""

    name: str = "run"
    strategy: str = "pfl_tpp"
    settings: dict[str, Any] = Field(default_factory=dict)
    """The strategy's hyperparameters."""
    rounds: int = Field(10, ge=1, le=100_000)
    seed: int = Field(0, ge=0)
    min_agents: int = Field(2, ge=1)
    """Agents that must be online before the run starts."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the present agents that is asked in each round."""
    quorum: float = Field(0.5, gt=0, le=1)
    """Share of the asked agents whose updates suffice when the deadline has passed."""
    deadline_s: float = Field(600.0, gt=0)
    """Seconds a round may take."""
    grace_s: float = Field(60.0, ge=0)
    """Seconds to wait for agents that went offline, once the quorum is reached."""
    wait_s: float = Field(3600.0, gt=0)
    """Seconds to wait for `min_agents`."""
    export_every: int = Field(0, ge=0)
    """Export personal models every so many rounds; the last round always does."""
    export: bool = True
    """Whether personal models are exported at all."""
    encoding: Encoding = "float32"
    """How parameters travel down; the strategy's own `encoding` is how they travel up."""
    model: ModelSettings = ModelSettings()

    def exports(self, number: int) -> bool:
        """Whether personal models are exported after this round."""
        due = number == self.rounds or (self.export_every > 0 and number % self.export_every == 0)
        return self.export and due


class HttpSettings(Frozen):
    """Where page and API are served; without authentication, so on loopback."""

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    enabled: bool = True


class CoordinatorSettings(Frozen):
    """Everything in `coordinator.toml`."""

    federation: str = "hedgerow"
    folder: Path = Path("coordinator-data")
    """Database and blobs."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    autostart: bool = True
    """Start the run of this file as soon as its agents are there."""
    exit_when_done: bool = False
    """End the program when the run is over."""
    mqtt: MqttSettings = MqttSettings()
    http: HttpSettings = HttpSettings()
    run: RunSettings = RunSettings()
