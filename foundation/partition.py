"""Shares of one data set among many devices; every device cuts its own from the labels and a seed.

Only whole numbers and one Dirichlet draw come from the seed (numpy's PCG64), so devices that never met agree
on who owns which sample. The forms of a partition:

    iid              shuffled and dealt evenly
    pathological:K   K classes on every device (McMahan et al., AISTATS 2017, section 3)
    dirichlet:ALPHA  class proportions drawn from Dirichlet(ALPHA); smaller is more unequal
                     (Hsu et al., arXiv 1909.06335; balanced as in Li et al., ICDE 2022)
    natural          one person, role or other group of the data set on every device
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from foundation.errors import DataError, SettingsError
from foundation.parameters import Array

FORMS = "'iid', 'pathological:K' (as pathological:2), 'dirichlet:ALPHA' (as dirichlet:0.3) or 'natural'"
LEAST = 10
"""Samples that a Dirichlet share holds at least, where there are that many."""


@dataclass(frozen=True, slots=True)
class Share:
    """Which share of a data set is this device's: number `index` (from 0) of `count`."""

    index: int
    count: int
    partition: str = "iid"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise SettingsError(
                f"share {self.index} of {self.count} does not exist: index goes from 0 to count - 1"
            )
        if self.seed < 0:
            raise SettingsError(f"seed {self.seed} is negative: use 0 or more")
        parse(self.partition)


def parse(partition: str) -> tuple[str, float]:
    """Return name and number of a partition; raises `SettingsError` with the valid forms."""
    name, colon, number = partition.partition(":")
    if name in ("iid", "natural") and not colon:
        return name, 0.0
    if name == "pathological" and number.isascii() and number.isdigit() and int(number) >= 1:
        return name, float(int(number))
    if name == "dirichlet":
        try:
            alpha = float(number)
        except ValueError:
            alpha = math.nan
        if 0 < alpha < math.inf:
            return name, alpha
    raise SettingsError(f"partition {partition!r} is none of {FORMS}")


def shares(labels: Array, groups: Array | None, share: Share) -> Array:
    """Return the rows of this device, ascending, from all labels and groups, both of shape (n,).

    Shares of the same count, partition and seed never overlap. Together they are all rows, except where the
    partition forbids it: a class for which `pathological` has no room, or a group beyond `count`.
    Raises `DataError` when there is too little to share, `SettingsError` when the partition does not fit
    the data.
    """
    if len(labels) < share.count:
        raise DataError(f"{len(labels)} samples cannot be shared among {share.count} devices")
    return np.flatnonzero(owners(labels, groups, share) == share.index)


def owners(labels: Array, groups: Array | None, share: Share) -> Array:
    """Return the device that owns each row, shape (n,); -1 for nobody. The same for every `share.index`."""
    name, number = parse(share.partition)
    rng = np.random.default_rng([share.seed, 0x5A4E])
    if name == "natural":
        return _natural(groups, share.count)
    if name == "pathological":
        return _pathological(labels, share.count, int(number), rng)
    if name == "dirichlet":
        return _dirichlet(labels, share.count, number, rng)
    owner = np.empty(len(labels), np.int64)
    owner[rng.permutation(len(labels))] = np.arange(len(labels)) % share.count
    return owner


def _natural(groups: Array | None, count: int) -> Array:
    if groups is None:
        raise SettingsError(
            "partition 'natural' needs data with groups (people, roles); this data set has none"
        )
    names, group = np.unique(groups, return_inverse=True)
    if count > len(names):
        raise SettingsError(f"partition 'natural' has {len(names)} groups, too few for {count} devices")
    # Two people on one device would not be one person's device any more: those beyond `count` stay out.
    return np.where(group < count, group, -1)


def _pathological(labels: Array, count: int, per_device: int, rng: np.random.Generator) -> Array:
    classes = np.unique(labels)
    if per_device > len(classes):
        raise SettingsError(
            f"pathological:{per_device} asks for more classes than the {len(classes)} there are"
        )
    room = np.full(len(classes), count * per_device // len(classes))
    room[rng.permutation(len(classes))[: count * per_device % len(classes)]] += 1
    holders: list[list[int]] = [[] for _ in classes]
    for device in rng.permutation(count):
        # The classes with most room first, so that the last devices still find enough different ones.
        tie = rng.permutation(len(classes))
        for chosen in np.lexsort((tie, -room))[:per_device]:
            room[chosen] -= 1
            holders[chosen].append(int(device))
    owner = np.full(len(labels), -1, np.int64)
    for label, devices in zip(classes, holders, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if len(rows) < len(devices):
            raise DataError(
                f"class {label} has {len(rows)} samples for {len(devices)} devices:"
                " use fewer devices, or fewer classes each"
            )
        for device, part in zip(devices, np.array_split(rows, max(1, len(devices))), strict=False):
            owner[part] = device
    return owner


def _dirichlet(labels: Array, count: int, alpha: float, rng: np.random.Generator) -> Array:
    fair = len(labels) / count
    owner = np.full(len(labels), -1, np.int64)
    held = np.zeros(count, np.int64)
    for label in rng.permutation(np.unique(labels)):
        rows = rng.permutation(np.flatnonzero(labels == label))
        # A device that has its fair number already gets no more, which keeps sizes comparable.
        odds = rng.dirichlet(np.full(count, alpha)) * (held < fair)
        total = odds.sum()
        odds = odds / total if total > 0 else (held < fair) / max(1, int((held < fair).sum()))
        cuts = np.floor(np.cumsum(odds)[:-1] * len(rows) + 0.5).astype(np.int64)
        for device, part in enumerate(np.split(rows, np.minimum(cuts, len(rows)))):
            owner[part] = device
            held[device] += len(part)
    _feed_the_poor(owner, labels, held, min(LEAST, len(labels) // count))
    return owner


def _feed_the_poor(owner: Array, labels: Array, held: Array, least: int) -> None:
    """Move samples from the richest device, of its commonest class, until everyone has `least`."""
    while held.min() < least:
        rich, poor = int(held.argmax()), int(held.argmin())
        mine = np.flatnonzero(owner == rich)
        values, counts = np.unique(labels[mine], return_counts=True)
        moved = mine[labels[mine] == values[counts.argmax()]][
            : min(least - int(held[poor]), int(held[rich]) - least)
        ]
        owner[moved] = poor
        held[rich] -= len(moved)
        held[poor] += len(moved)
