"""The bars of the main job, each measured here and now, both sides in one run.

    python bench/main_job.py                    all of them, a few minutes on two cores
    python bench/main_job.py --only step        rounds, step, wire or memory
    python bench/main_job.py --json             figures for machines

HEDGEROW_DATA names the folder of the data sets (`rounds` reads fashion-mnist there). Ends with 1 when a bar
is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from coordinator.engine import Engine
from coordinator.live import Live
from coordinator.settings import CoordinatorSettings, HttpSettings, RunSettings
from coordinator.store.sql import Store
from foundation.errors import HedgerowError
from foundation.messages import AgentCard, Presence
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.topics import Topics
from hedgerow.broker import EmbeddedBroker, find_broker
from hedgerow.children import Child, spawn, stop_all

Which = Literal["at least", "at most"]


@dataclass
class Bar:
    """One bar and what was measured against it; without a bar, a figure for comparison."""

    name: str
    figure: float
    unit: str
    bar: float | None = None
    which: Which = "at least"
    note: str = ""

    @property
    def passed(self) -> bool | None:
        if self.bar is None:
            return None
        return self.figure >= self.bar if self.which == "at least" else self.figure <= self.bar

    def line(self) -> str:
        mark = {True: "pass", False: "MISSED", None: ""}[self.passed]
        bar = f"{self.which} {self.bar:g}" if self.bar is not None else "no bar"
        return f"{mark:7}{self.name:58}{self.figure:>9.3f} {self.unit:7}{bar:16}{self.note}"


@dataclass
class Section:
    """The bars of one part, and how they were measured."""

    name: str
    how: str
    bars: list[Bar] = field(default_factory=list)
    seconds: float = 0.0


# --- rounds: units gone, and accuracy over FedAvg --------------------------------------------------

YARDSTICKS = ("pfl_tpp", "fedavg", "fedtp", "local")


def rounds(arguments: argparse.Namespace) -> Section:
    """Ten rounds of Fashion-MNIST on one fleet, by four strategies."""
    from hedgerow.simulate import simulate, simulation_of

    section = Section(
        "rounds",
        f"fashion-mnist, {arguments.limit} samples in all, 10 devices, pathological:2, width 64, depth 2,"
        f" 10 rounds, local epochs 2, pfl_tpp with target 0.9, seeds 0 to {arguments.seeds - 1}",
    )
    data = os.environ.get("HEDGEROW_DATA")
    if data is None:
        raise HedgerowError("rounds needs HEDGEROW_DATA, the folder that holds fashion-mnist")
    sent: dict[str, list[float]] = {name: [] for name in YARDSTICKS}
    after: dict[str, list[float]] = {name: [] for name in YARDSTICKS}
    gone: list[float] = []
    for seed in range(arguments.seeds):
        for name in YARDSTICKS:
            simulation = simulation_of(
                strategy=name,
                devices=10,
                rounds=10,
                dataset="fashion-mnist",
                partition="pathological:2",
                limit=arguments.limit,
                seed=seed,
                model={"width": 64, "depth": 2},
                settings={"epochs": 2} | ({"target": 0.9} if name == "pfl_tpp" else {}),
            )
            with tempfile.TemporaryDirectory(prefix="hedgerow-bench-") as folder:
                report = simulate(simulation, Path(folder), data_dir=Path(data))
            sent[name].append(100 * report.last.accuracy_sent)
            after[name].append(100 * report.last.accuracy)
            if name == "pfl_tpp":
                gone.append(100 * report.last.units_gone)
            say(f"seed {seed}  {name:8} sent {sent[name][-1]:.1f} after {after[name][-1]:.1f}")
    lead = [a - b for a, b in zip(sent["pfl_tpp"], sent["fedavg"], strict=True)]
    over_tuned = [a - b for a, b in zip(sent["pfl_tpp"], after["fedavg"], strict=True)]
    section.bars += [
        Bar("FFL units physically gone after 10 rounds", mean(gone), "%", 85, note=spread(gone)),
        Bar("accuracy as sent, round 10: pfl_tpp minus fedavg", mean(lead), "points", 20, note=spread(lead)),
        Bar("  the same minus fedavg after local training", mean(over_tuned), "points"),
    ]
    for name in YARDSTICKS:
        section.bars.append(Bar(f"  {name}: as sent", mean(sent[name]), "%", note=spread(sent[name])))
        section.bars.append(
            Bar(f"  {name}: after local training", mean(after[name]), "%", note=spread(after[name]))
        )
    return section


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> str:
    return "" if len(values) < 2 else f"min {min(values):.1f}, max {max(values):.1f}"


# --- step: what cutting saves ----------------------------------------------------------------------


def step(arguments: argparse.Namespace) -> Section:
    """CPU time of training steps on 16 tokens, as in the ten rounds."""
    return steps_on(arguments, "step", patch=7)


def step49(arguments: argparse.Namespace) -> Section:
    """The same on 49 tokens, where less of a step is fixed cost."""
    return steps_on(arguments, "step49", patch=4)


def steps_on(arguments: argparse.Namespace, name: str, patch: int) -> Section:
    """CPU time of training steps: dense, cut, born at the cut's size, and zeros at the old shape."""
    import torch

    from edge_agent.training.pruning import compacted
    from foundation.nn.bridge import to_module
    from foundation.nn.transformer import Transformer, loss_of
    from foundation.parameters import EVERYTHING, Parameters, Role, role_of
    from foundation.spec import ModelSpec, initial_parameters

    torch.set_num_threads(1)
    spec = ModelSpec(input="image", shape=(1, 28, 28), classes=10, width=128, depth=2, patch=patch)
    section = Section(
        name,
        f"width 128, depth 2, {spec.tokens} tokens, batch 32, ffl_ratio 4, 95 % of FFL units gone; one"
        f" thread, CPU time, in fours, {arguments.repeats} steps of each, medians of ratios in a turn",
    )
    parameters = initial_parameters(spec, 0)
    rng = np.random.default_rng(0)
    kept = round(0.05 * spec.hidden)
    masks = {}
    for i in range(spec.depth):
        mask = np.zeros(spec.hidden, np.bool_)
        mask[rng.choice(spec.hidden, kept, replace=False)] = True
        masks[f"blocks.{i}.ffl"] = mask
    zeros = dict(parameters)
    for block, mask in masks.items():
        zeros[f"{block}.up.weight"] = parameters[f"{block}.up.weight"] * mask[:, None]
        zeros[f"{block}.up.bias"] = parameters[f"{block}.up.bias"] * mask
        zeros[f"{block}.down.weight"] = parameters[f"{block}.down.weight"] * mask[None, :]
    models = {
        "dense": to_module(spec, parameters),
        "cut": to_module(spec, compacted(parameters, masks)),
        "born": to_module(spec, _born(Transformer(spec, [kept] * spec.depth), parameters)),
        "zeros": to_module(spec, Parameters(zeros)),
    }
    x = torch.from_numpy(rng.standard_normal((32, 1, 28, 28)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, 10, 32))
    lean = EVERYTHING - {Role.ATTENTION, Role.REST}
    optimizers = {n: torch.optim.AdamW(m.parameters(), 1e-9, fused=True) for n, m in models.items()}

    def forward_backward(name: str) -> None:
        models[name].zero_grad(set_to_none=True)
        loss_of(models[name](x), y).backward()  # type: ignore[no-untyped-call]

    def with_optimizer(name: str) -> None:
        forward_backward(name)
        torch.nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
        optimizers[name].step()

    plain = interleaved({n: partial(forward_backward, n) for n in models}, arguments.repeats)
    whole = interleaved({n: partial(with_optimizer, n) for n in models}, arguments.repeats)
    cached = {}
    for name, model in models.items():
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(role_of(key) in lean)
        with torch.no_grad():
            cached[name] = model(x, stop=model.frozen_stages())

    def lean_step(name: str) -> None:
        model = models[name]
        model.zero_grad(set_to_none=True)
        loss_of(model(cached[name], start=model.frozen_stages()), y).backward()  # type: ignore[no-untyped-call]

    thrifty = interleaved({n: partial(lean_step, n) for n in models}, arguments.repeats)
    dense, ms = plain["dense"], 1000
    section.bars += [
        Bar("cut: forward and backward cheaper than dense", 100 * (1 - over(plain["cut"], dense)), "%", 45),
        Bar("cut over a model born at that size", over(plain["cut"], plain["born"]), "x", 1.1, "at most"),
        Bar("zeros at the old shape over dense (control)", over(plain["zeros"], dense), "x", 0.9),
        Bar("  dense step", ms * statistics.median(dense), "ms"),
        Bar("  cut step", ms * statistics.median(plain["cut"]), "ms"),
        Bar("  born step", ms * statistics.median(plain["born"]), "ms"),
        Bar(
            "  with clipping and Adam: cut cheaper than dense",
            100 * (1 - over(whole["cut"], whole["dense"])),
            "%",
        ),
        Bar(
            "  lean phase: cut cheaper than dense, both cached",
            100 * (1 - over(thrifty["cut"], thrifty["dense"])),
            "%",
        ),
        Bar("  lean phase, cut, against a whole dense step", 100 * (1 - over(thrifty["cut"], dense)), "%"),
    ]
    return section


def _born(model: Any, fallback: Any) -> Any:
    """Return a fresh model's parameters, FFLs drawn at the small size, the rest as the dense model's."""
    from foundation.nn.bridge import array_of
    from foundation.parameters import Parameters

    rng = np.random.default_rng(1)
    arrays = {}
    for name, parameter in model.named_parameters():
        if ".ffl." in name:
            shape = tuple(array_of(parameter).shape)
            arrays[name] = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        else:
            arrays[name] = fallback[name]
    return Parameters(arrays)


IN_A_ROW = 4
"""Steps of one model before the next one's turn; the first is not counted, as it finds the others' caches."""


def interleaved(work: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Return CPU seconds of this thread by turn, taken in turn so that all share the weather.

    In training a model's step follows one of the same model, so here it does too.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for turn in range(-(-repeats // (IN_A_ROW - 1))):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            row = []
            for number in range(IN_A_ROW):
                begun = time.thread_time()
                work[name]()
                if number:
                    row.append(time.thread_time() - begun)
            taken[name].append(statistics.median(row))
    return taken


def over(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the ratios within a turn: what slows a whole turn falls out."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


# --- a real fleet: agents as processes, the engine here --------------------------------------------


@dataclass
class Fleet:
    """A broker and real agents; the engine runs in this process over the same broker."""

    folder: Path
    broker: EmbeddedBroker
    federation: str
    agents: list[Child]

    @property
    def mqtt(self) -> MqttSettings:
        return MqttSettings.from_url(self.broker.url)

    async def cards(self, within_s: float = 60.0) -> None:
        """Wait until every agent has introduced itself with usable data."""
        topics = Topics(self.federation)
        async with MqttTransport(self.mqtt, f"{self.federation}-watch") as transport:
            letters = await transport.subscribe(topics.every("card"))
            here: set[str] = set()
            async with asyncio.timeout(within_s):
                async for letter in letters:
                    card = AgentCard.model_validate_json(letter.body)
                    if card.problem:
                        raise HedgerowError(f"{card.agent}: {card.problem}")
                    here.add(card.agent)
                    if len(here) == len(self.agents):
                        return

    @asynccontextmanager
    async def engine(self, run: RunSettings) -> AsyncIterator[tuple[Engine, Store]]:
        settings = CoordinatorSettings(
            federation=self.federation,
            folder=self.folder / "coordinator",
            http=HttpSettings(enabled=False),
            mqtt=self.mqtt,
            run=run,
        )
        will = (
            Topics(self.federation).coordinator_presence,
            Presence(state="offline").model_dump_json().encode(),
        )
        transport = MqttTransport(settings.mqtt, f"{self.federation}-coordinator", will=will)
        with Store.open(settings.folder) as store:
            async with AsyncExitStack() as stack:
                live = await stack.enter_async_context(Live(store))
                engine = Engine(settings, transport=transport, store=store, live=live)
                motor = asyncio.create_task(engine.serve())
                try:
                    yield engine, store
                finally:
                    motor.cancel()
                    await asyncio.wait([motor])

    async def whole_run(self, run: RunSettings, within_s: float = 300.0) -> list[float]:
        """Run to the end and return the seconds of every round, as the engine took them."""
        async with self.engine(run) as (engine, store):
            async with asyncio.timeout(within_s):
                while not engine.finished.is_set():
                    for child in self.agents:
                        if child.process.poll() is not None:
                            raise HedgerowError(f"{child.name} ended:\n{child.tail()}")
                    await asyncio.sleep(0.05)
            if engine.outcome != "finished":
                reason = engine.live.snapshot().detail.get("reason")
                raise HedgerowError(f"the run {engine.outcome}: {reason}")
            return [float(r.metrics["seconds"]) for r in store.rounds(run.name)]


@contextmanager
def fleet(
    agents: int, prefer: Literal["auto", "mosquitto", "nats"], data: str, serve: bool = False
) -> Iterator[Fleet]:
    """Start a broker and agents; `data` is the rest of their `[data]` table, in TOML."""
    with tempfile.TemporaryDirectory(prefix="hedgerow-bench-") as name:
        folder = Path(name)
        with EmbeddedBroker(folder / "broker", prefer=prefer) as broker:
            children: list[Child] = []
            try:
                for index in range(agents):
                    config = folder / f"device-{index}.toml"
                    config.write_text(
                        f'agent = "device-{index}"\nfederation = "bench"\nvault = "device-{index}"\n'
                        f'threads = 1\nprofile = "unknown-linux"\n'
                        f'[mqtt]\nhost = "{broker.host}"\nport = {broker.port}\n'
                        f"[serve]\nenabled = {str(serve).lower()}\n"
                        f'[data]\nkind = "builtin"\nname = "digits"\nindex = {index}\ncount = {agents}\n'
                        f"{data}\n"
                    )
                    command = [sys.executable, "-m", "edge_agent", "--config", str(config)]
                    log = folder / f"device-{index}.log"
                    children.append(spawn(f"device-{index}", command, log, dict(os.environ)))
                yield Fleet(folder, broker, "bench", children)
            finally:
                stop_all(children)


# --- wire: what a round costs beside the training --------------------------------------------------


def wire(arguments: argparse.Namespace) -> Section:
    """Rounds without training: coordinator, transport, codec and store alone."""
    section = Section(
        "wire",
        f"fedavg with 0 local epochs, 1 MB of parameters, 2 agents as processes, {arguments.rounds} rounds"
        " over a real broker; seconds from planning to closed, median",
    )
    for prefer in ("mosquitto", "nats"):
        if find_broker(prefer) is None:
            say(f"{prefer} is not installed here: left out")
            continue
        with fleet(2, prefer, "limit = 200") as here:
            asyncio.run(here.cards())
            run = RunSettings(
                name="wire",
                strategy="fedavg",
                settings={"epochs": 0},
                rounds=arguments.rounds + 1,
                min_agents=2,
                export=False,
                model={"width": 104, "depth": 2},
            )
            seconds = asyncio.run(here.whole_run(run))[1:]  # in the first, the agents load torch
        section.bars.append(
            Bar(
                f"overhead of a round over {prefer}",
                statistics.median(seconds),
                "s",
                0.5,
                "at most",
                f"min {min(seconds):.3f}, max {max(seconds):.3f}",
            )
        )
    return section


# --- memory: what an agent weighs ------------------------------------------------------------------


def memory(arguments: argparse.Namespace) -> Section:
    """Resident memory of real agents: idle, and at their peak through the demo's run."""
    section = Section(
        "memory",
        "4 agents as processes, digits, dirichlet:0.3; idle: connected, data loaded, card published;"
        " training: peak (VmHWM) over pfl_tpp, 10 rounds, 3 epochs, width 64, depth 2, with export and proof",
    )
    with fleet(4, "auto", 'partition = "dirichlet:0.3"', serve=True) as here:
        asyncio.run(here.cards())
        time.sleep(1.0)
        idle = [resident(child, "VmRSS") for child in here.agents]
        run = RunSettings(name="memory", strategy="pfl_tpp", settings={"epochs": 3}, rounds=10, min_agents=4)
        asyncio.run(here.whole_run(run))
        peak = [resident(child, "VmHWM") for child in here.agents]
        after = [resident(child, "VmRSS") for child in here.agents]
    section.bars += [
        Bar("idle agent, the largest of 4", max(idle), "MB", 80, "at most", "goal 60"),
        Bar("training agent, the largest of 4", max(peak), "MB", 330, "at most"),
        Bar("  after the run, the largest of 4", max(after), "MB"),
    ]
    return section


def resident(child: Child, what: Literal["VmRSS", "VmHWM"]) -> float:
    """Return resident memory of a process in MB (10^6 bytes), now or at its peak."""
    for line in Path(f"/proc/{child.process.pid}/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024 / 1e6
    raise HedgerowError(f"{child.name} is gone:\n{child.tail()}")


# --- the command -----------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[argparse.Namespace], Section]] = {
    "step": step,
    "step49": step49,
    "wire": wire,
    "memory": memory,
    "rounds": rounds,
}


def say(text: str) -> None:
    """Tell a person how far it is."""
    print(f"  {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=SECTIONS, help="may be given several times")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument(
        "--seeds", type=int, default=1, help="rounds: seeds (default 1; 3 takes thrice as long)"
    )
    parser.add_argument("--limit", type=int, default=6000, help="rounds: samples over all devices")
    parser.add_argument("--repeats", type=int, default=200, help="step: steps of each kind")
    parser.add_argument("--rounds", type=int, default=12, help="wire: rounds")
    arguments = parser.parse_args()
    sections = []
    for name in arguments.only or SECTIONS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        begun = time.monotonic()
        section = SECTIONS[name](arguments)
        section.seconds = time.monotonic() - begun
        sections.append(section)
        if not arguments.json:
            print(f"\n{section.name}: {section.how} ({section.seconds:.0f} s)")
            for bar in section.bars:
                print("  " + bar.line().rstrip(), flush=True)
    missed = [bar.name for section in sections for bar in section.bars if bar.passed is False]
    if arguments.json:
        told = [
            asdict(s) | {"bars": [asdict(bar) | {"passed": bar.passed} for bar in s.bars]} for s in sections
        ]
        machine = {"machine": platform.machine(), "cores": psutil.cpu_count()}
        print(json.dumps(machine | {"passed": not missed, "sections": told}, indent=2))
    else:
        print(f"\n{len(missed)} of the bars missed" + (f": {'; '.join(missed)}" if missed else ""))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
