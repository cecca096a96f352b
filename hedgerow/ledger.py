"""`hedgerow report energy`: the ledger of a run, read from a store that may be in use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from coordinator.ledger.entries import Book, read
from coordinator.ledger.report import EnergyReport, energy_report
from coordinator.store.schema import FILE
from coordinator.store.sql import Store
from foundation.errors import HedgerowError, SettingsError
from foundation.words import unknown
from hedgerow.files import check_writable, write_whole
from hedgerow.ledger_csv import csv_text
from hedgerow.ledger_tables import show

WIDTH = 100
"""Columns that all tables fit; what a pipe gets."""
SHOWN = 12
"""Folders that a message lists."""
INSIDE = "coordinator"
"""Where `simulate`, `compare` and `demo` keep the store in their folders."""


def run_command(
    folder: Path,
    *,
    run: str | None = None,
    accuracy: float | None = None,
    against: str | None = None,
    radio_km: float | None = None,
    as_json: bool = False,
    csv_to: Path | None = None,
) -> int:
    """Read the ledger, show and write it, and return the exit code."""
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=WIDTH)
    try:
        check_writable(csv_to)
        report = ledger(folder, run, accuracy=accuracy, against=against, radio_km=radio_km)
        if csv_to:
            write_whole(csv_to, csv_text(report))
    except HedgerowError as error:
        console.print("[red]no ledger:[/red] ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2 if isinstance(error, SettingsError) else 1
    if as_json:
        sys.stdout.write(report.model_dump_json(indent=2) + "\n")
    else:
        show(report, console)
    if csv_to:
        console.print(f"wrote {csv_to}", markup=False, highlight=False, soft_wrap=True)
    return 0


def ledger(
    folder: Path,
    run: str | None = None,
    *,
    accuracy: float | None = None,
    against: str | None = None,
    radio_km: float | None = None,
) -> EnergyReport:
    """Return the ledger of a run, or of the newest, in the store of `folder`; nothing there is changed.

    `against` is another run of that store, or another folder with a store. Raises `SettingsError` that says
    which folders and runs there are, `StoreError` for a store that cannot be read.
    """
    with _opened(folder) as store:
        book = _book(store, run, folder)
        other = None if against is None else _other(store, against, folder)
    elsewhere = other is not None and other.run != against
    return energy_report(
        book,
        accuracy=accuracy,
        other=other,
        other_name=f"{other.run} in {against}" if other and elsewhere else None,
        radio_km=radio_km,
    )


def store_folder(folder: Path) -> Path:
    """Return where the store is: in the folder, or in the place that simulations keep it in.

    Raises `SettingsError` that says what else there is.
    """
    for place in (folder, folder / INSIDE):
        if (place / FILE).is_file():
            return place
    several = sorted(path.parents[1] for path in folder.glob(f"*/{INSIDE}/{FILE}"))
    if several:
        names = ", ".join(map(str, several[:SHOWN])) + (" ..." if len(several) > SHOWN else "")
        raise SettingsError(f"{folder} holds {len(several)} simulations: give --folder one of {names}")
    raise SettingsError(
        f"there is no store in {folder}: give --folder the coordinator's folder (coordinator-data where its"
        " settings name none), or that of hedgerow simulate --folder"
    )


@contextmanager
def _opened(folder: Path) -> Iterator[Store]:
    with Store.open_to_read(store_folder(folder)) as store:
        yield store


def _book(store: Store, run: str | None, folder: Path) -> Book:
    names = [record.run for record in store.runs()]
    if not names:
        raise SettingsError(f"the store in {folder} has no run yet: start one, and look again after a round")
    if run is not None and run not in names:
        raise SettingsError(f"{folder}: {unknown('run', run, names)}")
    return read(store, names[0] if run is None else run)


def _other(store: Store, against: str, folder: Path) -> Book:
    """Read the run to stand against; a name comes before a folder."""
    if store.has_run(against) or not Path(against).is_dir():
        return _book(store, against, folder)
    with _opened(Path(against)) as elsewhere:
        return _book(elsewhere, None, Path(against))
