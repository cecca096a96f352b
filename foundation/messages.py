"""What agents and coordinator say to each other.

Small messages (card, refusal, presence, telemetry, command) are JSON, and so are questions to a device's
personal model and what it answers. Assignments and updates are frames: the fields below as a JSON header, and
arrays beside it (see foundation/codec.py).
"""

from __future__ import annotations

from datetime import UTC
from typing import Any, Literal, TypeAlias, get_args

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from foundation.artifact import Manifest
from foundation.energy import EnergyReading, Stage
from foundation.errors import UnknownVerb, WireError
from foundation.frozen import Frozen
from foundation.parameters import Masks, Parameters
from foundation.spec import ModelSpec
from foundation.timing import Timing, Utc
from foundation.work import LocalWork

PROTOCOL = 1
COMMAND_BYTES = 4_096
"""Largest command."""
Link: TypeAlias = Literal["current", "previous", "serving", "good", "fallback", "pinned", "ordered"]
"""What a model on a device's disk is: export/folder.py."""


class Unavailable(Frozen):
    """Why an agent takes no work at present: a limit of its owner's."""

    cause: Literal["joules", "mains", "heat", "quiet"]
    reason: str = Field(max_length=500)
    """In words, without the end."""
    until: AwareDatetime | None = None
    """When that ends, where it is known."""

    def __str__(self) -> str:
        if self.until is None:
            return self.reason
        return f"{self.reason}, until {self.until.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


class Verdict(Frozen):
    """Why one of an agent's personal models does not answer there, or no longer."""

    kind: Literal["refused", "rolled_back"]
    sha256: str = Field(max_length=64)
    run: str | None = None
    round: int | None = None
    """`None` where the artifact could not be read."""
    reason: str = Field(max_length=1000)
    at: AwareDatetime

    def __str__(self) -> str:
        which = f"{self.sha256[:12]}…" if self.round is None else f"of round {self.round}"
        return f"the model {which} was {self.kind.replace('_', ' ')}: {self.reason}"


class KeptModel(Frozen):
    """One personal model that a device has on its disk."""

    sha256: str = Field(max_length=64)
    run: str = Field(max_length=64)
    round: int = Field(ge=0)
    links: frozenset[Link] = frozenset()
    """What it is there."""
    waits: bool = False
    """Whether it may not answer before the coordinator says so."""


class Done(Frozen):
    """What came of a command."""

    id: str = Field(max_length=32)
    verb: str = Field(max_length=32)
    done: bool
    said: str = Field("", max_length=300)
    """In words; why not, where it was not done."""


class Models(Frozen):
    """What a device says of its personal models."""

    serves: bool
    """Whether it answers requests with them."""
    kept: tuple[KeptModel, ...] = Field((), max_length=16)
    done: tuple[Done, ...] = Field((), max_length=16)
    """What came of the newest commands, oldest first."""

    def linked(self, link: Link) -> KeptModel | None:
        """Return the model that a link names."""
        return next((one for one in self.kept if link in one.links), None)

    def of(self, run: str, round: int) -> KeptModel | None:
        """Return the model that a round made."""
        return next((one for one in self.kept if (one.run, one.round) == (run, round)), None)


class AgentCard(Frozen):
    """Who an agent is and what it can do; retained on the broker."""

    protocol: int = PROTOCOL
    agent: str
    version: str
    profile: str
    examples: int = Field(ge=0)
    """Training examples on the device."""
    input: Literal["image", "series", "text"] | None = None
    shape: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    terms: frozenset[str] = frozenset()
    """What it can be asked for: names among `foundation.work.ABILITIES`."""
    size: int = Field(0, ge=0)
    """Weights of the model that this device would choose for itself; 0 when it has no data."""
    energy_kind: str = "none"
    energy_source: str = "none"
    serving: str | None = None
    """Address at which this device answers requests, if it serves."""
    problem: str | None = None
    """Why this agent cannot work at present, in words for its owner."""
    unavailable: Unavailable | None = None
    """Why it does not want to, though it could: it is not asked, and not waited for."""
    verdicts: tuple[Verdict, ...] = Field((), max_length=16)
    """The newest on its personal models, oldest first."""
    models: Models | None = None
    """`None` from an agent that does not tell, and cannot let a model wait."""


class Presence(Frozen):
    """Online, or offline (the last will)."""

    state: Literal["online", "offline"]
    session: str = ""
    """Changes with every start of the process."""
    protocol: int = PROTOCOL


class Assignment(Frozen):
    """What goes down: parameters and the description of the work. A frame."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    run: str
    round: int = Field(ge=1)
    agent: str
    strategy: str
    spec: ModelSpec
    """The model; for `flat` work, where the device's own counts, the teacher's."""
    model_seed: int
    """Seed of `initial_parameters`: what a device without personal parameters starts from."""
    seed: int
    work: LocalWork
    deadline_s: float = Field(gt=0)
    export: bool = False
    last: bool = False
    """Whether this is the last round of the run."""
    hold: bool = False
    """Whether the exported model waits until the coordinator lets it serve; not sent where it does not."""
    parameters: Parameters = Field(default_factory=Parameters, exclude=True)
    masks: Masks = Field(default_factory=dict, exclude=True)

    @model_serializer(mode="wrap")
    def _as_agents_know_it(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        told: dict[str, Any] = handler(self)
        if not self.hold:
            del told["hold"]  # an agent of an earlier version refuses a field that it does not know
        return told


class DeviceState(Frozen):
    """Under what conditions a device did a round, as its own files tell; `None` where they do not."""

    power_mode: str | None = Field(None, max_length=100)
    """A Jetson's, by name, at the end."""
    governor: str | None = Field(None, max_length=100)
    least_mhz: float | None = Field(None, ge=0)
    most_mhz: float | None = Field(None, ge=0)
    """The range that the clock was allowed at the end."""
    start_c: float | None = None
    end_c: float | None = None
    most_c: float | None = None
    """Of the hottest thermal zone, at start and end, and the most that was seen twice a second between."""
    throttle_events: int | None = Field(None, ge=0)
    """How often the processor was slowed, or the supply too weak; on a Raspberry Pi at least so often."""
    threads: int | None = Field(None, ge=1)
    """Of arithmetic."""
    own_threads: int | None = Field(None, ge=1)
    """How many the device uses where nobody asks for fewer and it is not too warm."""
    eased: str | None = Field(None, max_length=300)
    """Why these are fewer than the device's own, in words."""


class Update(Frozen):
    """What comes back. A frame."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    run: str
    round: int = Field(ge=1)
    agent: str
    examples: int = Field(ge=0)
    metrics: dict[str, float] = Field(default_factory=dict)
    """{loss,accuracy}_sent, loss, accuracy (test part, before and after), validation_sent and
    validation (accuracy on the validation part), loss_trained (mean over the last epoch's training steps),
    steps, step_ms, cpu_s (of training and pruning)."""
    kept_units: tuple[int, ...] = ()
    ledger: dict[Stage, EnergyReading] = Field(default_factory=dict)
    received_bytes: int = 0
    sent_bytes: int = 0
    """Of the update before this one, as delivered; its seconds are in this ledger, under `send`."""
    interface: str | None = None
    """The network interface towards the broker; its counters are those of all programs of the device."""
    interface_received_bytes: int | None = Field(None, ge=0)
    interface_sent_bytes: int | None = Field(None, ge=0)
    """Since the update before this one, headers and repeats included; `None` when nobody knows."""
    state: DeviceState | None = None
    """`None` where nobody looked, as with a simulated device."""
    timing: Timing | None = None
    """When the ledger's stages were; `None` where the coordinator knows no plug, and compares no clock."""
    artifact: Manifest | None = None
    problem: str | None = Field(None, max_length=2000)
    """What went wrong beside the training, such as an export that could not be proven."""
    parameters: Parameters = Field(default_factory=Parameters, exclude=True)
    masks: Masks = Field(default_factory=dict, exclude=True)


class Refusal(Frozen):
    """A reasoned no."""

    run: str
    round: int
    agent: str
    reason: str = Field(max_length=2000)


class Telemetry(Frozen):
    """Live progress of one agent, QoS 0: twice a second while it works, every 300 s when it rests."""

    agent: str
    stage: Stage
    run: str | None = None
    round: int | None = None
    progress: float | None = Field(None, ge=0, le=1)
    eta_s: float | None = None
    accuracy: float | None = None
    kept_units: tuple[int, ...] = ()
    hidden_units: int = 0
    joules: float | None = None
    """Since the agent's program started."""
    watts: float | None = None
    """At present, a mean over about a second; known as `energy_kind` says."""
    energy_kind: str = "none"
    sent_bytes: int = 0
    received_bytes: int = 0
    rss_bytes: int | None = None


class Command(Frozen):
    """A word from the coordinator to an agent."""

    verb: Literal["cancel", "release", "pin", "unpin", "rollback"]
    run: str = Field("", max_length=64)
    round: int = 0
    """Of the work that is called off, or of the model."""
    reason: str = Field("", max_length=1000)
    id: str = Field("", max_length=32)
    """What the answer on the card refers to; commands about models have one."""
    model: str = Field("", max_length=64)
    """SHA-256 of the model that is let go, pinned or rolled back."""
    by: str = Field("", max_length=64)
    """Who decided it."""

    def body(self) -> bytes:
        """Return it as it travels: `cancel` as agents of every version know it."""
        return self.model_dump_json(exclude_defaults=self.verb == "cancel").encode()


def command_of(body: bytes) -> Command:
    """Return the command in a letter; raises `UnknownVerb` for one of a newer version, else `WireError`."""
    if len(body) > COMMAND_BYTES:
        raise WireError(f"a command of {len(body)} bytes is larger than {COMMAND_BYTES}")
    try:
        return Command.model_validate_json(body)
    except ValidationError as error:
        told = _Verb.read(body)
        if told is not None and told.verb not in get_args(Command.model_fields["verb"].annotation):
            raise UnknownVerb(told.verb, told.id) from error
        problem = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "body"
        raise WireError(f"the command is malformed: {where}: {problem['msg']}") from error


class _Verb(BaseModel):
    """The little of a command that is read in every version."""

    model_config = ConfigDict(extra="ignore")

    verb: str = Field(max_length=32)
    id: str = Field("", max_length=32)

    @classmethod
    def read(cls, body: bytes) -> _Verb | None:
        try:
            return cls.model_validate_json(body)
        except ValidationError:
            return None


class ClockQuestion(Frozen):
    """What is your time? Asked by an agent, answered where the coordinator knows a plug of its device."""

    id: int = Field(ge=0, lt=2**53)


class ClockAnswer(Frozen):
    """The coordinator's time when a question came, and when its answer went."""

    id: int = Field(ge=0, lt=2**53)
    received_s: Utc
    answered_s: Utc


class Question(Frozen):
    """A request to a device's personal model."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    id: str = Field(min_length=1, max_length=128)
    """The asker's own, given back with the answer."""
    inputs: list[Any] | str
    """One raw sample or several, as nested lists of numbers; text may be a string or several."""
    probabilities: bool = False
    """Whether those of the likeliest labels are wanted, not only the label's own."""


class Predicted(Frozen):
    """The label of one sample."""

    label: str
    probability: float = Field(ge=0, le=1)
    probabilities: dict[str, float] | None = None


class Answer(Frozen):
    """What the personal model says to a question, or why nothing can be said."""

    id: str | None
    """`None` where the question could not be read so far."""
    error: str | None = Field(None, max_length=500)
    label: str | None = None
    probability: float | None = Field(None, ge=0, le=1)
    probabilities: dict[str, float] | None = None
    predictions: tuple[Predicted, ...] | None = None
    """In place of the three above, where the question had several samples."""
    model_version: str | None = None
    """The round that made the model."""
    model_sha256: str | None = None
    latency_ms: float | None = Field(None, ge=0)
    """From the question's arrival to its answer, on the device."""


class LivePrediction(Frozen):
    """What the personal model says to the newest window of a sensor; retained."""

    label: str
    probability: float = Field(ge=0, le=1)
    model_version: str
    model_sha256: str
    latency_ms: float = Field(ge=0)
    """From the window's last reading to its answer."""
    time: AwareDatetime
    """Of the window's last reading; when it came, where the sensor does not say."""
    skipped: int = Field(0, ge=0)
    """Windows since the prediction before this one that nobody was told about: the rate is bounded."""


Json = dict[str, Any]
