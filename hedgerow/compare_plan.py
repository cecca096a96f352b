"""What is compared: strategies with their settings, one fleet, several seeds; and where it is kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from coordinator.strategies.base import available, load_strategy
from foundation.errors import SettingsError
from foundation.frozen import Frozen
from foundation.messages import Json
from foundation.words import unknown
from hedgerow.simulate import Simulation, simulation_of

REFERENCE = "fedavg"
ALWAYS = (REFERENCE, "local", "fedper")
"""Baselines that stand beside every comparison: without them a saving says nothing."""
RUNS = Path("compare-runs")
"""Folder of comparisons that were not given one."""
_FORM = "NAME, NAME:KEY=VALUE;KEY=VALUE or NAME@LABEL:KEY=VALUE"
_LABEL = re.compile(r"[\w.+-]{1,40}")
_BETWEEN = re.compile(r",(?![^\[{]*[\]}])")
"""A comma that is not inside a list or an object."""


class Entry(Frozen):
    """One strategy with its settings, under the label that all tables show."""

    label: str
    strategy: str
    settings: Json = Field(default_factory=dict)


class Comparison(Frozen):
    """Everything that the result of a comparison depends on."""

    entries: tuple[Entry, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    fleet: Json
    """The fields of `Simulation` that all runs share: devices, rounds, data, model, profile."""

    @property
    def reference(self) -> str | None:
        """Label of what savings are counted against: plain `fedavg`, or the first FedAvg there is."""
        averages = [e.label for e in self.entries if e.strategy == REFERENCE]
        return REFERENCE if REFERENCE in averages else next(iter(averages), None)

    def simulation(self, entry: Entry, seed: int) -> Simulation:
        """Return one run; raises `SettingsError` that says what cannot be."""
        return simulation_of(**self.fleet, strategy=entry.strategy, settings=entry.settings, seed=seed)

    def runs(self) -> Iterator[tuple[Entry, int, Simulation]]:
        """Give every run: all strategies of one seed before the next, so that slow hours meet all alike."""
        for seed in self.seeds:
            for entry in self.entries:
                yield entry, seed, self.simulation(entry, seed)

    def folder(self) -> Path:
        """Return where this is kept when nobody says: named by the fleet, so that strategies can be added."""
        fleet = self.simulation(self.entries[0], 0)
        data = f"{fleet.dataset}-{fleet.partition}-{fleet.devices}x{fleet.rounds}"
        return RUNS / f"{_slug(data)}-{_digest(self.fleet)}"


def run_folder(label: str, simulation: Simulation) -> str:
    """Return the name of one run's own folder: the same run finds it again, another does not."""
    return f"{_slug(label)}-{_digest(simulation.model_dump(mode='json'))}-seed{simulation.seed}"


def comparison_of(
    strategies: str,
    *,
    seeds: str,
    sets: Sequence[tuple[str, Any]] = (),
    only: bool = False,
    **fleet: Any,
) -> Comparison:
    """Return what the command line asks for; `sets` are pairs of KEY or STRATEGY.KEY and a value.

    The baselines of `ALWAYS` are added unless `only`. Raises `SettingsError` in words for everything that
    cannot be, before anything runs.
    """
    entries = [_entry(text) for text in _BETWEEN.split(strategies) if text.strip()]
    if not entries:
        raise SettingsError(f"--strategies names none: give {_FORM}, and commas between them")
    if not only:
        known = {entry.strategy for entry in entries}
        missing = [name for name in ALWAYS if name not in known and name in available()]
        entries += [Entry(label=name, strategy=name) for name in missing]
    entries = _with_settings(entries, sets)
    _check_labels(entries)
    fleet = Simulation.model_validate(
        simulation_of(**fleet, artifacts=True, strategy=entries[0].strategy, settings=entries[0].settings)
    ).model_dump(mode="json", exclude={"strategy", "settings", "seed"})
    found = Comparison(entries=tuple(entries), seeds=_seeds(seeds), fleet=fleet)
    for entry in entries:
        found.simulation(entry, 0)
    return found


def _entry(text: str) -> Entry:
    """Read NAME[@LABEL][:KEY=VALUE;KEY=VALUE]; raises `SettingsError`."""
    head, _, tail = text.strip().partition(":")
    strategy, at, label = (part.strip() for part in head.partition("@"))
    load_strategy(strategy)  # says which there are
    if at and not _LABEL.fullmatch(label):
        raise SettingsError(f"label {label!r} in {text.strip()!r} may have letters, digits and . _ + - only")
    settings = dict(_pair(pair, text) for pair in tail.split(";") if pair.strip())
    shown = " ".join(f"{key}={_value_text(value)}" for key, value in settings.items())
    return Entry(label=label or f"{strategy} {shown}".strip(), strategy=strategy, settings=settings)


def _pair(pair: str, text: str) -> tuple[str, Any]:
    key, mark, value = (part.strip() for part in pair.partition("="))
    if not mark or not key:
        raise SettingsError(f"{pair.strip()!r} in {text.strip()!r} is not KEY=VALUE: write {_FORM}")
    return key, value_of(value)


def value_of(text: str) -> Any:
    """Return what a word of the command line means: JSON where it is JSON, text otherwise."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _with_settings(entries: Sequence[Entry], sets: Iterable[tuple[str, Any]]) -> list[Entry]:
    """Lay settings under those that an entry brings itself: for all that have them, then for one by name."""
    wide: list[dict[str, Any]] = [{} for _ in entries]
    narrow: list[dict[str, Any]] = [{} for _ in entries]
    for key, value in sets:
        scope, dot, name = key.rpartition(".")
        meant = [i for i, entry in enumerate(entries) if _is_meant(entry, scope if dot else None, name)]
        if not meant:
            raise SettingsError(_nobody(entries, scope if dot else None, name))
        for i in meant:
            (narrow if dot else wide)[i][name] = value
    return [
        entry.model_copy(update={"settings": {**wide[i], **narrow[i], **entry.settings}})
        for i, entry in enumerate(entries)
    ]


def _is_meant(entry: Entry, scope: str | None, name: str) -> bool:
    return name in _fields(entry) if scope is None else scope in (entry.strategy, entry.label)


def _fields(entry: Entry) -> list[str]:
    return list(type(load_strategy(entry.strategy)).model_fields)


def _nobody(entries: Sequence[Entry], scope: str | None, name: str) -> str:
    """Say that a setting is nobody's, and which is nearest."""
    if scope is not None:
        names = dict.fromkeys(name for entry in entries for name in (entry.strategy, entry.label))
        return f"--set {scope}.{name}: {unknown('compared strategy', scope, names)}"
    fields = sorted({field for entry in entries for field in _fields(entry)})
    return f"--set {name}: {unknown('setting', name, fields)}"


def _check_labels(entries: Sequence[Entry]) -> None:
    labels = [entry.label for entry in entries]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise SettingsError(
            f"{twice!r} is compared twice: give one other settings, or a label of its own ({_FORM})"
        )


def _seeds(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise SettingsError(f"--seeds {text!r}: give whole numbers from 0 with commas between, as 0,1,2")
    return tuple(dict.fromkeys(int(word) for word in words))


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")[:60]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
