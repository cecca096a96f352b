"""Prometheus' text form (0.0.4) read strictly, and what its conventions ask of names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"'
SAMPLE = re.compile(
    rf"({NAME})(?:\{{((?:{LABEL})(?:,{LABEL})*)\}})? (-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?|\+Inf)"
)
KINDS = {"counter", "gauge", "histogram"}
NOT_BASE = ("_ms", "_minutes", "_hours", "_kb", "_mb", "_kilobytes", "_wh", "_kwh", "_percent", "_milliwatts")
"""Endings that the conventions have a base unit for."""
INFO = ("_info",)


@dataclass
class Told:
    """One family."""

    kind: str
    help: str
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = field(default_factory=dict)

    def value(self, **labels: str) -> float:
        """Return the one sample that has these labels among its own."""
        (found,) = [v for (_, own), v in self.samples.items() if set(labels.items()) <= own]
        return found

    def labels(self) -> set[str]:
        return {name for _, own in self.samples for name, _ in own}


def read(text: str) -> Mapping[str, Told]:
    """Return the families; fails on anything that the format does not allow, or that readers may refuse."""
    found: dict[str, Told] = {}
    help: str | None = None
    family = ""
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            _, _, family, help = line.split(" ", 3)
            assert help
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert (name, kind in KINDS) == (family, True), line
            assert help is not None, f"{name} has no help"
            assert name not in found, f"{name} is told twice"
            found[name], help = Told(kind, help), None
        else:
            _sample(line, family, found[family])
    for name, told in found.items():
        _complete(name, told)
    return found


def _sample(line: str, family: str, told: Told) -> None:
    match = SAMPLE.fullmatch(line)
    assert match, line
    name = match[1]
    suffixes = ("_bucket", "_sum", "_count") if told.kind == "histogram" else ("",)
    assert name in {family + suffix for suffix in suffixes}, f"{name} stands under {family}"
    pairs = re.findall(LABEL, match[2] or "")
    labels = frozenset((key, _plain(value)) for key, value in pairs)
    assert len(labels) == len(dict(pairs)) == len(pairs), f"a label twice: {line}"
    assert (name, labels) not in told.samples, f"a sample twice: {line}"
    told.samples[name, labels] = float(match.group(match.lastindex or 0))


def _plain(value: str) -> str:
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], value)


def _complete(name: str, told: Told) -> None:
    if told.kind == "counter":
        assert name.endswith("_total"), name
        assert all(value >= 0 for value in told.samples.values()), name
    if told.kind == "histogram":
        buckets = [(dict(own)["le"], v) for (n, own), v in told.samples.items() if n.endswith("_bucket")]
        assert buckets[-1] == ("+Inf", told.samples[f"{name}_count", frozenset()])
        assert [v for _, v in buckets] == sorted(v for _, v in buckets)
    else:
        assert not name.endswith(("_bucket", "_sum", "_count")), name


def follows_the_conventions(families: Mapping[str, Told]) -> None:
    """Prometheus' naming: own prefix, base units, `_total` for counters alone, energy with its kind."""
    for name, told in families.items():
        assert re.fullmatch(r"(hedgerow|process)_[a-z0-9_]+", name), name
        assert not any(part in f"{name}_" for part in (f"{unit}_" for unit in NOT_BASE)), name
        assert name.endswith("_total") == (told.kind == "counter"), name
        if "joules" in name or "watts" in name:
            for _, own in told.samples:
                assert dict(own)["kind"] in ("measured", "mixed", "modelled"), (name, own)
        if name.endswith("_ratio"):
            assert all(0 <= value <= 1 for value in told.samples.values()), name
        assert not {"round", "sha256", "reason", "stage"} & told.labels() or name in (
            "hedgerow_model_info",
            "hedgerow_devices_in_stage",
            "hedgerow_agent_stage",
            "hedgerow_agent_stage_seconds_total",
            "hedgerow_agent_energy_joules_total",
        ), f"{name} has a label without bounds"
