"""A Home Assistant for tests: checks announcements by its published rules, and follows topics as it does.

The rules are facts of Home Assistant's own source, in our words (github.com/home-assistant/core, folder
homeassistant/): `components/mqtt/schemas.py` (DEVICE_DISCOVERY_SCHEMA, device, origin, availability),
`components/mqtt/sensor.py` (keys of a sensor; `options`, `last_reset_value_template`; what a value becomes),
`components/mqtt/discovery.py` (the topic; an empty message removes), `components/sensor/const.py` (units and
state classes of device classes), `const.py` (units; 255 characters of a state); and of the pages
integrations/mqtt and integrations/sensor.mqtt of home-assistant.io.
Home Assistant drops keys that it does not know without a word, so here they are an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from foundation.transport import Letter

Json = dict[str, Any]

TOPIC = re.compile(r"(?P<component>\w+)/(?:[a-zA-Z0-9_-]+/)?(?P<object_id>[a-zA-Z0-9_-]+)/config")
AVAILABILITY = {"availability", "availability_mode"}
DEVICE_KEYS = {
    *("identifiers", "connections", "manufacturer", "model", "model_id", "name", "hw_version", "sw_version"),
    *("serial_number", "via_device", "suggested_area", "configuration_url"),
}
ORIGIN_KEYS = {"name", "sw_version", "support_url"}
ROOT_KEYS = {
    "device",
    "origin",
    "components",
    "state_topic",
    "command_topic",
    "qos",
    "encoding",
} | AVAILABILITY
SENSOR_KEYS = AVAILABILITY | {
    *("platform", "unique_id", "name", "icon", "entity_category", "enabled_by_default", "default_entity_id"),
    *(
        "state_topic",
        "value_template",
        "qos",
        "encoding",
        "json_attributes_topic",
        "json_attributes_template",
    ),
    *("device_class", "state_class", "unit_of_measurement", "suggested_display_precision", "options"),
    *("last_reset_value_template", "expire_after", "force_update"),
}
UNITS = {
    "power": {"mW", "W", "kW", "MW", "GW", "TW", "BTU/h"},
    "energy": {
        *("J", "kJ", "MJ", "GJ", "mWh", "Wh", "kWh", "MWh", "GWh", "TWh"),
        *("cal", "kcal", "Mcal", "Gcal"),
    },
    "enum": {None},
}
STATE_CLASSES = {"power": {"measurement"}, "energy": {"total", "total_increasing"}, "enum": {None}}
NUMERIC = ("device_class", "state_class", "unit_of_measurement", "suggested_display_precision")
LONGEST_STATE = 255
ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
"""Home Assistant would write an undefined value as nothing and warn; here it is an error."""


def check_announcement(prefix: str, topic: str, payload: Json) -> None:
    """Raise `AssertionError` for what Home Assistant would not take, or not as meant."""
    place = TOPIC.fullmatch(topic.removeprefix(f"{prefix}/"))
    assert place, f"{topic} is no discovery topic"
    assert place["component"] == "device"
    assert payload.keys() <= ROOT_KEYS
    assert payload.keys() >= {"device", "origin", "components"}
    device = payload["device"]
    assert device.keys() <= DEVICE_KEYS
    assert device.get("identifiers") or device.get("connections")
    assert all(
        isinstance(value, str) for key, value in device.items() if key not in ("identifiers", "connections")
    )
    assert payload["origin"].keys() <= ORIGIN_KEYS
    assert payload["origin"]["name"]
    assert payload.get("qos", 0) in (0, 1, 2)
    assert payload.get("availability_mode", "latest") in ("all", "any", "latest")
    for one in payload.get("availability", []):
        assert one.keys() <= {"topic", "payload_available", "payload_not_available", "value_template"}
        assert is_topic(one["topic"])
        ENVIRONMENT.parse(one.get("value_template", ""))
    assert payload["components"]
    for sensor in payload["components"].values():
        check_sensor({"state_topic": payload.get("state_topic"), **sensor})
    ids = [sensor["unique_id"] for sensor in payload["components"].values()]
    assert len({*ids}) == len(ids)


def check_sensor(sensor: Json) -> None:
    assert sensor.keys() <= SENSOR_KEYS
    assert sensor["platform"] == "sensor"
    assert sensor["unique_id"]
    assert is_topic(sensor["state_topic"])
    assert isinstance(sensor["name"], str)
    assert sensor.get("entity_category") in (None, "diagnostic"), "a sensor is never `config`"
    assert re.fullmatch(r"[\w-]+:[\w-]+", sensor.get("icon", "mdi:x"))
    for key in ("value_template", "last_reset_value_template", "json_attributes_template"):
        ENVIRONMENT.parse(sensor.get(key, ""))
    kind, state, unit = (sensor.get(key) for key in ("device_class", "state_class", "unit_of_measurement"))
    assert state in (None, "measurement", "total", "total_increasing")
    if kind is not None:
        assert unit in UNITS[kind]
        assert state in STATE_CLASSES[kind]
    if "last_reset_value_template" in sensor:
        assert state == "total"
    if "options" in sensor:
        assert kind == "enum"
        assert sensor["options"]
        assert (state, unit) == (None, None)
    if "json_attributes_template" in sensor:
        assert is_topic(sensor["json_attributes_topic"])


def is_topic(topic: object) -> bool:
    return isinstance(topic, str) and bool(topic) and not set(topic) & {"+", "#", "\0"}


@dataclass
class Entity:
    """One sensor: what was announced, and what became of its topics. `None` is `unknown`."""

    config: Json
    value: str | None = None
    attributes: Json = field(default_factory=dict)
    last_reset: datetime | None = None
    history: list[tuple[datetime | None, str | None]] = field(default_factory=list)

    def hear(self, body: bytes) -> None:
        said = json.loads(body)
        value = _rendered(self.config["value_template"], said)
        self.value = None if value == "None" else self._checked(value)
        if template := self.config.get("last_reset_value_template"):
            reset = _rendered(template, said)
            self.last_reset = datetime.fromisoformat(reset) if reset else self.last_reset
            assert not reset or self.last_reset.tzinfo, (
                "without a zone it would be taken as UTC or local by chance"
            )
        if template := self.config.get("json_attributes_template"):
            self.attributes = json.loads(_rendered(template, said))
            assert isinstance(self.attributes, dict)
        self.history.append((self.last_reset, self.value))

    def _checked(self, value: str) -> str:
        if any(key in self.config for key in NUMERIC) and self.config.get("device_class") != "enum":
            float(value)  # Home Assistant raises for anything else
        assert value in self.config.get("options", [value])
        assert len(value) <= LONGEST_STATE
        return value


@dataclass
class Device:
    """What one discovery message has made."""

    config: Json
    entities: dict[str, Entity]
    presences: dict[str, bool]

    @property
    def available(self) -> bool:
        assert self.config["availability_mode"] == "all"
        return all(self.presences.values())


@dataclass
class Home:
    """Devices by the name that people see; feed it letters in any order that a broker may choose."""

    prefix: str = "homeassistant"
    devices: dict[str, Device] = field(default_factory=dict)
    _by_topic: dict[str, str] = field(default_factory=dict)
    heard: dict[str, bytes] = field(default_factory=dict)
    """The last body of every topic but announcements."""

    def hear(self, letter: Letter) -> None:
        """Take one letter."""
        if letter.topic.startswith(f"{self.prefix}/"):
            self._discover(letter.topic, letter.body)
            return
        self.heard[letter.topic] = letter.body
        for device in self.devices.values():
            self._follow(device, letter.topic, letter.body)

    def value(self, device: str, sensor: str) -> str | None:
        """Return what is shown, `None` for unknown."""
        return self.devices[device].entities[sensor].value

    def _discover(self, topic: str, body: bytes) -> None:
        if not body:
            self.devices.pop(self._by_topic.pop(topic, ""), None)
            return
        config = json.loads(body)
        check_announcement(self.prefix, topic, config)
        name = config["device"]["name"]
        old = self.devices.get(name)
        entities = {key: Entity(sensor) for key, sensor in config["components"].items()}
        for key, entity in entities.items():
            if old is not None:
                entity.history = old.entities[key].history
        presences = {one["topic"]: False for one in config["availability"]}
        device = self.devices[name] = Device(config, entities, presences)
        self._by_topic[topic] = name
        for known, last in self.heard.items():  # it subscribes now, and the broker hands out what is retained
            self._follow(device, known, last)

    def _follow(self, device: Device, topic: str, body: bytes) -> None:
        for one in device.config["availability"]:
            if one["topic"] == topic and body:
                said = _rendered(one["value_template"], json.loads(body))
                assert said in ("online", "offline")
                device.presences[topic] = said == "online"
        if topic == device.config["state_topic"] and body:
            for entity in device.entities.values():
                entity.hear(body)


def _rendered(template: str, said: Mapping[str, Any]) -> str:
    return ENVIRONMENT.from_string(template).render(value_json=said)
