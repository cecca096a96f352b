"""What an agent can be told."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from edge_agent.datasets import DataSettings
from edge_agent.quiet import stretch
from foundation.frozen import Frozen
from foundation.mqtt import MqttSettings
from foundation.spec import ModelSettings


def _hostname() -> str:
    return socket.gethostname().split(".")[0] or "agent"


class ServeStreamSettings(Frozen):
    """Windows of a sensor, predicted as they come; the model has to be one for series."""

    enabled: bool = False
    topic: str | None = None
    """Where the readings come from; with `kind = "mqtt_stream"`, not set: the same as in `[data]`."""
    fields: tuple[str, ...] | None = Field(None, min_length=1, max_length=256)
    """The numbers of one reading, in the model's order of channels; not set: as in `[data]`."""
    time_field: str | None = None
    """Seconds within a reading; not set: as in `[data]`, else the time of arrival."""
    stride: int | None = Field(None, ge=1)
    """Readings from one window to the next; not set: as in `[data]`, else half a window."""
    max_gap_s: float = Field(1.0, gt=0)
    """A longer silence begins a new window."""
    per_second: float = Field(1.0, gt=0, le=100)
    """Predictions published, at most; windows in between are skipped and counted."""


class ServeMqttSettings(Frozen):
    """Answering over MQTT, on the device's own topics; it starts the serving process as well."""

    enabled: bool = False
    per_second: float = Field(20.0, gt=0, le=10_000)
    """Questions answered, at most; others are told that there are too many."""
    question_bytes: int = Field(262_144, ge=1_024, le=8_388_608)
    """Largest question."""
    stream: ServeStreamSettings = ServeStreamSettings()


class ServeSettings(Frozen):
    """Answering requests with the personal model, in a process of its own without torch."""

    enabled: bool = False
    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535)
    """0 lets the system choose; the card says which."""
    api_key_file: Path | None = None
    """File with the key that clients have to send; needed beyond loopback, unless `insecure`."""
    admin_key_file: Path | None = None
    """File with the key for `/admin/` (pin, unpin, roll back); not set, the clients' key counts there too."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False
    """Lets the network ask without a key."""
    batch_window_ms: float = Field(0.0, ge=0)
    """How long a request waits for others to share a run with; 0 never."""
    canary: int = Field(64, ge=0, le=64)
    """Validation samples kept to compare a new model with the one that serves; 0 compares nothing."""
    canary_drop: float | None = Field(None, ge=0, le=100)
    """Points of accuracy that a new model may lose on them; not set, what chance explains."""
    rollback: bool = True
    """Whether a new model that leaves its band is taken back."""
    rollback_errors: float = Field(0.01, ge=0, le=1)
    """Share of its requests that a new model may fail and the one before answers."""
    rollback_p95: float = Field(2.0, ge=1)
    """p95 that a new model may take, as a multiple of that of the one before."""
    optimized: Literal["auto", "on", "off"] = "auto"
    """Keeps onnxruntime's optimized form of a model for the next start: `auto` where that is shorter here."""
    p95_ms: float | None = Field(None, gt=0)
    """Training stands still while the p95 of answers is above; not set, it does not look."""

    mqtt: ServeMqttSettings = ServeMqttSettings()

    @property
    def wanted(self) -> bool:
        """Whether the serving process is needed, for HTTP or for MQTT."""
        return self.enabled or self.mqtt.enabled or self.mqtt.stream.enabled

    def options(self) -> list[str]:
        """Return what `hedgerow serve` is told besides host and port."""
        names: tuple[str, ...] = ("api_key_file", "admin_key_file", "tls_cert", "tls_key", "batch_window_ms")
        names += ("canary_drop", "rollback_errors", "rollback_p95", "optimized")
        fields = type(self).model_fields
        told = [
            f"--{name.replace('_', '-')}={value}"
            for name in names
            if (value := getattr(self, name)) != fields[name].default
        ]
        return told + ["--insecure"] * self.insecure + ["--no-rollback"] * (not self.rollback)


class ExportSettings(Frozen):
    """How the personal model is exported."""

    int8: Literal["auto", "on", "off"] = "auto"
    """8-bit weights: `auto` takes them where the profile says that they may pay, and where they are proven
    to be faster on this device and as accurate on its validation data."""


class EnergySettings(Frozen):
    """How joules are counted."""

    share: Literal["device", "process"] = "device"
    """`device` charges this agent the whole board; `process` its share of a shared machine."""
    agents_on_host: int = Field(1, ge=1)
    """With `process`: among how many agents the machine's idle power is divided."""
    rate_hz: float = Field(5.0, gt=0, le=100)
    calibration: Path | None = None
    """A file of `hedgerow agent calibrate`; not set: `calibration/<agent>.toml` beside the vault, if any."""


class MetricsSettings(Frozen):
    """Figures of this agent for a Prometheus on the device, on loopback."""

    port: int | None = Field(None, ge=0, le=65535)
    """Where `/metrics` is answered; 0 lets the system choose, and the log says which. Not set: nowhere."""


class LimitSettings(Frozen):
    """When this device works at all: its owner's word, whatever a coordinator asks."""

    joules_per_day: float | None = Field(None, gt=0)
    """Joules of work (all stages but waiting and idling, gross) in a day of this device's local time."""
    only_on_mains: bool = False
    """Take no work while a battery feeds the device."""
    max_temperature_c: float | None = Field(None, gt=0, le=150)
    """Take no work while a thermal zone is hotter; 5 above it, work in hand is called off."""
    quiet_hours: tuple[str, ...] = ()
    """Stretches of the local day in which no work is taken, like 22:00-06:30."""

    @field_validator("quiet_hours", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("quiet_hours")
    @classmethod
    def _readable(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            stretch(text)
        return texts


class PrivacySettings(Frozen):
    """Bounds and noise on what leaves this device, whatever a coordinator asks; see docs/privacy.md."""

    clip: float | None = Field(None, gt=0)
    """Largest norm of the change in an update, over all its values; not set: as it is."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation of Gaussian noise on every value, as a multiple of `clip`; 0 adds none."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Of the (epsilon, delta) that is told."""
    epsilon: float | None = Field(None, gt=0)
    """Work that would spend more in this device's life is refused."""
    metrics: bool = False
    """With noise: whether accuracy, losses and the exported model are told all the same, unprotected."""

    @model_validator(mode="after")
    def _noise_needs_a_bound(self) -> PrivacySettings:
        if self.noise and self.clip is None:
            raise ValueError("privacy.noise is a multiple of privacy.clip: set clip as well")
        if self.epsilon is not None and not self.noise:
            raise ValueError("privacy.epsilon bounds what noise has to pay for: set noise as well")
        return self


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
    export: ExportSettings = ExportSettings()
    serve: ServeSettings = ServeSettings()
    energy: EnergySettings = EnergySettings()
    limits: LimitSettings = LimitSettings()
    privacy: PrivacySettings = PrivacySettings()
    metrics: MetricsSettings = MetricsSettings()
