"""docs/evidence.json from the runs, and docs/evidence.md from it: tables, bars, and where they came from."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from bench.evidence import LAST, Job, Results, best_rate
from bench.evidence_bars import markdown
from bench.evidence_sections import SECTIONS, Method, Table
from hedgerow.compare_figures import curve_of, first_at, saved_of
from hedgerow.compare_report import RunFigures

BARS, BARS_END = "<!-- bars: written by bench/evidence.py -->", "<!-- end of bars -->"
BEGIN, END = "<!-- tables: written by bench/evidence.py -->", "<!-- end of tables -->"


def write(results: Results, docs: Path, *, pages_only: bool) -> None:
    """Write `evidence.json` (unless only pages are asked for), and the tables of `evidence.md` from it."""
    target = docs / "evidence.json"
    if not pages_only:
        known = json.loads(target.read_text())["tables"] if target.exists() else {}
        known |= {t.title: told for ts in SECTIONS.values() for t in ts if (told := table_of(results, t))}
        titles = [t.title for ts in SECTIONS.values() for t in ts]
        tables = {title: known[title] for title in titles if title in known}
        target.write_text(json.dumps({"machine": machine(), "tables": tables}, indent=1) + "\n")
    page = docs / "evidence.md"
    page.write_text(renewed(page.read_text(), json.loads(target.read_text())))


def renewed(text: str, found: dict[str, Any]) -> str:
    """Return the page with bars and tables as they follow from `evidence.json`."""
    for begin, end, told in ((BARS, BARS_END, markdown(found["tables"])), (BEGIN, END, pages(found))):
        before, after = text.split(begin)[0], text.split(end)[1]
        text = before + begin + "\n\n" + told + "\n\n" + end + after
    return text


def machine() -> dict[str, Any]:
    """Return what the runs ran on; two runs at once, each with one thread."""
    return {
        "cpu": f"{psutil.cpu_count()} x86-64 cores, shared",
        "python": platform.python_version(),
        "torch": version("torch"),
        "system": platform.system(),
    }


def table_of(results: Results, table: Table) -> dict[str, Any] | None:
    """Return a table's rows, for the methods that have been run."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    rates: dict[str, float] = {}
    for method in table.methods:
        rate = best_rate(results, table, method)
        if rate is None:
            continue
        found = {s: results.get(Job(table, method, rate, s)) for s in method.seeds or table.seeds}
        runs[method.label] = {seed: figures for seed, figures in found.items() if figures is not None}
        rates[method.label] = rate
    if not runs:
        return None
    base = runs.get("fedavg", {})
    rows = [row_of(m, runs[m.label], rates[m.label], base) for m in table.methods if m.label in runs]
    return {"fleet": dict(table.fleet), "note": table.note, "rows": rows}


def row_of(
    method: Method, runs: dict[int, dict[str, Any]], rate: float, base: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """Return one method's figures, a list over seeds of each."""
    seeds = sorted(runs)
    row: dict[str, Any] = {"label": method.label, "strategy": method.strategy, "rate": rate, "seeds": seeds}
    row["settings"] = dict(method.settings)
    for name, one in _figures(method).items():
        row[name] = [one(runs[seed]) for seed in seeds]
    row["reach"] = [_reach(method, runs[seed], base[seed]) if seed in base else None for seed in seeds]
    return row


def _figures(method: Method) -> dict[str, Any]:
    return {
        "sent": lambda f: _last(f, "sent", "mean"),
        "after": lambda f: _last(f, "after", "mean"),
        "served": lambda f: _served(f, method),
        "worst_tenth_sent": lambda f: _last(f, "sent", "worst_tenth"),
        "worst_tenth": lambda f: _last(f, "after", "worst_tenth"),
        "deviation": lambda f: _last(f, "after", "deviation"),
        "best_sent": lambda f: max(r["sent"]["mean"] for r in f["rounds"]),
        "kept": _kept,
        "cpu_s": lambda f: _cost(f, "cpu_s"),
        "joules": _joules,
        "down_bytes": lambda f: _cost(f, "down_bytes"),
        "up_bytes": lambda f: _cost(f, "up_bytes"),
        "late": lambda f: f["late"],
    }


def _last(figures: dict[str, Any], name: str, part: str = "") -> float:
    rounds = figures["rounds"][-LAST:]
    return round(statistics.fmean(r[name][part] if part else r[name] for r in rounds), 5)


def _served(figures: dict[str, Any], method: Method) -> float:
    """Return the accuracy of the model that a device would use; validation decides where it may be either."""
    which = method.served
    if which == "best":
        which = "sent" if _last(figures, "validation_sent") > _last(figures, "validation") else "after"
    return _last(figures, which, "mean")


def _cost(figures: dict[str, Any], name: str) -> float:
    parts = ("received", "worked", "sent_back")
    total = sum(each[part][name] or 0.0 for each in figures["rounds"] for part in parts)
    return round(total / len(figures["rounds"]), 3)


def _joules(figures: dict[str, Any]) -> float | None:
    found = [e for r in figures["rounds"] for p in ("received", "worked") for e in r[p]["energy"]]
    known = [e["joules"] for e in found if e["joules"] is not None]
    return round(sum(known) / len(figures["rounds"]), 3) if known else None


def _kept(figures: dict[str, Any]) -> float:
    units, spec = figures["rounds"][-1]["kept_units"], figures["spec"]
    return round(statistics.fmean(units) / round(spec["width"] * spec["ffl_ratio"]), 4)


def _reach(method: Method, figures: dict[str, Any], base: dict[str, Any]) -> dict[str, Any] | None:
    """Return what is saved on the way to FedAvg's best accuracy as sent; `None` when it is not reached."""
    tuned = method.served == "after" and method.strategy == "fedavg"
    mine, theirs = curve_of(_run(figures), tuned=tuned), curve_of(_run(base), tuned=False)
    there, first = first_at(mine, theirs.best), first_at(theirs, theirs.best)
    if there is None or first is None:
        return None
    saved = saved_of(there.cost, first.cost)
    return {"round": there.round, "of": first.round, **saved.model_dump()}


def _run(figures: dict[str, Any]) -> RunFigures:
    known = {key: figures[key] for key in RunFigures.model_fields if key in figures}
    return RunFigures.model_validate(known | {"devices": (), "models": ()})


# --- the page ------------------------------------------------------------------------------------


def pages(found: dict[str, Any]) -> str:
    """Return all tables as Markdown."""
    return "\n".join(_section(title, table) for title, table in found["tables"].items()).rstrip()


def _section(title: str, table: dict[str, Any]) -> str:
    fleet = table["fleet"]
    size = f", {fleet['limit']:,} samples in all" if fleet.get("limit") else ""
    lines = [f"### {title}", "", f"{fleet['rounds']} rounds{size}. {table['note']}".strip(), ""]
    lines += [
        "| method | rate | seeds | as sent | after | worst 10 % | kept | CPU s | J (modelled) | MB |"
        " to FedAvg's best: CPU, J, bytes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_row, table["rows"]), ""])


def _row(row: dict[str, Any]) -> str:
    megabytes = [(d + u) / 1e6 for d, u in zip(row["down_bytes"], row["up_bytes"], strict=True)]
    joules = [j for j in row["joules"] if j is not None]
    cells = [
        row["label"],
        f"{row['rate']:g}",
        str(len(row["seeds"])),
        _spread(row["sent"]),
        _spread(row["after"]),
        f"{100 * statistics.median(row['worst_tenth']):.1f}",
        f"{statistics.median(row['kept']):.0%}",
        f"{statistics.median(row['cpu_s']):.2f}",
        f"{statistics.median(joules):.1f}" if joules else "–",
        f"{statistics.median(megabytes):.2f}",
        _saved(row["reach"]),
    ]
    return "| " + " | ".join(cells) + " |"


def _spread(values: Sequence[float]) -> str:
    middle = f"{100 * statistics.median(values):.1f}"
    return f"{middle} [{100 * min(values):.1f} … {100 * max(values):.1f}]" if len(values) > 1 else middle


def _saved(reaches: Sequence[dict[str, Any] | None]) -> str:
    there = [reach for reach in reaches if reach is not None]
    if not there:
        return "not reached"
    parts = []
    for name in ("cpu", "joules", "bytes"):
        values = [reach[name] for reach in there if reach[name] is not None]
        parts.append(f"{-statistics.median(values):+.0f} %" if values else "–")
    many = "" if len(there) == len(reaches) else f" ({len(there)} of {len(reaches)} seeds)"
    return ", ".join(parts) + many
