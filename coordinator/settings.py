"""What a coordinator can be told."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from coordinator.store.place import StoreSettings
from foundation.errors import SettingsError
from foundation.frozen import Frozen
from foundation.mqtt import MqttSettings
from foundation.plug import plug_of
from foundation.spec import ModelSettings
from foundation.work import Encoding


class Robust(Frozen):
    """What keeps a few hostile or broken devices from spoiling a round; see docs/poison.md."""

    rule: Literal["mean", "median", "trimmed_mean", "krum", "multi_krum"] = "mean"
    """How values that are averaged over devices become one."""
    hostile: float = Field(0.2, ge=0, lt=0.5)
    """Share of the devices that may be hostile: what a trimmed mean cuts at each end, and Krum expects."""
    clip: float | None = Field(None, gt=0)
    """Largest change of a device, as a multiple of the round's median; larger ones are scaled down."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of a device's change."""
    examples: float | None = Field(None, ge=1)
    """Examples that a device can claim, as a multiple of the round's median."""
    huge: float | None = Field(1000.0, gt=1)
    """Change from which on an update is quarantined, as a multiple of the others' median."""
    outlier: float | None = Field(None, gt=0)
    """Robust distance from the others, in size or direction, from which on an update is quarantined."""

    @property
    def combines(self) -> bool:
        """Whether updates are absorbed otherwise than as they came."""
        return self.rule != "mean" or (self.clip or self.clip_norm or self.examples) is not None

    @property
    def screens(self) -> bool:
        """Whether anything is quarantined."""
        return (self.huge or self.outlier) is not None


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
    late: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """First round that an agent is asked, by name: rehearses devices that join later. It counts towards
    `min_agents` all the same."""
    quorum: float = Field(0.5, gt=0, le=1)
    """Share of the asked agents whose updates suffice when the deadline has passed."""
    deadline_s: float = Field(600.0, gt=0)
    """Seconds a round may take."""
    patience: float | None = Field(None, ge=1)
    """Soft deadline, as a multiple of what devices took to answer lately: after it the quorum suffices."""
    grace_s: float = Field(60.0, ge=0)
    """Seconds to wait for agents that went offline, once the quorum is reached."""
    mode: Literal["rounds", "async"] = "rounds"
    """`async`: a round closes when `buffer` updates are in, whichever round's they are."""
    buffer: int = Field(4, ge=1)
    """Updates that close a round, with `async`."""
    stale: float | None = Field(None, ge=0)
    """a of the weight (1 + rounds late)^-a of a late update; not set, late ones are refused (async: 0.5)."""
    stale_rounds: int = Field(5, ge=1)
    """Rounds that an update may be late."""
    wait_s: float = Field(3600.0, gt=0)
    """Seconds to wait for `min_agents`."""
    snapshot_every: int = Field(1, ge=1)
    """Write a snapshot after every so many rounds, while the next one is under way; in between, and after a
    kill, the state is the last snapshot and the updates since."""
    export_every: int = Field(0, ge=0)
    """Export personal models every so many rounds; the last round always does."""
    export: bool = True
    """Whether personal models are exported at all."""
    encoding: Encoding | None = None
    """How parameters travel down; as the strategy's `encoding_down` says when not set."""
    model: ModelSettings = ModelSettings()
    robust: Robust = Robust()

    @property
    def staleness(self) -> float | None:
        """The exponent with which late updates are merged; `None` where they are refused."""
        return 0.5 if self.stale is None and self.mode == "async" else self.stale

    def exports(self, number: int) -> bool:
        """Whether personal models are exported after this round."""
        due = number == self.rounds or (self.export_every > 0 and number % self.export_every == 0)
        return self.export and due


class Budget(Frozen):
    """What a device may spend; `None` leaves it free."""

    joules_per_day: float | None = Field(None, gt=0)
    """Joules of work (all stages but waiting and idling, gross) in a day in UTC."""
    joules: float | None = Field(None, gt=0)
    """The same in one round."""
    deadline_s: float | None = Field(None, gt=0)
    """Seconds of work in one round."""

    def over(self, other: Budget) -> Budget:
        """Return this budget, with what it leaves open as `other` says."""
        return other.model_copy(update=self.model_dump(exclude_none=True))


class BudgetSettings(Frozen):
    """What devices may spend; a device's own word counts first, then its profile's, then everybody's."""

    joules_per_day: float | None = Field(None, gt=0)
    joules: float | None = Field(None, gt=0)
    deadline_s: float | None = Field(None, gt=0)
    profiles: dict[str, Budget] = Field(default_factory=dict)
    """By id of the device's profile."""
    devices: dict[str, Budget] = Field(default_factory=dict)
    """By name of the agent."""

    def of(self, agent: str, profile: str) -> Budget:
        """Return the budget of one device."""
        everybody = Budget(joules_per_day=self.joules_per_day, joules=self.joules, deadline_s=self.deadline_s)
        of_profile = self.profiles.get(profile, Budget()).over(everybody)
        return self.devices.get(agent, Budget()).over(of_profile)


class HttpSettings(Frozen):
    """Where page and API are served: on loopback to everybody on this machine, elsewhere with tokens."""

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    enabled: bool = True
    auth: Literal["auto", "on"] = "auto"
    """Whether a token is asked for: `auto` beyond loopback, `on` always."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False
    """Lets it be served beyond loopback without TLS: everybody in between reads tokens."""
    hosts: tuple[str, ...] = ()
    """Names that it may be called by; not set: on loopback its own, elsewhere all."""
    per_second: float = Field(50.0, gt=0)
    """Requests of one address, in the mean over ten seconds."""

    @model_validator(mode="after")
    def _belongs_together(self) -> HttpSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("http.tls_cert and http.tls_key are set together")
        return self


class EnrolmentSettings(Frozen):
    """Who may take part: devices that joined with a token, and how the broker is told of them."""

    enabled: bool = False
    """Whether devices can join, and letters of those that did have seals."""
    required: bool = True
    """Whether nobody else may take part."""
    broker: Literal["none", "mosquitto", "nats", "emqx"] = "none"
    """Whose files `hedgerow coordinator broker-config` wrote."""
    files: Path | None = None
    """The folder it wrote them to."""
    reload: tuple[str, ...] = ()
    """Command that makes the broker read them again; not set, the process of its pid file gets SIGHUP."""
    address: str | None = Field(None, pattern=r"^mqtts?://")
    """Where devices reach the broker, for the line that `hedgerow coordinator invite` prints."""
    certificates: bool = False
    """Whether devices get client certificates, and the broker asks for them (`broker-config`)."""
    certificate_days: float = Field(397.0, gt=0, le=3650)
    """How long one is good; devices ask for the next when a third of that is left."""
    port: int | None = Field(None, ge=1, le=65_535)
    """With certificates: where devices that have joined reach the broker; `address` is for joining."""
    coordinator_reads: tuple[str, ...] = ()
    """More topics that the coordinator may read at the broker, such as those of smart plugs."""
    coordinator_writes: tuple[str, ...] = ()
    """More topics that it may write, such as those that ask a Tasmota plug."""
    devices_read: tuple[str, ...] = ()
    """More topics that every device may read, such as those of its sensors."""

    @model_validator(mode="after")
    def _belongs_together(self) -> EnrolmentSettings:
        if (self.broker == "none") != (self.files is None):
            raise ValueError("enrolment.broker and enrolment.files are set together")
        if self.certificates and (self.broker != "mosquitto" or self.port is None):
            raise ValueError(
                "enrolment.certificates needs enrolment.broker = 'mosquitto' and enrolment.port: write its"
                " files with `hedgerow coordinator broker-config mosquitto --certificates`"
            )
        return self


class HomeAssistantSettings(Frozen):
    """What Home Assistant is told over the same broker; `home_assistant = true` turns it on as it is."""

    enabled: bool = False
    prefix: str = Field("homeassistant", pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$")
    """Home Assistant's discovery prefix."""
    every_s: float = Field(10.0, ge=0.1)
    """Seconds between two states of a device, at least."""
    forget_days: float = Field(30.0, ge=1)
    """Days that a device may be offline before it is taken out of Home Assistant."""

    @model_validator(mode="before")
    @classmethod
    def _just_yes(cls, value: object) -> object:
        return {"enabled": value} if isinstance(value, bool) else value


class WallSettings(Frozen):
    """Smart plugs on the coordinator's broker, each with one device behind it."""

    plugs: dict[str, str] = Field(default_factory=dict)
    """By name of the agent: `mqtt:tasmota/PLUG`, `shelly:PREFIX` or `shelly1:ID`, as `calibrate --meter`."""
    accuracy: float = Field(0.02, gt=0, le=1)
    """Relative error of a plug's watts at k = 2."""
    keep_days: float = Field(7.0, gt=0, le=3650)
    """Days that a plug's readings are kept; what rounds drew stays."""

    @field_validator("plugs")
    @classmethod
    def _one_each(cls, plugs: dict[str, str]) -> dict[str, str]:
        taken: dict[tuple[str, str, int], str] = {}
        for agent, text in plugs.items():
            try:
                plug = plug_of(text)
            except SettingsError as error:
                raise ValueError(f"{agent}: {error}") from error
            other = taken.setdefault((plug.kind, plug.name, plug.channel), agent)
            if other != agent:
                raise ValueError(f"{other} and {agent} are on one plug, which cannot tell them apart: {text}")
        return plugs


class RolloutSettings(Frozen):
    """New personal models serve ring by ring, the next when the ones before held; see docs/rollout.md."""

    enabled: bool = False
    canary: Annotated[int, Field(ge=1)] | tuple[str, ...] = 1
    """Devices that go first: how many, or which."""
    rings: tuple[float, ...] = (0.1, 1.0)
    """Shares of the devices that have the new model when a ring is let go, those before included."""
    accuracy: float = Field(2.0, ge=0, le=100)
    """Points that the new models may be below those that served before, each on its own validation part."""
    errors: float = Field(0.1, ge=0, le=1)
    """Share of the devices that may refuse the new model or roll it back."""
    soak_s: float = Field(3600.0, ge=0)
    """Seconds that a ring serves the new models before the next is let go."""
    settled: bool = False
    """Whether a ring's devices have to end their own trial, too: 1,000 requests or an hour."""

    @field_validator("rings")
    @classmethod
    def _rise_to_all(cls, rings: tuple[float, ...]) -> tuple[float, ...]:
        rising = all(a < b for a, b in pairwise(rings))
        if not rings or not rising or rings[0] <= 0 or rings[-1] != 1.0:
            raise ValueError("rollout.rings are rising shares above 0, and the last is 1.0: everybody")
        return rings


class CoordinatorSettings(Frozen):
    """Everything in `coordinator.toml`."""

    federation: str = "hedgerow"
    folder: Path = Path("coordinator-data")
    """Database and blobs, and what is the coordinator's alone."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    autostart: bool = True
    """Start the run of this file as soon as its agents are there."""
    exit_when_done: bool = False
    """End the program when the run is over."""
    workers: bool = False
    """Updates are taken by `hedgerow coordinator worker`, any number of them; see docs/workers.md."""
    store: StoreSettings = StoreSettings()
    mqtt: MqttSettings = MqttSettings()
    http: HttpSettings = HttpSettings()
    enrolment: EnrolmentSettings = EnrolmentSettings()
    home_assistant: HomeAssistantSettings = HomeAssistantSettings()
    run: RunSettings = RunSettings()
    budgets: BudgetSettings = BudgetSettings()
    wall: WallSettings = WallSettings()
    rollout: RolloutSettings = RolloutSettings()
