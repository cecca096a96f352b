"""Which personal models every device has made, as far as the coordinator knows, and how each stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Literal, TypeAlias

from pydantic import BaseModel

from coordinator.store.rollouts import Member
from coordinator.store.sql import Store
from foundation.artifact import Manifest
from foundation.messages import AgentCard, KeptModel, Models, Verdict

State: TypeAlias = Literal["proven", "waiting", "serving", "rolled_back", "refused", "pinned"]


class ModelView(BaseModel):
    """One personal model of one device. What nobody told is null."""

    device: str
    run: str
    round: int
    sha256: str
    state: State
    """`proven`: made and proven there, and neither in use nor refused, as far as is known here."""
    pinned_by: Literal["owner", "coordinator"] | None = None
    kept: bool | None
    """Whether it is on the device's disk; unknown of a device that does not tell."""
    accuracy_sent: float | None = None
    accuracy: float | None = None
    """On the device's own test part, before and after its training."""
    validation: float | None = None
    """Of the model as exported, on the device's validation part."""
    bytes: int | None = None
    latency_ms: float | None = None
    """Median of one run on the device, at its export."""
    ring: int | None = None
    """Of its rollout, from 1."""
    reason: str = ""
    """Why it was refused or rolled back."""

    @property
    def key(self) -> str:
        """What pages are turned with."""
        return f"{self.device}/{self.run}/{self.round}/{self.sha256[:12]}"


def pictures(store: Store, *, device: str | None = None, run: str | None = None) -> list[ModelView]:
    """Return the models of all devices or one, of all runs or one: by device, the newest first."""
    cards = store.cards()
    manifests = store.artifacts(run, agent=device)
    told = [one for card in cards.values() if card and card.models for one in card.models.kept]
    rings = _rings(store, {(m.run, m.round) for m in manifests} | {(one.run, one.round) for one in told})
    known = {(m.agent, m.sha256) for m in manifests}
    found = [_of_manifest(m, cards.get(m.agent), rings) for m in manifests]
    for agent, card in cards.items():
        if device in (None, agent) and card is not None and card.models is not None:
            # A device that keeps its figures to itself does not send manifests.
            found += [
                _view(agent, one, card, card.models, rings, None)
                for one in card.models.kept
                if (agent, one.sha256) not in known and run in (None, one.run)
            ]
    order = {(m.agent, m.sha256): -place for place, m in enumerate(manifests)}
    found.sort(key=lambda v: order.get((v.device, v.sha256), 1), reverse=True)
    found.sort(key=lambda view: view.device)
    return found


def stands(store: Store, manifests: Sequence[Manifest]) -> dict[tuple[str, str], ModelView]:
    """Return how these models stand, by device and SHA-256."""
    cards, rings = store.cards(), _rings(store, {(m.run, m.round) for m in manifests})
    return {(m.agent, m.sha256): _of_manifest(m, cards.get(m.agent), rings) for m in manifests}


def _rings(store: Store, rounds: Set[tuple[str, int]]) -> dict[tuple[str, str, int], Member]:
    return {
        (member.agent, member.run, member.round): member
        for rollout in store.rollouts(100)
        if (rollout.run, rollout.round) in rounds
        for member in store.members(rollout.run, rollout.round)
    }


def _of_manifest(m: Manifest, card: AgentCard | None, rings: dict[tuple[str, str, int], Member]) -> ModelView:
    models = None if card is None else card.models
    kept = None if models is None else next((one for one in models.kept if one.sha256 == m.sha256), None)
    one = kept or KeptModel(sha256=m.sha256, run=m.run, round=m.round)
    view = _view(m.agent, one, card, models, rings, m)
    return view if models is None else view.model_copy(update={"kept": kept is not None})


def _view(
    agent: str,
    one: KeptModel,
    card: AgentCard | None,
    models: Models | None,
    rings: dict[tuple[str, str, int], Member],
    m: Manifest | None,
) -> ModelView:
    verdict = next(_verdicts(card, one.sha256), None)
    member = rings.get((agent, one.run, one.round))
    return ModelView(
        device=agent,
        run=one.run,
        round=one.round,
        sha256=one.sha256,
        state=_state(one, verdict),
        pinned_by="owner" if "pinned" in one.links else "coordinator" if "ordered" in one.links else None,
        kept=None if models is None else True,
        accuracy_sent=m and m.accuracy_sent,
        accuracy=m and m.accuracy,
        validation=m and m.validation,
        bytes=m and m.bytes,
        latency_ms=m and m.latency_ms,
        ring=None if member is None else member.ring + 1,
        reason="" if verdict is None else verdict.reason,
    )


def _verdicts(card: AgentCard | None, sha256: str) -> Iterator[Verdict]:
    yield from (v for v in reversed(card.verdicts if card is not None else ()) if v.sha256 == sha256)


def _state(one: KeptModel, verdict: Verdict | None) -> State:
    if "serving" in one.links:
        return "pinned" if one.links & {"pinned", "ordered"} else "serving"
    if verdict is not None:
        return verdict.kind
    return "waiting" if one.waits else "proven"
