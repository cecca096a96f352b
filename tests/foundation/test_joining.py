"""Tokens, and letters about joining."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import HedgerowError, JoinRefused, SettingsError
from foundation.joining import (
    Box,
    Grant,
    Request,
    Token,
    boxed,
    public_of,
    read_grant,
    read_request,
    shared,
    unboxed,
    vouched,
)

pytest.importorskip("cryptography")
TOKEN = Token("green.house", "0123456789abcdef", bytes(range(16)), bytes(32))
PUBLIC = "ab" * 32


@given(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    st.binary(min_size=8, max_size=8),
    st.binary(min_size=16, max_size=16),
    st.none() | st.binary(min_size=32, max_size=32),
)
def test_a_token_is_read_as_it_was_made(
    federation: str, invite: bytes, secret: bytes, pin: bytes | None
) -> None:
    token = Token(federation, invite.hex(), secret, pin)
    assert Token.of(f" {token.text()}\n") == token


def test_a_token_that_was_not_copied_whole_is_told_from_one_that_was() -> None:
    text = TOKEN.text()
    for wrong in (text[:-1], text[1:], text[:20] + text[21:], text.upper(), "", "hg1.", text + "AAAA"):
        with pytest.raises(SettingsError, match="copy all of it"):
            Token.of(wrong)


@given(st.text(max_size=500))
def test_any_text_is_refused_as_a_token(text: str) -> None:
    with pytest.raises(SettingsError):
        Token.of("hg1." + text)


def test_secrets_do_not_show_in_what_is_printed() -> None:
    shown = repr(shared(bytes(range(32)), public_of(bytes([7]) * 32), federation="f", name="n", device=b"d",
                        coordinator=b"c"))  # fmt: skip
    assert "bytes" not in shown
    assert "\\x" not in shown


def test_a_letter_needs_the_tokens_secret_and_cannot_be_turned_round() -> None:
    request = Request(name="pi", public=PUBLIC)
    letter = vouched(request, TOKEN.secret)
    assert read_request(letter, TOKEN.secret) == request
    with pytest.raises(JoinRefused, match="does not have the token's secret"):
        read_request(letter, bytes(16))
    with pytest.raises(JoinRefused):
        read_grant(letter, TOKEN.secret)  # a question sent back is no answer
    with pytest.raises(JoinRefused):
        read_request(letter.replace(b"pi", b"po"), TOKEN.secret)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_as_letters(letter: bytes) -> None:
    for read in (read_request, read_grant):
        with pytest.raises(HedgerowError):
            read(letter, TOKEN.secret)


def test_a_letter_of_any_size_is_not_parsed() -> None:
    with pytest.raises(JoinRefused, match="too long"):
        read_request(vouched(Grant(authority="x" * 16_000), TOKEN.secret) * 10, TOKEN.secret)


def test_both_sides_come_to_the_same_keys_and_others_to_none() -> None:
    device, coordinator = bytes([1]) * 32, bytes([2]) * 32
    same = {
        "federation": "f",
        "name": "pi",
        "device": public_of(device),
        "coordinator": public_of(coordinator),
    }
    here = shared(device, public_of(coordinator), **same)
    there = shared(coordinator, public_of(device), **same)
    assert here == there
    assert len({here.seals.up, here.seals.down, here.box}) == 3
    assert shared(device, public_of(coordinator), **same | {"name": "po"}) != here
    box = Box(username="pi", password="secret")
    assert unboxed(boxed(box, here.box), there.box) == box
    with pytest.raises(JoinRefused, match="box"):
        unboxed(boxed(box, here.box), there.seals.up)
    with pytest.raises(JoinRefused):
        unboxed("zz", here.box)


def test_a_public_key_of_small_order_is_refused() -> None:
    with pytest.raises(JoinRefused, match="public key"):
        shared(bytes([1]) * 32, bytes(32), federation="f", name="n", device=b"", coordinator=b"")
