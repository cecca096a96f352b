"""What Home Assistant is told to expect: one discovery message per device, and what its states look like.

One message holds all sensors of a device (`<prefix>/device/<id>/config`; Home Assistant 2024.12 or newer):
what they share is said once, they appear and go together, and one empty message removes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, get_args

from coordinator.home_today import Day
from coordinator.live import AgentStatus, Phase, Status
from foundation.artifact import Manifest
from foundation.energy import Kind
from foundation.topics import Topics

Json = dict[str, Any]
QOS = 1
ONLINE = "{{ value_json.state }}"
"""Of a `Presence`, which says `online` or `offline`: what Home Assistant expects by default."""


@dataclass(frozen=True, slots=True)
class Sensor:
    """One entity: its key in the state, its name to people, and what Home Assistant should know of it."""

    key: str
    name: str
    more: Mapping[str, Any]


AGENT_SENSORS = (
    Sensor(
        "watts",
        "Power",
        {
            "device_class": "power",
            "state_class": "measurement",
            "unit_of_measurement": "W",
            "suggested_display_precision": 2,
        },
    ),
    Sensor(
        "joules_today",
        "Energy today",
        {
            "device_class": "energy",
            "state_class": "total",
            "unit_of_measurement": "J",
            "suggested_display_precision": 1,
            # Nothing rather than null where nobody knows: Home Assistant warns of a date that is none.
            "last_reset_value_template": "{{ value_json.joules_since or '' }}",
            "json_attributes_template": "{{ value_json.joules_about | tojson }}",
        },
    ),
    Sensor("round", "Round", {"state_class": "measurement", "icon": "mdi:counter"}),
    Sensor(
        "accuracy",
        "Accuracy",
        {
            "state_class": "measurement",
            "unit_of_measurement": "%",
            "suggested_display_precision": 1,
            "icon": "mdi:bullseye-arrow",
        },
    ),
    Sensor("model", "Model", {"entity_category": "diagnostic", "icon": "mdi:brain"}),
    Sensor(
        "energy_kind",
        "Energy kind",
        {
            "device_class": "enum",
            "options": [kind.value for kind in Kind],
            "entity_category": "diagnostic",
            "icon": "mdi:scale-balance",
        },
    ),
)
COORDINATOR_SENSORS = (
    Sensor("run", "Run", {"icon": "mdi:play-circle-outline"}),
    Sensor("round", "Round", {"state_class": "measurement", "icon": "mdi:counter"}),
    Sensor(
        "phase",
        "Phase",
        {"device_class": "enum", "options": [*get_args(Phase)], "icon": "mdi:progress-clock"},
    ),
    Sensor("agents", "Agents online", {"state_class": "measurement", "icon": "mdi:devices"}),
)


def object_id(federation: str, agent: str | None = None) -> str:
    """Return the id of a device, or of the coordinator: letters, digits, `_` and `-`, no two alike.

    Names may hold dots, ids may not: `.` is written `_-` and `_` is written `__`, so that a single `_` before
    a letter or digit stands between the parts only.
    """
    parts = ("hedgerow", federation) if agent is None else ("hedgerow", federation, agent)
    return "_".join(part.replace("_", "__").replace(".", "_-") for part in parts)


def config_topic(prefix: str, federation: str, agent: str | None = None) -> str:
    """Return where a device is announced, retained; an empty message there removes it."""
    return f"{prefix}/device/{object_id(federation, agent)}/config"


def agent_config(topics: Topics, status: AgentStatus) -> Json:
    """Return the announcement of a device: there while both its agent and the coordinator are."""
    return _config(
        object_id(topics.federation, status.agent),
        {"name": status.agent, "model": status.profile, "sw_version": status.version},
        AGENT_SENSORS,
        topics.home(status.agent),
        [topics.of(status.agent, "presence"), topics.coordinator_presence],
    )


def coordinator_config(topics: Topics) -> Json:
    """Return the announcement of the coordinator, a device of its own."""
    return _config(
        object_id(topics.federation),
        {
            "name": f"Hedgerow {topics.federation}",
            "model": "coordinator",
            "sw_version": version("hedgerow"),
        },
        COORDINATOR_SENSORS,
        topics.coordinator_state,
        [topics.coordinator_presence],
    )


def agent_state(status: AgentStatus, day: Day | None, model: str | None) -> Json:
    """Return the values of a device; `None` is unknown to Home Assistant. `day` is today's.

    Joules whose kind is not known any more are not shown: they are of a part of the day that nobody knows.
    """
    known = day if day is not None and status.joules is not None else None
    about: Json = {"kind": status.energy_kind.value, "source": status.energy_source}
    if known is not None:
        about = {"kind": known.kind.value, "source": known.source, "counted_s": round(known.seconds)}
    return {
        "watts": None if status.watts is None else round(status.watts, 3),
        "joules_today": None if known is None else round(known.joules, 3),
        "joules_since": None if known is None else datetime.fromtimestamp(known.since, UTC).isoformat(),
        "joules_about": about,
        "round": status.round,
        "accuracy": None if status.accuracy is None else round(100 * status.accuracy, 3),
        "model": model,
        "energy_kind": status.energy_kind.value,
    }


def coordinator_state(status: Status) -> Json:
    """Return the values of the coordinator."""
    return {"run": status.run, "round": status.round, "phase": status.phase, "agents": status.online}


def model_version(manifest: Manifest) -> str:
    """Return which model a device serves: run, round and the beginning of its SHA-256."""
    return f"{manifest.run}/{manifest.round} {manifest.sha256[:12]}"


def _config(
    id: str, device: Mapping[str, str | None], sensors: tuple[Sensor, ...], state: str, presences: list[str]
) -> Json:
    told = {key: value for key, value in device.items() if value is not None}
    return {
        "device": {"identifiers": [id], "manufacturer": "Hedgerow", **told},
        "origin": {"name": "Hedgerow", "sw_version": version("hedgerow")},
        "availability": [{"topic": topic, "value_template": ONLINE} for topic in presences],
        "availability_mode": "all",
        "state_topic": state,
        "qos": QOS,
        "components": {sensor.key: _component(id, sensor, state) for sensor in sensors},
    }


def _component(id: str, sensor: Sensor, state: str) -> Json:
    attributes = {"json_attributes_topic": state} if "json_attributes_template" in sensor.more else {}
    return {
        "platform": "sensor",
        "unique_id": f"{id}_{sensor.key}",
        "name": sensor.name,
        "value_template": f"{{{{ value_json.{sensor.key} }}}}",
        **attributes,
        **sensor.more,
    }
