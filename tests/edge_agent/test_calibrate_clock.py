"""Clocks, a GPU and power modes in a calibration: on made-up file trees, with loads that really run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from edge_agent.calibration.clock_pins import ClockPins, domains_of
from edge_agent.calibration.fit import fit, model_of
from edge_agent.calibration.loads import CLOCK, CORES, GPU, IDLE, NETWORK, Load
from edge_agent.calibration.meters import Seen, Span
from edge_agent.calibration.session import Session, Timing
from edge_agent.calibration.use import OTHER_MODE, calibrated, place_for
from edge_agent.energy.gpu_load import gpu_load
from edge_agent.energy.link import Link
from edge_agent.energy.meter import Meter
from edge_agent.energy.utilisation import Utilisation
from foundation.calibration import Calibration, MeterKind, full_at
from foundation.energy import Scope, Stage
from foundation.errors import HedgerowError, SensorError
from foundation.profile import DeviceProfile
from tests.calibrations import FAST_MHZ, FULL_W, IDLE_W, MADE, SLOW_MHZ, calibration_of, steps_of
from tests.devices import CLOCK as DOMAIN
from tests.devices import ORIN, STATUS, written
from tests.processes import until

PI4 = DeviceProfile.load("raspberry-pi-4b")
SOON: datetime = MADE + timedelta(days=1)
GPU_FILE = "sys/devices/gpu.0/load"


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """A Jetson whose clock follows its cap at once."""
    root = written(tmp_path / "root", ORIN)
    (root / DOMAIN / "scaling_cur_freq").unlink()
    (root / DOMAIN / "scaling_cur_freq").symlink_to("scaling_max_freq")
    return root


def cap(root: Path) -> str:
    return (root / DOMAIN / "scaling_max_freq").read_text().strip()


# --- holding the clock -----------------------------------------------------------------------------


def test_a_clock_is_held_to_what_it_can_run_at_and_put_back(orin: Path) -> None:
    domains, why = domains_of(orin)
    assert why is None
    with ClockPins(domains) as pins:
        assert pins.hold(0.0) == 115.2
        assert cap(orin) == "115200"
        assert pins.hold(0.5) == 806.4
        assert cap(orin) == "806400"
        assert pins.hold(1.0) is None
        assert cap(orin) == "1510400"
        pins.hold(0.5)
    assert cap(orin) == "1510400"


def hold_and(then: Callable[[], object], root: Path) -> None:
    with ClockPins(domains_of(root)[0]) as pins:
        pins.hold(0.0)
        then()


def test_an_error_puts_the_clock_back_as_well(orin: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        hold_and(lambda: 1 / 0, orin)
    assert cap(orin) == "1510400"


def test_where_the_clock_cannot_be_held_the_reason_is_said(orin: Path, tmp_path: Path) -> None:
    assert domains_of(tmp_path / "nothing") == ([], "the kernel does not show the processor's clock")
    (orin / DOMAIN / "scaling_min_freq").write_text("1510400")
    assert domains_of(orin) == ([], "the clock is fixed")
    (orin / DOMAIN / "scaling_max_freq").unlink()
    assert "run this as root" in str(domains_of(orin)[1])
    with ClockPins([]) as pins:
        assert pins.hold(0.0) is None


def test_a_clock_that_cannot_be_put_back_is_said_with_what_does_it(orin: Path) -> None:
    file = orin / DOMAIN / "scaling_max_freq"
    with pytest.raises(HedgerowError, match=r"echo 1510400 > .*scaling_max_freq"):
        hold_and(lambda: (file.unlink(), file.mkdir()), orin)


PROGRAM = """
import signal, sys, time
from pathlib import Path
from edge_agent.calibration.clock_pins import ClockPins, domains_of
signal.signal(signal.SIGINT, signal.default_int_handler)
with ClockPins(domains_of(Path(sys.argv[1]))[0]) as pins:
    pins.hold(0.0)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_however_it_ends_the_clock_is_put_back(number: signal.Signals, orin: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(orin)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        until(lambda: cap(orin) == "115200")
        os.killpg(process.pid, number)  # as a terminal does, or a service manager
        process.wait(20)
    until(lambda: cap(orin) == "1510400")


# --- a known model ---------------------------------------------------------------------------------


class KnownMeter:
    """A meter whose watts follow the known processor, the made-up clock and the made-up GPU."""

    name, kind, scope, accuracy, late = "known", "sysfs", Scope.BOARD_DC, 0.01, False
    kind: MeterKind

    def __init__(self, root: Path, processor: KnownProcessor) -> None:
        self._root, self._processor = root, processor
        self._mhz = 1510.4
        self._last: tuple[float, float] | None = None
        self._joules: list[tuple[float, float]] = []

    def opened(self) -> AbstractContextManager[object]:
        return nullcontext()

    def check(self) -> None:
        """Answer."""

    def watts(self) -> float | None:
        return None

    def sample(self, now_s: float) -> None:
        busy = self._processor.seconds()
        last, self._last = self._last, (now_s, busy)
        if last is None or now_s <= last[0]:
            return
        u = (busy - last[1]) / (self._processor.cores * (now_s - last[0]))
        # A file of a real system is never half written; this one is while its new number is put in.
        self._mhz = float(text) / 1000 if (text := cap(self._root)) else self._mhz
        up, down = self._processor.traffic
        watts = true_w(u, self._mhz, self._gpu()) + 0.05 * up + 0.03 * down
        self._joules.append((now_s, watts * (now_s - last[0])))

    def over(self, span: Span) -> Seen:
        inside = [(t, j) for t, j in self._joules if span.start_s < t <= span.end_s]
        watts = sum(j for _, j in inside) / span.seconds
        return Seen(watts, span, 0.001 * watts, "counter", len(inside))

    def _gpu(self) -> float:
        file = self._root / GPU_FILE
        return int(file.read_text() or "0") / 1000 if file.exists() else 0.0


def true_w(u: float, mhz: float, gpu: float = 0.0) -> float:
    return IDLE_W + (FULL_W - IDLE_W) * (mhz / 1510.4) ** 1.5 * u + 4.0 * gpu


class KnownProcessor:
    """A processor that is as busy as the load says, whatever else runs on this machine."""

    def __init__(self) -> None:
        self.cores = psutil.cpu_count() or 1
        self._share = self._busy_s = 0.0
        self.traffic = (0.0, 0.0)
        """Mbit/s up and down."""
        self._mbit = (0.0, 0.0)
        self._time_s = time.monotonic()
        self._lock = threading.Lock()

    def seconds(self) -> float:
        with self._lock:
            now = time.monotonic()
            seconds = now - self._time_s
            self._busy_s += self._share * self.cores * seconds
            (up, down), (sent, received) = self.traffic, self._mbit
            self._mbit = sent + up * seconds, received + down * seconds
            self._time_s = now
            return self._busy_s

    def mbit(self) -> tuple[float, float]:
        """As an interface counts them."""
        self.seconds()
        return self._mbit

    def load(self, load: Load) -> None:
        self.seconds()
        self._share = 0.1 if load.block in ("gpu", "network") else load.busy
        up = 50.0 * load.busy if load.block == "network" else 0.0
        self.traffic = up, 0.9 * up if load.way == "both" else 0.0


def test_a_known_model_by_clock_gpu_and_traffic_is_recovered(
    orin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that is really held, a GPU that is a file, and a processor whose load is known."""
    processor = KnownProcessor()
    written(orin, {GPU_FILE: "0"})
    monkeypatch.setattr("edge_agent.calibration.session.machine_busy_seconds", processor.seconds)
    monkeypatch.setattr("edge_agent.calibration.session.commands", lambda *_: [])

    def tell(load: Load, what: str, done: float, seconds: float) -> None:
        if what == "settle" and done < 0.05:
            processor.load(load)
            new = orin / "new"
            new.write_text(str(round(1000 * load.busy) if load.block == "gpu" else 0))
            new.replace(orin / GPU_FILE)

    loads = (IDLE, CORES[3], CLOCK[1], CORES[2], GPU[1], CLOCK[3], CORES[1], GPU[0], IDLE, *NETWORK[1:])
    link = Link("wlan0", orin)
    monkeypatch.setattr(link, "mbit", processor.mbit)
    meter = KnownMeter(orin, processor)
    session = Session(
        *(meter, None),
        timing=Timing(settle_s=0.1, hold_s=0.4, idle_s=0.4, exact=True),
        threads=1,
        root=orin,
        tell=tell,
        domains=domains_of(orin)[0],
        gpu=gpu_load(orin),
        link=link,
    )
    steps = session.run(loads)
    assert cap(orin) == "1510400"
    model = model_of(fit(steps, 0.01), steps, 0.01, link.interface)
    assert [round(at.mhz, 1) for at in model.clock] == [115.2, 806.4, 1510.4]
    for at in model.clock:
        assert at.full_w.v == pytest.approx(true_w(1.0, at.mhz), rel=0.03)
    assert model.p_idle_w.v == pytest.approx(IDLE_W, rel=0.03)
    assert model.gpu_w is not None
    assert model.gpu_w.v == pytest.approx(4.0, rel=0.03)
    assert model.link is not None
    assert model.link.down is not None
    assert model.link.up.v == pytest.approx(0.05, rel=0.03)
    assert model.link.down.v == pytest.approx(0.03, rel=0.03)


def test_a_power_mode_that_is_set_meanwhile_ends_it(orin: Path) -> None:
    def tell(load: Load, what: str, done: float, seconds: float) -> None:
        (orin / STATUS).write_text("pmode:0001\n")

    timing = Timing(settle_s=0.0, hold_s=0.1, idle_s=0.1, exact=True)
    session = Session(
        KnownMeter(orin, KnownProcessor()), None, timing=timing, threads=1, root=orin, tell=tell
    )
    with pytest.raises(SensorError, match="power_mode changed from 15W to 7W"):
        session.run((IDLE,))


# --- what the model does with it -------------------------------------------------------------------


def test_joules_follow_the_clock_and_the_gpu(orin: Path) -> None:
    profile = PI4.calibrated(calibration_of(steps_of(clock=True, gpu_w=5.0, noise=0.0)))
    assert profile.model is not None
    DeviceProfile.model_validate(profile.model_dump(by_alias=True))
    written(orin, {GPU_FILE: "500"})
    busy = [0.0]
    sensor = Utilisation(profile.model, busy=lambda: busy[0], cores=4, root=orin)

    def watts(khz: int, u: float, gpu: int) -> float:
        (orin / DOMAIN / "scaling_max_freq").write_text(str(khz))
        (orin / GPU_FILE).write_text(str(gpu))
        start = sensor.joules(10.0 * len(seen))
        busy[0] += 4 * u * 10.0
        seen.append(u)
        end = sensor.joules(10.0 * len(seen))
        assert start is not None
        assert end is not None
        return (end - start) / 10.0

    seen: list[float] = []
    above = FULL_W - IDLE_W
    assert watts(1_500_000, 1.0, 0) == pytest.approx(FULL_W, rel=0.01)
    assert watts(600_000, 1.0, 0) == pytest.approx(IDLE_W + above * 0.16, rel=0.01)
    assert watts(600_000, 0.0, 1000) == pytest.approx(IDLE_W + 5.0, rel=0.02)
    assert watts(200_000, 0.5, 0) == pytest.approx(IDLE_W + 0.5 * above * 0.16, rel=0.01), "never below"
    between = IDLE_W + above * (0.16 + 0.49) / 2
    assert watts(825_000, 1.0, 0) == pytest.approx(between, rel=0.01)
    (orin / GPU_FILE).write_text("broken")
    sensor.joules(10.0 * len(seen) + 10.0)
    assert "clock_or_gpu_unread" in sensor.flags


def test_traffic_of_the_interface_is_charged_and_an_unread_one_is_said(tmp_path: Path) -> None:
    steps = steps_of(link=(0.06, 0.04), noise=0.0)
    model = model_of(fit(steps, 0.02), steps, 0.02, "wlan0")
    profile = PI4.calibrated(calibration_of(steps, model=model))
    assert profile.model is not None
    counters = "sys/class/net/wlan0/statistics"
    written(tmp_path, {f"{counters}/tx_bytes": "1000000", f"{counters}/rx_bytes": "0"})
    sensor = Utilisation(profile.model, busy=lambda: 0.0, cores=4, root=tmp_path)
    assert sensor.joules(0.0) == 0
    written(tmp_path, {f"{counters}/tx_bytes": "13500000", f"{counters}/rx_bytes": "25000000"})
    found = sensor.joules(10.0)  # 100 Mbit up, 200 down
    assert found == pytest.approx(10 * IDLE_W + 0.06 * 100 + 0.04 * 200, rel=0.01)
    written(tmp_path, {f"{counters}/tx_bytes": "0", f"{counters}/rx_bytes": "0"})
    again = sensor.joules(20.0)
    assert again == pytest.approx((found or 0) + 10 * IDLE_W, rel=0.01), "an interface that began anew"
    (tmp_path / counters / "tx_bytes").unlink()
    sensor.joules(30.0)
    assert "link_unread" in sensor.flags


def test_between_clocks_watts_are_linear_and_beyond_them_level() -> None:
    points = [(SLOW_MHZ, 3.0), (FAST_MHZ, 6.0)]
    assert [full_at(points, mhz, 9.0) for mhz in (1, 600, 1050, 1500, 9999)] == [3.0, 3.0, 4.5, 6.0, 6.0]
    assert full_at(points, None, 9.0) == full_at([], 700.0, 9.0) == 9.0


# --- several power modes ---------------------------------------------------------------------------


def in_mode(mode: str | None, made: datetime = MADE, **more: object) -> Calibration:
    device = calibration_of().device.model_copy(update={"power_mode": mode})
    return calibration_of(device=device, made=made, **more)


def keep(out: Path, made: Calibration) -> Path:
    place = place_for(out, made.device.power_mode)
    place.write_text(made.toml())
    return place


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Set the power mode that this machine seems to be in."""

    def put(name: str | None) -> None:
        monkeypatch.setattr("edge_agent.calibration.host.power_mode", lambda root: name)

    return put


def test_another_mode_adds_and_the_same_one_replaces(tmp_path: Path) -> None:
    out = tmp_path / "pi.toml"
    assert keep(out, in_mode("15W")) == out
    assert keep(out, in_mode("7W")) == tmp_path / "pi@7W.toml"
    assert keep(out, in_mode(None)) == tmp_path / "pi@none.toml"
    assert keep(out, in_mode("15W")) == out
    odd = [place_for(out, name) for name in ("a/b", "a:b", "../../x", "7W")]
    assert len(set(odd)) == 4
    assert {place.parent for place in odd} == {tmp_path}
    out.write_text("damaged")
    assert place_for(out, "7W") == out


def test_the_one_of_the_present_mode_is_used_and_of_two_the_newest(
    tmp_path: Path, mode: Callable[[str | None], None]
) -> None:
    out = tmp_path / "pi.toml"
    keep(out, in_mode("15W"))
    keep(out, in_mode("7W", steps=steps_of(full_w=4.0)))
    mode("7W")
    use = calibrated(PI4, None, out, now=SOON)
    assert use.path == tmp_path / "pi@7W.toml"
    assert use.profile.model is not None
    assert use.profile.model.full_w == pytest.approx(4.0, rel=0.03)
    out.write_text(in_mode("7W", MADE + timedelta(hours=1)).toml())
    assert calibrated(PI4, out, now=SOON).path == out
    mode("15W")
    assert calibrated(PI4, out, now=SOON).calibration is None


def test_in_another_mode_the_published_model_is_used_and_every_reading_says_so(
    tmp_path: Path, mode: Callable[[str | None], None]
) -> None:
    out = tmp_path / "pi.toml"
    keep(out, in_mode("15W"))
    for other, says in (("MAXN", "now it is in the power mode MAXN"), (None, "no power mode that is known")):
        mode(other)
        use = calibrated(PI4, None, out, now=SOON)
        assert use.calibration is None
        assert "made in the power mode 15W" in (use.reason or "")
        assert says in (use.reason or "")
        with Meter(use.profile) as meter:
            meter.sample()
        reading = meter.peek()[Stage.IDLE]
        assert OTHER_MODE in reading.flags
        assert "calibrated" not in reading.flags
        assert PI4.model is not None
        assert reading.scope == PI4.model.scope


def test_a_mode_that_changes_under_way_changes_the_model_from_the_next_window_on(
    orin: Path, tmp_path: Path
) -> None:
    out, now = tmp_path / "pi.toml", [0.0]
    from edge_agent.calibration.host import facts

    def of(name: str, full_w: float) -> None:
        device = facts(orin).model_copy(update={"power_mode": name})
        keep(out, calibration_of(steps_of(full_w=full_w), device=device))

    of("15W", 6.2)
    of("7W", 4.0)

    def chosen() -> DeviceProfile:
        return calibrated(PI4, None, out, root=orin, now=SOON).profile

    meter = Meter(chosen(), root=orin, clock=lambda: now[0], threaded=False, renewed=chosen)
    with meter:
        now[0] += 60.0
        assert meter.take()[Stage.IDLE].flags == ("calibrated",)
        (orin / STATUS).write_text("pmode:0001\n")
        now[0] += 60.0
        assert "power_mode_changed" in meter.take()[Stage.IDLE].flags
        now[0] += 60.0
        after = meter.take()[Stage.IDLE]
        assert after.flags == ("calibrated",)
        (orin / STATUS).write_text("pmode:0002\n")
        now[0] += 60.0
        meter.take()
        now[0] += 60.0
        last = meter.take()[Stage.IDLE]
        assert OTHER_MODE in last.flags
        assert last.coverage == 1


def test_another_governor_is_said(orin: Path) -> None:
    device = calibration_of().device.model_copy(update={"governor": "performance"})
    profile = PI4.calibrated(calibration_of(device=device))
    with Meter(profile, root=orin) as meter:
        meter.sample()
    assert meter.peek()[Stage.IDLE].flags == ("calibrated", "other_governor")


# --- the GPU's load --------------------------------------------------------------------------------


def test_a_gpus_load_is_a_share_or_unknown_never_0_for_an_error(tmp_path: Path) -> None:
    assert gpu_load(tmp_path) is None
    root = written(tmp_path, {"sys/devices/platform/bus@0/17000000.gpu/load": "375\n"})
    gpu = gpu_load(root)
    assert gpu is not None
    assert gpu.share() == 0.375
    for text in ("", "x", "-5", "1001"):
        (root / "sys/devices/platform/bus@0/17000000.gpu/load").write_text(text)
        assert gpu.share() is None


def test_cards_in_a_pc_are_asked_through_their_library(tmp_path: Path) -> None:
    class NVMLError(Exception):
        pass

    def rates(handle: int) -> SimpleNamespace:
        if handle == broken[0]:
            raise NVMLError
        return SimpleNamespace(gpu=(100, 20)[handle])

    broken = [-1]
    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=rates,
    )
    gpu = gpu_load(tmp_path, library)
    assert gpu is not None
    assert gpu.share() == 0.6
    broken[0] = 1
    assert gpu.share() is None
