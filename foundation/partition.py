"""Shares of one data set among many devices; every device cuts its own from the labels and a seed.

Only whole numbers and one Dirichlet draw come from the seed (numpy's PCG64), so devices that never met agree
on who owns which sample. The forms of a partition:

    iid              shuffled and dealt evenly
    pathological:K   K classes on every device (McMahan et al., AISTATS 2017, section 3)
    dirichlet:ALPHA  class proportions drawn from Dirichlet(ALPHA); smaller is more unequal
                     (Hsu et al., arXiv 1909.06335; balanced as in Li et al., ICDE 2022)
    by:GROUP         one person, role or other natural group on every device, those beyond `count` on none;
                     GROUP is the data set's name for them (by:subject, by:role)
    natural          the same, whatever the data set calls its groups
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foundation.errors import DataError, SettingsError
from foundation.parameters import Array
from foundation.words import devices, unknown

FORMS = (
    "'iid', 'pathological:K' (as pathological:2), 'dirichlet:ALPHA' (as dirichlet:0.3),"
    " 'by:GROUP' (as by:subject) or 'natural'"
)
ADVICE = "use fewer devices, more samples (a larger limit) or another partition"
PARTS = ("training", "validation", "test")
"""The parts of a device's share, in the order of `check_shares`."""
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
    """Return name and number of a partition; raises `SettingsError` with the valid forms.

    `by:GROUP` is `natural` here; `group_asked` has its group.
    """
    name, colon, number = partition.partition(":")
    if name in ("iid", "natural") and not colon:
        return name, 0.0
    if name == "by" and number:
        return "natural", 0.0
    if name == "pathological" and number.isascii() and number.isdigit() and int(number) >= 1:
        return name, float(int(number))
    if name == "dirichlet":
        try:
            alpha = float(number)
        except ValueError:
            alpha = math.nan
        if 0 < alpha < math.inf:
            return name, alpha
    from difflib import get_close_matches  # needed by mistakes alone

    near = get_close_matches(name.casefold(), ("iid", "pathological", "dirichlet", "natural"), n=1)
    meant = f"; did you mean {near[0]!r}?" if near and near[0] != name else ""
    raise SettingsError(f"partition {partition!r} is none of {FORMS}{meant}")


def group_asked(partition: str) -> str | None:
    """Return the group that `by:GROUP` names, None for every other partition."""
    name, _, group = partition.partition(":")
    return group if name == "by" and group else None


def group_fits(partition: str, grouping: str | None) -> None:
    """Raise `SettingsError` when `by:GROUP` names another group than the data set's own, `grouping`."""
    asked = group_asked(partition)
    if asked is not None and asked != grouping:
        raise SettingsError(unknown("group", asked, [grouping] if grouping else []))


def shares(labels: Array, groups: Array | None, share: Share) -> Array:
    """Return the rows of this device, ascending, from all labels and groups, both of shape (n,).

    Shares of the same count, partition and seed never overlap. Together they are all rows, except where the
    partition forbids it: a class for which `pathological` has no room, or a group beyond `count`.
    Raises `DataError` when there is too little to share, `SettingsError` when the partition does not fit
    the data.
    """
    return np.flatnonzero(owners(labels, groups, share) == share.index)


def owners(labels: Array, groups: Array | None, share: Share) -> Array:
    """Return the device that owns each row, shape (n,); -1 for nobody. The same for every `share.index`.

    `groups` are those that the partition asks for by name. Raises as `shares` does.
    """
    if len(labels) < share.count:
        raise DataError(
            f"{len(labels)} samples (a segment counts as one) cannot be shared among {share.count} devices:"
            f" use at most {len(labels)}, or more samples (a larger limit)"
        )
    name, number = parse(share.partition)
    rng = np.random.default_rng([share.seed, 0x5A4E])
    if name == "natural":
        return _natural(groups, share)
    if name == "pathological":
        return _pathological(labels, share.count, int(number), rng)
    if name == "dirichlet":
        return _dirichlet(labels, share.count, number, rng)
    owner = np.empty(len(labels), np.int64)
    owner[rng.permutation(len(labels))] = np.arange(len(labels)) % share.count
    return owner


def _natural(groups: Array | None, share: Share) -> Array:
    if groups is None:
        raise SettingsError(
            f"partition {share.partition!r} needs data with groups (people, roles); this data set has none:"
            " name the array of a .npz, as by:person, or use iid, pathological:K or dirichlet:ALPHA"
        )
    names, group = np.unique(groups, return_inverse=True)
    if share.count > len(names):
        raise SettingsError(
            f"partition {share.partition!r} has {len(names)} groups, too few for {share.count} devices:"
            f" use at most {len(names)}"
        )
    # Two people on one device would not be one person's device any more: those beyond `count` stay out.
    return np.where(group < share.count, group, -1)


def _pathological(labels: Array, count: int, per_device: int, rng: np.random.Generator) -> Array:
    classes = np.unique(labels)
    if per_device > len(classes):
        raise SettingsError(
            f"pathological:{per_device} asks for more classes than the {len(classes)} there are:"
            f" use pathological:{len(classes)} or less"
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
    for label, mine in zip(classes, holders, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if len(rows) < len(mine):
            raise DataError(
                f"class {label} has {len(rows)} samples for {len(mine)} devices,"
                f" so that {devices(sorted(mine[len(rows) :]))} would be without it:"
                " use fewer devices, a larger limit, or fewer classes each"
            )
        for device, part in zip(mine, np.array_split(rows, max(1, len(mine))), strict=False):
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


def check_shares(
    share: Share,
    samples: Array,
    names: Sequence[str] = (),
    *,
    batch_size: int = 32,
    needed: Sequence[bool] = (True, True, True),
    advice: str = ADVICE,
) -> list[str]:
    """Return what a person should know of all shares before anyone trains on them, one sentence each.

    `samples` (count, 3, classes) are each device's training, validation and test samples of each class;
    `names` are the classes' (none for text, whose samples have no class). Warnings: a device with less than
    two batches to train on, a class that is tested but not trained on a device, a class that is nowhere.
    Raises `DataError` when it cannot work: a device has nothing in a part that is `needed`, or trains on
    fewer classes than `pathological:K` promises. Devices go by their number from 0.
    """
    by_part = samples.sum(axis=2)
    for part, asked, counts in zip(PARTS, needed, by_part.T, strict=True):
        if asked and not counts.all():
            raise DataError(
                f"partition {share.partition!r} leaves {_where(counts == 0)} without a sample in the {part}"
                f" part: {advice}"
            )
    said = _few_batches(by_part[:, 0], batch_size, advice)
    return said + _missing_classes(share, samples, names, advice) if names else said


def _where(chosen: Array) -> str:
    return devices(np.flatnonzero(chosen).tolist())


def _few_batches(training: Array, batch_size: int, advice: str) -> list[str]:
    few = training < 2 * batch_size
    if not few.any():
        return []
    return [
        f"fewer than {2 * batch_size} training samples, two batches of {batch_size}, on {_where(few)}"
        f" (the fewest: {training.min()} on device {training.argmin()}): {advice}"
    ]


def _missing_classes(share: Share, samples: Array, names: Sequence[str], advice: str) -> list[str]:
    trained, tested = samples[:, 0] > 0, samples[:, 2] > 0
    form, number = parse(share.partition)
    lacking = trained.sum(axis=1) < number
    if form == "pathological" and lacking.any():
        raise DataError(
            f"{share.partition} leaves {_where(lacking)} with fewer than {int(number)} classes to train on:"
            f" {advice}"
        )
    said = [
        f"class {names[label]!r} is tested but not trained on {_where(missing)}: {advice}"
        for label, missing in enumerate((tested & ~trained).T)
        if missing.any()
    ]
    nowhere = [names[label] for label in np.flatnonzero(~samples.any(axis=(0, 1))).tolist()]
    if nowhere:
        said.append(f"no device has samples of class {', '.join(nowhere)}")
    return said
