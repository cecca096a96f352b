"""An agent whose work is empty: it waits, adds a scalar to what arrived, and sends that back.

python -m bench.fleet_agent d0 --folder DIR --at HOST:PORT --work-s 0
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from pathlib import Path
from typing import Any

from edge_agent.agent import OFFLINE, Agent
from edge_agent.datasets import DataSettings, load
from edge_agent.energy.meter import Meter
from edge_agent.memory import hold_little
from edge_agent.settings import AgentSettings
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.profile import DeviceProfile
from foundation.topics import Topics, client_id


def nothing(name: str, folder: Path, work_s: float) -> Any:
    """Return what carries out empty work; each agent's scalar is its own."""

    def carry_out(task: Any, hooks: Any) -> Any:
        import numpy as np

        from edge_agent.training.trainer import Outcome, Probe

        time.sleep(work_s)
        own = np.float32(1e-3 * (1 + int(name[1:])))
        arrays = [(key, np.asarray(value) + own) for key, value in task.start.items()]
        (folder / f"{name}.parameters").write_text(str(sum(array.size for _, array in arrays)))
        widths = (task.spec.hidden,) * task.spec.depth
        empty = np.zeros((0,), np.float32)
        metrics = {"accuracy": 0.0, "accuracy_sent": 0.0}
        return Outcome(type(task.start)(arrays), {}, widths, metrics, 0, Probe(empty, empty))

    return carry_out


async def live(name: str, folder: Path, at: str, work_s: float) -> None:
    """Live until told to stop."""
    host, port = at.split(":")
    settings = AgentSettings(
        agent=name,
        federation="bench",
        vault=folder / name,
        data=DataSettings(kind="builtin", name="digits"),
        mqtt=MqttSettings(host=host, port=int(port), connect_timeout_s=None),
    )
    will = (Topics("bench").of(name, "presence"), OFFLINE.model_dump_json().encode())
    transport = MqttTransport(settings.mqtt, client_id("bench", name), will=will)
    with Meter(DeviceProfile.load("unknown-linux")) as meter:
        agent = Agent(
            settings,
            transport=transport,
            meter=meter,
            profile="unknown-linux",
            threads=1,
            load_data=lambda: load(settings.data, None, folder / name),
            carry_out=nothing(name, folder, work_s),
        )
        task = asyncio.ensure_future(agent.run())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        while not transport.connected and not task.done():
            await asyncio.sleep(0.01)
        (folder / f"{name}.up").touch()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--at", required=True)
    parser.add_argument("--work-s", type=float, default=0.0)
    a = parser.parse_args()
    hold_little()
    asyncio.run(live(a.name, a.folder, a.at, a.work_s))


if __name__ == "__main__":
    main()
