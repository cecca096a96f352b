"""What Home Assistant is told: by its own rules, at a bounded rate, and taken back when it should be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jinja2 import TemplateSyntaxError

from coordinator import home_today
from coordinator.home_assistant import HomeAssistant
from coordinator.home_discovery import (
    AGENT_SENSORS,
    COORDINATOR_SENSORS,
    agent_config,
    agent_state,
    config_topic,
    coordinator_config,
    object_id,
)
from coordinator.live import AgentStatus, Live
from coordinator.settings import CoordinatorSettings, HomeAssistantSettings
from coordinator.store.sql import Store
from foundation import settings
from foundation.artifact import Manifest
from foundation.energy import Kind, Stage
from foundation.errors import SettingsError
from foundation.messages import AgentCard, Presence, Telemetry
from foundation.topics import NAME, Topics
from foundation.transport import MemoryBroker, MemoryTransport
from tests.coordinator.filled_store import Clock, a_manifest
from tests.doubles import FaultyTransport
from tests.home import Home, check_announcement

pytestmark = pytest.mark.anyio
TOPICS = Topics("test")
NOON = datetime(2026, 3, 2, 12).timestamp()
NAMES = st.from_regex(NAME, fullmatch=True)
SECONDS = 10.0


@dataclass
class House:
    """A coordinator's picture, the task under test, and a Home Assistant at the same broker."""

    folder: Path
    store: Store
    live: Live
    clock: Clock
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    federation: str = "test"
    prefix: str = "homeassistant"

    def __post_init__(self) -> None:
        self.wire = FaultyTransport(MemoryTransport(self.broker))

    def task(self, **changes: Any) -> HomeAssistant:
        mine = {"enabled": True, "prefix": self.prefix, "every_s": SECONDS, **changes}
        told = CoordinatorSettings(
            federation=self.federation, folder=self.folder, home_assistant=HomeAssistantSettings(**mine)
        )
        return HomeAssistant(
            told,
            transport=self.wire,
            store=self.store,
            live=self.live,
            clock=self.clock,
            monotonic=self.clock,
        )

    async def seen(self) -> Home:
        """Return what a Home Assistant shows that starts now: from retained letters alone."""
        home = Home(self.prefix)
        async with MemoryTransport(self.broker) as reader:
            letters = await reader.subscribe("#")
            for _ in range(len(self.broker.retained)):
                home.hear(await anext(letters))
        return home

    def introduce(self, agent: str, kind: str = "measured", source: str = "plug") -> None:
        card = AgentCard(
            agent=agent,
            version="0.1.0",
            profile="raspberry-pi-5",
            examples=9,
            energy_kind=kind,
            energy_source=source,
        )
        self.live.card(card)
        self.live.presence(agent, online=True)
        self.broker.deliver(TOPICS.of(agent, "presence"), presence("online"), retain=True)

    def tell(self, agent: str, **figures: Any) -> None:
        kind = figures.pop("energy_kind", "measured")
        self.live.telemetry(Telemetry(agent=agent, stage=Stage.TRAIN, energy_kind=kind, **figures))

    def published(self, topic: str) -> int:
        return sum(told == topic for told, _ in self.wire.log)


def manifest(agent: str, round: int) -> Manifest:
    return a_manifest(0, round).model_copy(update={"agent": agent})


def presence(state: Any) -> bytes:
    return Presence(state=state).model_dump_json().encode()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    clock = Clock()
    clock.now = NOON
    with Store.open(tmp_path) as store:
        async with Live(store, clock=clock, monotonic=clock) as live:
            here = House(tmp_path, store, live, clock)
            here.broker.deliver(TOPICS.coordinator_presence, presence("online"), retain=True)
            async with here.wire:
                yield here


@asynccontextmanager
async def running(task: HomeAssistant) -> AsyncIterator[None]:
    job = asyncio.create_task(task.run())
    try:
        yield
    finally:
        job.cancel()
        await asyncio.wait([job])
        if not job.cancelled():
            job.result()


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


# --- announcements -----------------------------------------------------------------------------------


@given(federation=NAMES, agent=NAMES)
def test_any_name_is_announced_by_the_rules(federation: str, agent: str) -> None:
    topics = Topics(federation)
    for status in (AgentStatus(agent=agent), AgentStatus(agent=agent, profile="pi", version="0.1.0")):
        check_announcement("ha", config_topic("ha", federation, agent), agent_config(topics, status))
    check_announcement("ha/x", config_topic("ha/x", federation), coordinator_config(topics))


@given(st.tuples(NAMES, st.none() | NAMES), st.tuples(NAMES, st.none() | NAMES))
def test_no_two_devices_have_one_id(one: tuple[str, str | None], other: tuple[str, str | None]) -> None:
    assume(one != other)
    assert object_id(*one) != object_id(*other)


def test_ids_that_look_alike_are_not() -> None:
    alike = [
        ("a", "b.c"),
        ("a", "b_c"),
        ("a.b", "c"),
        ("a_b", "c"),
        ("a", "b-c"),
        ("a_b_c", None),
        ("a", "b__c"),
    ]
    assert len({object_id(*names) for names in alike}) == len(alike)
    ids = [
        f"{object_id(*names)}_{sensor.key}"
        for names in alike
        for sensor in (COORDINATOR_SENSORS if names[1] is None else AGENT_SENSORS)
    ]
    assert len({*ids}) == len(ids)


@pytest.mark.parametrize(
    "change",
    [
        {"device_class": "energy"},  # W is no unit of energy
        {"state_class": "total"},  # of power
        {"unit_of_measurement": "J"},
        {"last_reset_value_template": "{{ value_json.x }}"},  # not of a measurement
        {"options": ["a"]},
        {"object_id": "x"},  # no key any more: Home Assistant would drop it
        {"value_template": "{{ value_json.watts"},
        {"entity_category": "config"},
    ],
)
def test_the_rules_refuse_what_home_assistant_does(change: dict[str, Any]) -> None:
    config = agent_config(TOPICS, AgentStatus(agent="pi"))
    check_announcement("ha", config_topic("ha", "test", "pi"), config)
    config["components"]["watts"] |= change
    with pytest.raises((AssertionError, TemplateSyntaxError)):
        check_announcement("ha", config_topic("ha", "test", "pi"), config)


def test_every_value_that_is_read_is_written() -> None:
    state = agent_state(AgentStatus(agent="pi"), None, None)
    assert {sensor.key for sensor in AGENT_SENSORS} | {"joules_since", "joules_about"} == state.keys()


def test_yes_alone_turns_it_on(tmp_path: Path) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_text("home_assistant = true\n")
    loaded, origins = settings.load(CoordinatorSettings, file)
    assert loaded.home_assistant == HomeAssistantSettings(enabled=True)
    assert origins["home_assistant.enabled"] == str(file)
    assert settings.load(CoordinatorSettings, None, {}, ["home_assistant=true"])[0].home_assistant.enabled
    assert not CoordinatorSettings().home_assistant.enabled
    with pytest.raises(SettingsError, match=r"home_assistant\.prefix"):
        settings.load(CoordinatorSettings, None, {}, ["home_assistant.prefix=home/#"])


# --- values ------------------------------------------------------------------------------------------


async def test_a_device_with_all_its_values(house: House) -> None:
    task = house.task()
    house.introduce("pi")
    house.tell("pi", joules=100.0, watts=4.25, run="r", round=2, accuracy=0.875)
    await task.tick()
    house.clock.now += SECONDS
    house.tell("pi", joules=142.5, watts=4.25, run="r", round=2, accuracy=0.875)
    house.store.add_artifact(manifest("pi", round=2))
    house.live.phase("r", 2, 5, "collecting")
    await task.tick()
    home = await house.seen()
    assert home.devices["pi"].available
    assert home.devices["pi"].config["device"]["model"] == "raspberry-pi-5"
    values = {key: entity.value for key, entity in home.devices["pi"].entities.items()}
    assert values == {
        "watts": "4.25",
        "joules_today": "42.5",
        "round": "2",
        "accuracy": "87.5",
        "model": None,  # it was looked for before it was there
        "energy_kind": "measured",
    }
    energy = home.devices["pi"].entities["joules_today"]
    assert energy.attributes == {"kind": "measured", "source": "plug", "counted_s": SECONDS}
    assert energy.last_reset is not None
    assert energy.last_reset.timestamp() == NOON
    middle = home.devices["Hedgerow test"]
    assert {key: entity.value for key, entity in middle.entities.items()} == {
        "run": "r",
        "round": "2",
        "phase": "collecting",
        "agents": "1",
    }


async def test_a_new_model_is_shown_after_its_update(house: House) -> None:
    house.introduce("pi")
    async with running(house.task()):
        await until(lambda: TOPICS.home("pi") in house.broker.retained)
        sent = manifest("pi", round=3)
        house.store.add_artifact(sent)
        house.live.emit("update", "pi: accuracy 0.9", run=sent.run, round=3, agent="pi")
        await house.live.flush()
        house.clock.now += SECONDS
        await until(lambda: house.published(TOPICS.home("pi")) > 1)
    home = await house.seen()
    assert home.value("pi", "model") == f"{sent.run}/3 {sent.sha256[:12]}"


async def test_what_nobody_knows_is_unknown_and_not_zero(house: House) -> None:
    task = house.task()
    house.introduce("pi", "none", "none")
    house.tell("pi", energy_kind="none")
    await task.tick()
    home = await house.seen()
    unknown = ("watts", "joules_today", "accuracy", "round", "model")
    assert [home.value("pi", key) for key in unknown] == [None] * len(unknown)
    assert home.value("pi", "energy_kind") == "none"
    assert home.devices["pi"].entities["joules_today"].last_reset is None


async def test_joules_that_became_unknown_are_not_shown_as_if_they_went_on(house: House) -> None:
    task = house.task()
    house.introduce("pi")
    for joules in (10.0, 15.0, None):
        house.tell("pi", joules=joules)
        await task.tick()
        house.clock.now += SECONDS
    assert (await house.seen()).value("pi", "joules_today") is None
    house.tell("pi", joules=2.0)  # its program was started again
    await task.tick()
    assert (await house.seen()).value("pi", "joules_today") == "7.0"


async def test_a_meter_that_becomes_another_begins_a_new_count(house: House) -> None:
    task = house.task()
    house.introduce("pi")
    for joules in (10.0, 15.0):
        house.tell("pi", joules=joules)
        await task.tick()
        house.clock.now += SECONDS
    house.introduce("pi", "modelled", "utilisation")
    house.tell("pi", joules=1.0, energy_kind="modelled")
    await task.tick()
    entity = (await house.seen()).devices["pi"].entities["joules_today"]
    assert (entity.value, entity.attributes["kind"]) == ("0.0", "modelled")
    assert entity.last_reset is not None
    assert entity.last_reset.timestamp() == house.clock.now


async def test_states_are_rare_and_only_news(house: House) -> None:
    task = house.task()
    house.introduce("pi")
    house.introduce("still")
    for second in range(100):
        house.tell("pi", joules=float(second), watts=1.0)
        await task.tick()
        house.clock.now += 1
    assert house.published(TOPICS.home("pi")) == 100 / SECONDS
    assert house.published(TOPICS.home("still")) == 1
    assert house.published(config_topic("homeassistant", "test", "pi")) == 1


async def test_a_device_that_was_never_here_is_not_announced(house: House) -> None:
    house.live.card(AgentCard(agent="old", version="1", profile="pi", examples=1))
    await house.task().tick()
    assert set((await house.seen()).devices) == {"Hedgerow test"}


async def test_available_only_while_agent_and_coordinator_are(house: House) -> None:
    house.introduce("pi")
    await house.task().tick()
    for topic in (TOPICS.of("pi", "presence"), TOPICS.coordinator_presence):
        assert (await house.seen()).devices["pi"].available
        house.broker.deliver(topic, presence("offline"), retain=True)
        assert not (await house.seen()).devices["pi"].available
        house.broker.deliver(topic, presence("online"), retain=True)
    house.broker.deliver(TOPICS.of("pi", "presence"), presence("offline"), retain=True)
    assert (await house.seen()).devices["Hedgerow test"].available


async def test_a_device_that_is_offline_has_no_power(house: House) -> None:
    task = house.task()
    house.introduce("pi")
    house.tell("pi", joules=1.0, watts=4.0)
    await task.tick()
    house.live.presence("pi", online=False)
    house.clock.now += SECONDS
    await task.tick()
    assert (await house.seen()).value("pi", "watts") is None


async def test_the_same_number_again_is_no_seconds(house: House) -> None:
    """A device that is away keeps its last figure in the picture; that hour is not counted as 0 J."""
    task = house.task()
    house.introduce("pi")
    house.tell("pi", joules=1.0)
    await task.tick()
    house.live.presence("pi", online=False)
    for _ in range(6):
        house.clock.now += 600
        await task.tick()
    house.introduce("pi")
    house.tell("pi", joules=2.0)
    await task.tick()
    entity = (await house.seen()).devices["pi"].entities["joules_today"]
    assert (entity.value, entity.attributes["counted_s"]) == ("1.0", 3600)


# --- restarts, brokers, the end ------------------------------------------------------------------------


async def test_a_day_goes_on_after_a_kill(house: House) -> None:
    shown = []
    for joules in (10.0, 30.0, 31.0, 2.0, 2.5):
        house.introduce("pi")
        house.tell("pi", joules=joules)
        async with running(house.task()):  # a new life each time; nothing is said on the way out
            await until(lambda: house.published(TOPICS.home("pi")) > len(shown))
        assert _kept(house.folder).told == joules
        shown.append(float((await house.seen()).value("pi", "joules_today") or -1))
        house.clock.now += SECONDS
    assert shown == [0.0, 20.0, 21.0, 23.0, 23.5]


def _kept(folder: Path) -> Any:
    memory = home_today.read(folder)
    return memory.devices["pi"].day if memory else None


async def test_a_number_is_on_disk_before_it_is_shown(house: House) -> None:
    task = house.task()
    house.introduce("pi")
    house.tell("pi", joules=5.0)
    await task.tick()
    house.clock.now += SECONDS
    house.tell("pi", joules=9.0)
    at_publish = []
    house.wire.edit = lambda topic, body: (at_publish.append(_kept(house.folder).joules), [body])[1]
    await task.tick()
    assert at_publish
    assert set(at_publish) == {4.0}


async def test_a_broker_that_is_away_is_told_later(house: House, caplog: pytest.LogCaptureFixture) -> None:
    task = house.task()
    house.introduce("pi")
    house.wire.offline = True
    for _ in range(3):
        await task.tick()
    assert not (await house.seen()).devices
    assert caplog.text.count("Home Assistant not told") == 1
    house.wire.offline = False
    await task.tick()
    assert set((await house.seen()).devices) == {"pi", "Hedgerow test"}


async def test_a_folder_that_is_full_is_said_and_the_states_go_on(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    task = house.task()
    house.introduce("pi")
    full = house.folder / "full"
    full.write_bytes(b"")  # a file where a folder would have to be: nothing can be kept in it
    house.folder = full
    broken = house.task()
    await broken.tick()
    assert "joules of today are not kept" in caplog.text
    assert "pi" in (await house.seen()).devices
    assert task is not broken


async def test_a_device_long_away_is_taken_out_and_comes_back(house: House) -> None:
    task = house.task(forget_days=2)
    house.introduce("pi")
    await task.tick()
    house.live.presence("pi", online=False)
    house.clock.now += 86_400
    await task.tick()
    assert "pi" in (await house.seen()).devices
    house.clock.now += 2 * 86_400
    await task.tick()
    assert set((await house.seen()).devices) == {"Hedgerow test"}
    assert TOPICS.home("pi") not in house.broker.retained
    house.live.presence("pi", online=True)
    house.clock.now += SECONDS
    await task.tick()
    assert "pi" in (await house.seen()).devices


async def test_turned_off_nothing_is_left(house: House) -> None:
    house.introduce("pi")
    async with running(house.task()):
        await until(lambda: TOPICS.home("pi") in house.broker.retained)
    await house.task(enabled=False).run()
    assert not (await house.seen()).devices
    assert {*house.broker.retained} == {TOPICS.of("pi", "presence"), TOPICS.coordinator_presence}
    assert not (house.folder / home_today.FILE).exists()
    told = len(house.wire.log)
    await house.task(enabled=False).run()
    assert len(house.wire.log) == told, "what was never told is not taken back"


async def test_another_prefix_leaves_nothing_under_the_old_one(house: House) -> None:
    house.introduce("pi")
    house.tell("pi", joules=1.0)
    async with running(house.task()):
        await until(lambda: TOPICS.home("pi") in house.broker.retained)
    house.prefix = "other"
    house.clock.now += SECONDS
    house.tell("pi", joules=3.0)
    async with running(house.task()):
        topic = config_topic("other", "test", "pi")
        await until(lambda: {topic, TOPICS.home("pi")} <= house.broker.retained.keys())
    assert not [topic for topic in house.broker.retained if topic.startswith("homeassistant/")]
    assert (await house.seen()).value("pi", "joules_today") == "2.0"
    kept = home_today.read(house.folder)
    assert kept is not None
    assert kept.prefix == "other"


async def test_kinds_of_energy_are_those_that_home_assistant_may_show(house: House) -> None:
    task = house.task()
    for kind in Kind:
        house.introduce(f"pi-{kind}", kind.value, "x")
    await task.tick()
    home = await house.seen()
    assert {home.value(f"pi-{kind}", "energy_kind") for kind in Kind} == {kind.value for kind in Kind}
