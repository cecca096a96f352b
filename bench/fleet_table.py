"""The table of the bench of a fleet: a row for each measure, with its bar, the peer and the ratio."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

ROUND_BARS_S = {(2, 1): 0.3, (2, 10): 1.5, (10, 1): 1.0, (10, 10): 6.0}
QUOTED_ROUND_S = {(2, 1): 6.7, (2, 10): 10.3, (10, 1): 26.9, (10, 10): 28.6}
"""Of Flower 1.41 on another day, on two busier cores; nothing that is quoted is of this run."""
Found = Mapping[str, Any]
"""What one side measured: figures by the name of the case; `failed` in them says what did not come."""


@dataclass(frozen=True)
class Row:
    """One measure; a value that is text is an observation, `None` is not measured."""

    measure: str
    unit: str
    ours: float | str | None
    peer: float | str | None
    bar: float | None = None
    quoted: str = ""
    """The peer on another day: from the issue, not from this run."""
    good: bool | None = None
    """Whether the bar is met where it is no number."""
    wanted: str = ""
    """That bar in words."""

    @property
    def ratio(self) -> float | None:
        """How many times ours the peer takes."""
        if isinstance(self.ours, float) and isinstance(self.peer, float) and self.ours > 0:
            return self.peer / self.ours
        return None

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; `None` where there is none or nothing was measured."""
        if self.good is not None:
            return self.good
        return self.ours <= self.bar if self.bar is not None and isinstance(self.ours, float) else None

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "met": self.met}


def figure(side: Found | None, case: str, key: str, scale: float = 1.0) -> float | str | None:
    """Return a figure as a float, the reason where its case failed, `None` where it was not measured."""
    found = (side or {}).get(case)
    if found is None:
        return None
    if "failed" in found:
        return f"failed: {found['failed']}"
    value = found.get(key)
    if isinstance(value, list):
        value = statistics.median(value) if value else None
    return None if value is None else float(value) * scale


def _overheads(ours: Found, peer: Found | None) -> list[Row]:
    rows = []
    for (agents, mb), bar in ROUND_BARS_S.items():
        case = f"{agents}x{mb}"
        if case in ours:
            name = f"round overhead, empty work, {agents} agents, {mb} MB"
            sides = (figure(ours, case, "rounds_s"), figure(peer, case, "rounds_s"))
            rows.append(Row(name, "s", *sides, bar, f"{QUOTED_ROUND_S[agents, mb]}"))
    for case in (c for c in ("2x1", "2x10", "10x1", "10x10") if c in ours):
        quoted = "1.8-1.9 s a message" if case == "2x1" else ""
        name = f"agent CPU for each MB, outside the work, {case}"
        sides = (figure(ours, case, "cpu_s_per_mb"), figure(peer, case, "cpu_s_per_mb"))
        rows.append(Row(name, "s", *sides, 0.05, quoted))
        name = f"agent CPU for each message down and up, {case}"
        sides = (figure(ours, case, "cpu_s_per_message"), figure(peer, case, "cpu_s_per_message"))
        rows.append(Row(name, "s", *sides))
        name = f"IP bytes on the wire / payload, dense fp32, {case}"
        sides = (figure(ours, case, "wire_over_payload"), figure(peer, case, "wire_over_payload"))
        rows.append(Row(name, "", *sides, 1.03, "1.01-1.08"))
    own = figure(ours, "own codec", "wire_over_payload")
    rows.append(Row("IP bytes on the wire / payload, codec of `hedgerow` (int8)", "", own, None, 0.5))
    sides = (figure(ours, "2x1", "first_round_s"), figure(peer, "2x1", "first_round_s"))
    rows.append(Row("start to the end of round 1, 2 agents, 1 MB", "s", *sides, 5.0, "10.8"))
    return rows


def _memory(ours: Found, peer: Found | None) -> list[Row]:
    rows = []
    for kind, bar, quoted in (("rss", 60.0, "395 with an empty ClientApp"), ("pss", None, "")):
        sides = (figure(ours, "training", f"idle_{kind}_mb"), figure(peer, "training", f"idle_{kind}_mb"))
        rows.append(Row(f"agent {kind.upper()} idle, before its first work", "MB", *sides, bar, quoted))
    for kind, bar, quoted in (("rss", 330.0, "671"), ("pss", None, "544")):
        sides = (
            figure(ours, "training", f"training_{kind}_mb"),
            figure(peer, "training", f"training_{kind}_mb"),
        )
        rows.append(Row(f"agent {kind.upper()} training a tiny transformer, most", "MB", *sides, bar, quoted))
    sides = (figure(ours, "idle", "bytes_per_s"), figure(peer, "idle", "bytes_per_s"))
    rows.append(Row("idle traffic of an agent", "B/s", *sides, 10.0, "629"))
    return rows


def _kept(side: Found | None, case: str) -> str | None:
    found = (side or {}).get(case)
    if found is None:
        return None
    if "failed" in found:
        return f"failed: {found['failed']}"
    return f"updates of rounds {found['updates']}, state {'kept' if found['state_kept'] else 'lost'}"


def _agent_killed(ours: Found, peer: Found | None) -> list[Row]:
    mine, case = ours.get("agent killed", {}), "agent killed"
    same = mine.get("state") is not None and mine.get("state") == ours.get("unbroken", {}).get("state")
    intact = mine.get("updates") == [2, 2, 2] and mine.get("state_kept") is True and same
    return [
        Row("agent killed -9: noticed after", "s", figure(ours, case, "noticed_s"), None, 2.0),
        Row(
            "agent killed -9, back in 3 s: the round is longer by",
            "s",
            figure(ours, case, "longer_s"),
            figure(peer, case, "longer_s"),
            None,
            "41",
        ),
        Row(
            "agent killed -9, back in 3 s: what became of it",
            "",
            _told(_kept(ours, case), same),
            _kept(peer, case),
            None,
            "state lost",
            intact if mine else None,
            "same round, state intact",
        ),
    ]


def _told(text: str | None, same: bool) -> str | None:
    if text is None or text.startswith("failed"):
        return text
    return f"{text}, {'same' if same else 'OTHER'} end as unbroken"


def _coordinator_killed(ours: Found, peer: Found | None) -> list[Row]:
    mine, case = ours.get("coordinator killed", {}), "coordinator killed"
    same = mine.get("state") is not None and mine.get("state") == ours.get("unbroken", {}).get("state")
    theirs = figure(peer, case, "resumed_s")
    if theirs is None and peer and case in peer:
        theirs = f"not within {peer[case]['watched_s']:g} s"
    text = None if not mine else mine.get("failed") or f"updates of rounds {mine['updates']}"
    return [
        Row(
            "coordinator killed -9: from its new start to the end of the round",
            "s",
            figure(ours, case, "resumed_s"),
            theirs,
            5.0,
            "never",
        ),
        Row(
            "coordinator killed -9: updates lost or counted twice",
            "",
            _told(text, same),
            None,
            None,
            "",
            (mine.get("updates") == [2, 2, 2] and same) if mine else None,
            "0 lost, 0 twice",
        ),
    ]


def rows(ours: Found, peer: Found | None) -> list[Row]:
    """Return all measures; `peer` is `None` where there is no Flower."""
    killed = _agent_killed(ours, peer) + _coordinator_killed(ours, peer)
    return _overheads(ours, peer) + _memory(ours, peer) + killed


def _cell(value: float | str | None, unit: str = "") -> str:
    if value is None:
        return "not measured"
    return value if isinstance(value, str) else f"{value:.3g} {unit}".strip()


def markdown(all_rows: list[Row], peer: str | None) -> str:
    """Write the table; `peer` is the version that ran beside, `None` where none did."""
    beside = f"Flower {peer}, this run" if peer else "Flower: not there"
    head = f"| measure | Hedgerow | {beside} | ratio | bar | met | Flower 1.41, another day (quoted) |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in all_rows:
        met = {None: "", True: "yes", False: "**no**"}[row.met]
        bar = row.wanted or ("" if row.bar is None else f"{row.bar:g}")
        ratio = "" if row.ratio is None else f"{row.ratio:.3g} x"
        theirs = _cell(row.peer, row.unit) if peer else "-"
        cells = [row.measure, _cell(row.ours, row.unit), theirs, ratio, bar, met, row.quoted]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
