"""Who gets how much of the uplink and who prunes how much, so that a round ends in time. numpy, no torch.

    minimise    sum_k w_k rho_k
    subject to  T_k <= T_th ,   sum_k B_k <= B ,   0 <= rho_k <= rho_max
    T_k = a_k + D0_k / r_k + (1 - rho_k) (c_k + D_k / r_k) ,   r_k = r_k(B_k)                   (1)

    a  fixed_s      c  compute_s    w  weight     rho  ratio        T_th  threshold_s
    D0 fixed_bits   D  bits         r  rate_bps   B    bandwidth

The setting is that of "Adaptive Model Pruning and Personalization for Federated Learning over Wireless
Networks" (arXiv 2309.01816), whose text we could not read: model and solution are our own. c and D are the
seconds and bits that pruning shrinks. Whole FFL units are pruned and nothing else, so D0 and a part of a are
left whatever is pruned; with D0 = 0 the problem is the usual one.

Given r, the least pruning that meets the threshold is closed form, with S = T_th - a:

    rho = [1 - q]_+ ,   q = (S r - D0) / (c r + D) ,   dq/dr = (S D + c D0) / (c r + D)^2        (2)

q rises with r and bends down, r(B) does too, so q(B) is concave and a price lambda of bandwidth decides:

    w dq/dr r'(B) = lambda     between the bandwidth of q = 1 - rho_max and that of q = 1        (3)

A bisection on lambda meets the sum of bandwidths; inside it a bracketed Newton step finds every B(lambda).
Bandwidth is in Hz where links are radios, in bit/s where they are wires to an access point (channel.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.channel import TINY, Channel, Link, Radio, Wire, channel_of, rate_bps
from foundation.parameters import Array

_HALVINGS = 64


@dataclass(frozen=True, slots=True)
class Device:
    """What a round costs one device without pruning, split into what pruning shrinks and what it does not."""

    agent: str
    fixed_s: float
    """Seconds that no pruning changes: the way down, the personal phase, the dense epochs, attention."""
    fixed_bits: float
    """Bits up that no pruning changes."""
    compute_s: float
    """Seconds of training that shrink with the share of units that is kept."""
    bits: float
    """Bits up that shrink with it."""
    link: Link
    weight: float = 1.0
    """What pruning this device costs, by unit of ratio."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one device got."""

    device: Device
    ratio: float
    """Share of its units that goes."""
    bandwidth: float

    @property
    def rate_bps(self) -> float:
        """Rate up."""
        return rate_bps(self.device.link, self.bandwidth)

    @property
    def upload_s(self) -> float:
        """Seconds on the way up; infinite for bits without a rate."""
        bits = self.device.fixed_bits + (1 - self.ratio) * self.device.bits
        return float(_seconds(np.array(bits), np.array(self.rate_bps)))

    @property
    def latency_s(self) -> float:
        """Seconds of the whole round; eq. 1."""
        return self.device.fixed_s + (1 - self.ratio) * self.device.compute_s + self.upload_s

    @property
    def radiated_j(self) -> float | None:
        """Energy that leaves the antenna, p (D0 + (1 - rho) D) / r; None without one.

        Not what the device draws from its supply: never to be added to joules of a meter or a power model.
        """
        return self.device.link.power_w * self.upload_s if isinstance(self.device.link, Radio) else None


@dataclass(frozen=True, slots=True)
class Allocation:
    """The solution: who takes part, with what, and who does not, with the reason."""

    threshold_s: float
    bandwidth: float
    ratio_max: float
    shares: Mapping[str, Share]
    """By agent, in the order given."""
    excluded: Mapping[str, str]
    """Reasons by agent."""
    price: float
    """lambda of eq. 3: how much less of the objective another unit of bandwidth would bring; 0 when there is
    more than enough."""

    @property
    def objective(self) -> float:
        """sum_k w_k rho_k."""
        return math.fsum(s.device.weight * s.ratio for s in self.shares.values())

    @property
    def latency_s(self) -> float:
        """Seconds until the last of those who take part is done."""
        return max((share.latency_s for share in self.shares.values()), default=0.0)

    def in_units(self, units: int) -> Allocation:
        """Return the same with every ratio rounded up to whole units of `units`: latencies only fall."""
        shares = {
            agent: dataclasses.replace(share, ratio=1 - math.floor(units * (1 - share.ratio) + 1e-6) / units)
            for agent, share in self.shares.items()
        }
        return dataclasses.replace(self, shares=shares)


def allocate(
    devices: Sequence[Device], threshold_s: float, bandwidth: float, *, ratio_max: float = 0.9
) -> Allocation:
    """Return the least pruning, weighted, with which everybody who takes part meets the threshold.

    `bandwidth` is in Hz for radios and bit/s for wires. Devices that cannot meet the threshold, and, one by
    one from the most demanding on, those for whom no bandwidth is left, are excluded with a reason. Bandwidth
    that nobody needs is shared out in proportion. Raises `ValueError` for figures that cannot be.
    """
    _checked(devices, bandwidth, ratio_max)
    if not threshold_s > 0:
        raise ValueError(f"a threshold of {threshold_s} s is not positive")
    excluded = {d.agent: why for d in devices if (why := _too_slow(d, threshold_s, bandwidth, ratio_max))}
    inside = [d for d in devices if d.agent not in excluded]
    while inside:
        low = _Cell.of(inside).needed(1 - ratio_max, threshold_s, bandwidth)
        if low.sum() <= bandwidth:
            break
        most = int(np.argmax(low))
        excluded[inside[most].agent] = _no_room(inside, low, most, bandwidth, ratio_max)
        del inside[most]
    shares: dict[str, Share] = {}
    price = 0.0
    if inside:
        cell = _Cell.of(inside)
        given, price = _shared_out(cell, threshold_s, bandwidth, ratio_max)
        kept = np.clip(cell.retention(cell.channel.rate(given), threshold_s), 1 - ratio_max, 1)
        for device, b, keep in zip(inside, given, kept, strict=True):
            shares[device.agent] = Share(device, 1 - float(keep), float(b))
    return Allocation(threshold_s, bandwidth, ratio_max, shares, excluded, price)


def reachable_s(devices: Sequence[Device], bandwidth: float, ratio: float = 0.0) -> float:
    """Return the shortest threshold that all devices meet when each prunes `ratio`, bandwidth shared best.

    It lies one part in a billion above the bound, so that it is met in floating point as well.
    """
    _checked(devices, bandwidth, ratio)
    if not devices:
        return 0.0
    equal = bandwidth / len(devices)
    high = max(Share(d, ratio, equal).latency_s for d in devices)
    low, cell = max(d.fixed_s + (1 - ratio) * d.compute_s for d in devices), _Cell.of(devices)
    for _ in range(_HALVINGS):
        if high <= low * (1 + 1e-12):
            break
        middle = (low + high) / 2
        if cell.needed(1 - ratio, middle, bandwidth).sum() <= bandwidth:
            high = middle
        else:
            low = middle
    return high * (1 + 1e-9)


@dataclass(frozen=True, slots=True)
class Residuals:
    """How far an allocation is from the conditions of Karush, Kuhn and Tucker; all are 0 at the optimum.

    Latency and bandwidth are relative to threshold and total; stationarity is relative to the weight, and
    slackness, in units of the objective, is mu (T_th - T) and lambda (B - sum B).
    """

    latency: float
    bandwidth: float
    ratio: float
    stationarity: float
    slackness: float

    @property
    def worst(self) -> float:
        """The largest of them."""
        return max(self.latency, self.bandwidth, self.ratio, self.stationarity, self.slackness)


def residuals(allocation: Allocation) -> Residuals:
    """Return the residuals of (1) with the multipliers lambda = `price` and mu_k = w_k / (c_k + D_k / r_k).

    Where rho_k sits at a bound, mu_k is what the condition on B_k asks for, and the bound's own multiplier
    has to have the right sign. Only for an allocation as it was solved, not `in_units`.
    """
    shares = list(allocation.shares.values())
    left = allocation.bandwidth - math.fsum(s.bandwidth for s in shares)
    stationarity, slack = [0.0], [abs(allocation.price * left)]
    for share in shares:
        mu, off = _multiplier(share, allocation)
        stationarity.append(off)
        slack.append(mu * abs(allocation.threshold_s - share.latency_s))
    late = max((s.latency_s / allocation.threshold_s - 1 for s in shares), default=0.0)
    out = max((max(-s.ratio, s.ratio - allocation.ratio_max) for s in shares), default=0.0)
    over = -left / allocation.bandwidth
    return Residuals(max(0.0, late), max(0.0, over), max(0.0, out), max(stationarity), max(slack))


def _multiplier(share: Share, allocation: Allocation) -> tuple[float, float]:
    """Return mu of one device's latency, and by how much stationarity fails, relative to its weight."""
    device, rate, price = share.device, share.rate_bps, allocation.price
    slope = float(channel_of([device.link]).slope(np.array([share.bandwidth]))[0])
    steep = _over(device.fixed_bits + (1 - share.ratio) * device.bits, rate) / rate if rate else math.inf
    seconds = device.compute_s + _over(device.bits, rate)
    interior = 1e-9 < share.ratio < allocation.ratio_max - 1e-9
    if interior:  # mu from the condition on rho; what fails is the one on B: mu steep r' = lambda
        mu = device.weight / seconds
        gain = mu * steep * slope
        saturated = isinstance(device.link, Wire) and share.bandwidth >= device.link.link_bps * (1 - 1e-12)
        off = max(0.0, price - mu * steep) if saturated else abs(price - gain)
        return mu, off / max(price, gain, TINY)
    mu = price / (steep * slope) if price and steep * slope > 0 else 0.0
    pull = mu * seconds / device.weight - 1  # <= 0 at rho = 0, >= 0 at rho = rho_max
    return mu, max(0.0, pull if share.ratio <= 1e-9 else -pull)


# --- inside --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cell:
    """Devices as columns."""

    channel: Channel
    a: Array
    d0: Array
    c: Array
    d: Array
    w: Array

    @classmethod
    def of(cls, devices: Sequence[Device]) -> _Cell:
        rows = [(d.fixed_s, d.fixed_bits, d.compute_s, d.bits, d.weight) for d in devices]
        return cls(channel_of([d.link for d in devices]), *np.array(rows, np.float64).T)

    def retention(self, rate: Array, threshold_s: float) -> Array:
        """Return q of eq. 2: the share of units a device can keep; 1 and above where nothing has to go."""
        room = threshold_s - self.a - _seconds(self.d0, rate)
        seconds = self.c + _seconds(self.d, rate)
        q: Array = np.divide(room, seconds, out=np.ones_like(room), where=seconds > 0)
        return q

    def gain(self, bandwidth: Array, threshold_s: float) -> Array:
        """Return the left side of eq. 3."""
        rate = self.channel.rate(bandwidth)
        top = (threshold_s - self.a) * self.d + self.c * self.d0
        bottom = np.maximum(np.square(self.c * rate + self.d), TINY)
        result: Array = self.w * top / bottom * self.channel.slope(bandwidth)
        return result

    def bend(self, bandwidth: Array) -> Array:
        """Return d log gain / d log B: not above 0, and 0 where the gain is constant."""
        channel, b = self.channel, bandwidth
        bits = np.maximum(self.c * channel.rate(b) + self.d, TINY)
        slope = np.maximum(channel.slope(b), TINY)
        result: Array = b * (channel.curve(b) / slope - 2 * self.c * slope / bits)
        return result

    def needed(self, keep: float, threshold_s: float, most: float) -> Array:
        """Return the least bandwidth with which q >= keep; infinite where `most` is not enough."""
        bits, room = keep * self.d + self.d0, threshold_s - self.a - keep * self.c
        rate = np.divide(bits, room, out=np.full_like(bits, np.inf), where=room > 0)
        rate = np.where((bits == 0) & (room >= 0), 0.0, rate)
        return self.channel.inverse(rate, most)


def _shared_out(cell: _Cell, threshold_s: float, bandwidth: float, ratio_max: float) -> tuple[Array, float]:
    """Return everybody's bandwidth and its price: bisection on the price, eq. 3 inside."""
    less = cell.needed(1 - ratio_max, threshold_s, bandwidth)
    wanted = np.minimum(cell.needed(1, threshold_s, bandwidth), cell.channel.useful())
    # Where more bandwidth does not save any pruning, nobody wants more than is needed.
    wanted = np.where((cell.d > 0) | (cell.c * cell.d0 > 0), np.maximum(less, wanted), less)
    total = wanted.sum()
    if total <= bandwidth:
        spare: Array = wanted * (bandwidth / total) if total > 0 else wanted
        return spare, 0.0
    more = np.minimum(wanted, bandwidth)
    low, high = _prices(cell, threshold_s, less, more)
    for _ in range(3 * _HALVINGS):
        if high <= low * (1 + 1e-13):
            break
        price = math.sqrt(low) * math.sqrt(high)
        given = _at_price(cell, threshold_s, price, less, more)
        if given.sum() < bandwidth:
            high, less = price, given
        else:
            low, more = price, given
    # Where the gain does not fall (c = 0 on a wire) a price leaves an interval: divide what is left along it.
    gap = more.sum() - less.sum()
    part = min(1.0, max(0.0, (bandwidth - less.sum()) / gap)) if gap > 0 else 0.0
    return less + part * (more - less), math.sqrt(low) * math.sqrt(high)


def _prices(cell: _Cell, threshold_s: float, less: Array, more: Array) -> tuple[float, float]:
    """Return a price at which everybody takes the most and one at which everybody takes the least."""
    free = more > less
    last, first = cell.gain(more, threshold_s)[free], cell.gain(less, threshold_s)[free]
    return float(last.min()) * 0.5, float(first.max()) * 2


def _at_price(cell: _Cell, threshold_s: float, price: float, low: Array, high: Array) -> Array:
    """Return B with gain(B) = price, or the end of [low, high] nearest to it; the gain falls with B."""
    high = np.where(cell.gain(low, threshold_s) <= price, low, high)
    low = np.where(cell.gain(high, threshold_s) >= price, high, low)
    b = (low + high) / 2
    for _ in range(_HALVINGS):
        gain = cell.gain(b, threshold_s)
        low, high = np.where(gain > price, b, low), np.where(gain > price, high, b)
        # Newton on logarithms, where both are nearly straight; half the way where it leaves the bracket.
        far = np.log(np.maximum(gain, TINY) / price) / np.maximum(-cell.bend(b), TINY)
        nearer = b * np.exp(np.clip(far, -50, 50))
        nearer = np.where((nearer > low) & (nearer < high), nearer, (low + high) / 2)
        nearer = np.where(np.abs(far) <= 1e-15, b, nearer)
        if np.all(np.abs(nearer - b) <= 1e-14 * b):
            break
        b = nearer
    return b


def _too_slow(device: Device, threshold_s: float, bandwidth: float, ratio_max: float) -> str | None:
    """Return why a device cannot meet the threshold even alone, or None."""
    alone = Share(device, ratio_max, bandwidth).latency_s
    if device.fixed_s >= threshold_s:
        return (
            f"slower than the threshold of {threshold_s:.4g} s even without anything to prune or to send: it"
            f" needs {device.fixed_s:.4g} s; a threshold above {alone:.4g} s would let it in"
        )
    low = _Cell.of([device]).needed(1 - ratio_max, threshold_s, bandwidth)[0]
    if low <= bandwidth:
        return None
    return (
        f"slower than the threshold of {threshold_s:.4g} s: with the whole uplink to itself and"
        f" {ratio_max:.0%} of its units pruned it needs {alone:.4g} s"
    )


def _no_room(devices: Sequence[Device], low: Array, most: int, bandwidth: float, ratio_max: float) -> str:
    unit = "Hz" if isinstance(devices[most].link, Radio) else "bit/s"
    return (
        f"not enough bandwidth for everyone: with {ratio_max:.0%} of all units pruned {len(devices)} devices"
        f" need {low.sum():.4g} {unit} of {bandwidth:.4g}, and this one needs the most, {low[most]:.4g}"
    )


def _seconds(bits: Array, rate: Array) -> Array:
    """Return bits / rate; nothing to send takes no time, whatever the rate."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.divide(
            bits, rate, out=np.zeros(np.broadcast_shapes(bits.shape, rate.shape)), where=bits > 0
        )


def _over(bits: float, rate: float) -> float:
    return float(_seconds(np.array(bits), np.array(rate)))


def _checked(devices: Sequence[Device], bandwidth: float, ratio: float) -> None:
    if len({d.agent for d in devices}) < len(devices):
        raise ValueError("two devices have the same name")
    if not (bandwidth > 0 and 0 <= ratio <= 1):
        raise ValueError(f"bandwidth {bandwidth} is not positive, or ratio {ratio} is not in [0, 1]")
    for d in devices:
        costs = (d.fixed_s, d.fixed_bits, d.compute_s, d.bits)
        if not (all(0 <= cost < math.inf for cost in costs) and 0 < d.weight < math.inf):
            raise ValueError(f"{d.agent}: costs are finite and not negative, weights positive: {d}")
