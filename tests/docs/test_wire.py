"""docs/wire.md names every topic, and its numbers are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from foundation import codec, messages, topics, transfer
from foundation.codec import Limits

PAGE = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
TOPICS = re.findall(rf"^({re.escape(topics.ROOT)}/\S+)", topics.__doc__ or "", re.MULTILINE)


def test_the_page_is_short_and_the_code_lists_its_topics() -> None:
    assert len(PAGE.splitlines()) < 240
    assert len(TOPICS) >= 10


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_is_on_the_page(topic: str) -> None:
    branch, _, word = topic.partition("/agents/{agent}/")
    row = f"`…/agents/{{agent}}/{word}`" if word else f"`{branch}`"
    assert re.search(rf"^\| {re.escape(row)} \|", PAGE, re.MULTILINE)


def test_no_topic_on_the_page_is_unknown() -> None:
    known = {topic.rpartition("/")[2] for topic in TOPICS}
    assert set(re.findall(r"^\| `\S*/(\w+)` \|", PAGE, re.MULTILINE)) == known


@pytest.mark.parametrize(
    "fact",
    [
        f"`{codec.MAGIC.decode()}`",
        f"`{transfer.MAGIC.decode()}`",
        f"{transfer.PART_HEADER.size} bytes",
        f"{transfer.MAX_PARTS:,} parts",
        f"{transfer.RECEIPT_BYTES:,} bytes",
        f"{Limits().frame_bytes // 2**20} MiB",
        f"{Limits().header_bytes // 2**20} MiB",
        f"{Limits().arrays:,} arrays",
        f"protocol {messages.PROTOCOL}",
    ],
)
def test_numbers_are_those_of_the_code(fact: str) -> None:
    assert fact in PAGE


@pytest.mark.parametrize(
    "kind",
    [
        *("AgentCard", "Presence", "Assignment", "Update", "Refusal", "Telemetry", "Command"),
        *("Question", "Answer", "LivePrediction", "ClockQuestion", "ClockAnswer"),
    ],
)
def test_every_message_is_on_the_page(kind: str) -> None:
    assert hasattr(messages, kind)
    assert f"`{kind}`" in PAGE
