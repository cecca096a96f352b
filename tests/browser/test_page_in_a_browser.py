"""The page as people meet it: Chromium, a real coordinator, real agents, a real broker."""

from __future__ import annotations

import re
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from coordinator.web.pages.shell import PLACES
from tests.browser.conftest import PHONE, Reader, Watched
from tests.processes import AGENTS, until

pytestmark = [pytest.mark.broker, pytest.mark.slow]

WITHIN_MS = 60_000
RUN = "watched"
SECOND = "second"
PATHS = [place.path for place in PLACES] + [f"/fleet/{AGENTS[0]}", f"/runs/{RUN}/rounds/1"]
BUDGET_BYTES = 300_000
GRAVE = {"serious", "critical"}

every_page = pytest.mark.parametrize("path", PATHS)


def rounds_shown(page: Page) -> int:
    text = page.locator("#now-figures").inner_text()
    found = re.search(r"(\d+) of 500", text)
    assert found is not None, text
    return int(found[1])


def row(page: Page, agent: str) -> str:
    return page.locator("#fleet tr", has=page.get_by_role("link", name=agent, exact=True)).inner_text()


def held(page: Page) -> None:
    """Wait for the page to follow the coordinator."""
    expect(page.locator("#link")).to_have_text("live", timeout=WITHIN_MS)


@every_page
def test_a_page_keeps_the_laws_of_pages(reader: Reader, path: str) -> None:
    """Nothing grave for a checker of access, small, narrow enough for a phone, all of it by the Tab key."""
    page = reader.open(path)
    held(page)
    assert grave(page) == []
    assert 5_000 < weight(page) < BUDGET_BYTES
    wanted = page.evaluate(CONTROLS)
    reached = {number for number in (tabbed(page) for _ in range(wanted + 10)) if number is not None}
    assert len(reached) >= 0.9 * wanted, "rows come and go meanwhile"
    page.emulate_media(color_scheme="dark")
    assert grave(page) == []
    page.set_viewport_size(PHONE)
    until(lambda: page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], 10, 0.1)
    assert reader.complaints == []


def grave(page: Page) -> list[tuple[str, str, list[str]]]:
    """Return what axe-core calls serious or critical."""
    found = Axe().run(page).response["violations"]
    return [(v["id"], v["help"], [n["html"] for n in v["nodes"][:3]]) for v in found if v["impact"] in GRAVE]


def weight(page: Page) -> int:
    """Return the bytes of the page and of all it loads, without plotly's script."""
    sizes: list[list[Any]] = page.evaluate(SIZES)
    return sum(size for name, size in sizes if "plotly" not in name)


def tabbed(page: Page) -> int | None:
    """Press Tab; return the number of the control that has the focus now, which has to be seen there."""
    page.keyboard.press("Tab")
    told: list[Any] | None = page.evaluate(FOCUS)
    if told is None:
        return None
    assert told[1], "the focus is not seen"
    return int(told[0])


CONTROLS = """() => [...document.querySelectorAll("a[href], button, input, select, summary")]
  .filter((e) => e.checkVisibility() && !e.closest("dialog:not([open])")).length"""
SIZES = """() => ["navigation", "resource"].flatMap((kind) => performance.getEntriesByType(kind))
  .map((entry) => [entry.name, entry.decodedBodySize])"""
FOCUS = """() => {
  const it = document.activeElement;
  if (!it || it === document.body) return null;
  window.steps = window.steps || new Map();
  if (!steps.has(it)) steps.set(it, steps.size);
  const style = getComputedStyle(it);
  return [steps.get(it), style.outlineStyle !== "none" || style.boxShadow !== "none"];
}"""


def test_a_round_is_watched_without_loading_again(reader: Reader) -> None:
    page = reader.open("/")
    page.evaluate("window.untouched = true")
    first = rounds_shown(page)
    until(lambda: rounds_shown(page) > first + 1, 120, 0.1)
    assert page.evaluate("window.untouched"), "it followed events; nothing was loaded again"
    expect(page.locator("[data-chart=accuracy] .plot-container")).to_be_visible()
    assert reader.complaints == []


def test_a_lost_device_is_seen_and_so_is_its_return(reader: Reader, watched: Watched) -> None:
    page = reader.open("/")
    lost = AGENTS[2]
    until(lambda: "offline" not in row(page, lost), 30, 0.05)
    watched.processes.kill(lost)
    until(lambda: "offline" in row(page, lost), 15, 0.02)
    watched.processes.start_agent(lost)
    until(lambda: "offline" not in row(page, lost), 60, 0.05)
    assert reader.complaints == []


def test_a_coordinator_that_is_gone_is_said_and_found_again(reader: Reader, watched: Watched) -> None:
    page = reader.open("/")
    held(page)
    page.evaluate("window.untouched = true")
    watched.processes.kill("coordinator")
    expect(page.locator("#link")).to_contain_text("no connection", timeout=WITHIN_MS)
    reached = rounds_shown(page)
    watched.start()
    held(page)
    until(lambda: rounds_shown(page) > reached, 120, 0.1)
    assert page.evaluate("window.untouched"), "it came back by itself"


def test_a_run_is_stopped_by_the_keyboard_alone_and_asks_first(reader: Reader, watched: Watched) -> None:
    page = reader.open("/")
    page.get_by_role("button", name="Stop the run").focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert watched.api(f"runs/{RUN}")["state"] == "running", "asked, and left"
    page.keyboard.press("Enter")
    dialog.get_by_label("Why").focus()
    page.keyboard.type("seen enough")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden(timeout=WITHIN_MS)
    expect(page.locator("#now-head, #now-empty").first).to_contain_text(
        re.compile("stopped|No run"), timeout=WITHIN_MS
    )
    until(lambda: watched.api(f"runs/{RUN}")["state"] == "stopped", 60, 0.1)
    assert "seen enough" in watched.api(f"runs/{RUN}")["reason"]
    assert reader.complaints == []


def test_a_run_is_started_paused_and_resumed_from_the_page(reader: Reader, watched: Watched) -> None:
    page, slow = reader.open("/"), AGENTS[2]
    held(page)
    dialog, phase = page.get_by_role("dialog"), page.locator("#now-head .phase")
    watched.processes.pause(slow)  # so that the first round stays open
    page.get_by_role("button", name="Start a run").click()
    for label, value in {"Name": SECOND, "Rounds": "2", "Rounds between models": "1"}.items():
        dialog.get_by_label(label, exact=True).fill(value)
    dialog.get_by_role("button", name="Start it").click()
    expect(page.locator("#now-head h1")).to_have_text(SECOND, timeout=WITHIN_MS)
    page.get_by_role("button", name="Pause the run").click(timeout=WITHIN_MS)
    dialog.get_by_label("Why").fill("harvest")
    page.keyboard.press("Enter")
    expect(page.locator("#now-head")).to_contain_text("pauses when round 1 has ended: harvest")
    watched.processes.go_on(slow)
    expect(phase).to_have_text("paused", timeout=WITHIN_MS)
    assert watched.api(f"runs/{SECOND}")["state"] == "paused"
    page.get_by_role("button", name="Resume the run").click()
    dialog.get_by_role("button", name="Resume it").click()
    expect(phase).to_have_text("finished", timeout=WITHIN_MS)
    assert [r["updates"] for r in watched.api(f"runs/{SECOND}/rounds")["items"]] == [3, 3]
    assert reader.complaints == []


def test_a_model_is_rolled_back_and_another_pinned_from_the_devices_page(reader: Reader) -> None:
    page = reader.open("/fleet")
    dialog = page.get_by_role("dialog")
    page.get_by_role("link", name=AGENTS[0], exact=True).click()
    expect(page.locator("h1")).to_have_text(AGENTS[0])
    expect(page.locator("#device-made tbody tr")).to_have_count(2, timeout=WITHIN_MS)
    page.get_by_role("button", name="Roll back").click()
    dialog.get_by_role("button", name="Roll back").click()
    expect(dialog.get_by_role("status")).to_contain_text("no model serves on it: name one")
    for verb, button, number, answer in (
        ("rollback", "Roll back", 2, "serves again"),
        ("pin", "Pin it", 1, "pinned round 1"),
    ):
        if verb == "pin":
            page.get_by_role("button", name="Pin a model").click()
        option = dialog.locator("option", has_text=f"round {number},")
        dialog.get_by_label("Model").select_option(option.get_attribute("value"))
        dialog.get_by_label("Why").fill("wrong at night")
        dialog.get_by_role("button", name=button).click()
        expect(dialog).to_be_hidden()
        newest = page.locator("#device-orders li").first
        expect(newest).to_contain_text(re.compile(f"{verb} .*, done: .*{answer}"), timeout=WITHIN_MS)
    expect(page.locator("#device-made")).to_contain_text("rolled back")
    (complaint,) = reader.complaints
    assert "409" in complaint, "the browser's own word for the order that could not be"
