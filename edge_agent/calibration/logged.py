"""Another instrument's log: a CSV file with the columns time_s (seconds since 1970, UTC) and watts."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from foundation.errors import DataError

MOST_BYTES = 64 << 20
MOST_W = 1e5
COLUMNS = ("time_s", "watts")


@dataclass(frozen=True, slots=True)
class Log:
    """Times, rising, and the watts at them."""

    times_s: list[float]
    watts: list[float]


def read_log(file: Path) -> Log:
    """Read a log, which may still be growing: a last line without its end is left out.

    Other columns are left out too. Raises `DataError` that names the line and what is wrong with it.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise DataError(f"{file} has more than {MOST_BYTES >> 20} MiB: log less often, or cut it")
    return parse_log(data, str(file))


def parse_log(data: bytes, file: str) -> Log:
    """Return the log of a file's bytes; raises `DataError`."""
    whole = data[: data.rfind(b"\n") + 1]
    try:
        rows = list(csv.reader(whole.decode("utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is no CSV: {error}") from error
    if not rows:
        return Log([], [])
    heads = [head.strip() for head in rows[0]]
    if any(heads.count(column) != 1 for column in COLUMNS):
        raise DataError(f"{file}, line 1: the first line must name the columns {' and '.join(COLUMNS)}")
    places = [heads.index(column) for column in COLUMNS]
    log = Log([], [])
    for number, row in enumerate(rows[1:], 2):
        if row:
            time_s, watts = _numbers(row, places, f"{file}, line {number}")
            if log.times_s and time_s <= log.times_s[-1]:
                raise DataError(f"{file}, line {number}: its time is not after the line before")
            log.times_s.append(time_s)
            log.watts.append(watts)
    return log


def _numbers(row: list[str], places: list[int], where: str) -> tuple[float, float]:
    try:
        time_s, watts = (float(row[place]) for place in places)
    except (ValueError, IndexError) as error:
        raise DataError(f"{where}: time_s and watts must be numbers") from error
    if not math.isfinite(time_s) or not 0 <= watts <= MOST_W:
        raise DataError(f"{where}: watts must be between 0 and {MOST_W:g}, and the time finite")
    return time_s, watts
