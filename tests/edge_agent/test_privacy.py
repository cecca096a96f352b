"""Clipping, noise and its price: against an integral, a published value and a looser bound."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from edge_agent.privacy import FILE, Privacy, Spent, delta_of, epsilon_of, secret_noise
from edge_agent.settings import PrivacySettings
from foundation.errors import SettingsError, WorkRefused
from foundation.parameters import WEIGHTS, Array, Parameters, Role
from foundation.transport import MemoryBroker
from foundation.work import ImportancePruning, LocalWork, ThresholdPruning
from tests.fleet import fleet, memory, run_settings

HEAD, QKV = "head.weight", "blocks.0.attention.qkv.weight"
MIXED = LocalWork(send=WEIGHTS, change=frozenset({Role.ATTENTION}))


# --- the accountant ------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.05, 0.2, 1.0, 4.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 5.0])
def test_delta_is_the_integral_it_stands_for(epsilon: float, mu: float) -> None:
    """delta(epsilon) = integral of max(0, p - e^epsilon q), p and q normal and mu apart."""
    x = np.linspace(-12, 12 + mu, 400_001)
    p, q = (np.exp(-((x - m) ** 2) / 2) / math.sqrt(2 * math.pi) for m in (mu, 0.0))
    integral = np.maximum(0, p - math.exp(epsilon) * q).sum() * (x[1] - x[0])
    assert delta_of(epsilon, mu) == pytest.approx(integral, abs=1e-7)


def test_the_noise_for_epsilon_1() -> None:
    """The root of theorem 8 in sigma at epsilon 1, delta 1e-5, sensitivity 1: mpmath, 40 digits."""
    assert epsilon_of(1 / 3.730631634815941832249822575, 1e-5) == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("mu", [0.1, 0.5, 2.0, 10.0, 60.0])
def test_exact_is_never_above_the_bound_of_renyi_accountants(mu: float) -> None:
    """RDP of the Gaussian mechanism: alpha mu^2 / 2 + log(1 / delta) / (alpha - 1), Mironov 2017."""
    best = min(a * mu**2 / 2 + math.log(1e5) / (a - 1) for a in np.linspace(1.01, 500, 50_000))
    found = epsilon_of(mu, 1e-5)
    assert 0 < found < best
    assert found > best / 2, "and not far below it"
    assert delta_of(found, mu) <= 1e-5


def test_nothing_spent_is_nothing() -> None:
    assert epsilon_of(0.0, 1e-5) == 0.0
    assert delta_of(0.0, 0.0) == 0.0
    assert epsilon_of(1e-9, 1e-5) == 0.0


def test_releases_add_up_over_the_vaults_life(tmp_path: Path) -> None:
    spent = Spent.load(tmp_path, 1e-5)
    for _ in range(4):
        ahead = spent.epsilon(10.0)
        spent.spend(10.0)
        assert spent.epsilon() == pytest.approx(ahead)
    again = Spent.load(tmp_path, 1e-5)
    assert again.releases == 4
    assert again.epsilon() == spent.epsilon() == pytest.approx(epsilon_of(2 / 10 * 2, 1e-5))


@pytest.mark.parametrize("body", ["", "{", "[]", '{"releases": 1}', '{"releases": -1, "square": 0}'])
def test_a_broken_account_is_not_an_empty_one(tmp_path: Path, body: str) -> None:
    (tmp_path / FILE).write_text(body)
    with pytest.raises(SettingsError, match="what was spent stays spent"):
        Spent.load(tmp_path, 1e-5)


# --- what leaves ---------------------------------------------------------------------------------


def arrays(**values: object) -> Parameters:
    names = {"head": HEAD, "qkv": QKV}
    return Parameters((names[n], np.array(v, np.float32)) for n, v in values.items())


def test_the_change_is_clipped_as_one_vector_whatever_its_form(tmp_path: Path) -> None:
    privacy = Privacy(PrivacySettings(clip=1.0), tmp_path)
    sent = arrays(head=[[10, 10]], qkv=[[1]])
    # The head comes as values, its change being (3, 0); attention as a change of 4: together 5.
    found = privacy.released(arrays(head=[[7, 10]], qkv=[[4]]), sent, MIXED)
    assert found[HEAD].tolist() == [[pytest.approx(10 - 0.6), 10]]
    assert found[QKV].tolist() == [[pytest.approx(0.8)]]
    assert privacy.told() == {}, "without noise there is nothing to tell"
    assert not privacy.silent
    small = arrays(head=[[10, 9.5]], qkv=[[0.5]])
    assert privacy.released(small, sent, MIXED) == small


def test_noise_is_on_every_value_and_as_large_as_it_says(tmp_path: Path) -> None:
    drawn = iter((np.array([1.0, -2.0]), np.array([0.5])))
    privacy = Privacy(PrivacySettings(clip=2.0, noise=3.0), tmp_path, lambda count: next(drawn))
    sent = arrays(head=[[10, 10]], qkv=[[1]])
    found = privacy.released(arrays(head=[[10, 10]], qkv=[[0]]), sent, MIXED)
    assert found[HEAD].tolist() == [[10 - 6, 10 + 12]]
    assert found[QKV].tolist() == [[3]]
    assert privacy.told() == {"epsilon": epsilon_of(2 / 3, 1e-5), "delta": 1e-5}
    assert privacy.silent
    assert not Privacy(PrivacySettings(clip=2.0, noise=3.0, metrics=True), tmp_path).silent


def test_nothing_configured_changes_nothing(tmp_path: Path) -> None:
    update = arrays(head=[[1, 2]])
    assert Privacy(PrivacySettings(), tmp_path).released(update, {}, MIXED) is update
    assert not (tmp_path / FILE).exists()


def test_what_cannot_be_bounded_does_not_leave(tmp_path: Path) -> None:
    privacy = Privacy(PrivacySettings(clip=1.0, noise=1.0), tmp_path)
    with pytest.raises(WorkRefused, match=r"nothing was sent that head\.weight could be a change of"):
        privacy.released(arrays(head=[[1, 2]]), {}, MIXED)
    for term in (ThresholdPruning(), ImportancePruning()):
        with pytest.raises(WorkRefused, match="which ones stay tells of the data"):
            privacy.allow(LocalWork(terms=(term,)))
    privacy.allow(MIXED)


def test_the_budget_is_a_promise(tmp_path: Path) -> None:
    privacy = Privacy(PrivacySettings(clip=1.0, noise=10.0, epsilon=1.0), tmp_path, np.zeros)
    for _ in range(int(1.0 / epsilon_of(0.2, 1e-5))):  # once: one more would be 1.06
        privacy.allow(MIXED)
        privacy.released(arrays(qkv=[[1]]), {}, MIXED)
    with pytest.raises(WorkRefused, match=r"privacy: epsilon 0\.\d+ of 1 is spent \(delta 1e-05\)"):
        privacy.allow(MIXED)
    assert privacy.spent is not None
    assert privacy.spent.epsilon() <= 1.0 < privacy.spent.epsilon(10.0)


def test_noise_without_a_bound_is_refused() -> None:
    with pytest.raises(ValidationError, match="set clip as well"):
        PrivacySettings(noise=1.0)
    with pytest.raises(ValidationError, match="set noise as well"):
        PrivacySettings(clip=1.0, epsilon=1.0)


def test_secret_noise_is_normal_and_never_the_same() -> None:
    drawn: Array = secret_noise(200_001)  # more than one chunk, and an odd number
    assert np.isfinite(drawn).all()
    assert abs(drawn.mean()) < 0.02  # nine deviations
    assert abs(drawn.std() - 1) < 0.02
    ordered = np.sort(drawn)
    for x, below in ((-1.959964, 0.025), (-0.674490, 0.25), (0.0, 0.5), (0.674490, 0.75), (1.959964, 0.975)):
        assert abs(np.searchsorted(ordered, x) / len(drawn) - below) < 0.01
    assert not np.array_equal(secret_noise(4), secret_noise(4))
    assert secret_noise(0).shape == (0,)


# --- in a federation -----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_private_device_tells_what_it_spent_and_nothing_of_its_data(tmp_path: Path) -> None:
    once, twice, thrice = (epsilon_of(math.sqrt(n) * 2 / 8, 1e-5) for n in (1, 2, 3))
    own = PrivacySettings(clip=0.5, noise=8.0, epsilon=(twice + thrice) / 2)
    run = run_settings(strategy="fedavg", settings={"epochs": 1}, rounds=3, export=True)
    async with fleet(tmp_path, memory(MemoryBroker()), run, privacy={"d1": own}) as whole:
        assert await whole.finished() == "finished"
        assert whole.store is not None
        assert whole.engine is not None
        rounds = [[u.agent for u in whole.store.updates("r", n)] for n in (1, 2, 3)]
        assert rounds == [["d0", "d1", "d2"], ["d0", "d1", "d2"], ["d0", "d2"]], "two are what it pays for"
        (refusal,) = [r for r in whole.store.refusals("r") if r.agent == "d1"]
        assert refusal.reason.startswith(f"privacy: epsilon {twice:.3g} of ")
        told = [u.summary for u in whole.store.history("r") if u.agent == "d1"]
        assert [set(t["metrics"]) for t in told] == [{"epsilon", "delta"}] * 2
        assert all(t["artifact"] is None for t in told)
        assert [t["metrics"]["epsilon"] for t in told] == pytest.approx([once, twice])
        status = whole.engine.live.agent("d1")
        assert status is not None
        assert status.epsilon == told[-1]["metrics"]["epsilon"]
        assert status.accuracy is None
        other = whole.engine.live.agent("d0")
        assert other is not None
        assert other.epsilon is None
