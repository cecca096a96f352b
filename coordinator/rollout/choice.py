"""Which devices, and which of their models, somebody means who pins, unpins or rolls back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coordinator.store.rollouts import Verb
from foundation.errors import SettingsError
from foundation.messages import AgentCard, KeptModel, Models
from foundation.words import unknown

_SHORTEST = 6
_SHORT = 12


def chosen(
    verb: Verb, devices: Sequence[str] | None, model: str | None, cards: Mapping[str, AgentCard | None]
) -> tuple[list[tuple[str, Verb, str]], dict[str, str]]:
    """Return orders (agent, verb, model), and by device why there is none.

    `devices` not given means all; `model` not given the one that serves there. Raises `SettingsError` for a
    device that is not known.
    """
    names = sorted(cards) if devices is None else list(dict.fromkeys(devices))
    if strange := next((name for name in names if name not in cards), None):
        raise SettingsError(unknown("device", strange, cards))
    wanted: list[tuple[str, Verb, str]] = []
    problems: dict[str, str] = {}
    for name in names:
        card = cards[name]
        if card is None or card.models is None:
            problems[name] = "it does not tell its models: install a newer version on it"
        elif verb == "unpin":
            wanted.append((name, verb, ""))
        else:
            found = _matching(card.models, model)
            if isinstance(found, str):
                problems[name] = found
            else:
                wanted.append((name, verb, found.sha256))
    return wanted, problems


def _matching(models: Models, model: str | None) -> KeptModel | str:
    """Return the model that is meant, or why none is."""
    if model is None:
        return models.linked("serving") or "no model serves on it: name one"
    found = [one for one in models.kept if _is(one, model)]
    if len(found) == 1:
        return found[0]
    there = ", ".join(f"{one.round} ({one.sha256[:_SHORT]})" for one in models.kept) or "none"
    return f"{'several models are' if found else 'it has no model'} {model!r}; there are rounds {there}"


def _is(one: KeptModel, wanted: str) -> bool:
    return wanted == str(one.round) or (len(wanted) >= _SHORTEST and one.sha256.startswith(wanted))
