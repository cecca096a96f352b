"""MH-pFedHN's chunked multi-head hypernetwork: what is generated, its chain rule, and who may move."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
import torch

from coordinator import hypernet, multihead
from coordinator.aggregate import shares_of
from coordinator.multihead import Member, Sizes
from coordinator.strategies.base import RoundContext, State, load_strategy
from edge_agent.answer import arrived, weights_of
from foundation.codec import frame_of
from foundation.messages import Assignment, Update
from foundation.parameters import WEIGHTS, Parameters, layout_size
from foundation.spec import ModelSpec, initial_parameters
from tests.toys import SPEC, ToyFederation, same, toy_card, toy_data

SMALL = Sizes(chunk=7, bucket=2, embedding=5, hidden=6, rank=0)
LENGTHS = (10, 24, 33, 12, 33)
"""Of five vectors: 2, 4, 5, 2 and 5 chunks, in the groups 2, 4, 6, 2 and 6."""
SHARES = [0.1, 0.3, 0.2, 0.25, 0.15]
FAST = {"learning_rate": 5e-3, "epochs": 1, "chunk": 64, "bucket": 4, "rank": 4}

SERIES = ModelSpec(input="series", shape=(8, 3), classes=3, width=8, depth=1, heads=2, ffl_ratio=2, patch=2)
DEEPER = SPEC.model_copy(update={"depth": 3})
UNEQUAL = {"d1": DEEPER, "d2": SERIES}
GROUP = "hypernet/group/"


@pytest.fixture(params=[0, 3], ids=["full", "factored"])
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return dataclasses.replace(SMALL, rank=request.param)


def _network(sizes: Sizes, groups: Sequence[int] = (2, 4, 6)) -> Parameters:
    network = multihead.begin(sizes, 0)
    for group in groups:
        network = network.updated(multihead.new_head(sizes, group, 0, offset=False))
    return Parameters((name, array.astype(np.float64)) for name, array in network.items())


def _members(sizes: Sizes, lengths: Sequence[int] = LENGTHS) -> list[Member]:
    rows = [multihead.new_embeddings(sizes, length, [0, i]) for i, length in enumerate(lengths)]
    return [Member(n, r.astype(np.float64)) for n, r in zip(lengths, rows, strict=True)]


def _changes(lengths: Sequence[int] = LENGTHS) -> list[np.ndarray]:
    return [np.random.default_rng([1, i]).standard_normal(n) for i, n in enumerate(lengths)]


# ---- 1: what is generated ----


def test_a_vector_is_its_chunks_one_after_the_other_cut_to_its_size(sizes: Sizes) -> None:
    # By hand: theta = concat_c ( A_c f(V[c]) + b_c )[: K], the trunk written out.
    network, members = _network(sizes), _members(sizes)
    for member, vector in zip(members, multihead.generate(sizes, network, members), strict=True):
        group, pieces = sizes.group(member.size), []
        for c, v in enumerate(member.embeddings):
            f = v / np.linalg.norm(v) * np.sqrt(len(v))
            for i in range(3):
                f = np.maximum(network[f"trunk.{i}.weight"] @ f + network[f"trunk.{i}.bias"], 0)
            code = network["mix"] @ f if sizes.rank else f
            pieces.append(network[f"group/{group}/weight"][c] @ code + network[f"group/{group}/bias"][c])
        assert vector.shape == (member.size,)
        assert np.allclose(vector, np.concatenate(pieces)[: member.size], rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", [SPEC, DEEPER, SERIES], ids=["image", "deeper", "series"])
def test_every_weight_of_a_device_is_given_once(spec: ModelSpec) -> None:
    strategy = load_strategy("mh_pfedhn", FAST | {"offset": False})
    toy = ToyFederation(strategy, own_specs=dict.fromkeys(("d0", "d1", "d2"), spec))
    assignment = toy.plan(toy.begin(), 1)[0]
    size = layout_size(weights_of(spec))
    assert assignment.parameters["flat"].shape == (size,)
    numbered = assignment.model_copy(update={"parameters": Parameters({"flat": np.arange(size)})})
    sent = arrived(numbered, spec, {})
    assert sent.layout == weights_of(spec)
    assert np.array_equal(np.concatenate([array.ravel() for array in sent.values()]), np.arange(size))


def test_numbers_of_chunks_are_rounded_up_to_the_bucket() -> None:
    sizes = Sizes(chunk=3072, bucket=16)
    chunks = [sizes.chunks(n) for n in (1, 3072, 3073, 234_006, 565_386)]
    assert chunks == [1, 1, 2, 77, 185]  # the last two: CNN and ResNet18 of the official code
    assert [sizes.group(n) for n in (1, 3072 * 16, 3072 * 16 + 1, 234_006)] == [16, 16, 32, 80]
    exact = dataclasses.replace(sizes, bucket=1)
    assert exact.group(234_006) == 77


def test_what_a_device_gets_does_not_depend_on_who_else_is_there(sizes: Sizes) -> None:
    network = Parameters((name, array.astype(np.float32)) for name, array in _network(sizes).items())
    members = [Member(m.size, m.embeddings.astype(np.float32)) for m in _members(sizes)]
    together = multihead.generate(sizes, network, members)
    for member, vector in zip(members, together, strict=True):
        assert np.array_equal(multihead.generate(sizes, network, [member])[0], vector)


# ---- 2: the chain rule, and what has no gradient ----


@pytest.mark.parametrize("chunk_values", [1, 1 << 22])
def test_the_product_is_the_gradient_of_the_squared_distance(
    sizes: Sizes, chunk_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, members, changes = _network(sizes), _members(sizes), _changes()
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in network.items()}
    rows = [torch.tensor(member.embeddings, requires_grad=True) for member in members]
    sent = multihead.generate(sizes, network, members)
    for member, row, change, vector, share in zip(members, rows, changes, sent, SHARES, strict=True):
        trained = torch.tensor(vector - change)
        output = multihead._forward(tensors, row[None], sizes.group(member.size))[0, : member.size]
        (share / 2 * (output - trained).square().sum()).backward()
    monkeypatch.setattr(multihead, "CHUNK_VALUES", chunk_values)
    gradient, row_gradients = multihead.pull_back(sizes, network, members, changes, SHARES)
    assert same(gradient, {name: t.grad.numpy() for name, t in tensors.items() if t.grad is not None}, 1e-12)
    for got, row in zip(row_gradients, rows, strict=True):
        assert row.grad is not None
        assert np.allclose(got, row.grad.numpy(), rtol=0, atol=1e-12)
        assert np.abs(got).max() > 0


def test_heads_of_absent_groups_have_no_gradient_at_all(sizes: Sizes) -> None:
    network, members, changes = _network(sizes), _members(sizes), _changes()
    present = [i for i in range(5) if sizes.group(LENGTHS[i]) != 4]
    gradient, rows = multihead.pull_back(
        sizes, network, [members[i] for i in present], [changes[i] for i in present], [0.25] * 4
    )
    assert set(network) - set(gradient) == {"group/4/weight", "group/4/bias"}
    assert len(rows) == len(present)


def test_what_lies_beyond_a_vectors_end_has_no_gradient(sizes: Sizes) -> None:
    member, change = _members(sizes)[0], _changes()[0]
    gradient, _ = multihead.pull_back(sizes, _network(sizes), [member], [change], [1.0])
    assert np.allclose(gradient["group/2/bias"].ravel()[:10], change, rtol=0, atol=1e-12)
    assert not gradient["group/2/bias"].ravel()[10:].any()
    assert not gradient["group/2/weight"].reshape(14, -1)[10:].any()


def test_a_member_that_does_not_teach_moves_its_embeddings_alone(sizes: Sizes) -> None:
    network, members, changes = _network(sizes), _members(sizes), _changes()
    gradient, rows = multihead.pull_back(sizes, network, members, changes, SHARES)
    pupil = dataclasses.replace(members[1], teaches=False)  # the only one of its group
    less, same_rows = multihead.pull_back(sizes, network, [members[0], pupil, *members[2:]], changes, SHARES)
    assert set(gradient) - set(less) == {"group/4/weight", "group/4/bias"}
    assert not np.allclose(less["trunk.0.weight"], gradient["trunk.0.weight"])
    assert all(np.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(rows, same_rows, strict=True))


# ---- 3, 4: heads are found by number ----


def _cards(toy: ToyFederation) -> State:
    state = toy.strategy.begin(initial_parameters(toy.spec, 0), 0)
    for card in toy.cards:
        state = toy.strategy.enroll(state, card, 0)
    return state


def test_the_order_of_registration_does_not_matter() -> None:
    toy = ToyFederation(load_strategy("mh_pfedhn", FAST), own_specs=UNEQUAL)
    cards = list(toy.cards)
    known = _cards(toy)
    groups = [name for name in known.shared if name.startswith(GROUP) and name.endswith("/bias")]
    numbers = [int(name.split("/")[2]) for name in groups]
    assert len(numbers) == 3
    assert numbers == sorted(numbers)
    frames = {a.agent: frame_of(a) for a in toy.plan(known, 1)}
    for order in permutations(cards):
        toy.cards = list(order)
        state = _cards(toy)
        assert state.shared == known.shared
        assert list(state.shared) == list(known.shared)
        assert state.private == known.private
        assert {a.agent: frame_of(a) for a in toy.plan(state, 1)} == frames


def test_near_sizes_share_a_head_and_others_do_not() -> None:
    near = SPEC.model_copy(update={"ffl_ratio": 2.25})
    toy = ToyFederation(
        load_strategy("mh_pfedhn", FAST | {"bucket": 8}), own_specs={"d1": near, "d2": DEEPER}
    )
    state = _cards(toy)
    sizes = [card.size for card in toy.cards]
    assert sizes[0] < sizes[1] < sizes[2]
    heads = {name for name in state.shared if name.startswith(GROUP) and name.endswith("/bias")}
    assert heads == {f"{GROUP}24/bias", f"{GROUP}32/bias"}, sizes
    moved = state.shared.updated({f"{GROUP}24/bias": state.shared[f"{GROUP}24/bias"] + 1})
    after = dataclasses.replace(state, shared=moved)
    for agent, shares in (("d0", True), ("d1", True), ("d2", False)):
        before, now = (toy.strategy.personal(s, agent)["flat"] for s in (state, after))
        assert np.allclose(now, before + shares, atol=1e-6)


# ---- 5: the teacher ----


def _taught(alpha: float = 0.2) -> ToyFederation:
    settings = FAST | {"teacher": True, "alpha": alpha}
    return ToyFederation(load_strategy("mh_pfedhn", settings), own_specs=UNEQUAL)


def test_without_weight_on_the_teacher_devices_learn_what_they_would_without_one() -> None:
    alone = ToyFederation(load_strategy("mh_pfedhn", FAST), own_specs=UNEQUAL)
    taught = _taught(alpha=0.0)
    plain = [alone.work(a) for a in alone.plan(alone.begin(), 1)]
    with_teacher = [taught.work(a) for a in taught.plan(taught.begin(), 1)]
    for one, other in zip(plain, with_teacher, strict=True):
        assert np.array_equal(one.parameters["flat"], other.parameters["flat"])
    weighed = _taught(alpha=0.9)
    other = weighed.work(weighed.plan(weighed.begin(), 1)[0])
    assert not np.array_equal(plain[0].parameters["flat"], other.parameters["flat"])


def test_the_teacher_goes_to_those_whose_data_suit_it_and_comes_back() -> None:
    toy = _taught()
    state = toy.begin()
    names = {f"teacher/{name}" for name, _ in weights_of(SPEC)}
    for assignment in toy.plan(state, 1):
        suits = assignment.agent != "d2"  # its data are a series
        assert (assignment.work.distillation() is not None) == suits
        assert set(assignment.parameters) == {"flat"} | (names if suits else set())
        assert set(toy.work(assignment).parameters) == set(assignment.parameters)


def test_the_teacher_is_one_more_client_and_moves_towards_the_mean_of_what_was_trained() -> None:
    toy = _taught()
    toy = dataclasses.replace(toy, strategy=toy.strategy.model_copy(update={"hypernet_rate": 1e-4}))
    state = toy.begin()
    plan = list(toy.plan(state, 1))
    updates = [toy.work(a) for a in plan]
    after = toy.strategy.absorb(state, updates)
    lessons = [u for u in updates if u.agent != "d2"]
    sent = plan[0].parameters.under("teacher/")
    trained = {
        name: sum(p * (sent[name] - u.parameters[f"teacher/{name}"])
                  for p, u in zip(shares_of(lessons), lessons, strict=True))
        for name in sent
    }  # fmt: skip

    def distance(teacher: Parameters) -> float:
        return sum(float(np.square(teacher[name] - trained[name]).sum()) for name in trained)

    now = toy.plan(after, 2)[0].parameters.under("teacher/")
    assert distance(now) < distance(sent)
    assert not np.array_equal(after.shared["teacher/embedding"], state.shared["teacher/embedding"])


def test_a_teacher_that_nobody_trained_stands_still_with_its_moments() -> None:
    toy = _taught()
    state, _ = toy.round(toy.begin(), 1)
    series = [toy.work(a) for a in toy.plan(state, 2) if a.agent == "d2"]
    after = toy.strategy.absorb(state, series)
    own = [name for name in state.shared if "teacher/" in name]
    assert own
    assert all(np.array_equal(after.shared[name], state.shared[name]) for name in own)


def test_a_round_with_a_teacher_survives_writing_and_does_not_care_who_came_first() -> None:
    toy = _taught()
    state, _ = toy.round(toy.begin(), 1)
    back = State.from_bytes(state.to_bytes())
    assert back.to_bytes() == state.to_bytes()
    assert [frame_of(a) for a in toy.plan(back, 2)] == [frame_of(a) for a in toy.plan(state, 2)]
    updates = [toy.work(a) for a in toy.plan(state, 2)]
    after = toy.strategy.absorb(state, updates)
    assert toy.strategy.absorb(back, updates[::-1]).to_bytes() == after.to_bytes()
    nobody = toy.strategy.absorb(state, [])
    assert nobody == dataclasses.replace(state, round=2)


# ---- 6: the coordinator knows a size, not a model ----


def test_models_of_one_size_get_the_same_whatever_they_are() -> None:
    # An image model and a series model of equally many weights.
    a = ModelSpec(input="series", shape=(8, 2), classes=3, width=8, depth=1, heads=2, ffl_ratio=2, patch=2)
    b = ModelSpec(input="image", shape=(1, 4, 4), classes=3, width=8, depth=1, heads=2, ffl_ratio=2, patch=2)
    assert layout_size(weights_of(a)) == layout_size(weights_of(b))
    sent: list[list[Assignment]] = []
    for spec in (a, b):
        toy = ToyFederation(
            load_strategy("mh_pfedhn", FAST), spec=SPEC, own_specs=dict.fromkeys(("d0", "d1", "d2"), spec)
        )
        sent.append(list(toy.plan(toy.begin(), 1)))
    for one, other in zip(*sent, strict=True):
        assert same(one.parameters, other.parameters)
        assert one.work == other.work


def test_what_is_known_of_a_device_are_numbers() -> None:
    toy = ToyFederation(load_strategy("mh_pfedhn", FAST), own_specs=UNEQUAL)
    state, _ = toy.round(toy.begin(), 1)
    for card in toy.cards:
        own = state.private[card.agent]
        assert {name for name in own if not name.startswith("moments/")} == {"size_joined", "embedding"}
        assert own["size_joined"].tolist() == [card.size, 0]
        assert own["embedding"].shape == (-(-card.size // 64), 64)
    assert not [name for name in state.shared if "blocks" in name or "attention" in name]


def test_a_device_that_tells_no_size_is_left_out_with_the_reason() -> None:
    toy = ToyFederation(load_strategy("mh_pfedhn", FAST))
    toy.cards[1] = toy.cards[1].model_copy(update={"size": 0})
    state = toy.begin()
    context: RoundContext = toy.context(1)
    assert [a.agent for a in toy.plan(state, 1)] == ["d0", "d2"]
    assert list(toy.strategy.excluded(state, context)) == ["d1"]
    assert "no model size" in toy.strategy.excluded(state, context)["d1"]


def test_a_device_with_another_model_than_before_starts_anew() -> None:
    toy = ToyFederation(load_strategy("mh_pfedhn", FAST))
    state, _ = toy.round(toy.begin(), 1)
    card = toy_card("d1", toy_data(1), DEEPER)
    after = toy.strategy.enroll(state, card, 0)
    assert after.private["d1"]["size_joined"].tolist() == [card.size, 1]
    assert after.private["d0"] is state.private["d0"]
    assert toy.strategy.enroll(after, card, 0) is after
    assert toy.strategy.personal(after, "d1")["flat"].shape == (card.size,)


# ---- 7: newcomers, and who is absent ----


def _absorbed(toy: ToyFederation, state: State, agents: set[str]) -> tuple[State, list[Update]]:
    updates = [toy.work(a) for a in toy.plan(state, state.round + 1) if a.agent in agents]
    return toy.strategy.absorb(state, updates), updates


def test_a_newcomer_can_be_held_to_its_own_embeddings() -> None:
    toy = ToyFederation(load_strategy("mh_pfedhn", FAST | {"newcomer_rounds": 1}))
    everybody, toy.cards = toy.cards, toy.cards[:2]
    state, _ = toy.round(toy.begin(), 1)
    toy.cards = everybody
    state = toy.strategy.enroll(state, toy.cards[2], 0)
    after, _ = _absorbed(toy, state, {"d2"})
    assert after.shared == state.shared, "trunk and heads, and their moments"
    assert not np.array_equal(after.private["d2"]["embedding"], state.private["d2"]["embedding"])
    later, _ = _absorbed(toy, after, {"d2"})
    assert later.shared != after.shared, "from its second round on it teaches"


def test_heads_of_absent_groups_and_embeddings_of_absent_devices_do_not_move() -> None:
    toy = ToyFederation(load_strategy("mh_pfedhn", FAST), own_specs=UNEQUAL)
    state, _ = toy.round(toy.begin(), 1)  # with moments, which would move them
    after, _ = _absorbed(toy, state, {"d0"})
    mine = Sizes(chunk=64, bucket=4).group(toy.cards[0].size)
    for name, array in state.shared.items():
        part = name.removeprefix("moments/")
        absent = part.startswith(GROUP) and not part.startswith(f"{GROUP}{mine}/")
        assert np.array_equal(array, after.shared[name]) == absent, name
    assert after.private["d1"] == state.private["d1"]
    assert after.private["d2"] == state.private["d2"]


def test_a_long_gradient_is_clipped_as_a_whole() -> None:
    toy = ToyFederation(load_strategy("mh_pfedhn", FAST), own_specs=UNEQUAL)
    state = toy.begin()
    after, updates = _absorbed(toy, state, {"d0", "d1", "d2"})
    clipped = toy.strategy.model_copy(update={"hypernet_clip": 1e-3}).absorb(state, updates)

    def length(at: State) -> float:
        # After one step first moments are a tenth of the gradient.
        firsts = [a for n, a in at.shared.items() if "/first/" in n]
        firsts += [a for own in at.private.values() for n, a in own.items() if "/first/" in n]
        return float(np.sqrt(sum(np.square(a.astype(np.float64)).sum() for a in firsts)))

    assert length(clipped) == pytest.approx(1e-4, rel=1e-3)
    assert length(after) > 2e-4


# ---- 8: sparse changes; and where devices start ----


def test_the_largest_of_all_are_the_dense_change() -> None:
    dense = ToyFederation(load_strategy("mh_pfedhn", FAST))
    everything = ToyFederation(load_strategy("mh_pfedhn", FAST | {"topk": 1 - 1e-9}))
    few = ToyFederation(load_strategy("mh_pfedhn", FAST | {"topk": 0.3}))
    a, updates = dense.round(dense.begin(), 1)
    b, _ = everything.round(everything.begin(), 1)
    _, sparse = few.round(few.begin(), 1)
    assert a.to_bytes() == b.to_bytes()
    change, some = updates[0].parameters["flat"], sparse[0].parameters["flat"]
    assert np.count_nonzero(some) == round(0.3 * change.size)
    assert np.array_equal(some[some != 0], change[some != 0])


@pytest.mark.parametrize("heads", ["factored", "full"])
def test_devices_start_near_their_own_initial_model_or_from_what_is_generated_alone(heads: str) -> None:
    for offset in (True, False):
        settings = FAST | {"offset": offset, "heads": heads, "chunk": 3072, "rank": 16}
        toy = ToyFederation(load_strategy("mh_pfedhn", settings))
        assignment = toy.plan(toy.begin(), 1)[0]
        start = arrived(assignment, SPEC, {})
        away = (start - initial_parameters(SPEC, 0)).only(WEIGHTS).flat()
        assert (np.abs(away).mean() < 0.01) == offset
        assert 0.5 < assignment.parameters["flat"].std() / (multihead.SPREAD if offset else 0.05) < 2


def test_the_trunk_is_the_one_of_the_other_hypernetworks() -> None:
    drawn = hypernet.trunk((5, 6, 6, 6), np.random.default_rng([0, 0x3F4]))
    assert same(drawn, {n: a for n, a in multihead.begin(SMALL, 0).items() if n.startswith("trunk.")})
