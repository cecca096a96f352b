"""Asks a filled coordinator everything, and writes coordinator/web/examples.json and docs/openapi.json.

python -m tests.coordinator.api_examples
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from coordinator.app import create_app
from coordinator.exports import Exporter
from coordinator.live import Event, Live
from coordinator.rollout.steward import Steward
from coordinator.roster import Roster
from coordinator.settings import RolloutSettings
from coordinator.store.sql import Store
from coordinator.web.api import PREFIX
from coordinator.web.described import EXAMPLES
from tests.coordinator.filled_store import NOON, Clock, Engine, enliven, fill

DESCRIPTION = Path(__file__).parents[2] / "docs" / "openapi.json"
RUN = {"run": "greenhouse-1", "n": 1, "agent": "jetson-barn"}
ASKED = {
    "/healthz": "",
    f"{PREFIX}/status": "",
    f"{PREFIX}/fleet": "limit=1",
    f"{PREFIX}/fleet/{{agent}}": "",
    f"{PREFIX}/runs": "limit=1",
    f"{PREFIX}/runs/{{run}}": "",
    f"{PREFIX}/runs/{{run}}/rounds": "limit=1",
    f"{PREFIX}/runs/{{run}}/energy": "",
    f"{PREFIX}/runs/{{run}}/rounds/{{n}}/updates": "",
    f"{PREFIX}/runs/{{run}}/updates": "limit=1",
    f"{PREFIX}/artifacts": "limit=1",
    f"{PREFIX}/refusals": "limit=1",
    f"{PREFIX}/quarantine": "limit=1",
    f"{PREFIX}/models": "limit=1",
}
"""What is asked, and with which query."""
SHA = "3f" * 32
ORDER = {
    "id": "4b1d", "device": "jetson-barn", "verb": "pin", "model": SHA, "who": "otto", "reason": "the fair",
    "at": 1772366400.0, "state": "open", "said": "",
}  # fmt: skip
ROLLOUT = {
    "run": "greenhouse-1", "round": 5, "state": "open", "ring": 1, "rings": 2, "reason": "",
    "waits": "soaks for 3600 s more",
    "members": [
        {"device": "jetson-barn", "ring": 1, "state": "serving", "model": SHA, "before": None, "reason": ""},
    ],
}  # fmt: skip
EVENT = Event(
    id=41,
    kind="round_closed",
    at=NOON,
    text="round 5 closed with 4 of 4 updates",
    run="greenhouse-1",
    round=5,
)
SAID: dict[str, Any] = {
    f"POST {PREFIX}/runs": {"run": "greenhouse-1", "state": "waiting"},
    f"POST {PREFIX}/runs/{{run}}/stop": {"run": "greenhouse-1", "state": "stopped"},
    f"POST {PREFIX}/runs/{{run}}/pause": {"run": "greenhouse-1", "state": "paused"},
    f"POST {PREFIX}/runs/{{run}}/resume": {"run": "greenhouse-1", "state": "running"},
    f"POST {PREFIX}/runs/{{run}}/devices/{{agent}}/export": {
        "run": "greenhouse-1",
        "device": "jetson-barn",
        "files": {"model.onnx": "CAo…", "manifest.json": "ewog…", "probe.npz": "UEsD…"},
    },
    f"POST {PREFIX}/models/{{verb}}": {"orders": [ORDER], "problems": {"pi-kitchen": "it tells no models"}},
    f"GET {PREFIX}/orders": [ORDER],
    f"GET {PREFIX}/rollouts": [ROLLOUT],
    f"POST {PREFIX}/rollouts/stop": ROLLOUT
    | {"state": "stopped", "reason": "stopped by hand", "waits": None},
    f"POST {PREFIX}/rollouts/go": ROLLOUT | {"ring": 2},
    f"GET {PREFIX}/events": f"id: 41\ndata: {EVENT.model_dump_json()}\n\n",
}
"""What is not asked here: changes, and what they leave behind. A test reads each as its type."""


def shortened(value: Any) -> Any:
    """Return an answer with at most two items of each list of objects."""
    if isinstance(value, list):
        return [shortened(one) for one in (value[:2] if value and isinstance(value[0], dict) else value)]
    if isinstance(value, dict):
        return {key: shortened(one) for key, one in value.items()}
    return value


def application(store: Store, live: Live, engine: Engine, clock: Clock) -> FastAPI:
    """Return the application with everything that it can have."""

    async def nobody(agent: str, body: bytes) -> None:
        raise AssertionError("nothing is ordered here")

    steward = Steward(RolloutSettings(), store=store, live=live, roster=Roster(), send=nobody)
    return create_app(store, live, engine, models=steward, maker=Exporter(Path("unused")), clock=clock)


async def examples(folder: Path) -> tuple[dict[str, Any], FastAPI]:
    """Return an example for every operation, and the application that was asked."""
    clock = Clock()
    with Store.open(folder, clock=clock) as store:
        async with Live(store, clock=clock, monotonic=clock) as live:
            fill(store, clock)
            enliven(live, clock)
            app = application(store, live, Engine(store, live), clock)
            transport = httpx.ASGITransport(app)
            found = {}
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                for path, query in ASKED.items():
                    answer = (await client.get(f"{path.format(**RUN)}?{query}")).raise_for_status()
                    found[f"GET {path}"] = shortened(answer.json())
    return {key: (found | SAID)[key] for key in sorted(found | SAID)}, app


def written(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found, app = asyncio.run(examples(Path(folder)))
    EXAMPLES.write_text(written(found), "utf-8")
    DESCRIPTION.write_text(written(app.openapi()), "utf-8")


if __name__ == "__main__":
    main()
