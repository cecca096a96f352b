"""Metrics in Prometheus' text form: families of samples to text, without a client library.

Names end in base units (`_seconds`, `_bytes`, `_joules_total`, `_ratio` for shares from 0 to 1), counters in
`_total`. What nobody knows is a sample that is not there: never 0, never NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import psutil

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels: TypeAlias = Mapping[str, object]
Value: TypeAlias = tuple[Labels, float | None]

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_NAME = re.compile(r"[a-z_][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Sample:
    """One line: what follows the family's name (as `_bucket`), labels, and the value."""

    labels: Labels
    value: float
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """All samples of one name; `told` is its help, with the unit where the name has none."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    told: str
    samples: tuple[Sample, ...]


def gauge(name: str, told: str, values: Iterable[Value]) -> Family:
    """Return what goes up and down; unknown values are left out."""
    return Family(name, "gauge", told, _known(values))


def counter(name: str, told: str, values: Iterable[Value]) -> Family:
    """Return what only grows, until its program starts again; unknown values are left out.

    Raises `ValueError` for a name that does not end in `_total`.
    """
    if not name.endswith("_total"):
        raise ValueError(f"{name} is a counter, so its name ends in _total")
    return Family(name, "counter", told, _known(values))


def render(families: Iterable[Family]) -> str:
    """Return the text of all families; one without samples is told by its name alone."""
    lines: list[str] = []
    for family in families:
        lines += [
            f"# HELP {family.name} {_in_help(family.told)}",
            f"# TYPE {family.name} {family.kind}",
            *_lines(family),
        ]
    return "\n".join(lines) + "\n"


def process_families(process: psutil.Process) -> list[Family]:
    """Return the figures of a process under the names that Prometheus' own clients give them."""
    with process.oneshot():
        cpu_s, rss = sum(process.cpu_times()[:2]), process.memory_info().rss
        started = process.create_time()
    return [
        counter("process_cpu_seconds_total", "CPU time of this process.", [({}, cpu_s)]),
        gauge("process_resident_memory_bytes", "Memory of this process.", [({}, rss)]),
        gauge("process_start_time_seconds", "When it started, since the epoch.", [({}, started)]),
    ]


def _known(values: Iterable[Value]) -> tuple[Sample, ...]:
    return tuple(Sample(labels, float(value)) for labels, value in values if value is not None)


def _lines(family: Family) -> Iterator[str]:
    for sample in family.samples:
        told = ",".join(f'{_checked(name)}="{_escaped(text)}"' for name, text in sample.labels.items())
        braces = f"{{{told}}}" if told else ""
        yield f"{family.name}{sample.suffix}{braces} {_number(sample.value)}"


@cache
def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be the name of a label")
    return name


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(int(value)) if float(value).is_integer() else repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def _escaped(text: object) -> str:
    return str(text).translate(_ESCAPES)


def _in_help(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")
