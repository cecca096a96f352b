"""LocalAlt, pruning by importance, the mean over keepers, and the allocation, simulated and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coordinator.channel import Radio, Wire, rate_bps
from coordinator.cost import forward_cost, payload_bits
from coordinator.engine import planned
from coordinator.strategies.adaptive_pruning import ASKED_AGAIN, HEAD, SHARED, AdaptivePruning
from coordinator.strategies.base import State, load_strategy
from edge_agent.training.trainer import Outcome, Task, carry_out
from foundation.codec import array_bytes, frame_of
from foundation.energy import EnergyReading, Stage
from foundation.errors import SettingsError
from foundation.messages import Assignment, Update
from foundation.nn.bridge import to_module
from foundation.parameters import Parameters, role_of
from foundation.spec import ModelSpec, initial_parameters
from foundation.work import Encoding, ImportancePruning, LocalWork
from tests.toys import SPEC, Quiet, ToyFederation, same, toy_data

MODEL = initial_parameters(SPEC, 0)
SPECS = {
    "image": SPEC,
    "cls": SPEC.model_copy(update={"pool": "cls"}),
    "series": ModelSpec(input="series", shape=(12, 3), classes=4, width=8, depth=3, heads=2, patch=4),
    "text": ModelSpec(input="text", shape=(10,), classes=7, width=8, depth=2, heads=2),
}


def _toy(agents: int = 3, **settings: object) -> ToyFederation:
    return ToyFederation(AdaptivePruning(learning_rate=5e-3, **settings), agents=agents)


def _strategy(toy: ToyFederation) -> AdaptivePruning:
    assert isinstance(toy.strategy, AdaptivePruning)
    return toy.strategy


def _work(toy: ToyFederation, ratio: float) -> LocalWork:
    """The work that a device gets when it has to prune `ratio`."""
    return _strategy(toy)._local_alt(ratio)


def _carried_out(work: LocalWork, seed: int = 3) -> Outcome:
    return carry_out(Task(SPEC, work, MODEL, MODEL.only(SHARED), toy_data(0), seed), Quiet())


# --- what the device does ------------------------------------------------------------------------


def test_the_personal_phase_leaves_the_shared_part_and_the_shared_phase_the_head() -> None:
    personal = _work(_toy(epochs=0, importance_epochs=0, head_epochs=2), 0)
    after = _carried_out(personal).parameters
    assert same(after.only(SHARED), MODEL.only(SHARED))
    assert not np.array_equal(after["head.weight"], MODEL["head.weight"])
    shared = _work(_toy(epochs=2, head_epochs=0), 0.5)
    after = _carried_out(shared).parameters
    assert same(after.only(HEAD), MODEL.only(HEAD))
    moved = [name for name, array in after.only(SHARED).items() if not np.array_equal(array, MODEL[name])]
    assert len(moved) == len(MODEL.only(SHARED))


def test_without_pruning_it_is_fedalt() -> None:
    plain = _work(_toy(), 0)
    assert plain.terms == ()
    assert [phase.train & HEAD for phase in plain.phases] == [HEAD, frozenset()]
    assert plain.keep == HEAD
    assert not plain.send & HEAD
    with_term = plain.model_copy(update={"terms": (ImportancePruning(ratio=0),)})
    assert same(_carried_out(plain).parameters, _carried_out(with_term).parameters)


def test_the_units_that_changed_least_are_cut() -> None:
    # With all epochs before the cut, the dense run shows what was measured, and what the kept units became.
    toy = _toy(epochs=2, importance_epochs=2)
    dense, pruned = _carried_out(_work(toy, 0)), _carried_out(_work(toy, 0.75))
    for i in range(SPEC.depth):
        block = f"blocks.{i}.ffl"
        change = {
            p: dense.parameters[f"{block}.{p}"] - MODEL[f"{block}.{p}"] for p in ("up.weight", "up.bias")
        }
        down = dense.parameters[f"{block}.down.weight"] - MODEL[f"{block}.down.weight"]
        squares = (
            np.square(change["up.weight"]).sum(1) + np.square(change["up.bias"]) + np.square(down).sum(0)
        )
        kept = np.zeros(SPEC.hidden, np.bool_)
        kept[np.argsort(squares)[-4:]] = True
        assert np.array_equal(pruned.masks[block], kept)
        for part, index in (("up.weight", kept), ("up.bias", kept), ("down.weight", (slice(None), kept))):
            name = f"{block}.{part}"
            assert np.array_equal(pruned.parameters[name][index], dense.parameters[name][index])
    assert pruned.kept_units == (4, 4)


# --- what the coordinator makes of it ------------------------------------------------------------


def _update(
    agent: str, value: float, mask: list[bool] | None, examples: int = 10, **fields: object
) -> Update:
    """An update whose every value is the same; `mask` repeats over both blocks."""
    arrays = {n: np.full(shape, value, np.float32) for n, shape in SPEC.layout if role_of(n) in SHARED}
    masks = {} if mask is None else {f"blocks.{i}.ffl": np.array(mask) for i in range(SPEC.depth)}
    kept = (SPEC.hidden if mask is None else sum(mask),) * SPEC.depth
    return Update(
        run="toy",
        round=1,
        agent=agent,
        examples=examples,
        parameters=Parameters(arrays),
        masks=masks,
        kept_units=kept,
        **fields,
    )


def test_units_are_averaged_over_their_keepers_and_stay_where_nobody_kept_them() -> None:
    toy = _toy()
    half, first = [True] * 8 + [False] * 8, [True] + [False] * 15
    updates = [_update("a", 1, half, 30), _update("b", 5, first, 10)]
    state = toy.strategy.absorb(toy.begin(), updates)
    after = state.shared.under("model/")
    up, bias, down = (after[f"blocks.1.ffl.{p}"] for p in ("up.weight", "up.bias", "down.weight"))
    assert np.allclose(up[0], 2)  # (30 + 5 * 10) / 40
    assert np.allclose(up[1:8], 1)
    assert np.array_equal(up[8:], MODEL["blocks.1.ffl.up.weight"][8:])
    assert np.allclose(bias[:8], [2] + [1] * 7)
    assert np.allclose(down[:, 0], 2)
    assert np.array_equal(down[:, 8:], MODEL["blocks.1.ffl.down.weight"][:, 8:])
    assert np.allclose(after["blocks.1.ffl.down.bias"], 2)
    assert np.allclose(after["blocks.0.attention.qkv.weight"], 2)
    assert not after.only(HEAD)


# --- what a round costs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_multiply_adds_are_those_that_torch_counts(name: str) -> None:
    spec = SPECS[name]
    dense = _counted(spec, spec.hidden)
    cost = forward_cost(spec)
    assert cost.body + cost.ffl + cost.head == dense
    assert cost.ffl * 3 // 4 == dense - _counted(spec, spec.hidden // 4)


def _counted(spec: ModelSpec, hidden: int) -> int:
    model = to_module(spec, _narrow(initial_parameters(spec, 0), hidden))
    sample = np.zeros((1, *spec.shape), np.int64 if spec.input == "text" else np.float32)
    # The fused attention is not counted, the one made of plain products is.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.from_numpy(sample))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def _narrow(parameters: Parameters, hidden: int) -> Parameters:
    arrays = {}
    for name, array in parameters.items():
        if ".ffl.up." in name or name.endswith("ffl.threshold"):
            array = array[:hidden]
        arrays[name] = array[:, :hidden] if name.endswith("ffl.down.weight") else array
    return Parameters(arrays)


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
@pytest.mark.parametrize("name", SPECS)
def test_bits_are_those_of_the_frame(name: str, encoding: Encoding) -> None:
    spec = SPECS[name]
    kept = spec.hidden // 4
    mask = np.arange(spec.hidden) < kept
    rng = np.random.default_rng(0)  # arrays of many zeros would travel as bitmaps
    arrays = Parameters(
        (n, rng.normal(size=a.shape).astype(np.float32))
        for n, a in initial_parameters(spec, 0).only(SHARED).items()
    )
    masks = {f"blocks.{i}.ffl": mask for i in range(spec.depth)}
    update = Update(run="r", round=1, agent="a", examples=1, parameters=arrays, masks=masks)
    bits = payload_bits(spec, SHARED, encoding, masks=True)
    assert 8 * sum(array_bytes(frame_of(update, encoding)).values()) == bits.fixed + bits.units // 4
    whole = update.model_copy(update={"masks": {}})
    assert (
        8 * sum(array_bytes(frame_of(whole, encoding)).values()) == payload_bits(spec, SHARED, encoding).total
    )


# --- the simulated cell --------------------------------------------------------------------------


def test_everybody_gets_a_place_from_the_seed_and_its_name() -> None:
    toy = _toy(agents=40)
    state = toy.begin()
    again = toy.strategy.enroll(state, toy.cards[3], 99)
    assert again is state
    other = toy.strategy.enroll(toy.strategy.begin(MODEL, 0), toy.cards[3], 0)
    assert same(other.private["d3"], state.private["d3"])
    places = np.array([float(state.private[c.agent]["distance_km"][0]) for c in toy.cards])
    clocks = np.array([float(state.private[c.agent]["cpu_hz"][0]) for c in toy.cards])
    assert 0.05 <= places.min() < places.max() <= 0.5
    assert 0.25 < places.mean() < 0.45, "evenly over the area: most are far out"
    assert 5e8 <= clocks.min() < clocks.max() <= 3e9
    assert len({*places, *clocks}) == 80


def test_the_costs_of_a_simulated_device_by_hand() -> None:
    toy = _toy(
        epochs=3,
        importance_epochs=1,
        head_epochs=2,
        nearest_km=0.1,
        farthest_km=0.1,
        slowest_hz=1e9,
        fastest_hz=1e9,
        cycles_per_madd=2,
    )
    state, context = toy.begin(), toy.context(1)
    device = _strategy(toy).devices(state, context)[0]
    cost, n = forward_cost(SPEC), toy.cards[0].examples
    per_madd = 2e-9 * n
    assert device.compute_s == pytest.approx(per_madd * 2 * 3 * cost.ffl)
    personal = cost.body + cost.ffl + 2 * 3 * cost.head
    shared = 3 * (3 * cost.body + 2 * cost.head) + 3 * cost.ffl
    down_s = payload_bits(SPEC, SHARED).total / rate_bps(Radio(40, 0.1), 1.8e5)
    assert device.fixed_s == pytest.approx(down_s + per_madd * (personal + shared))
    assert device.link == Radio(20, 0.1)
    bits = payload_bits(SPEC, SHARED, masks=True)
    assert (device.fixed_bits, device.bits) == (bits.fixed, bits.units)


@pytest.mark.parametrize("tightness", [0.3, 0.7])
def test_on_a_simulated_clock_every_round_ends_in_time_and_those_who_prune_use_it_up(
    tightness: float,
) -> None:
    toy = _toy(agents=5, tightness=tightness, bandwidth_hz=2e4, nearest_km=0.2, farthest_km=2.0)
    strategy, state = _strategy(toy), toy.begin()
    allocation = strategy.allocation(state, toy.context(1))
    assert not allocation.excluded
    pruned = 0
    for assignment in toy.plan(state, 1):
        share = allocation.shares[assignment.agent]
        update = toy.work(assignment)
        seconds = _clocked(strategy, state, assignment, update, share.bandwidth)
        assert seconds <= allocation.threshold_s * (1 + 1e-9)
        if update.masks:
            device, unit = share.device, 1 / SPEC.hidden
            one_unit = unit * (device.compute_s + device.bits / share.rate_bps)
            pruned += 1
            assert seconds > allocation.threshold_s - one_unit or share.ratio >= allocation.ratio_max
            assert share.latency_s == pytest.approx(seconds, rel=1e-9)
    assert pruned >= 1


def _clocked(
    strategy: AdaptivePruning, state: State, assignment: Assignment, update: Update, bandwidth: float
) -> float:
    """Seconds of what was really done and sent: units that were left, bytes of the frame."""
    cost, n, kept = forward_cost(SPEC), update.examples, update.kept_units[0] / SPEC.hidden
    personal = cost.body + cost.ffl + 3 * cost.head
    dense = 3 * (cost.body + cost.ffl) + 2 * cost.head
    lean = 3 * (cost.body + kept * cost.ffl) + 2 * cost.head
    clock = float(state.private[update.agent]["cpu_hz"][0])
    place = float(state.private[update.agent]["distance_km"][0])
    down = (
        8
        * sum(array_bytes(frame_of(assignment)).values())
        / rate_bps(Radio(40, place), strategy.bandwidth_hz)
    )
    up = 8 * sum(array_bytes(frame_of(update)).values()) / rate_bps(Radio(20, place), bandwidth)
    return down + n * (personal + dense + lean) / clock + up


def test_tightness_goes_from_no_pruning_to_the_most() -> None:
    toy = _toy(agents=4, nearest_km=0.2, farthest_km=0.2, slowest_hz=1e9, fastest_hz=1e9, ratio_max=0.75)
    ratios = []
    for tightness in (0.0, 0.5, 1.0):
        strategy = AdaptivePruning(**(_strategy(toy).model_dump() | {"tightness": tightness}))
        allocation = strategy.allocation(toy.begin(), toy.context(1))
        assert not allocation.excluded
        ratios.append([share.ratio for share in allocation.shares.values()])
    assert max(ratios[0]) <= 1 / SPEC.hidden
    assert ratios[2] == [0.75] * 4
    assert all(0.2 < ratio < 0.7 for ratio in ratios[1])


def test_the_floor_bounds_the_ratio() -> None:
    toy = _toy(floor=6, tightness=1.0)
    state, context = toy.begin(), toy.context(1)
    assert _strategy(toy).allocation(state, context).ratio_max == pytest.approx(10 / 16)
    assert all(toy.work(a).kept_units >= (6, 6) for a in toy.plan(state, 1))


def test_weights_are_examples_or_equal() -> None:
    for weights, expected in (("examples", [0.5, 1.0, 1.5]), ("equal", [1.0, 1.0, 1.0])):
        toy = _toy(weights=weights)
        toy.cards = [c.model_copy(update={"examples": 20 * (i + 1)}) for i, c in enumerate(toy.cards)]
        devices = _strategy(toy).devices(toy.begin(), toy.context(1))
        assert [d.weight for d in devices] == pytest.approx(expected)


def test_who_cannot_meet_the_threshold_is_left_out_and_told_why() -> None:
    toy = _toy(agents=5)
    state, context = toy.begin(), toy.context(1)
    wide = AdaptivePruning(bandwidth_hz=1e9)
    threshold = sorted(d.fixed_s + 0.5 * d.compute_s for d in wide.devices(state, context))[2]
    strict = AdaptivePruning(threshold_s=threshold, bandwidth_hz=1e9)
    out = strict.excluded(state, context)
    assert 0 < len(out) < 5
    assert all(f"slower than the threshold of {threshold:.4g} s" in reason for reason in out.values())
    asked = [a.agent for a in strict.plan(state, context)]
    assert sorted([*asked, *out]) == [card.agent for card in toy.cards]
    assert planned(strict, state, context)[1] == dict(out)
    hopeless = AdaptivePruning(threshold_s=1e-9)
    assignments, reasons = planned(hopeless, state, context)
    assert assignments == []
    assert set(reasons) == {card.agent for card in toy.cards}


# --- the closed loop -----------------------------------------------------------------------------


@dataclasses.dataclass
class RealFleet:
    """Devices with a speed and a link of their own, told to nobody: only their updates show them."""

    toy: ToyFederation
    madds_per_s: Mapping[str, float]
    link_bps: Mapping[str, float]
    sent: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of the last round, training and sending."""

    def update(self, assignment: Assignment) -> Update:
        term = assignment.work.importance()
        left = SPEC.hidden if term is None else round(SPEC.hidden * (1 - term.ratio))
        mask = [i < left for i in range(SPEC.hidden)] if term else None
        agent, n = assignment.agent, self.toy.data[assignment.agent].examples
        cost = forward_cost(SPEC)
        head = cost.body + cost.ffl + 3 * cost.head
        shared = 2 * (3 * cost.body + 2 * cost.head) + 3 * cost.ffl * (1 + left / SPEC.hidden)
        train_s = n * (head + shared) / self.madds_per_s[agent]
        before = self.sent.get(agent, 0)
        ledger = {
            Stage.TRAIN: EnergyReading(seconds=train_s * 0.9),
            Stage.PRUNE: EnergyReading(seconds=train_s * 0.1),
        }
        if before:
            ledger[Stage.SEND] = EnergyReading(seconds=8 * before / self.link_bps[agent])
        update = _update(agent, 0.1, mask, n, ledger=ledger, sent_bytes=before)
        self.sent[agent] = sum(array_bytes(frame_of(update)).values())
        self.seconds[agent] = train_s + 8 * self.sent[agent] / self.link_bps[agent]
        return update

    def round(self, state: State, number: int) -> State:
        self.seconds.clear()
        updates = [self.update(a) for a in self.toy.plan(state, number)]
        return self.toy.strategy.absorb(state, updates)


def _fleet(**settings: object) -> RealFleet:
    toy = _toy(rates="measured", **settings)
    return RealFleet(toy, {"d0": 4e7, "d1": 2e7, "d2": 1e7}, {"d0": 1e6, "d1": 3e5, "d2": 2e6})


def test_the_first_rounds_of_a_real_fleet_are_unpruned_and_the_next_end_in_time() -> None:
    fleet = _fleet()
    toy, state = fleet.toy, fleet.toy.begin()
    assert state.private == {}
    for number in (1, 2):  # the link shows with the second update: its ledger holds the first one's way up
        assert all(a.work.terms == () for a in toy.plan(state, number))
        state = fleet.round(state, number)
    slow = max(fleet.seconds.values())
    for number in (3, 4, 5):
        allocation = _strategy(toy).allocation(state, toy.context(number))
        assert list(allocation.shares) == ["d0", "d1", "d2"]
        assert allocation.threshold_s < slow
        state = fleet.round(state, number)
        assert max(fleet.seconds.values()) <= allocation.threshold_s * (1 + 1e-6)
        assert max(share.ratio for share in allocation.shares.values()) > 0.1


def test_what_was_measured_while_pruned_is_scaled_back_to_the_dense_model() -> None:
    fleet = _fleet(threshold_s=0.18)
    toy, state = fleet.toy, fleet.toy.begin()
    seen = []
    for number in range(1, 6):
        state = fleet.round(state, number)
        seen.append(_strategy(toy).devices(state, toy.context(number + 1)))
    cost, n = forward_cost(SPEC), toy.data["d1"].examples
    assert not seen[0]
    for devices in seen[1:]:
        device = devices[1]
        assert device.compute_s == pytest.approx(n * 3 * cost.ffl / 2e7)
        assert device.link == Wire(pytest.approx(3e5))
    kept = float(state.private["d1"]["train"][1])
    assert 0 < kept < 1, "the last measurement was of a pruned model"


def test_a_shared_access_point_bounds_them_all_together() -> None:
    fleet = _fleet(uplink_bps=5e5)
    state = fleet.toy.begin()
    for number in (1, 2):
        state = fleet.round(state, number)
    allocation = _strategy(fleet.toy).allocation(state, fleet.toy.context(3))
    assert sum(share.bandwidth for share in allocation.shares.values()) <= 5e5 * (1 + 1e-12)
    assert allocation.price > 0


def test_an_excluded_device_is_measured_again_after_some_rounds() -> None:
    fleet = _fleet(threshold_s=3.0)
    fleet.madds_per_s = {**fleet.madds_per_s, "d2": 1e5}
    toy, state = fleet.toy, fleet.toy.begin()
    for number in (1, 2):
        state = fleet.round(state, number)
    for number in range(3, 3 + ASKED_AGAIN):
        assert list(toy.strategy.excluded(state, toy.context(number))) == ["d2"]
        assert "d2" not in [a.agent for a in toy.plan(state, number)]
        state = fleet.round(state, number)
    again = 3 + ASKED_AGAIN
    assert not toy.strategy.excluded(state, toy.context(again))
    term = {a.agent: a.work.importance() for a in toy.plan(state, again)}["d2"]
    assert term is not None
    assert term.ratio == pytest.approx(1 - 2 / 16)  # 0.9 of 16 units, in whole units
    fleet.madds_per_s = {**fleet.madds_per_s, "d2": 1e7}  # it was busy, and is itself again
    state = fleet.round(state, again)
    assert not toy.strategy.excluded(state, toy.context(again + 1))
    assert list(_strategy(toy).allocation(state, toy.context(again + 1)).shares) == ["d0", "d1", "d2"]


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 1, "importance_epochs": 2}, "importance_epochs 2 is more than epochs 1"),
        ({"nearest_km": 1}, "nearest_km 1.0 and"),
        ({"fastest_hz": 1e8}, "fastest_hz 100000000.0"),
        ({"ratio_max": 1.0}, "ratio_max"),
        ({"treshold_s": 1.0}, "threshold_s"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load_strategy("adaptive_pruning", settings)
