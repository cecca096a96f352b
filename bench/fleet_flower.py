"""Flower's side of the bench: a SuperLink, SuperNodes on the other side of the wire, and empty work.

Its Python is that of an environment of its own: `python -m venv X; X/bin/pip install flwr==1.41.0`. Its
telemetry and update check are off, nothing is installed at run time, and there is no TLS on either side. A
client adds a scalar of its own: Flower does not send what the server already has.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from bench.fleet_net import Children, Most, Wire, cpu_s, pss, rss, until
from bench.fleet_ours import BACK_S, SAMPLES, STRUCK_S
from coordinator.strategies.hedgerow import Hedgerow
from foundation.spec import ModelSpec

PORT = 28000
STALLED_S = 60.0
"""How long a run whose server was killed and started again is watched."""
OFF = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "empty-work"
version = "1.0.0"
description = "Rounds whose work is empty"
license = "Apache-2.0"
dependencies = ["flwr"]
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
num-server-rounds = 3
parameters = 1000
clients = 2
out = ""
work-s = 0.0
samples = 0
lent = ""
"""
CLIENT = """
import sys
import time

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    time.sleep(float(context.run_config["work-s"]))
    if context.run_config["samples"]:
        if context.run_config["lent"]:
            sys.path.append(str(context.run_config["lent"]))
        import tiny
        trained = tiny.trained(message.content["arrays"], int(context.run_config["samples"]))
        metrics = MetricRecord({"num-examples": 1, "kept": 1})
        return Message(content=RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)
    own = np.float32(1e-3 * (1 + int(context.node_config["partition-id"])))
    kept = int(context.state["kept"]["rounds"]) + 1 if "kept" in context.state else 1
    context.state["kept"] = MetricRecord({"rounds": kept})
    arrays = [array + own for array in message.content["arrays"].to_numpy_ndarrays()]
    metrics = MetricRecord({"num-examples": 1, "kept": kept})
    return Message(content=RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)
"""
TINY = """
import torch
from flwr.app import ArrayRecord
from torch import nn

torch.set_num_threads(1)


class Tiny(nn.Module):
    def __init__(self, width={width}, depth={depth}, heads={heads}, patch={patch}):
        super().__init__()
        tokens = (8 // patch) ** 2
        self.cut = nn.Unfold(patch, stride=patch)
        self.embed = nn.Linear(patch * patch, width)
        self.place = nn.Parameter(torch.zeros(tokens, width))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.embed(self.cut(x).transpose(1, 2)) + self.place
        return self.head(self.blocks(x).mean(1))


def model():
    return Tiny()


def trained(arrays, samples):
    torch.manual_seed(0)
    x, y = torch.randn(samples, 1, 8, 8), torch.randint(0, 10, (samples,))
    it = model()
    it.load_state_dict(arrays.to_torch_state_dict())
    steps = torch.optim.AdamW(it.parameters(), 1e-3)
    for _ in range({epochs}):
        for i in range(0, samples, {batch}):
            steps.zero_grad()
            nn.functional.cross_entropy(it(x[i : i + {batch}]), y[i : i + {batch}]).backward()
            steps.step()
    return ArrayRecord(it.state_dict())
"""
SERVER = """
import json
import sys
import time

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Noted(FedAvg):
    out = ""

    def note(self, **what):
        with open(self.out, "a") as file:
            file.write(json.dumps(what | {"at": time.time()}) + "\\n")

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.note(opened=server_round)
        return messages

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        result = super().aggregate_train(server_round, replies)
        kept = [int(one.content["metrics"]["kept"]) for one in replies if one.has_content()]
        self.note(closed=server_round, kept=kept)
        return result


@app.main()
def main(grid: Grid, context: Context) -> None:
    c = context.run_config
    clients = int(c["clients"])
    strategy = Noted(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy.out = str(c["out"])
    draw = np.random.default_rng(0)
    each = int(c["parameters"]) // 16
    if c["samples"]:
        if c["lent"]:
            sys.path.append(str(c["lent"]))
        import tiny
        initial = ArrayRecord(tiny.model().state_dict())
    else:
        initial = ArrayRecord([draw.standard_normal(each).astype(np.float32) for _ in range(16)])
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=int(c["num-server-rounds"]))
"""


def tiny() -> str:
    """Write the transformer that Flower's clients train: of the default's shape, in torch's own words."""
    spec = ModelSpec(input="image", shape=(1, 8, 8), classes=10)
    common = Hedgerow()
    told = {name: getattr(spec, name) for name in ("width", "depth", "heads", "patch")}
    told |= {"epochs": common.epochs, "batch": common.batch_size}
    text = TINY
    for name, value in told.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


class Flower(Children):
    """One SuperLink and some SuperNodes; ended at the end of the `with`."""

    def __init__(self, folder: Path, python: Path, agents: int, wire: Wire) -> None:
        self.bin, self.wire, self.count = python.parent, wire, agents
        path = f"{self.bin}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        super().__init__(
            folder, {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | OFF | {"PATH": path}
        )
        self.app, self.out = folder / "app", folder / "rounds.jsonl"
        self.app.mkdir()
        files = {
            "pyproject.toml": PROJECT,
            "client_app.py": CLIENT,
            "server_app.py": SERVER,
            "tiny.py": tiny(),
        }
        for name, text in files.items():
            (self.app / name).write_text(text.lstrip())
        home = self.home("link")
        at = f'[superlink.bench]\naddress = "{wire.host}:{PORT}"\ninsecure = true\n'
        (home / "config.toml").write_text('[superlink]\ndefault = "bench"\n' + at)

    def __enter__(self) -> Flower:
        self.start_link()
        for i in range(self.count):
            self.start_node(i)
        until("Flower's nodes are there", lambda: self.ended() or self.ready(), every_s=0.2)
        if self.ended():
            raise SystemExit(self.log("link") + self.log("node0"))
        return self

    def __exit__(self, *what: object) -> None:
        self.stop()

    def home(self, name: str) -> Path:
        folder = self.folder / f"home-{name}"
        folder.mkdir(exist_ok=True)
        return folder

    def start_link(self) -> None:
        command = [
            str(self.bin / "flower-superlink"),
            "--insecure",
            "--disable-runtime-dependency-installation",
        ]
        more = ["--host", self.wire.host, "--port", str(PORT), "--database", str(self.folder / "link.db")]
        self.start("link", [*command, *more], {"FLWR_HOME": str(self.home("link"))})

    def start_node(self, i: int) -> None:
        command = [
            str(self.bin / "flower-supernode"),
            "--insecure",
            "--superlink",
            f"{self.wire.host}:{PORT}",
        ]
        more = ["--host", "127.0.0.1", "--port", str(PORT + 1 + i)]
        who = ["--node-config", f"partition-id={i} num-partitions={self.count}"]
        home = {"FLWR_HOME": str(self.home(f"node{i}"))}
        self.start(f"node{i}", [*self.wire.inside, *command, *more, *who], home)

    def ready(self) -> bool:
        """Whether each SuperNode has its SuperExec, which comes after it has registered."""
        return all(len(self.tree(f"node{i}")) > 1 for i in range(self.count))

    def run(
        self, parameters: int, rounds: int, work_s: float = 0.0, samples: int = 0, lent: str = ""
    ) -> None:
        """Start a run; with samples its work is training, with torch from the folder that is lent."""
        told = {
            "num-server-rounds": rounds,
            "parameters": parameters,
            "clients": self.count,
            "work-s": work_s,
            "samples": samples,
        }
        words = " ".join(
            [*(f"{key}={value}" for key, value in told.items()), f"out='{self.out}' lent='{lent}'"]
        )
        command = [str(self.bin / "flwr"), "run", str(self.app), "bench", "--stream", "--run-config", words]
        self.start("run", command, {"FLWR_HOME": str(self.home("link"))})

    def noted(self, what: str) -> list[dict[str, Any]]:
        """What the server app wrote of rounds that were `opened` or `closed`."""
        text = self.out.read_text() if self.out.exists() else ""
        return [line for line in map(json.loads, text.splitlines()) if what in line]

    def until_closed(self, number: int) -> list[float]:
        """Wait for the end of a round and return when each so far ended."""
        until(f"Flower's round {number} ends", lambda: len(self.noted("closed")) >= number, every_s=0.05)
        return [line["at"] for line in self.noted("closed")]

    def nodes(self) -> list[list[psutil.Process]]:
        return [self.tree(f"node{i}") for i in range(self.count) if f"node{i}" in self.running]

    def nodes_cpu_s(self) -> float:
        return sum(cpu_s(tree) for tree in self.nodes())


@contextmanager
def flower(base: Path, python: Path, agents: int, wire: Wire) -> Iterator[Flower]:
    with tempfile.TemporaryDirectory(dir=base) as place, Flower(Path(place), python, agents, wire) as made:
        yield made


def version(python: Path) -> str:
    """Return the version that is installed there; ends the bench where there is none."""
    code = "import importlib.metadata as m; print(m.version('flwr'))"
    told = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if told.returncode:
        raise SystemExit(
            f"no flwr in {python}: python -m venv X; X/bin/pip install flwr==1.41.0;"
            " --flower-python X/bin/python"
        )
    return told.stdout.strip()


def lent(python: Path) -> str:
    """Return where the clients find torch: empty for their own, else in this environment."""
    code = "import importlib.util as u, sys; print(u.find_spec('torch') is not None, *sys.version_info[:2])"
    told = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    if told[0] == "True":
        return ""
    if told[1:] != [str(part) for part in sys.version_info[:2]]:
        raise SystemExit("no torch there, and that of this environment is for another Python")
    return sysconfig.get_path("purelib")


def overhead(base: Path, python: Path, wire: Wire, agents: int, payload: int, rounds: int) -> dict[str, Any]:
    """Run rounds of empty work with as many bytes of float32; the first is counted apart."""
    with flower(base, python, agents, wire) as it, Most(it.nodes) as most:
        begun = time.time()
        it.run(payload // 4, rounds)
        it.until_closed(1)
        cpu, sent = it.nodes_cpu_s(), wire.bytes()
        closed = it.until_closed(rounds)
        cpu, sent_after = it.nodes_cpu_s() - cpu, wire.bytes()
        messages = agents * (rounds - 1)
        wired = None if sent is None or sent_after is None else (sent_after - sent) / messages / (2 * payload)
        return {
            "rounds_s": [b - a for a, b in itertools.pairwise(closed)],
            "first_round_s": closed[0] - begun,
            "cpu_s_per_message": cpu / messages,
            "cpu_s_per_mb": cpu / messages / (2 * payload / 1e6),
            "wire_over_payload": wired,
            "empty_rss_mb": most.rss / 1e6,
            "empty_pss_mb": most.pss / 1e6,
        }


def training(base: Path, python: Path, wire: Wire) -> dict[str, Any]:
    """Let two nodes idle, then train a transformer of the same shape in them, without any export."""
    folder = lent(python)
    with flower(base, python, 2, wire) as it:
        time.sleep(10)
        idle, shared = max(map(rss, it.nodes())), max(map(pss, it.nodes()))
        with Most(it.nodes) as most:
            it.run(16, 2, samples=SAMPLES, lent=folder)
            it.until_closed(2)
        if not all(len(line["kept"]) == 2 for line in it.noted("closed")):
            raise SystemExit(it.log("node0") + "a client of Flower could not train")
        return {
            "idle_rss_mb": idle / 1e6,
            "idle_pss_mb": shared / 1e6,
            "training_rss_mb": most.rss / 1e6,
            "training_pss_mb": most.pss / 1e6,
            "torch": "lent" if folder else "its own",
        }


def idle(base: Path, python: Path, wire: Wire, seconds: float) -> dict[str, Any]:
    """Count the bytes of two nodes that have nothing to do."""
    with flower(base, python, 2, wire):
        time.sleep(10)
        before = wire.bytes()
        time.sleep(seconds)  # what is measured is what polling costs
        after = wire.bytes()
        known = before is not None and after is not None
        return {"bytes_per_s": (after - before) / seconds / 2 if known else None, "seconds": seconds}  # type: ignore[operator]


def node_killed(base: Path, python: Path, wire: Wire, payload: int) -> dict[str, Any]:
    """Kill one of two SuperNodes in round 2 and start it again 3 s later; work takes 4 s."""
    with flower(base, python, 2, wire) as it:
        it.run(payload // 4, 3, work_s=4)
        until("Flower's round 2 opens", lambda: len(it.noted("opened")) >= 2)
        time.sleep(STRUCK_S)
        it.kill("node1")
        time.sleep(BACK_S)
        it.start_node(1)
        closed = it.until_closed(3)
        kept = [line["kept"] for line in it.noted("closed")]
        return {
            "longer_s": (closed[1] - closed[0]) - (closed[2] - closed[1]),
            "updates": [len(each) for each in kept],
            "state_kept": sorted(kept[2]) == [3, 3],
        }


def link_killed(base: Path, python: Path, wire: Wire, payload: int) -> dict[str, Any]:
    """Kill the SuperLink, and what it started, in round 2; start it again 3 s later on the same database."""
    with flower(base, python, 2, wire) as it:
        it.run(payload // 4, 3, work_s=1.5)
        until("Flower's round 2 opens", lambda: len(it.noted("opened")) >= 2)
        time.sleep(0.7)
        it.kill("link")
        time.sleep(BACK_S)
        again = time.time()
        it.start_link()
        deadline = time.monotonic() + STALLED_S
        while len(it.noted("closed")) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        found = it.noted("closed")
        return {"resumed_s": found[1]["at"] - again if len(found) > 1 else None, "watched_s": STALLED_S}
