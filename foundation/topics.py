"""Every MQTT topic, in one place.

hedgerow/v1/{federation}/coordinator/presence          coordinator, last will    retained
hedgerow/v1/{federation}/agents/{agent}/presence       agent, last will          retained
hedgerow/v1/{federation}/agents/{agent}/card           agent                     retained
hedgerow/v1/{federation}/agents/{agent}/assignment     coordinator: parts of a frame
hedgerow/v1/{federation}/agents/{agent}/received       agent: receipts for assignment parts
hedgerow/v1/{federation}/agents/{agent}/update         agent: parts of a frame
hedgerow/v1/{federation}/agents/{agent}/receipt        coordinator: receipts for update parts
hedgerow/v1/{federation}/agents/{agent}/refusal        agent
hedgerow/v1/{federation}/agents/{agent}/telemetry      agent, QoS 0
hedgerow/v1/{federation}/agents/{agent}/command        coordinator: cancel, stop, ...
hedgerow/v1/{federation}/agents/{agent}/clock          agent, QoS 0: asks what time it is
hedgerow/v1/{federation}/agents/{agent}/time           coordinator, QoS 0: says it, where a plug is joined
hedgerow/v1/{federation}/agents/{agent}/renew          agent: asks for a new client certificate
hedgerow/v1/{federation}/agents/{agent}/certificate    coordinator: gives it
hedgerow/v1/{federation}/agents/{agent}/predict        anyone who may: questions to its personal model
hedgerow/v1/{federation}/agents/{agent}/answer         agent: answers to them
hedgerow/v1/{federation}/agents/{agent}/prediction     agent: of its sensor's newest window  retained
hedgerow/v1/{federation}/home/{agent}/state            coordinator, for Home Assistant  retained
hedgerow/v1/{federation}/coordinator/state             coordinator, for Home Assistant  retained
hedgerow/v1/{federation}/join/{user}/request           a device that wants to join (foundation/joining.py)
hedgerow/v1/{federation}/join/{user}/answer            coordinator
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from foundation.errors import SettingsError

PROTOCOL = 1
"""The version of what is said; the topics have it, and in MQTT 5 every letter."""
ROOT = f"hedgerow/v{PROTOCOL}"
WRITTEN_BY_AGENTS = (
    "presence",
    "card",
    "received",
    "update",
    "refusal",
    "telemetry",
    "clock",
    "renew",
    "answer",
    "prediction",
)
"""What an agent writes below its own branch; the broker lets it write nothing else."""
READ_BY_AGENTS = ("assignment", "receipt", "command", "time", "certificate", "predict")
"""What it reads there; besides these only the coordinator's presence."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def checked_name(name: str, what: str) -> str:
    """Return `name` if it can stand in a topic; raises `SettingsError` with the rule otherwise."""
    if not NAME.fullmatch(name):
        raise SettingsError(
            f"{what} {name!r} cannot be used in a topic: use up to 64 letters, digits, '.', '_' or '-',"
            " starting with a letter or digit"
        )
    return name


def client_id(federation: str, who: str) -> str:
    """Return the MQTT client id of an agent or of the `coordinator`; NATS takes none with a dot."""
    return f"{federation}-{who}".replace(".", "~")


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one federation."""

    federation: str

    def __post_init__(self) -> None:
        checked_name(self.federation, "federation")

    @property
    def root(self) -> str:
        """The federation's branch."""
        return f"{ROOT}/{self.federation}"

    @property
    def coordinator_presence(self) -> str:
        """Retained; `online` or `offline`."""
        return f"{ROOT}/{self.federation}/coordinator/presence"

    @property
    def coordinator_state(self) -> str:
        """Retained; where the run stands, for Home Assistant."""
        return f"{ROOT}/{self.federation}/coordinator/state"

    def home(self, agent: str) -> str:
        """Return where Home Assistant reads the values of one agent; the agent itself may not write there."""
        return f"{ROOT}/{self.federation}/home/{agent}/state"

    def of(self, agent: str, what: str) -> str:
        """Return the topic of one agent; `what` is the last word of its line in the table above."""
        return f"{ROOT}/{self.federation}/agents/{agent}/{what}"

    def every(self, what: str) -> str:
        """Return the pattern of that topic over all agents."""
        return f"{ROOT}/{self.federation}/agents/+/{what}"

    def agent_of(self, topic: str) -> str:
        """Return the agent in a topic of this federation; raises `ValueError` for any other topic."""
        head = f"{ROOT}/{self.federation}/agents/"
        rest = topic.removeprefix(head).split("/")
        if not topic.startswith(head) or len(rest) != 2:
            raise ValueError(f"{topic!r} is not an agent's topic of federation {self.federation!r}")
        return rest[0]
