"""The bars of docs/evidence.md, worked out from docs/evidence.json: what was asked, seen, and if it is met.

Figures are medians over seeds; differences are taken seed by seed first. "Served" is the accuracy of the
model that a device would use: as sent or after training, by its validation part.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SPLITS = ("pathological:2", "dirichlet:0.3")
FASHION = "Fashion-MNIST, 10 devices, {}"
CIFAR = "CIFAR-10 (10k/4k subset), 10 devices, {}"
COST = "Cost: Fashion-MNIST, 10 devices, {}, width {}"
RIVALS = ("local", "fedper", "fedtp", "fedavg + fine-tuning")
REACH = {"pathological:2": (86.0, 90.0, 92.0), "dirichlet:0.3": (75.0, 82.7, 85.0)}
"""Least savings of CPU time, joules and bytes to FedAvg's best accuracy as sent, per cent."""
OVER = {"pathological:2": 25.0, "dirichlet:0.3": 6.0}
"""Points over FedAvg as sent."""
OURS = ("pfl_tpp", "hedgerow")
REACHING = ("pfl_tpp, lean", "pfl_tpp, lean, int8", "hedgerow")
"""Whose way to FedAvg's best is looked at, as they are called in the cost tables."""


@dataclass(frozen=True)
class Bar:
    """One line: a claim, what it asks for, what was seen."""

    claim: str
    wanted: str
    seen: str
    met: bool | None
    """`None` where a table is missing."""


Tables = dict[str, Any]
Row = dict[str, Any]


def bars(tables: Tables) -> list[Bar]:
    """Return every bar that the tables can say something about."""
    makers: tuple[Callable[[Tables], Iterator[Bar]], ...] = (
        _pruning, _units, _reach, _over, _round, _unequal, _best, _lean, _joiner,
    )  # fmt: skip
    return [bar for maker in makers for bar in maker(tables)]


def markdown(tables: Tables) -> str:
    """Return the bars as a table."""
    lines = ["| claim | bar | measured | |", "|---|---|---|---|"]
    for bar in bars(tables):
        verdict = "–" if bar.met is None else "met" if bar.met else "**missed**"
        lines.append(f"| {bar.claim} | {bar.wanted} | {bar.seen} | {verdict} |")
    return "\n".join(lines)


def _row(tables: Tables, title: str, label: str) -> Row | None:
    rows: Sequence[Row] = tables.get(title, {}).get("rows", ())
    return next((row for row in rows if row["label"] == label), None)


def _apart(mine: Row, other: Row, name: str = "sent") -> list[float]:
    """Return the differences in points, for the seeds that both have."""
    both = [seed for seed in mine["seeds"] if seed in other["seeds"]]
    at = [(mine["seeds"].index(seed), other["seeds"].index(seed)) for seed in both]
    return [100 * (mine[name][i] - other[name][j]) for i, j in at]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _seeds(values: Sequence[Any]) -> str:
    return f"{len(values)} seed" + ("s" if len(values) != 1 else "")


def _pruning(tables: Tables) -> Iterator[Bar]:
    for split in SPLITS:
        title = FASHION.format(split)
        mine, dense = _row(tables, title, "pfl_tpp"), _row(tables, title, "fedtp")
        if mine is None or dense is None:
            continue
        points, gone = _median(_apart(mine, dense)), 100 * (1 - _median(mine["kept"]))
        yield Bar(
            f"pruning costs nothing: `pfl_tpp` − dense `fedtp`, as sent, Fashion-MNIST {split}",
            "≥ −1 point with ≥ 90 % of FFL units gone",
            f"{points:+.1f} points, {gone:.1f} % gone ({_seeds(mine['seeds'])})",
            points >= -1 and gone >= 90,
        )


def _units(tables: Tables) -> Iterator[Bar]:
    verdicts = []
    for data in ("CIFAR-10", "Shakespeare"):
        title = f"{data}, 4 devices, iid: which units are kept"
        rows = {r["label"].split(",")[0].split(" ")[0]: r for r in tables.get(title, {}).get("rows", ())}
        if not {"dense", "learned", "random", "narrow"} <= rows.keys():
            continue
        learned = rows["learned"]
        loss = -_median(_apart(rows["narrow"], rows["dense"]))
        over = {name: _apart(learned, rows[name]) for name in ("random", "narrow")}
        sure = [len(d) > 1 and statistics.fmean(d) > _error(d) for d in over.values()]
        verdicts.append(all(sure))
        told = "; ".join(f"over {n} {statistics.fmean(d):+.1f} ± {_error(d):.1f}" for n, d in over.items())
        yield Bar(
            f"the right units are kept, {data} (narrow dense costs {loss:.1f} points)",
            "learned − random and − narrow dense > one standard error, on one of the two data sets",
            f"as sent: {told} ({_seeds(learned['seeds'])})",
            all(sure),
        )


def _error(differences: Sequence[float]) -> float:
    if len(differences) < 2:
        return math.nan
    return statistics.stdev(differences) / math.sqrt(len(differences))


def _reach(tables: Tables) -> Iterator[Bar]:
    for split, wanted in REACH.items():
        for label in REACHING:
            row = _row(tables, COST.format(split, 64), label)
            if row is None:
                continue
            there = [reach for reach in row["reach"] if reach is not None]
            if not there:
                yield Bar(
                    f"to FedAvg's best as sent, {split}: {label}", _wanted(wanted), "not reached", False
                )
                continue
            saved = [_median([r[key] for r in there]) for key in ("cpu", "joules", "bytes")]
            yield Bar(
                f"to FedAvg's best as sent, {split}: {label} (CPU, joules modelled, bytes)",
                _wanted(wanted),
                f"{_wanted(saved)} ({len(there)} of {_seeds(row['seeds'])})",
                all(s >= w for s, w in zip(saved, wanted, strict=True)) and len(there) == len(row["seeds"]),
            )


def _wanted(saved: Sequence[float]) -> str:
    return ", ".join(f"−{value:.3g}" for value in saved) + " %"


def _over(tables: Tables) -> Iterator[Bar]:
    for split, wanted in OVER.items():
        title = FASHION.format(split)
        base = _row(tables, title, "fedavg")
        for name in OURS:
            row = _row(tables, title, name)
            if row is None or base is None:
                continue
            points = _median(_apart(row, base))
            yield Bar(
                f"over FedAvg as sent, {split}: `{name}`",
                f"≥ +{wanted:.0f}",
                f"{points:+.1f}",
                points >= wanted,
            )


def _share(row: Row, base: Row, name: str) -> float:
    """Return how many per cent less a method takes in a round."""
    mine, theirs = (
        [d + u for d, u in zip(r["down_bytes"], r["up_bytes"], strict=True)] if name == "bytes" else r[name]
        for r in (row, base)
    )
    return 100 * (1 - _median([a / b for a, b in zip(mine, theirs, strict=True)]))


def _round(tables: Tables) -> Iterator[Bar]:
    for split, width, wanted in ((SPLITS[0], 64, 35.0), (SPLITS[1], 64, 35.0), (SPLITS[0], 128, 50.0)):
        title = COST.format(split, width)
        base, plain = _row(tables, title, "fedavg"), _row(tables, title, "pfl_tpp, lean")
        small = _row(tables, title, "pfl_tpp, lean, int8")
        if base is None or plain is None or small is None:
            continue
        cpu = _share(plain, base, "cpu_s")
        sizes = _share(plain, base, "bytes"), _share(small, base, "bytes")
        yield Bar(
            f"a round of `pfl_tpp` lean against `fedavg`, {split}, width {width}"
            " (CPU; bytes as float32; as int8)",
            f"−{wanted:.0f} %; −60 %; −80 %",
            "; ".join(f"{-saved + 0.0:+.0f} %".replace("-", "−") for saved in (cpu, *sizes)),
            cpu >= wanted and sizes[0] >= 60 and sizes[1] >= 80,
        )


def _unequal(tables: Tables) -> Iterator[Bar]:
    rows = tables.get("Fashion-MNIST, 9 devices, pathological:2: unequal models", {}).get("rows", ())
    mixed = next((r for r in rows if r["label"] == "three sizes mixed"), None)
    alone = [r for r in rows if r["label"].endswith("alone")]
    if mixed is None or not alone:
        return
    least = min(_median(_apart(mixed, row, "served")) for row in alone)
    yield Bar(
        "unequal models: three sizes mixed − each size alone, served",
        "≥ −2 points",
        f"{least:+.1f} at the least ({_seeds(mixed['seeds'])})",
        least >= -2,
    )


def _best(tables: Tables) -> Iterator[Bar]:
    titles = [template.format(split) for template in (FASHION, CIFAR) for split in SPLITS]
    titles += ["UCI HAR, 10 people, by:subject", "Shakespeare, 10 roles, by:role"]
    margins = []
    for title in titles:
        mine = _row(tables, title, "hedgerow")
        rivals = {label: _row(tables, title, label) for label in RIVALS}
        there = {label: _median(row["served"]) for label, row in rivals.items() if row is not None}
        if mine is None or len(there) < len(RIVALS):
            continue
        best = max(there, key=lambda label: there[label])
        margins.append(100 * (_median(mine["served"]) - there[best]))
        yield Bar(
            f"`hedgerow` − best of local, FedPer, FedTP, FedAvg + fine-tuning, served: {title}",
            "≥ −0.5",
            f"{margins[-1]:+.2f} against {best} ({_seeds(mine['seeds'])})",
            margins[-1] >= -0.5,
        )
    if margins:
        mean = statistics.fmean(margins)
        yield Bar("the same, mean of these", "> 0", f"{mean:+.2f} points", mean > 0)


def _lean(tables: Tables) -> Iterator[Bar]:
    for split in SPLITS:
        title = COST.format(split, 64)
        mine, theirs = _row(tables, title, "hedgerow"), _row(tables, title, "fedper")
        if mine is None or theirs is None:
            continue
        joules, sizes = (100 - _share(mine, theirs, name) for name in ("joules", "bytes"))
        yield Bar(
            f"a round of `hedgerow` against `fedper`, {split} (joules modelled, bytes)",
            "≤ 40 %, ≤ 25 %",
            f"{joules:.0f} %, {sizes:.0f} %",
            joules <= 40 and sizes <= 25,
        )


def _joiner(tables: Tables) -> Iterator[Bar]:
    title = "Fashion-MNIST, 12 devices, dirichlet:0.3: the last 2 join after round 8"
    mine, theirs = _row(tables, title, "hedgerow"), _row(tables, title, "fedavg")
    if mine is None or theirs is None:
        return
    after = [[100 * late[0]["accuracy"] for late in row["late"]] for row in (mine, theirs)]
    ours, base = map(_median, after)
    yield Bar(
        "a late joiner of `hedgerow` after its first round − one from FedAvg's model, one local epoch each",
        "≥ 0",
        f"{ours:.1f} against {base:.1f}, two joiners ({_seeds(mine['seeds'])})",
        ours >= base,
    )
