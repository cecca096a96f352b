"""The allocation of bandwidth and pruning: against a generic solver, its conditions and its limits."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
from scipy.optimize import minimize

from coordinator.channel import Radio, Wire, rate_bps
from coordinator.wireless import Allocation, Device, Residuals, Share, allocate, reachable_s, residuals

CELLS = 200
RATIO_MAX = 0.9


def _radio_cell(rng: np.random.Generator, number: int) -> tuple[list[Device], float, float]:
    """Two to eight devices at 50 to 500 m and 10 to 23 dBm; every other cell is the usual one, D0 = 0."""
    unprunable = number % 2
    devices = [
        Device(
            agent=f"d{i}",
            fixed_s=rng.uniform(0, 1),
            fixed_bits=unprunable * rng.uniform(0, 3e6),
            compute_s=rng.uniform(0.01, 2),
            bits=rng.uniform(1e5, 5e6),
            link=Radio(power_dbm=rng.uniform(10, 23), distance_km=rng.uniform(0.05, 0.5)),
            weight=rng.uniform(0.5, 2),
        )
        for i in range(rng.integers(2, 9))
    ]
    return devices, *_between(rng, devices, 10 ** rng.uniform(6, 7.3))


def _wire_cell(rng: np.random.Generator, number: int) -> tuple[list[Device], float, float]:
    devices = [
        dataclasses.replace(d, link=Wire(rng.uniform(1e6, 1e7)), compute_s=d.compute_s * (number % 4 > 0))
        for d in _radio_cell(rng, number)[0]
    ]
    return devices, *_between(rng, devices, 10 ** rng.uniform(6.5, 7.7))


def _between(rng: np.random.Generator, devices: list[Device], bandwidth: float) -> tuple[float, float]:
    """A threshold between pruning everything and pruning nothing."""
    short, long = reachable_s(devices, bandwidth, RATIO_MAX), reachable_s(devices, bandwidth)
    return rng.uniform(short, long), bandwidth


@functools.cache
def _solved(kind: str) -> list[tuple[list[Device], Allocation]]:
    rng = np.random.default_rng(20230918)
    make = _radio_cell if kind == "radio" else _wire_cell
    cells = [make(rng, number) for number in range(CELLS)]
    return [(devices, allocate(devices, t, b, ratio_max=RATIO_MAX)) for devices, t, b in cells]


# --- optimality ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Generic:
    """Problem (1) as it stands, for SLSQP; rates, slopes and constraints written anew."""

    devices: list[Device]
    threshold_s: float
    bandwidth: float

    def __post_init__(self) -> None:
        self.a = np.array([d.fixed_s for d in self.devices])
        self.d0 = np.array([d.fixed_bits for d in self.devices])
        self.c = np.array([d.compute_s for d in self.devices])
        self.d = np.array([d.bits for d in self.devices])
        self.w = np.array([d.weight for d in self.devices])
        loss = [128.1 + 37.6 * np.log10(d.link.distance_km) for d in self.devices]
        self.s = 10 ** ((np.array([d.link.power_dbm for d in self.devices]) - loss + 174) / 10)

    def split(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        ratio, b = z[: len(self.w)], np.maximum(z[len(self.w) :], 1e-9) * self.bandwidth
        x = self.s / b
        return ratio, b, b * np.log2(1 + x), np.log2(1 + x) - x / ((1 + x) * np.log(2))

    def left(self, z: np.ndarray) -> np.ndarray:
        """Seconds left before the threshold, relative to what pruning shrinks; then the bandwidth left."""
        ratio, b, r, _ = self.split(z)
        shrinks = self.c + self.d / r
        seconds = self.a + self.d0 / r + (1 - ratio) * shrinks
        return np.append((self.threshold_s - seconds) / shrinks, 1 - b.sum() / self.bandwidth)

    def left_slope(self, z: np.ndarray) -> np.ndarray:
        _, _, r, slope = self.split(z)
        room = self.threshold_s - self.a - self.d0 / r
        shrinks = self.c + self.d / r
        by_rate = self.d0 / r**2 / shrinks + room * self.d / r**2 / shrinks**2
        k = len(self.w)
        by_b = np.diag(by_rate * slope * self.bandwidth)
        return np.block([[np.eye(k), by_b], [np.zeros((1, k)), -np.ones((1, k))]])

    def best(self, rng: np.random.Generator) -> float:
        """The lowest objective of up to three starts that end well; SLSQP gets lost from some."""
        k, found = len(self.w), []
        for start in range(40):
            shares = np.full(k, 1 / k) if start == 0 else rng.dirichlet(np.full(k, 5.0))
            result = minimize(
                lambda z: float(self.w @ z[:k]),
                np.concatenate([np.full(k, RATIO_MAX), shares]),
                jac=lambda z: np.concatenate([self.w, np.zeros(k)]),
                bounds=[(0, RATIO_MAX)] * k + [(1e-9, 1)] * k,
                constraints={"type": "ineq", "fun": self.left, "jac": self.left_slope},
                method="SLSQP",
                options={"maxiter": 200, "ftol": 1e-12},
            )
            if self.left(result.x).min() > -1e-9:
                found.append(float(result.fun))
            if len(found) == 3 or (found and start >= 4):
                break
        return min(found)


def test_two_hundred_random_cells_agree_with_a_generic_solver() -> None:
    rng = np.random.default_rng(1)
    for devices, allocation in _solved("radio"):
        assert not allocation.excluded
        best = Generic(devices, allocation.threshold_s, allocation.bandwidth).best(rng)
        assert allocation.objective == pytest.approx(best, rel=0, abs=1e-6)


@pytest.mark.parametrize("kind", ["radio", "wire"])
def test_every_solution_is_feasible_and_meets_the_conditions_of_kkt(kind: str) -> None:
    pruned = 0
    for devices, allocation in _solved(kind):
        assert list(allocation.shares) == [d.agent for d in devices]
        assert residuals(allocation).worst < 1e-9
        pruned += sum(share.ratio > 0.01 for share in allocation.shares.values())
    assert pruned > CELLS, "cells where nobody prunes prove nothing"


def test_residuals_see_what_is_wrong() -> None:
    allocation = next(a for _, a in _solved("radio") if all(0.01 < s.ratio < 0.89 for s in a.shares.values()))
    first, second, *_ = allocation.shares

    def residual(changes: dict[str, dict[str, float]], **fields: float) -> Residuals:
        shares = {
            agent: dataclasses.replace(share, **changes.get(agent, {}))
            for agent, share in allocation.shares.items()
        }
        return residuals(dataclasses.replace(allocation, shares=shares, **fields))

    share = allocation.shares[first]
    assert residual({first: {"ratio": share.ratio - 0.01}}).latency > 1e-4
    assert residual({first: {"ratio": share.ratio + 0.01}}).slackness > 1e-4
    assert residual({first: {"ratio": 0.95}}).ratio == pytest.approx(0.05)
    assert residual({first: {"bandwidth": share.bandwidth + 0.1 * allocation.bandwidth}}).bandwidth > 0.01
    assert residual({}, price=allocation.price * 1.1).stationarity > 0.01
    # Feasible and with every constraint tight, but bandwidth taken from one and given to another.
    moved = 0.05 * min(share.bandwidth, allocation.shares[second].bandwidth)
    tight = {}
    for agent, b in ((first, share.bandwidth - moved), (second, allocation.shares[second].bandwidth + moved)):
        d = allocation.shares[agent].device
        r = rate_bps(d.link, b)
        keep = (allocation.threshold_s - d.fixed_s - d.fixed_bits / r) / (d.compute_s + d.bits / r)
        tight[agent] = {"bandwidth": b, "ratio": 1 - keep}
    worse = residual(tight)
    assert max(worse.latency, worse.bandwidth, worse.slackness) < 1e-9
    assert worse.stationarity > 1e-3


def test_pruning_by_hand() -> None:
    # 8 s for 2 s + 4 Mbit + (1 - rho) (4 s + 8 Mbit) at 2 Mbit/s: 4 s are left for 8 s, so half has to go.
    device = Device("pi", fixed_s=2, fixed_bits=4e6, compute_s=4, bits=8e6, link=Wire(2e6))
    share = allocate([device], 8, 5e6).shares["pi"]
    assert share.ratio == pytest.approx(0.5)
    assert share.rate_bps == pytest.approx(2e6)
    assert share.upload_s == pytest.approx(4)
    assert share.latency_s == pytest.approx(8)
    assert share.radiated_j is None


def test_the_share_kept_rises_with_the_rate_and_bends_down_with_the_slope_that_is_claimed() -> None:
    a, d0, c, d, t = 0.3, 2e6, 1.2, 4e6, 2.5

    def q(r: np.ndarray) -> np.ndarray:
        return ((t - a) * r - d0) / (c * r + d)

    r = np.linspace(1e6, 2e7, 400)
    step = 1.0
    numeric = (q(r + step) - q(r - step)) / (2 * step)
    claimed = ((t - a) * d + c * d0) / (c * r + d) ** 2
    assert np.allclose(numeric, claimed, rtol=1e-6)
    assert (np.diff(claimed) < 0).all()
    by_definition = 1 - (1 - (t - a - d0 / r) / (c + d / r))
    assert np.allclose(q(r), by_definition, rtol=1e-12)


def test_a_wire_gets_its_closed_form() -> None:
    # Without D0 and away from all bounds: B = (sqrt(w S D / lambda) - D) / c.
    devices = [
        Device("a", 0.5, 0, 2.0, 4e6, Wire(1e9), weight=1.0),
        Device("b", 0.2, 0, 1.5, 6e6, Wire(1e9), weight=1.3),
    ]
    allocation = allocate(devices, 2.0, 8e6)
    for share in allocation.shares.values():
        assert 0.1 < share.ratio < 0.8
        d, slack = share.device, 2.0 - share.device.fixed_s
        closed = (math.sqrt(d.weight * slack * d.bits / allocation.price) - d.bits) / d.compute_s
        assert share.bandwidth == pytest.approx(closed, rel=1e-9)


def test_where_only_the_way_up_shrinks_the_dearest_device_is_served_first() -> None:
    # With c = 0 on a wire the gain of a bit/s is constant: a linear program, solved by the gains' order.
    devices = [Device(n, 1, 0, 0, 4e6, Wire(1e9), weight=w) for n, w in (("a", 1), ("b", 3), ("c", 2))]
    allocation = allocate(devices, 2.0, 7e6)
    ratios = {agent: share.ratio for agent, share in allocation.shares.items()}
    # At least 0.4 Mbit/s each; "b" gets all of its 4, "c" what is left.
    assert ratios == {
        "a": pytest.approx(0.9),
        "b": pytest.approx(0, abs=1e-9),
        "c": pytest.approx(1 - 2.6 / 4),
    }


# --- rates ---------------------------------------------------------------------------------------


def test_the_channel_by_hand() -> None:
    radio = Radio(power_dbm=20, distance_km=0.1)  # loss 128.1 - 37.6 = 90.5 dB; 20 - 90.5 + 174 = 103.5 dB Hz
    assert radio.snr_hz == pytest.approx(10**10.35)
    assert radio.power_w == pytest.approx(0.1)
    assert rate_bps(radio, 1e6) == pytest.approx(1e6 * math.log2(1 + 10**4.35))
    assert rate_bps(Wire(3e6), 2e6) == 2e6
    assert rate_bps(Wire(3e6), 5e6) == 3e6
    share = Share(Device("pi", 0, 1e6, 1, 4e6, radio), ratio=0.5, bandwidth=1e6)
    assert share.radiated_j == pytest.approx(0.1 * 3e6 / rate_bps(radio, 1e6))


def test_a_radio_rate_rises_towards_its_limit() -> None:
    radio = Radio(power_dbm=10, distance_km=2)
    rates = [rate_bps(radio, b) for b in np.geomspace(1, 1e15, 60)]
    assert (np.diff(rates) > 0).all()
    assert rates[-1] == pytest.approx(radio.snr_hz / math.log(2), rel=1e-6)
    assert rate_bps(radio, 0) == pytest.approx(0, abs=1e-100)


@pytest.mark.parametrize("bandwidth", [1e3, 1e6, 1e9, 1e13])
def test_the_price_is_right_from_strong_signals_to_weak_ones(bandwidth: float) -> None:
    # Signal to noise from 2e7 down to 2e-3: where log(1 + x) and x / (1 + x) nearly cancel, too.
    devices = [Device(f"d{i}", 0.1 * i, 1e2 * i, 1, 1e4, Radio(20, 0.1 + 0.02 * i)) for i in range(4)]
    scaled = [dataclasses.replace(d, bits=d.bits * 2 * bandwidth / 1e4) for d in devices]
    threshold = (reachable_s(scaled, bandwidth) + reachable_s(scaled, bandwidth, RATIO_MAX)) / 2
    allocation = allocate(scaled, threshold, bandwidth)
    assert allocation.price > 0
    assert residuals(allocation).worst < 1e-9


# --- limits and order ----------------------------------------------------------------------------


def test_a_long_threshold_prunes_nobody() -> None:
    devices, allocation = _solved("radio")[0]
    relaxed = allocate(devices, 1e6, allocation.bandwidth)
    assert relaxed.objective == 0
    assert relaxed.price == 0
    assert relaxed.latency_s < reachable_s(devices, allocation.bandwidth) * 20, "spare bandwidth is used"
    assert residuals(relaxed).worst < 1e-9


def test_no_bandwidth_is_infeasible_in_words() -> None:
    devices, allocation = _solved("radio")[1]
    nobody = allocate(devices, allocation.threshold_s, 1e-3)
    assert not nobody.shares
    assert set(nobody.excluded) == {d.agent for d in devices}
    assert all("whole uplink to itself" in reason for reason in nobody.excluded.values())


def test_identical_devices_get_the_same() -> None:
    for link, bandwidth in ((Radio(20, 0.2), 2e6), (Wire(1e7), 1e7)):
        one = Device("d0", 0.4, 5e5, 1.0, 3e6, link)
        devices = [dataclasses.replace(one, agent=f"d{i}") for i in range(5)]
        threshold = (reachable_s(devices, bandwidth, RATIO_MAX) + reachable_s(devices, bandwidth)) / 2
        shares = list(allocate(devices, threshold, bandwidth).shares.values())
        assert 0.05 < shares[0].ratio < 0.85
        for share in shares:
            assert share.ratio == pytest.approx(shares[0].ratio, abs=1e-9)
            assert share.bandwidth == pytest.approx(bandwidth / 5, rel=1e-9)


@pytest.mark.parametrize("number", range(0, 40, 4))
def test_more_time_bandwidth_power_or_speed_never_means_more_pruning(number: int) -> None:
    devices, before = _solved("radio")[number]
    t, b = before.threshold_s, before.bandwidth

    def total(devices: list[Device], t: float, b: float) -> float:
        solved = allocate(devices, t, b, ratio_max=RATIO_MAX)
        assert not solved.excluded
        return sum(share.ratio for share in solved.shares.values())

    equal = [dataclasses.replace(d, weight=1.0) for d in devices]
    base = total(equal, t, b)
    stronger = [
        dataclasses.replace(d, link=dataclasses.replace(d.link, power_dbm=d.link.power_dbm + 3))
        for d in equal
    ]
    faster = [dataclasses.replace(d, fixed_s=d.fixed_s / 1.3, compute_s=d.compute_s / 1.3) for d in equal]
    for eased in (
        total(equal, t * 1.05, b),
        total(equal, t, b * 1.2),
        total(stronger, t, b),
        total(faster, t, b),
    ):
        assert eased <= base + 1e-9


def test_a_worse_channel_never_gets_less_pruning() -> None:
    devices = [Device(f"d{i}", 0.4, 5e5, 1.0, 3e6, Radio(20, 0.08 + 0.05 * i)) for i in range(6)]
    threshold = (reachable_s(devices, 3e6, RATIO_MAX) + reachable_s(devices, 3e6)) / 2
    ratios = [share.ratio for share in allocate(devices, threshold, 3e6).shares.values()]
    assert ratios == sorted(ratios)
    assert ratios[0] < ratios[-1]


@pytest.mark.parametrize("kind", ["radio", "wire"])
def test_everybody_ends_in_time_and_those_who_prune_just_in_time(kind: str) -> None:
    for _, allocation in _solved(kind):
        for share in allocation.shares.values():
            assert share.latency_s <= allocation.threshold_s * (1 + 1e-9)
            if 1e-6 < share.ratio < RATIO_MAX - 1e-6:
                assert share.latency_s == pytest.approx(allocation.threshold_s, rel=1e-9)


def test_whole_units_round_up_and_stay_in_time() -> None:
    for _, allocation in _solved("radio")[:20]:
        whole = allocation.in_units(64)
        for agent, share in whole.shares.items():
            exact = allocation.shares[agent].ratio
            units = share.ratio * 64
            assert units == pytest.approx(round(units), abs=1e-9)
            assert exact - 1e-7 <= share.ratio < exact + 1 / 64
            assert share.latency_s <= allocation.threshold_s * (1 + 1e-5)
    exact = dataclasses.replace(allocation.shares["d0"], ratio=0.25)
    assert dataclasses.replace(allocation, shares={"d0": exact}).in_units(64).shares["d0"].ratio == 0.25


def test_the_reachable_threshold_is_the_edge_of_what_is_feasible() -> None:
    for devices, allocation in _solved("radio")[:20]:
        b = allocation.bandwidth
        unpruned, hardest = reachable_s(devices, b), reachable_s(devices, b, RATIO_MAX)
        assert allocate(devices, unpruned, b).objective == pytest.approx(0, abs=1e-6)
        assert allocate(devices, unpruned * 0.99, b).objective > 1e-4
        at_edge = allocate(devices, hardest, b, ratio_max=RATIO_MAX)
        assert not at_edge.excluded
        assert residuals(at_edge).worst < 1e-6
        assert allocate(devices, hardest * 0.99, b, ratio_max=RATIO_MAX).excluded
    assert reachable_s([], 1e6) == 0


# --- those who cannot ----------------------------------------------------------------------------


def test_the_slow_are_excluded_with_the_reason() -> None:
    fine = Device("fine", 0.1, 0, 0.5, 1e6, Wire(1e7))
    slow = dataclasses.replace(fine, agent="slow", fixed_s=3)
    heavy = dataclasses.replace(fine, agent="heavy", compute_s=30)
    weak = dataclasses.replace(fine, agent="weak", link=Wire(1e3))
    allocation = allocate([slow, fine, heavy, weak], 2, 1e7)
    assert list(allocation.shares) == ["fine"]
    assert "slower than the threshold of 2 s even without anything to prune" in allocation.excluded["slow"]
    assert "it needs 3 s" in allocation.excluded["slow"]
    for agent in ("heavy", "weak"):
        assert "with the whole uplink to itself and 90% of its units pruned" in allocation.excluded[agent]
    assert "needs 3.11 s" in allocation.excluded["heavy"]  # 0.1 + 0.1 (30 + 1e6 / 1e7)
    assert "needs 100.1 s" in allocation.excluded["weak"]  # 0.1 + 0.1 (0.5 + 1e6 / 1e3)


def test_without_room_for_all_the_most_demanding_go_one_by_one() -> None:
    # Each needs its bits within a second: 4, 3, 2 and 1 Mbit/s when 90 % is pruned; 6 are there.
    devices = [Device(f"d{m}", 1, 0, 0, m * 1e7, Wire(1e9)) for m in (1, 4, 2, 3)]
    allocation = allocate(devices, 2, 6e6)
    assert list(allocation.excluded) == ["d4"]
    reason = allocation.excluded["d4"]
    assert "not enough bandwidth for everyone" in reason
    assert "4 devices need 1e+07 bit/s of 6e+06" in reason
    assert list(allocate(devices, 2, 4e6).excluded) == ["d4", "d3"]
    assert residuals(allocation).worst < 1e-9


def test_a_device_with_nothing_to_prune_takes_what_it_needs_and_no_more() -> None:
    stiff = Device("stiff", 0.5, 2e6, 0, 0, Wire(1e8))
    silent = Device("silent", 0.5, 0, 0.5, 0, Wire(1e8))
    other = Device("other", 0.5, 0, 1, 8e6, Wire(1e8))
    allocation = allocate([stiff, silent, other], 1.5, 6e6)
    assert allocation.shares["stiff"].bandwidth == pytest.approx(2e6)
    assert allocation.shares["stiff"].ratio == 0
    assert allocation.shares["silent"].bandwidth == pytest.approx(0, abs=1e-3)
    assert allocation.shares["other"].bandwidth == pytest.approx(4e6)
    assert residuals(allocation).worst < 1e-9


def test_everything_may_go_where_everything_may_be_pruned() -> None:
    devices = [Device(f"d{i}", 0.5, 0, 1, 8e6, Radio(10, 0.5), weight=1 + i) for i in range(3)]
    allocation = allocate(devices, 0.6, 1e4, ratio_max=1)
    assert not allocation.excluded
    assert residuals(allocation).worst < 1e-9
    assert allocation.latency_s <= 0.6 * (1 + 1e-9)


def test_nobody_is_no_error() -> None:
    empty = allocate([], 1, 1)
    assert not empty.shares
    assert empty.objective == empty.latency_s == 0
    assert residuals(empty).worst == 0


@pytest.mark.parametrize(
    ("devices", "threshold_s", "bandwidth", "ratio_max", "words"),
    [
        ([], 0, 1, 0.9, "threshold"),
        ([], 1, 0, 0.9, "bandwidth"),
        ([], 1, 1, 1.1, "ratio"),
        ([Device("a", 1, 1, 1, 1, Wire(1))] * 2, 1, 1, 0.9, "same name"),
        ([Device("a", -1, 1, 1, 1, Wire(1))], 1, 1, 0.9, "a: costs"),
        ([Device("a", 1, math.nan, 1, 1, Wire(1))], 1, 1, 0.9, "a: costs"),
        ([Device("a", 1, 1, 1, 1, Wire(1), weight=0)], 1, 1, 0.9, "weights positive"),
        ([Device("a", 0, 1, 1, 1, Wire(1)), Device("b", 0, 1, 1, 1, Radio(1, 1))], 9, 9, 0.9, "one kind"),
    ],
)
def test_figures_that_cannot_be_are_refused(
    devices: list[Device], threshold_s: float, bandwidth: float, ratio_max: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        allocate(devices, threshold_s, bandwidth, ratio_max=ratio_max)
