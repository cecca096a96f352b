"""pFedLA: its gradient against autograd, its sign, its special cases, and whom it finds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from coordinator import mixing
from coordinator.strategies.base import State
from coordinator.strategies.fedavg import FedAvg
from coordinator.strategies.local import Local
from coordinator.strategies.pfedla import HELD, PFedLA
from foundation.errors import SettingsError
from foundation.messages import AgentCard, Update
from foundation.parameters import WEIGHTS, Array, BoolArray, Parameters, role_of
from foundation.spec import initial_parameters
from foundation.work import Phase
from tests.toys import SPEC, ToyFederation, same, toy_card, toy_data

OWN = 1
LAYERS = ("start", "blocks.0.attention", "blocks.0.ffl", "blocks.1.attention", "blocks.1.ffl", "end")
DENSE = initial_parameters(SPEC, 0).only(WEIGHTS)
MIXINGS = pytest.mark.parametrize("how", ["direct", "hypernetwork"])


def _drawn(seed: int, agents: int = 5, values: int = 40) -> tuple[Array, Array, Array]:
    """Offsets (1, agents), models (agents, values), what agent OWN trained (values,); float64."""
    rng = np.random.default_rng(seed)
    models = rng.standard_normal((agents, values))
    return rng.standard_normal((1, agents)), models, models[OWN] + rng.standard_normal(values)


def _step(offsets: Array, models: Array, trained: Array, known: BoolArray | None = None) -> mixing.Step:
    alpha = mixing.weights(offsets, OWN, known)
    return mixing.Step(alpha, np.array([OWN]), models, alpha @ models - trained)


def _distance(offsets: Array, models: Array, trained: Array) -> float:
    return float(((mixing.weights(offsets, OWN) @ models - trained) ** 2).sum() / 2)


def _rows(z: Tensor, own: int) -> Tensor:
    """The weights of `mixing.weights`, for autograd: z (layers, N)."""
    agents = z.shape[1]
    others = torch.tensor([j for j in range(agents) if j != own])
    logits = z.clone()
    count = math.log(agents - 1)
    logits[:, others] = z[:, others] - torch.logsumexp(z[:, others], 1, keepdim=True) + count
    logits[:, own] = z[:, own] + math.log(agents)
    return torch.softmax(logits, 1)


# --- the closed form (5.4: 1, 3, 4, 5) ---------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_closed_form_is_autograds_gradient(seed: int) -> None:
    offsets, models, trained = _drawn(seed)
    z = torch.tensor(offsets, requires_grad=True)
    rows = _rows(z, OWN)
    (((rows @ torch.tensor(models) - torch.tensor(trained)) ** 2).sum() / 2).backward()
    np.testing.assert_allclose(mixing.weights(offsets, OWN), rows.detach().numpy(), rtol=0, atol=1e-15)
    assert z.grad is not None
    found = _step(offsets, models, trained).gradient()
    np.testing.assert_allclose(found, z.grad.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_in_softmax_logits_it_is_the_sources(seed: int) -> None:
    """5.1: dF/dl_j = alpha_j <theta_j - bar, change>, carried over to the offsets by the chain rule."""
    offsets, models, trained = _drawn(seed)
    step = _step(offsets, models, trained)
    alpha, (change,) = step.alpha[0], step.changes
    source = alpha * ((models - alpha @ models) @ change)
    logits = torch.tensor(np.log(alpha), requires_grad=True)
    bar = torch.softmax(logits, 0) @ torch.tensor(models)
    (((bar - torch.tensor(trained)) ** 2).sum() / 2).backward()
    assert logits.grad is not None
    np.testing.assert_allclose(source, logits.grad.numpy(), rtol=0, atol=1e-12)
    assert source.sum() == pytest.approx(0, abs=1e-12)
    strangers = step.strangers[0]
    others = np.arange(len(alpha)) != OWN
    carried = np.where(others, source - strangers * source[others].sum(), source)
    np.testing.assert_allclose(step.gradient()[0], carried, rtol=0, atol=1e-12)


def test_the_closed_form_by_hand() -> None:
    # Self 2, strangers 0 and 4 with weights 1/2 and 1/8, 3/8: bar' = 3, bar = 2.5. Trained 4.5: change = -2.
    alpha, models = np.array([[0.5, 0.125, 0.375]]), np.array([[2.0], [0.0], [4.0]])
    step = mixing.Step(alpha, np.array([0]), models, np.array([[-2.0]]))
    assert step.strangers.tolist() == [[0, 0.25, 0.75]]
    assert step.brackets().tolist() == [[2, 6, -2]]  # (theta_j - 3) * -2
    assert step.gradient().tolist() == [[0.5, 0.75, -0.75]]  # times 1/2 * 1/2, 1/8, 3/8
    size = 2 * math.sqrt((1 + 9 + 1) / 3)
    np.testing.assert_allclose(step.direction(), [[2 / size, 6 / size, -2 / size]], atol=1e-15)
    np.testing.assert_allclose(step.direction(self_rate=0.1), [[0.2 / size, 6 / size, -2 / size]], atol=1e-15)


@pytest.mark.parametrize("which", ["gradient", "direction", "only strangers"])
@pytest.mark.parametrize("seed", range(5))
def test_a_step_goes_towards_what_was_trained(which: str, seed: int) -> None:
    offsets, models, trained = _drawn(seed)
    step = _step(offsets, models, trained)
    found = step.gradient() if which == "gradient" else step.direction(self_rate=float(which == "direction"))
    now, small = _distance(offsets, models, trained), 1e-3 * found
    assert _distance(offsets - small, models, trained) < now < _distance(offsets + small, models, trained)


def test_equal_models_give_no_gradient() -> None:
    model = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    alpha = mixing.weights(np.random.default_rng(1).standard_normal((1, 7)), 2).astype(np.float32)
    step = mixing.Step(alpha, np.array([2]), np.stack([model] * 7), np.ones((1, 1000), np.float32))
    assert not step.gradient().any()
    assert not step.direction().any()


def test_rows_are_of_the_simplex_and_the_unknown_have_no_weight() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        offsets, known, own = 30 * rng.standard_normal((6, 9)), rng.random((6, 9)) < 0.5, rng.integers(9)
        known[2], known[3], known[4] = False, np.arange(9) == own, np.arange(9) != own
        alpha = mixing.weights(offsets, own, known)
        assert (alpha >= 0).all()
        np.testing.assert_allclose(alpha.sum(-1), 1, rtol=0, atol=1e-12)
        there = known.any(-1)
        assert not alpha[~known & there[:, None]].any()
        np.testing.assert_allclose(alpha[2], mixing.weights(offsets[2:3], own)[0])
        assert alpha[3, own] == 1


def test_whom_one_listens_to_does_not_change_how_much() -> None:
    rng = np.random.default_rng(0)
    offsets = rng.standard_normal((4, 6))
    offsets[:, 1] = 0
    for strangers in (offsets, 20 * offsets):
        np.testing.assert_allclose(mixing.weights(strangers, 1)[:, 1], 6 / 11, rtol=0, atol=1e-12)


def test_the_unknown_neither_move_nor_count() -> None:
    offsets, models, trained = _drawn(3)
    known = np.array([[True, True, False, True, False]])
    found = _step(offsets, models, trained, known).direction(known[0])
    assert not found[~known].any()
    there, *_ = known
    alpha = mixing.weights(offsets, OWN, known)[:, there]
    fewer = mixing.Step(alpha, np.array([OWN]), models[there], alpha @ models[there] - trained)
    np.testing.assert_allclose(found[:, there], fewer.direction(), atol=1e-12)


# --- the hypernetwork --------------------------------------------------------------------------------


def _hypernetwork(seed: int, layers: int = 3, agents: int = 5) -> dict[str, Array]:
    """A hypernetwork in float64 that has learned something already."""
    drawn = mixing.widened_hypernetwork(mixing.new_hypernetwork(layers, 4, 6, [seed]), agents, 1)
    rng = np.random.default_rng(seed)
    return {
        name: array.astype(float) + 0.3 * rng.standard_normal(array.shape) for name, array in drawn.items()
    }


def _forward(network: Mapping[str, Tensor]) -> Tensor:
    h = network["embedding"]
    for i in range(2):
        h = torch.relu(network[f"trunk.{i}.weight"] @ h + network[f"trunk.{i}.bias"])
    return network["head.weight"] @ h + network["head.bias"]


@pytest.mark.parametrize("seed", range(3))
def test_the_whole_chain_is_autograds(seed: int) -> None:
    network = _hypernetwork(seed)
    rng = np.random.default_rng(seed)
    models = [rng.standard_normal((5, n)) for n in (3, 20, 8)]
    trained = [rng.standard_normal(m.shape[1]) for m in models]
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in network.items()}
    rows = _rows(_forward(tensors), OWN)
    losses = [
        ((row @ torch.tensor(m) - torch.tensor(t)) ** 2).sum() / 2
        for row, m, t in zip(rows, models, trained, strict=True)
    ]
    torch.stack(losses).sum().backward()
    alpha = mixing.weights(mixing.hypernetwork_offsets(network), OWN)
    np.testing.assert_allclose(alpha, rows.detach().numpy(), rtol=0, atol=1e-14)
    steps = [
        mixing.Step(a[None], np.array([OWN]), m, (a @ m - t)[None])
        for a, m, t in zip(alpha, models, trained, strict=True)
    ]
    found = mixing.backpropagated(network, np.concatenate([step.gradient() for step in steps]))
    for name, tensor in tensors.items():
        assert tensor.grad is not None
        np.testing.assert_allclose(found[name], tensor.grad.numpy(), rtol=0, atol=1e-11, err_msg=name)


def test_a_step_of_the_hypernetwork_descends() -> None:
    network = Parameters(_hypernetwork(0))
    cotangent = np.random.default_rng(0).standard_normal((3, 5))

    def along(rate: float) -> float:
        return float(
            (mixing.hypernetwork_offsets(mixing.stepped(network, cotangent, rate)) * cotangent).sum()
        )

    assert along(1e-3) < along(0) < along(-1e-3)
    # As far as logits stepped themselves would go, to first order.
    assert along(1e-5) - along(0) == pytest.approx(-1e-5 * (cotangent**2).sum(), rel=1e-3)
    still = mixing.stepped(network, 0 * cotangent, 1.0)
    assert same(still, network)


@MIXINGS
def test_everybody_starts_near_itself_whatever_was_drawn(how: str) -> None:
    strategy, agents = PFedLA(mixing=how), 7
    state = _begun(strategy, [f"d{i}" for i in range(agents)])
    state = strategy.absorb(state, [_update(agent, DENSE) for agent in state.private])
    for agent in state.private:
        for row in strategy.weights(state, agent).values():
            assert row.pop(agent) == pytest.approx(agents / (2 * agents - 1), rel=1e-6)
            assert list(row.values()) == pytest.approx([1 / (2 * agents - 1)] * (agents - 1), rel=1e-6)


# --- layers ------------------------------------------------------------------------------------------


def test_layers_are_groups_of_tensors_and_leave_none_out() -> None:
    spec = SPEC.model_copy(update={"pool": "cls"})
    names = [name for name, _ in spec.layout if role_of(name) in WEIGHTS]
    parts = mixing.layers_of(names, "parts")
    assert tuple(parts) == LAYERS
    assert parts["start"] == ("embed.weight", "embed.bias", "cls", "position")
    b = "blocks.0."
    assert parts["blocks.0.attention"] == tuple(
        b + n for n in ("norm1.weight", "norm1.bias", "attention.qkv.weight", "output.weight", "output.bias")
    )
    assert {n.split(".")[2] for n in parts["blocks.1.ffl"]} == {"norm2", "ffl"}
    assert parts["end"] == ("norm.weight", "norm.bias", "head.weight", "head.bias")
    assert tuple(mixing.layers_of(names, "blocks")) == ("start", "blocks.0", "blocks.1", "end")
    for grouping in ("parts", "blocks", "tensors"):
        together = [n for members in mixing.layers_of(names, grouping).values() for n in members]
        assert together == names


def test_a_layers_vector_is_cut_into_its_tensors_again() -> None:
    for names in mixing.layers_of(DENSE, "parts").values():
        back = mixing.tensors(mixing.vector(DENSE, names), names, DENSE)
        assert same(back, {n: DENSE[n] for n in names})


# --- special cases (5.4: 2, 7) -----------------------------------------------------------------------


def _begun(strategy: PFedLA, agents: Sequence[str], model: Parameters = DENSE) -> State:
    state = strategy.begin(model, 0)
    for agent in agents:
        state = strategy.enroll(state, AgentCard(agent=agent, version="0", profile="p", examples=1), 0)
    return state


def _update(agent: str, parameters: Parameters, examples: int = 1) -> Update:
    return Update(run="r", round=1, agent=agent, examples=examples, parameters=parameters)


def _with_offsets(state: State, agent: str, logits: Array) -> State:
    own = state.private[agent].updated({"mixing/offsets": logits})
    return State(state.round, state.shared, {**state.private, agent: own})


def test_one_hot_weights_are_local_training() -> None:
    alone, mixed = ToyFederation(Local()), ToyFederation(PFedLA(mixing_rate=0))
    a, b = alone.begin(), mixed.begin()
    for column, agent in enumerate(b.private):
        b = _with_offsets(b, agent, 1e4 * np.eye(3)[column] * np.ones((len(LAYERS), 1)))
    for number in (1, 2, 3):
        a, _ = alone.round(a, number)
        b, _ = mixed.round(b, number)
        for agent, (own, _) in alone.personal.items():
            assert same(own, b.private[agent].under("last/"))


def test_weights_by_examples_are_fedavg() -> None:
    averaged, mixed = ToyFederation(FedAvg()), ToyFederation(PFedLA(mixing_rate=0))
    for toy in (averaged, mixed):
        toy.data = {agent: toy_data(i, examples=16 * (i + 1)) for i, agent in enumerate(toy.data)}
        toy.cards = [toy_card(agent, data) for agent, data in toy.data.items()]
    a, b = averaged.begin(), mixed.begin()
    shares = np.array([1, 2, 3]) / 6
    for column, agent in enumerate(b.private):
        offsets = np.log(shares)
        share = shares[column]
        offsets[column] = math.log(share / (1 - share) * 2 / 3)  # self counts as 3 e^z, strangers as 2
        b = _with_offsets(b, agent, np.tile(offsets, (len(LAYERS), 1)))
    for number in (1, 2, 3):
        a, _ = averaged.round(a, number)
        b, _ = mixed.round(b, number)
        for agent in b.private:
            assert same(mixed.strategy.personal(b, agent), averaged.strategy.personal(a, agent), 2e-6)


def test_with_all_layers_retained_it_is_local_training() -> None:
    alone, retained = ToyFederation(Local()), ToyFederation(PFedLA(heuristic=len(LAYERS)))
    a, b = alone.begin(), retained.begin()
    for number in (1, 2, 3):
        assert all(not assignment.parameters for assignment in retained.plan(b, number))
        a, of_a = alone.round(a, number)
        b, of_b = retained.round(b, number)
        assert all(not update.parameters for update in of_b)
        assert [u.metrics["loss"] for u in of_a] == [u.metrics["loss"] for u in of_b]
    for agent, (own, _) in alone.personal.items():
        assert same(own, retained.personal[agent][0].only(WEIGHTS))


def test_with_none_retained_everything_travels_and_nothing_is_kept() -> None:
    toy = ToyFederation(PFedLA(heuristic=0))
    state = toy.begin()
    for number in (1, 2):
        for assignment in toy.plan(state, number):
            assert (assignment.work.own, assignment.work.keep) == ((), frozenset())
            assert assignment.parameters.layout == DENSE.layout
        state, _ = toy.round(state, number)


@pytest.mark.parametrize("k", range(len(LAYERS) + 1))
def test_bytes_are_those_of_the_layers_that_are_not_retained(k: int) -> None:
    toy = ToyFederation(PFedLA(heuristic=k))
    state = toy.begin()
    layers = mixing.layers_of(DENSE, "parts")
    for assignment in toy.plan(state, 1):
        retained = toy.strategy.retained(state, assignment.agent)
        assert len(retained) == k
        travelling = [n for layer, names in layers.items() if layer not in retained for n in names]
        formula = sum(4 * DENSE[name].size for name in travelling)
        assert assignment.parameters.nbytes == formula
        assert toy.work(assignment).parameters.nbytes == formula


# --- HeurpFedLA --------------------------------------------------------------------------------------


def test_the_most_self_weighted_layers_are_retained() -> None:
    strategy = PFedLA(heuristic=2)
    state = _begun(strategy, ["a", "b"])
    assert strategy.retained(state, "a") == ["blocks.1.ffl", "end"]  # equals: nearest to the answer
    logits = np.zeros((len(LAYERS), 2))
    logits[[0, 3], 0] = 1
    moved = _with_offsets(state, "a", logits)
    assert strategy.retained(moved, "a") == ["start", "blocks.1.attention"]
    assert strategy.retained(moved, "b") == ["blocks.1.ffl", "end"]


def test_a_layer_that_changes_hands_loses_nothing() -> None:
    toy = ToyFederation(PFedLA(heuristic=1, mixing_rate=0))
    state, updates = toy.round(toy.begin(), 1)
    assert all(not any(n.startswith(("norm.", "head.")) for n in u.parameters) for u in updates)
    assert state.private["d0"][HELD].tolist() == [False] * 5 + [True]
    trained = toy.personal["d0"][0]
    logits = np.zeros((len(LAYERS), 3))
    logits[0, 0] = 1
    state = _with_offsets(state, "d0", logits)  # the first layer is to be retained instead of the last
    (plan, *_) = toy.plan(state, 2)
    layers = mixing.layers_of(DENSE, "parts")
    assert set(plan.parameters) == set(DENSE) - {*layers["start"], *layers["end"]}
    # What comes back of the layer let go of is the device's own, which never was here before.
    still = plan.work.model_copy(update={"phases": (Phase(epochs=0),)})
    update = toy.work(plan.model_copy(update={"work": still}))
    assert all(np.array_equal(update.parameters[n], trained[n]) for n in layers["end"])
    assert not any(n in update.parameters for n in layers["start"])
    assert all(np.array_equal(toy.personal["d0"][0][n], trained[n]) for n in layers["start"])
    state = toy.strategy.absorb(state, [update])
    assert state.private["d0"][HELD].tolist() == [True] + [False] * 5
    assert set(toy.strategy.personal(state, "d0")) == set(DENSE) - {*layers["start"]}


def test_more_layers_than_there_are_cannot_stay() -> None:
    with pytest.raises(
        SettingsError, match="heuristic = 7, but the model has 6 layers as 'parts': give 6 or"
    ):
        PFedLA(heuristic=7).begin(initial_parameters(SPEC, 0), 0)
    PFedLA(heuristic=7, layers="tensors").begin(initial_parameters(SPEC, 0), 0)


# --- whom it finds (5.4: 5, 6, 8) --------------------------------------------------------------------


def _targets(widths: Sequence[int], agents: Sequence[str]) -> dict[str, Parameters]:
    """What each agent would train to: its cluster's, and a part of its own. The first half is one cluster."""
    rng = np.random.default_rng(0)
    names = ("embed.weight", "blocks.0.attention.qkv.weight", "head.weight")
    clusters = [{n: rng.standard_normal(w) for n, w in zip(names, widths, strict=True)} for _ in range(2)]
    return {
        agent: Parameters(
            {
                name: (target + 0.5 * rng.standard_normal(target.shape)).astype(np.float32)
                for name, target in clusters[2 * i >= len(agents)].items()
            }
        )
        for i, agent in enumerate(agents)
    }


def _rounds(
    strategy: PFedLA,
    targets: Mapping[str, Parameters],
    rounds: int,
    state: State | None = None,
) -> State:
    """Run rounds of devices that go a third of the way to their target."""
    if state is None:
        zero = Parameters((n, np.zeros_like(a)) for n, a in next(iter(targets.values())).items())
        state = _begun(strategy, [*targets], zero)
    for _ in range(rounds):
        updates = []
        for agent, target in targets.items():
            sent = strategy.personal(state, agent)
            trained = Parameters((n, (a + (target[n] - a) / 3).astype(np.float32)) for n, a in sent.items())
            updates.append(_update(agent, trained))
        state = strategy.absorb(state, updates)
    return state


def _mass(strategy: PFedLA, state: State, agents: Sequence[str]) -> float:
    """Mean weight inside the own cluster."""
    side = {agent: 2 * i >= len(agents) for i, agent in enumerate(agents)}
    found = [
        sum(weight for other, weight in row.items() if side[other] == side[agent])
        for agent in agents
        for row in strategy.weights(state, agent).values()
    ]
    return float(np.mean(found))


AGENTS = [f"d{i}" for i in range(8)]


@MIXINGS
@pytest.mark.parametrize("widths", [(8, 16, 8), (300, 9000, 20)])
def test_weight_gathers_inside_the_own_cluster_at_any_width(how: str, widths: tuple[int, ...]) -> None:
    strategy = PFedLA(mixing=how)
    targets, state, masses = _targets(widths, AGENTS), None, []
    for rounds in (1, 2, 2, 3):
        state = _rounds(strategy, targets, rounds, state)
        masses.append(_mass(strategy, state, AGENTS))
    assert masses == sorted(masses)
    assert masses[0] == pytest.approx(11 / 15, abs=1e-6)  # 8 on self and 1 on each of 3, of 8 + 7
    assert masses[-1] > 0.8


@MIXINGS
def test_no_unit_no_width(how: str) -> None:
    # Everything a hundred times larger, and a layer said thrice: the weights come out the same.
    strategy = PFedLA(mixing=how)
    once = _targets((30, 30, 30), AGENTS)
    thrice = {a: Parameters((n, np.tile(100 * w, 3)) for n, w in t.items()) for a, t in once.items()}
    a, b = (_rounds(strategy, targets, 5) for targets in (once, thrice))
    for agent in AGENTS:
        one, other = strategy.weights(a, agent), strategy.weights(b, agent)
        for layer in one:
            assert list(one[layer].values()) == pytest.approx([*other[layer].values()], abs=1e-4)


@MIXINGS
def test_the_first_rounds_gradient_is_zero(how: str) -> None:
    strategy = PFedLA(mixing=how)
    targets = _targets((8, 16, 8), AGENTS)
    begun, first, second = (_rounds(strategy, targets, n) for n in (0, 1, 2))
    assert len(strategy.weights(first, "d0")) == 3
    for agent in AGENTS:
        old, new = (s.private[agent].under("mixing/") for s in (begun, first))
        assert all(not new[n].any() for n in new if n.startswith(("offsets", "head")))
        assert all(np.array_equal(old[n], new[n]) for n in new if n.startswith(("embedding", "trunk")))
        assert any(a.any() for n, a in second.private[agent].items() if n.endswith(("offsets", "head.bias")))


@MIXINGS
def test_the_order_of_joining_only_permutes_columns(how: str) -> None:
    strategy = PFedLA(mixing=how)
    targets = _targets((8, 16, 8), AGENTS)
    order = ["d5", "d0", "d7", "d2", "d1", "d3", "d6", "d4"]
    permuted = {agent: targets[agent] for agent in order}
    a, b = _rounds(strategy, targets, 5), _rounds(strategy, permuted, 5)
    assert a.private["d5"]["column"].tolist() != b.private["d5"]["column"].tolist()
    for agent in AGENTS:
        one, other = strategy.weights(a, agent), strategy.weights(b, agent)
        for layer, row in one.items():
            assert row == pytest.approx(other[layer], abs=1e-5)


def test_names_do_not_matter() -> None:
    strategy = PFedLA()
    targets = _targets((8, 16, 8), AGENTS)
    called = dict(zip(AGENTS, ["z", "m", "a", "q", "b", "y", "c", "k"], strict=True))
    renamed = {called[agent]: target for agent, target in targets.items()}
    a, b = _rounds(strategy, targets, 5), _rounds(strategy, renamed, 5)
    for agent in AGENTS:
        for layer, row in strategy.weights(a, agent).items():
            there = strategy.weights(b, called[agent])[layer]
            assert {called[other]: w for other, w in row.items()} == pytest.approx(there, abs=1e-5)


# --- who comes and who goes --------------------------------------------------------------------------


def test_a_newcomer_counts_as_the_mean_stranger() -> None:
    logits = np.array([[1.0, 5.0, 3.0], [0.0, -1.0, 0.5]])
    assert mixing.widened(logits, 5, own=1).tolist() == [[1, 5, 3, 2, 2], [0, -1, 0.5, 0.25, 0.25]]
    assert mixing.widened(logits, 3, own=1) is logits
    assert mixing.widened(np.zeros((2, 0)), 2, own=1).tolist() == [[0, 0], [0, 0]]
    network = Parameters(_hypernetwork(0))
    wide = mixing.hypernetwork_offsets(mixing.widened_hypernetwork(network, 7, own=1))
    np.testing.assert_allclose(
        wide, mixing.widened(mixing.hypernetwork_offsets(network), 7, own=1), atol=1e-12
    )


@MIXINGS
def test_a_newcomer_adds_a_column_and_is_not_mixed_before_it_has_sent(how: str) -> None:
    strategy = PFedLA(mixing=how)
    targets = _targets((200, 400, 200), AGENTS)
    there = {agent: targets[agent] for agent in AGENTS[:7]}
    state = _rounds(strategy, there, 4)
    before = {agent: strategy.weights(state, agent) for agent in there}
    state = strategy.enroll(state, AgentCard(agent="d7", version="0", profile="p", examples=1), 0)
    for agent in there:
        for layer, row in strategy.weights(state, agent).items():
            assert row.pop("d7") == 0
            assert sum(row.values()) == pytest.approx(1, abs=1e-6)
            # Self counts as 8 strangers now, not 7; strangers count as they did among themselves.
            others = {o: w / (1 - row[agent]) for o, w in row.items() if o != agent}
            old = before[agent][layer]
            expected = {o: w / (1 - old[agent]) for o, w in old.items() if o != agent}
            assert others == pytest.approx(expected, abs=1e-5)
    for row in strategy.weights(state, "d7").values():
        assert row == pytest.approx(dict.fromkeys(there, 1 / 7) | {"d7": 0}, rel=1e-6)
    lasts = [state.private[agent]["last/head.weight"] for agent in there]
    np.testing.assert_allclose(
        strategy.personal(state, "d7")["head.weight"], np.mean(lasts, axis=0), rtol=0, atol=1e-6
    )
    state = _rounds(strategy, targets, 4, state)
    for row in strategy.weights(state, "d4").values():
        assert row["d7"] > max(row[agent] for agent in AGENTS[:4])
    assert _mass(strategy, state, AGENTS) > 0.8


def test_nothing_is_learned_about_who_has_sent_nothing() -> None:
    strategy = PFedLA()
    there = {agent: t for agent, t in _targets((8, 16, 8), AGENTS).items() if agent != "d7"}
    state = _rounds(strategy, there, 3)
    strangers = state.private["d0"]["mixing/offsets"][:, 1:]
    state = strategy.enroll(state, AgentCard(agent="d7", version="0", profile="p", examples=1), 0)
    state = _rounds(strategy, there, 1, state)
    after = state.private["d0"]["mixing/offsets"]
    np.testing.assert_allclose(after[:, 7], strangers.mean(axis=1), rtol=0, atol=1e-12)
    assert not np.allclose(after[:, 1:7], strangers, atol=1e-3)


def test_the_absent_keep_their_last_and_stay_in_the_mixture() -> None:
    strategy = PFedLA()
    targets = _targets((8, 16, 8), AGENTS)
    state = _rounds(strategy, targets, 2)
    away = state.private["d1"]
    state = _rounds(strategy, {agent: t for agent, t in targets.items() if agent != "d1"}, 3, state)
    assert same(state.private["d1"], away)
    assert all(row["d1"] > 0 for row in strategy.weights(state, "d0").values())


def test_a_rate_of_zero_leaves_the_weights_where_they_start() -> None:
    strategy = PFedLA(mixing_rate=0)
    state = _rounds(strategy, _targets((8, 16, 8), AGENTS), 4)
    assert _mass(strategy, state, AGENTS) == pytest.approx(11 / 15, abs=1e-6)


@pytest.mark.parametrize(
    "settings", [{"mixing": "hypernetwork"}, {"layers": "tensors", "heuristic": 2}, {"layers": "blocks"}]
)
def test_rows_stay_on_the_simplex_in_a_real_federation(settings: dict[str, object]) -> None:
    toy = ToyFederation(PFedLA(**settings, epochs=1))
    state = toy.begin()
    for number in (1, 2, 3):
        state, _ = toy.round(state, number)
        for agent in state.private:
            for row in toy.strategy.weights(state, agent).values():
                assert min(row.values()) >= 0
                assert math.fsum(row.values()) == pytest.approx(1, abs=1e-6)
