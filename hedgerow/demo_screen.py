"""Live progress of a federation: a table on a terminal, plain lines in a pipe."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Screen:
    """Shows the coordinator's status while a run is on."""

    def __init__(self, console: Console, run: str) -> None:
        self._console, self._run = console, run
        self._live = Live(console=console, refresh_per_second=8, transient=True)
        self._round = 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def update(self, status: dict[str, Any]) -> None:
        """Show a status; in a pipe, one line for each round."""
        if self._console.is_terminal:
            self._live.update(picture(status))
        if status["run"] != self._run:
            return  # the run before this one is still on the screen
        done = status["rounds"] if status["phase"] == "finished" else status["round"] - 1
        while self._round < done:
            self._round += 1
            self._console.print(
                f"round {self._round}/{status['rounds']} done  {figures(status)}", highlight=False
            )


def figures(status: dict[str, Any]) -> str:
    """Return mean accuracy, units kept and the time left, as last heard from the agents."""
    known = [a["accuracy"] for a in status["agents"] if a["accuracy"] is not None]
    accuracy = f"accuracy {sum(known) / len(known):.3f}" if known else "accuracy –"
    kept = [sum(a["kept_units"]) for a in status["agents"] if a["kept_units"]]
    dense = [len(a["kept_units"]) * (a["hidden_units"] or 0) for a in status["agents"] if a["kept_units"]]
    units = f"FFL units kept {sum(kept) / sum(dense):.0%}" if sum(dense) else "FFL units kept –"
    eta = f"  about {status['eta_s']:.0f} s left" if status["eta_s"] else ""
    return f"{accuracy}  {units}{eta}"


def picture(status: dict[str, Any]) -> RenderableType:
    """Return the live picture: where the run is, and every device."""
    head = Text(
        f"round {status['round']}/{status['rounds']}  {status['phase']}  {figures(status)}", style="bold"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("device", "stage", "", "%", "ETA", "accuracy", "FFL units", "joules", "down", "up"):
        table.add_column(name, justify="left" if name in ("device", "stage", "") else "right", no_wrap=True)
    for agent in status["agents"]:
        table.add_row(*_row(agent))
    return Group(head, table)


def _row(agent: dict[str, Any]) -> list[RenderableType]:
    stage = agent["stage"] if agent["online"] else "offline"
    fraction = agent["progress"] or 0.0
    kept, hidden = agent["kept_units"], agent["hidden_units"]
    units = f"{sum(kept)}/{len(kept) * hidden}" if kept and hidden else "–"
    return [
        agent["agent"],
        Text(str(stage or "–"), style="red" if stage == "offline" else "cyan"),
        ProgressBar(total=1.0, completed=fraction, width=16),
        f"{fraction:.0%}",
        f"{agent['eta_s']:.1f} s" if agent["eta_s"] is not None else "–",
        f"{agent['accuracy']:.3f}" if agent["accuracy"] is not None else "–",
        units,
        joules_text(agent["joules"], agent["energy_kind"]),
        bytes_text(agent["received_bytes"]),
        bytes_text(agent["sent_bytes"]),
    ]


def joules_text(joules: float | None, kind: str) -> str:
    """Return joules with their kind; a modelled figure is marked `~`, an unknown one is a dash."""
    if joules is None:
        return "–"
    return f"~{joules:.1f} J modelled" if kind == "modelled" else f"{joules:.1f} J {kind}"


def bytes_text(count: float | None) -> str:
    """Return bytes in kB or MB (powers of ten)."""
    if count is None:
        return "–"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
