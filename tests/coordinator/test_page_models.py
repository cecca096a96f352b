"""The models of all devices, in pages, and how far the rings are."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from coordinator.store.rollouts import Member
from coordinator.web.pages.models import Ring, rings
from tests.coordinator.filled_store import a_manifest
from tests.coordinator.visiting import Visit, read


def test_rings_count_who_serves() -> None:
    members = [
        Member("r", 2, "a", 0, "serving", "", None, 0.0),
        Member("r", 2, "b", 1, "refused", "", None, 0.0),
        Member("r", 2, "c", 1, "serving", "", None, 0.0),
        Member("r", 2, "d", 2, "waiting", "", None, 0.0),
    ]
    assert rings(members, 1) == [Ring(1, 1, 1, True), Ring(2, 1, 2, True), Ring(3, 0, 1, False)]
    assert rings([], 0) == []


@pytest.mark.anyio
async def test_rings_are_let_go_and_stopped_by_dialogs_and_who_fell_is_named(filled: Visit) -> None:
    filled.store.begin_rollout("greenhouse-1", 5, [["jetson-barn"], ["pi-kitchen", "pi-greenhouse"]])
    first = next(m for m in filled.store.members("greenhouse-1", 5) if m.ring == 0)
    filled.store.change_member(replace(first, state="rolled_back", reason="slower than before"))
    page = await filled.get("/models")
    told = read(page)
    assert "Ring 1 0 of 1 serve it" in told
    assert "Ring 2 0 of 2 serve it, not let go yet" in told
    assert "jetson-barn , ring 1: rolled back: slower than before" in told
    assert re.findall(r'data-send="POST /api/v1/rollouts/(\w+)"', page) == ["go", "stop"]
    (rollout,) = filled.store.rollouts()
    filled.store.change_rollout(replace(rollout, state="stopped", reason="enough"))
    page = await filled.get("/parts/models")
    assert "Stopped: enough" in read(page)
    assert "data-send" not in page


@pytest.mark.anyio
async def test_older_models_are_on_further_pages(visit: Visit) -> None:
    for number in range(1, 106):
        visit.store.add_artifact(a_manifest(0, number))
    seen: list[str] = []
    for address in ("/models", "/models?after=100"):
        page = await visit.get(address)
        seen += re.findall(r'data-label="Round" class="number">(\d+)<', page)
        assert ('href="/models?after=100"' in page) == (address == "/models")
        assert f'data-part="{address.replace("/models", "/parts/models")}"' in page
    assert seen == [str(number) for number in range(105, 0, -1)]
    assert "There are no older ones" in read(await visit.get("/models?after=500"))
