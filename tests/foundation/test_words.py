"""Words of messages: the nearest name, and devices by number."""

from __future__ import annotations

import pytest

from foundation.words import devices, unknown

NAMES = ["fedavg", "fedper", "fedprox", "local", "pfl_tpp"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("fedpre", "fedper"),
        ("FedAvg", "fedavg"),
        ("pfl-tpp", "pfl_tpp"),
        ("lokal", "local"),
        ("fedproxx", "fedprox"),
    ],
)
def test_the_nearest_is_named_and_all_are_listed(name: str, meant: str) -> None:
    said = unknown("strategy", name, reversed(NAMES))
    listed = "There are: fedavg, fedper, fedprox, local, pfl_tpp"
    assert said == f"there is no strategy {name!r}; did you mean {meant!r}? {listed}"


def test_what_is_like_nothing_gets_the_list_alone() -> None:
    assert unknown("strategy", "xyz", ["b", "a"]) == "there is no strategy 'xyz'. There are: a, b"
    assert unknown("group", "person", []) == "there is no group 'person'. There is none"


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([3], "device 3"),
        ([3, 5], "devices 3 and 5"),
        ([0, 1, 2], "devices 0, 1 and 2"),
        (list(range(12)), "devices 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 11"),
        (list(range(40)), "devices 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 28 more"),
    ],
)
def test_devices_go_by_number(numbers: list[int], words: str) -> None:
    assert devices(numbers) == words
