"""`hedgerow agent calibrate` end to end: a scripted plug on a real broker, the program, the file, its use.

The watts follow what the machine really did, so the power model that comes out is known, whatever else runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from edge_agent.__main__ import main
from edge_agent.calibration.loads import NETWORK, Running, commands
from edge_agent.calibration.meters import PlugMeter, Span
from edge_agent.calibration.net_load import where
from edge_agent.calibration.plug_reader import PlugReader
from edge_agent.energy.link import Link
from edge_agent.traffic import interface_to
from foundation.calibration import read_calibration
from foundation.errors import SensorError
from foundation.mqtt import MqttSettings
from foundation.plug import plug_of
from foundation.process import bound_to_parent
from foundation.profile import DeviceProfile
from tests.broker.conftest import LONG, ONE
from tests.processes import until
from tests.scripted_plug import LIE_W

pytestmark = pytest.mark.broker

IDLE_W, FULL_W = 1200.0, 3600.0
Plug = Callable[..., Path]


@pytest.fixture
def plug(settings: MqttSettings, tmp_path: Path) -> Iterator[Plug]:
    """Start a scripted plug by kind and name; returns the file of what it heard."""
    running: list[subprocess.Popen[bytes]] = []

    def start(kind: str, name: str, *more: str) -> Path:
        heard = tmp_path / "heard"
        command = [sys.executable, "-m", "tests.scripted_plug", kind, name, "--port", str(settings.port)]
        command += ["--idle", f"{IDLE_W}", "--full", f"{FULL_W}", "--heard", str(heard), *more]
        running.append(subprocess.Popen(bound_to_parent(command)))
        until(heard.exists)
        return heard

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["tasmota", "shelly"])
def test_a_plug_is_heard_and_only_asked(kind: str, plug: Plug, settings: MqttSettings) -> None:
    heard = plug(kind, "plug3")
    name = "mqtt:tasmota/plug3" if kind == "tasmota" else "shelly:plug3"
    meter = PlugMeter(name, plug_of(name), settings)
    with meter.opened() as reader:
        assert isinstance(reader, PlugReader)
        meter.check()
        until(lambda: len(reader.readings()) >= 4)
        readings = reader.readings()
        seen = meter.over(Span(readings[0].time_s, readings[-1].time_s))
    assert max(r.watts for r in readings if r.watts is not None) < LIE_W  # the retained lie was discarded
    assert 0.9 * IDLE_W < seen.watts < 1.1 * FULL_W
    assert set(heard.read_text().splitlines()) == ({"cmnd/plug3/Status 8"} if kind == "tasmota" else set())


@pytest.mark.parametrize("way", ["up", "both"])
def test_the_network_load_really_sends_to_the_broker_and_gets_it_back(
    way: str, settings: MqttSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    interface = interface_to(settings.host, settings.port)
    assert interface is not None
    link = Link(interface)
    for name, value in where(settings, "hedgerow/v1/test/agents/pi/calibrate").items():
        monkeypatch.setenv(name, value)
    (load,) = (load for load in NETWORK if load.way == way and load.busy == 1)

    def sent() -> float:
        mbit = link.mbit()
        assert mbit is not None
        return mbit[0]

    with Running(commands(load, [0], 1)) as running:
        before = sent()
        until(lambda: sent() > before + 20)
        running.check()


def test_a_plug_that_is_silent_is_told_with_what_to_look_at(settings: MqttSettings) -> None:
    plug = plug_of("shelly:nobody")
    plug.period_s = 0.1  # type: ignore[misc]  # else the test would wait half a minute
    meter = PlugMeter("shelly:nobody", plug, settings)
    with meter.opened(), pytest.raises(SensorError, match=r"nobody/status/switch:0.*Is its MQTT on"):
        meter.check()


def quiet(within_s: float = 60) -> bool:
    """Whether the machine is less than half busy for a second: else no load can be told from none."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if psutil.cpu_percent(interval=1.0) < 50:
            return True
    return False


LOADS_ALONE = """
import sys, threading, time
from pathlib import Path
import psutil
from edge_agent.__main__ import main
from edge_agent.calibration import session

file, me, lock = Path(sys.argv[1]), psutil.Process(), threading.Lock()
then_s, seconds = time.monotonic(), 0.0

def cores(load):
    try:
        words = load.cmdline()
    except psutil.Error:
        return 0.0
    if "edge_agent.training.load" in words:
        return 1.0
    return float(words[words.index("--duty") + 1]) if "--duty" in words else 0.0

def busy():
    global then_s, seconds
    with lock:
        now_s = time.monotonic()
        rate = sum(map(cores, me.children()))
        seconds += rate * (now_s - then_s)
        then_s = now_s
        file.with_name("new").write_text(f"{then_s} {seconds} {rate}")
        file.with_name("new").replace(file)
        return seconds

session.machine_busy_seconds = busy
sys.exit(main(sys.argv[2:]))
"""
"""The program, on a processor that gives every load the cores it asks for, whatever else runs on it."""


@ONE
def test_a_known_power_model_is_recovered(
    plug: Plug, settings: MqttSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In short holds, with watts that follow the loads that run."""
    busy = tmp_path / "busy"
    busy.write_text("0 0 0")
    heard, out = (
        plug("shelly", "shellyplusplugs-1", "--busy", str(busy)),
        tmp_path / "calibration" / "pi.toml",
    )
    program = [sys.executable, "-c", LOADS_ALONE, str(busy)]
    arguments = ["--quick", "--settle", "0.1", "--hold", "1"]
    calibrated(program, "shelly:shellyplusplugs-1", arguments, 8, settings, out, heard)
    profile = DeviceProfile.load("unknown-linux").calibrated(read_calibration(out))
    assert profile.model is not None
    assert profile.model.basis == "calibrated"
    measure = ["measure", "--profile", "unknown-linux", "--calibration", str(out), "--json"]
    assert main([*measure, "--seconds", "0.4", "--every", "0.4"]) == 0
    (source,) = json.loads(capsys.readouterr().out.splitlines()[-1])["sources"]
    assert (source["kind"], source["scope"], source["flags"]) == ("modelled", "wall_ac", ["calibrated"])
    error = read_calibration(out).model.u_rel_gross
    assert source["joules_uncertainty"] / source["joules"] == pytest.approx(error)


@LONG
@pytest.mark.slow
@pytest.mark.parametrize(
    ("broker", "meter", "arguments", "steps"),
    [
        ("mosquitto", "mqtt:tasmota/plug3", ["--quick", "--hold", "5"], 8),
        ("nats", "shelly:shellyplusplugs-1", ["--hold", "4"], 11),
    ],
    indirect=["broker"],
)
def test_a_known_power_model_of_the_whole_machine_is_recovered(
    meter: str, arguments: list[str], steps: int, plug: Plug, settings: MqttSettings, tmp_path: Path
) -> None:
    if not quiet():
        pytest.skip("the processor was busy with other work for a minute: idle cannot be told from load")
    kind, name = ("tasmota", "plug3") if meter.startswith("mqtt:") else ("shelly", "shellyplusplugs-1")
    program = [sys.executable, "-m", "edge_agent"]
    arguments = ["--settle", "0.5", *arguments]
    heard = plug(kind, name)
    calibrated(program, meter, arguments, steps, settings, tmp_path / "pi.toml", heard)


def calibrated(
    program: list[str],
    meter: str,
    arguments: list[str],
    steps: int,
    settings: MqttSettings,
    out: Path,
    heard: Path,
) -> None:
    """Calibrate, and see that the plug's power model came out and that it was only asked."""
    command = [*program, "calibrate", "--meter", meter, "--mqtt-port", str(settings.port)]
    command += ["--profile", "unknown-linux", "--out", str(out), "--agent", "pi"]
    command += ["--no-clock", "--force", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-5000:]

    said, made = json.loads(done.stdout), read_calibration(out)
    assert said["accepted"]
    assert made.model.p_idle_w.v == pytest.approx(IDLE_W, rel=0.03)
    assert made.model.p_full_w.v == pytest.approx(FULL_W, rel=0.03)
    assert made.model.exponent == 1
    assert len(made.step) == steps
    assert {step.how for step in made.step} == {"counter"}
    assert [step.block for step in made.step if step.hold_out] in (
        ["training", "cores"],
        ["cores", "training"],
    )
    assert any("short hold" in rule for rule in made.forced)
    assert not made.refused
    assert set(heard.read_text().splitlines()) <= {"cmnd/plug3/Status 8"}


# A shell that starts jobs in the background lets them ignore SIGINT; a person's terminal does not.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from edge_agent.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, -15)]
)
def test_however_it_ends_no_load_goes_on(number: signal.Signals, code: int, tmp_path: Path) -> None:
    out = tmp_path / "pi.toml"
    command = [sys.executable, "-c", PROGRAM, "calibrate", "--meter", f"csv:{tmp_path / 'log.csv'}", "--out"]
    command += [str(out), "--settle", "0", "--hold", "1", "--force", "--seed", "3"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        loads: list[psutil.Process] = []

        def loaded() -> bool:
            loads[:] = psutil.Process(process.pid).children(recursive=True)
            return any("edge_agent.calibration.load" in " ".join(_words(load)) for load in loads)

        until(loaded)
        os.kill(process.pid, number)
        assert process.wait(20) == code
    until(lambda: not [load for load in loads if load.is_running() and load.status() != "zombie"])
    assert not out.exists()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
