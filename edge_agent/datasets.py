"""A device's data: `load` reads what `[data]` in `agent.toml` names; `partition_problems` checks all shares.

A data set that is shared, a built-in one or a `.npz` file, comes with the federation's experiments: each
device finds the same files, takes its share by the seed, and keeps nothing but its share in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from edge_agent import sources
from edge_agent.builtin import BUILTIN
from edge_agent.samples import (
    DataSettings,
    Input,
    LocalData,
    Part,
    Source,
    check_labels,
    local_data,
    split,
)
from foundation.errors import DataError, HedgerowError, SettingsError
from foundation.parameters import Array
from foundation.partition import ADVICE, check_shares, group_fits, owners, parse
from foundation.words import unknown

__all__ = [
    "BUILTIN",
    "DataSettings",
    "Input",
    "LocalData",
    "Part",
    "load",
    "load_shares",
    "partition_problems",
]


def load(settings: DataSettings, data_dir: Path | None = None, buffer_dir: Path | None = None) -> LocalData:
    """Read this device's data and split it for training, validation and test; the same every time.

    `data_dir` holds the data sets that are shared, unless `settings.path` says otherwise; `buffer_dir` is
    where a `StreamRecorder` writes. Raises `DataError` in words for the device's owner: which file, which
    row, what to do.
    """
    if settings.kind == "builtin":
        with _said_as(DataError, settings):  # found out only here; the agent stays up and says so
            source = _open_shared(settings, data_dir)
            rows = own_rows(source, settings)
        return local_data(source, rows, settings)
    if settings.kind == "python":
        result = sources.python_function(settings)
        if isinstance(result, LocalData):
            return result
        source = result
    elif settings.kind == "mqtt_stream":
        from edge_agent import stream  # half a megabyte that other kinds do not need

        source = stream.recorded(settings, buffer_dir)
    else:
        readers = {"npz": sources.npz, "csv": sources.csv_file, "image_folder": sources.image_folder}
        source = readers[settings.kind](settings)
    return local_data(source, np.arange(len(source.classes)), settings)


def load_shares(settings: DataSettings, data_dir: Path | None = None) -> list[LocalData]:
    """Read what every one of `settings.count` devices has: what `load` gives each, with the files read once.

    The parts of all devices are views of one array, so many virtual devices weigh what the data set does.
    Raises as `load`; only data that are shared can be read so.
    """
    if settings.kind != "builtin":
        raise SettingsError(f"kind = {settings.kind!r} is one device's own data: there are no shares of it")
    each = [settings.model_copy(update={"index": index}) for index in range(settings.count)]
    with _said_as(DataError, settings):
        source = _open_shared(settings, data_dir)
        rows, owner = _dealt(source, settings)
    own = [rows[owner == one.index] for one in each]
    orders = [np.concatenate(split(source, mine, one)) for mine, one in zip(own, each, strict=True)]
    x, y = source.read(np.concatenate(orders))
    cuts = np.cumsum([len(order) for order in orders])[:-1]
    pieces = zip(np.split(x, cuts), np.split(y, cuts), strict=True)
    return [
        local_data(replace(source, read=partial(_given, piece)), mine, one)
        for piece, mine, one in zip(pieces, own, each, strict=True)
    ]


def _given(piece: tuple[Array, Array], rows: Array) -> tuple[Array, Array]:
    return piece  # read already, in the order of the rows


def partition_problems(
    settings: DataSettings, data_dir: Path | None = None, batch_size: int = 32
) -> list[str]:
    """Return what to know of the shares of all `settings.count` devices before any of them trains.

    Labels and groups are read, samples are not (but for the ids of text). Warnings, one sentence each: a
    device with less than two batches to train on, a class that a device is tested on but not trained on, a
    class that no device has. Raises `SettingsError` when the partition does not fit the data set, and
    `DataError` when a file is missing or damaged or a device could not work: nothing in a part that it
    needs, or fewer classes than `pathological:K` promises. A device's own data (another `kind` than
    `builtin`) are not shared, and there is nothing to say.
    """
    if settings.kind != "builtin":
        return []
    with _said_as(SettingsError, settings):
        source = _open_shared(settings, data_dir)
        rows, owner = _dealt(source, settings)
    check_labels(source)
    order = np.argsort(owner, kind="stable")
    edges = np.searchsorted(owner[order], np.arange(settings.count + 1))
    names = () if source.input == "text" else source.labels
    samples = np.zeros((settings.count, 3, max(1, len(names))), np.int64)
    for device, (start, stop) in enumerate(pairwise(edges.tolist())):
        for part, chosen in enumerate(split(source, rows[order[start:stop]], settings)):
            # The classes of text are its roles, which it need not learn.
            classes = source.classes[chosen] if names else np.zeros(len(chosen), np.int64)
            samples[device, part] = np.bincount(classes, minlength=samples.shape[2])
    return check_shares(
        settings.share,
        samples,
        names,
        batch_size=batch_size,
        needed=(True, settings.validation > 0, settings.test > 0),
        advice=ADVICE
        if settings.split is None
        else f"{ADVICE}, repair the array {settings.split!r}, or leave split out",
    )


@contextmanager
def _said_as(kind: type[HedgerowError], settings: DataSettings) -> Iterator[None]:
    """Name the data set that a setting does not fit."""
    try:
        yield
    except SettingsError as error:
        raise kind(f"{settings.name}: {error}") from error


def _open_shared(settings: DataSettings, data_dir: Path | None) -> Source:
    folder = settings.path.expanduser() if settings.path else data_dir
    if settings.shared_file:
        return _open_file(settings, folder)
    if settings.name not in BUILTIN:
        raise DataError(f"{unknown('data set', settings.name, BUILTIN)}, or the name of a .npz file")
    if folder is None and settings.name != "digits":
        raise DataError(
            f"{settings.name} needs the folder of the data sets: give --data-dir, set HEDGEROW_DATA, or path"
            " in [data]"
        )
    return BUILTIN[settings.name](folder or Path(), settings)


def _open_file(settings: DataSettings, folder: Path | None) -> Source:
    path = (folder or Path()) / Path(settings.name).expanduser()
    if not path.is_file():
        raise DataError(
            f"{path} is not there: put the file there, or give its whole path; a relative one counts from the"
            " folder of the data sets (--data-dir, HEDGEROW_DATA or path in [data])"
        )
    return sources.npz(settings, path)


def own_rows(source: Source, settings: DataSettings) -> Array:
    """Return the rows of this device; rows of one segment stay on one device."""
    rows, owner = _dealt(source, settings)
    mine: Array = rows[owner == settings.index]
    return mine


def _dealt(source: Source, settings: DataSettings) -> tuple[Array, Array]:
    """Return the rows that are shared, ascending, and the device that each belongs to (-1: nobody)."""
    group_fits(settings.partition, source.grouping)
    everyone = np.arange(len(source.classes))
    groups = source.groups
    if groups is not None and parse(settings.partition)[0] == "natural":
        # Samples of people who do not take part should not count towards the limit.
        everyone = everyone[np.isin(groups, np.unique(groups)[: settings.count])]
    if settings.limit is not None and settings.limit < len(everyone):
        everyone = _limited(source, everyone, settings)
    units = everyone if source.segments is None else source.segments[everyone]
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    rows = everyone[first]
    owner = owners(source.classes[rows], None if groups is None else groups[rows], settings.share)
    return everyone, owner[unit]


def _limited(source: Source, rows: Array, settings: DataSettings) -> Array:
    """Return `settings.limit` of the rows, as equal in number over classes (and people) as can be."""
    stratum = source.classes[rows]
    if source.groups is not None and parse(settings.partition)[0] == "natural":
        group = np.unique(source.groups[rows], return_inverse=True)[1]
        stratum = np.unique(np.stack([stratum, group]), axis=1, return_inverse=True)[1].ravel()
    order = np.arange(len(rows))
    if not source.ordered:
        # Whole segments before parts of others; text goes on where it began.
        units = rows if source.segments is None else source.segments[rows]
        unit = np.unique(units, return_inverse=True)[1]
        rank = np.random.default_rng([settings.seed, 0x11417]).permutation(int(unit.max()) + 1)
        order = np.argsort(rank[unit], kind="stable")
    left = settings.limit or 0
    values, counts = np.unique(stratum, return_counts=True)
    kept: list[Array] = []
    for done, which in enumerate(np.argsort(counts, kind="stable")):
        quota = min(int(counts[which]), left // (len(values) - done))
        kept.append(order[stratum[order] == values[which]][:quota])
        left -= quota
    limited: Array = rows[np.sort(np.concatenate(kept))]
    return limited
