"""Words that messages share: the nearest of the names there are, and lists of devices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SHOWN = 12
"""Devices that a message lists by number before it counts the rest."""


def unknown(what: str, name: str, names: Iterable[str]) -> str:
    """Return that there is no such thing, which one was nearly meant, and all there are.

    `unknown("strategy", "fedpre", ["fedavg", "fedper"])` is
    "there is no strategy 'fedpre'; did you mean 'fedper'? There are: fedavg, fedper".
    """
    import difflib  # needed by mistakes alone

    valid = sorted(names)
    folded = {one.casefold(): one for one in valid}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    meant = f"; did you mean {folded[near[0]]!r}? " if near else ". "
    there = f"There are: {', '.join(valid)}" if valid else "There is none"
    return f"there is no {what} {name!r}{meant}{there}"


def devices(numbers: Sequence[int]) -> str:
    """Return "device 3", "devices 3, 5 and 8", or the first dozen and how many more."""
    shown = [str(number) for number in numbers[:SHOWN]]
    rest = len(numbers) - len(shown)
    if rest:
        shown.append(f"{rest} more")
    listed = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
    return f"device{'s' * (len(numbers) > 1)} {listed}"
