"""Seals: what is taken, and what is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import NotSealed, Replayed, SealBroken, SealWrong
from foundation.seal import DOWN, OVERHEAD, UP, WINDOW, Mark, Opener, Sealer, SealKeys, hkdf, new_epoch
from foundation.topics import READ_BY_AGENTS, WRITTEN_BY_AGENTS, Topics

KEY, OTHER = bytes(32), bytes([1]) * 32
TOPIC = Topics("f").of("a", "update")
CARD, PRESENCE = Topics("f").of("a", "card"), Topics("f").of("a", "presence")


def test_a_sealed_letter_opens_and_costs_what_is_said() -> None:
    letter = Sealer(1).seal(TOPIC, b"body", KEY)
    assert len(letter) == len(b"body") + OVERHEAD == 4 + 52
    assert Opener().open(TOPIC, letter, KEY) == b"body"


def test_another_key_another_topic_and_every_changed_bit_are_refused() -> None:
    letter = Sealer(1).seal(TOPIC, b"body", KEY)
    for topic, key in (
        (TOPIC, OTHER),
        (Topics("f").of("b", "update"), KEY),
        (Topics("g").of("a", "update"), KEY),
    ):
        with pytest.raises(SealWrong, match="wrong"):
            Opener().open(topic, letter, key)
    for bit in range(8 * len(letter)):
        changed = bytearray(letter)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealBroken):
            Opener().open(TOPIC, bytes(changed), KEY)


def test_what_has_no_seal_is_refused_by_that_name() -> None:
    for letter in (b"", b"{}", b"HGS", bytes(200)):
        with pytest.raises(NotSealed, match="no seal"):
            Opener().open(TOPIC, letter, KEY)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(letter: bytes) -> None:
    opener = Opener()
    with pytest.raises(SealBroken):
        opener.open(TOPIC, letter, KEY)
    assert opener.marks() == {}


@given(st.permutations(range(12)))
def test_letters_may_overtake_each_other_and_none_comes_twice(order: list[int]) -> None:
    sealer = Sealer(1)
    letters = [sealer.seal(TOPIC, bytes([n]), KEY) for n in range(12)]
    opener = Opener()
    for n in order:
        assert opener.open(TOPIC, letters[n], KEY) == bytes([n])
        again = Opener(opener.marks())  # after a restart
        for seen in order[: order.index(n) + 1]:
            with pytest.raises(Replayed):
                again.open(TOPIC, letters[seen], KEY)


def test_what_is_older_than_the_window_is_refused() -> None:
    sealer = Sealer(1)
    letters = [sealer.seal(TOPIC, b"", KEY) for _ in range(WINDOW + 2)]
    opener = Opener()
    opener.open(TOPIC, letters[-1], KEY)
    opener.open(TOPIC, letters[1], KEY)
    with pytest.raises(Replayed):
        opener.open(TOPIC, letters[0], KEY)


def test_letters_of_an_earlier_life_are_refused() -> None:
    old, new = Sealer(1), Sealer(2)
    late = old.seal(TOPIC, b"old", KEY)
    opener = Opener()
    assert opener.open(TOPIC, new.seal(TOPIC, b"new", KEY), KEY) == b"new"
    with pytest.raises(Replayed):
        opener.open(TOPIC, late, KEY)


def test_retained_letters_come_again_and_older_ones_do_not() -> None:
    sealer, opener = Sealer(1), Opener()
    first, second = sealer.seal(CARD, b"1", KEY), sealer.seal(CARD, b"2", KEY)
    assert opener.open(CARD, first, KEY) == b"1"
    assert opener.open(CARD, second, KEY) == b"2"
    assert Opener(opener.marks()).open(CARD, second, KEY) == b"2"
    with pytest.raises(Replayed, match="older"):
        opener.open(CARD, first, KEY)


def test_a_last_will_is_sealed_first_and_read_last_but_not_after_the_next_life() -> None:
    life, opener = Sealer(1), Opener()
    will, online = life.seal(PRESENCE, b"off", KEY), life.seal(PRESENCE, b"on", KEY)
    assert opener.open(PRESENCE, online, KEY) == b"on"
    assert opener.open(PRESENCE, will, KEY) == b"off"
    assert opener.open(PRESENCE, Sealer(2).seal(PRESENCE, b"on", KEY), KEY) == b"on"
    with pytest.raises(Replayed):  # a broker that notices the dead connection late
        opener.open(PRESENCE, will, KEY)


def test_epochs_rise_also_where_the_clock_goes_back() -> None:
    far = 2**62
    assert new_epoch(far) == far + 1
    assert new_epoch(0) > 1_700_000_000_000_000


def test_hkdf_is_that_of_rfc_5869() -> None:
    # Appendix A.1 and A.3.
    info = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9")
    made = hkdf(b"\x0b" * 22, bytes(range(13)), info, 42)
    assert made.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )
    assert hkdf(b"\x0b" * 22, b"", b"", 42).hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )


def test_every_topic_of_an_agent_has_a_direction_or_is_for_others() -> None:
    """A new topic has to be sealed, or listed here with the reason why not."""
    for_others = {"answer", "prediction", "predict"}  # between the device and whoever asks at home
    assert set(WRITTEN_BY_AGENTS) | set(READ_BY_AGENTS) == set(UP) | set(DOWN) | for_others
    keys = SealKeys(KEY, OTHER)
    assert keys.of(TOPIC) == KEY
    assert keys.of(Topics("f").of("a", "assignment")) == OTHER
    assert keys.of(Topics("f").of("a", "predict")) is None


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**WINDOW - 1))
def test_marks_survive_json(epoch: int, seen: int) -> None:
    mark = Mark(epoch=epoch, counter=3, seen=seen)
    assert Mark.model_validate_json(mark.model_dump_json()) == mark
