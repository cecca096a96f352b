"""Virtual devices that attack, to rehearse what a federation's settings are worth.

nan         an update with a value that is not a number, which no honest encoder writes
huge        a million times the change that training made
sign_flip   the change that training made, the other way
label_flip  honest training on wrong labels: class c is called C - 1 - c
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import zstandard

from edge_agent.agent import Agent, CarryOut
from edge_agent.samples import LocalData, Part
from edge_agent.vault import Outgoing, Vault
from foundation.parameters import Parameters

if TYPE_CHECKING:
    from edge_agent.training import trainer as trainer_module

Attack: TypeAlias = Literal["nan", "huge", "sign_flip", "label_flip"]
ATTACKS: tuple[Attack, ...] = get_args(Attack)
FACTORS = {"huge": 1e6, "sign_flip": -1.0}


def poisoned(data: LocalData, attack: Attack) -> LocalData:
    """Return the data that a device with this attack trains on."""
    if attack != "label_flip":
        return data
    return dataclasses.replace(data, train=Part(data.train.x, len(data.labels) - 1 - data.train.y))


def carry_out(attack: Attack, honest: CarryOut | None = None) -> CarryOut:
    """Return how a device with this attack trains; `honest` is how it would without."""

    def work(task: trainer_module.Task, hooks: trainer_module.Hooks) -> trainer_module.Outcome:
        from edge_agent.training import trainer  # torch: only once there is work

        outcome = (honest or trainer.carry_out)(task, hooks)
        return dataclasses.replace(outcome, parameters=turned(outcome.parameters, task.sent, attack))

    return work


def turned(trained: Parameters, sent: Parameters, attack: Attack) -> Parameters:
    """Return what the attack makes of trained parameters: sent + factor (trained - sent)."""
    if attack not in FACTORS:
        return trained
    factor = FACTORS[attack]
    turned = {name: base + factor * (trained[name] - base) for name, base in sent.items() if name in trained}
    return trained.updated({name: array.astype(trained[name].dtype) for name, array in turned.items()})


class Poisoner(Agent):
    """An agent whose updates hold a value that is not a number."""

    def __init__(self, *args: Any, **named: Any) -> None:
        """Live as an agent does."""
        super().__init__(*args, **named)
        self.vault = _PoisonedVault(self.settings.vault, self.name)


def agent_of(attack: Attack | None) -> type[Agent]:
    """Return the class of an agent with this attack."""
    return Poisoner if attack == "nan" else Agent


class _PoisonedVault(Vault):
    def finish(self, outgoing: Outgoing) -> None:
        """Put the spoilt update into the outbox."""
        super().finish(dataclasses.replace(outgoing, frame=with_nan(outgoing.frame)))


def with_nan(frame: bytes) -> bytes:
    """Return a frame with its first float32 value replaced; unchanged when it holds none."""
    body = zstandard.ZstdDecompressor().decompress(frame[13:]) if frame[4] else frame[13:]
    (length,) = struct.unpack_from("<Q", body)
    for name, entry in json.loads(body[8 : 8 + length]).items():
        if name != "__metadata__" and entry["dtype"] == "F32" and math.prod(entry["shape"]):
            start = 8 + length + entry["data_offsets"][0]
            spoilt = body[:start] + struct.pack("<f", math.nan) + body[start + 4 :]
            return frame[:4] + b"\0" + struct.pack("<Q", len(spoilt)) + spoilt
    return frame
