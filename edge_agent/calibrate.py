"""`hedgerow agent calibrate`: this device's own power model, fitted against a meter."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from edge_agent.calibration import host
from edge_agent.calibration.clock_pins import Domain, domains_of
from edge_agent.calibration.fit import fit, model_of, sensor_of
from edge_agent.calibration.judge import Breach, breaches
from edge_agent.calibration.loads import LOWER_CLOCKS, Load, gpu_works, plan
from edge_agent.calibration.meters import HOW, NEEDS, CalibrationMeter, meter_of
from edge_agent.calibration.net_load import where
from edge_agent.calibration.session import Session, Timing
from edge_agent.calibration.use import FOLDER, place_beside, place_for
from edge_agent.calibration.use import REFUSED as REFUSED_END
from edge_agent.energy.corrected import MOST_ERROR
from edge_agent.energy.gpu_load import GpuLoad, gpu_load
from edge_agent.energy.link import Link
from edge_agent.energy.sensor import EnergySensor, find_sensors
from edge_agent.settings import AgentSettings
from edge_agent.traffic import interface_to
from foundation import settings
from foundation.calibration import Calibration, FittedModel, MeterFacts, Step
from foundation.durable import write_whole
from foundation.energy import Kind, Scope
from foundation.errors import HedgerowError, SensorError, SettingsError
from foundation.mqtt import MqttSettings
from foundation.profile import DeviceProfile
from foundation.topics import Topics

REFUSED = 3
QUICK_IDLE_S = 60.0
EPILOG = f"""\
Meters: {HOW}.
  A plug: calibrate it with a resistive load first, put nothing else on it. Tasmota: WattRes 2, EnergyRes 5,
  TelePeriod 10. It is never told to switch. A log (csv:) has the columns time_s (seconds since 1970, UTC) and
  watts; it may grow meanwhile, or be put there afterwards.
  Taken without --scope and --accuracy: plugs, csv and manual wall_ac, sysfs board_dc; 2 % at k = 2.

Steps: idle three times; 25, 50, 75 and 100 % of the cores with matrix products; all cores half and all of the
  time; memory-bound; and training as an agent does it. Each settles (60 s) and is held (60 s, sysfs 20 s;
  longer where a plug needs 50 pulses; idle 120 s). About 25 minutes, 20 with sysfs; --quick 16 and 13.
  Training and one step of the processor are not fitted: they judge the fit.
  As root, where the kernel lets the clock be set: half and all of the cores at the lowest and a middle clock
  (8 minutes more, {", ".join(f"{share:.0%}" for share in LOWER_CLOCKS)} of its range); the clock is put back
  however this ends. With --no-clock, or elsewhere, one figure stands for all clocks. With a GPU, a source of
  its load and a torch that can use it: the GPU half and all of the time. With --net: half and
  all of the time sending to the broker, and getting it back as well (user and agent name as in its ACL).

Power modes (Jetson): a calibration is of the mode in which it was made, and is used in that one alone. In
  another mode run this again: it is written beside the first one, as AGENT@MODE.toml.

Stop the agent and other programs first. Ends with 0 if the calibration was written, 3 if it was refused.
"""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="hedgerow agent calibrate",
        description="Fit this device's own power model against a meter, and write it for the agent to use.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--meter", required=True, help="what measures this device's power, see below")
    add("--config", type=Path, help="agent.toml: its name, profile, broker and vault are taken")
    add("--profile", help="id or .toml file of a device profile (default: the config's, or auto)")
    add("--agent", help="name of this agent (default: the config's, or the host's)")
    add("--out", type=Path, help=f"file to write (default: {FOLDER}/AGENT.toml, beside the config's vault)")
    add("--scope", choices=[scope.value for scope in Scope], help="where the meter sits")
    add("--accuracy", type=float, metavar="X", help="relative error of the meter at k = 2, as 0.02")
    add("--quick", action="store_true", help="idle, four steps of the processor and training; idle 60 s")
    add("--no-clock", action="store_true", help="leave the processor's clock alone")
    add("--net", action="store_true", help="load the way to the broker of --mqtt-host or --config as well")
    add("--settle", type=float, metavar="S", help="seconds before each hold (default: what the meter needs)")
    add("--hold", type=float, metavar="S", help="seconds of each hold (default: what the meter needs)")
    add("--seed", type=int, default=0, help="of the order of the steps (default: 0)")
    add(
        "--force",
        action="store_true",
        help="accept short holds, a busy idle, and an idle far from the profile's",
    )
    add("--wait", type=float, default=3600.0, metavar="S", help="csv: how long to wait for the log's end")
    add("--mqtt-host", help="the plug's broker (default: the config's, or 127.0.0.1)")
    add("--mqtt-port", type=int)
    add("--mqtt-username", metavar="USER")
    add("--mqtt-password-file", type=Path, metavar="FILE", help="the password and nothing else")
    add("--mqtt-tls", action="store_true", default=None)
    add("--mqtt-ca-file", type=Path, metavar="FILE")
    add("--json", action="store_true", help="what was written or refused as JSON, for machines")
    add("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Calibrate; returns the exit code: 3 where the result was refused."""
    arguments = parser().parse_args(argv)
    console = console or Console(stderr=True)
    try:
        return _calibrate(arguments, console)
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow agent calibrate: {error}\n")
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("hedgerow agent calibrate: stopped; nothing was written\n")
        return 130


def _calibrate(arguments: argparse.Namespace, console: Console) -> int:
    told = _told(arguments.config)
    which = arguments.profile or (told.profile if told else "auto")
    profile = DeviceProfile.detect(arguments.root) if which == "auto" else DeviceProfile.load(which)
    agent = arguments.agent or (told.agent if told else socket.gethostname().split(".")[0] or "agent")
    out = arguments.out or (place_beside(told.vault, agent) if told else Path(FOLDER) / f"{agent}.toml")
    meter = meter_of(
        arguments.meter,
        _broker(arguments, told),
        scope=Scope(arguments.scope) if arguments.scope else None,
        accuracy=_accuracy(arguments.accuracy),
        wait_s=arguments.wait,
        say=console.print,
    )
    timing = _timing(arguments, meter)
    sensor = _own_sensor(profile, arguments)
    threads = (told.threads if told else None) or profile.agent.threads_of(os.cpu_count() or 1)
    rig = _rig(
        arguments,
        _broker(arguments, told),
        Topics(told.federation if told else "hedgerow").of(agent, "calibrate"),
    )
    loads = plan(
        *(arguments.seed,),
        quick=arguments.quick,
        clock=bool(rig.domains),
        gpu=rig.gpu is not None,
        net=rig.link is not None,
    )
    with meter.opened():
        meter.check()
        _announce(console, profile, meter, sensor, loads)
        for missing in rig.missing:
            console.print(f"[dim]not measured: {missing}[/dim]")
        steps = _measured(console, arguments, meter, sensor, timing, threads, loads, rig)
    made, broken = _made(arguments, agent, profile, meter, sensor, steps, rig)
    place = place_for(out, made.device.power_mode)
    place = place if not made.refused else place.with_name(f"{place.stem}{REFUSED_END}")
    write_whole(place, made.toml().encode())
    _report(arguments, console, made, broken, place)
    return REFUSED if made.refused else 0


@dataclass(frozen=True, slots=True)
class _Rig:
    """What there is to load beside the cores, and why the rest is not measured."""

    domains: tuple[Domain, ...]
    gpu: GpuLoad | None
    link: Link | None
    missing: tuple[str, ...]


def _rig(arguments: argparse.Namespace, mqtt: MqttSettings, topic: str) -> _Rig:
    found, why = ([], "--no-clock was given") if arguments.no_clock else domains_of(arguments.root)
    missing = [] if why is None else [f"frequency steps ({why})"]
    gpu = gpu_load(arguments.root)
    if gpu is None:
        missing.append("a GPU's load (there is none, or nothing says how busy it is)")
    elif (without := gpu_works()) is not None:
        gpu = None
        missing.append(f"a GPU's load ({without})")
    link = None
    if not arguments.net:
        missing.append("network traffic (ask for it with --net)")
    elif (interface := interface_to(mqtt.host, mqtt.port)) is None:
        raise SettingsError(f"--net: there is no way to the broker {mqtt.address}: give --mqtt-host")
    else:
        link = Link(interface, arguments.root)
        os.environ.update(where(mqtt, topic))  # for the children that load it
    if link is not None and link.interface == "lo":
        missing.append("a network interface (the broker is on this machine: what is sent stays in it)")
    return _Rig(tuple(found), gpu, link, tuple(missing))


def _told(config: Path | None) -> AgentSettings | None:
    return settings.load(AgentSettings, config, os.environ, (), prefix="AGENT")[0] if config else None


def _broker(arguments: argparse.Namespace, told: AgentSettings | None) -> MqttSettings:
    keys = ("host", "port", "username", "password_file", "tls", "ca_file")
    given = {key: value for key in keys if (value := getattr(arguments, f"mqtt_{key}")) is not None}
    base = told.mqtt.model_dump(exclude_unset=True) if told else {}
    if "password_file" in given:
        base.pop("password", None)
    try:
        return MqttSettings.model_validate({**base, **given})
    except ValidationError as error:
        problems = "; ".join(item["msg"] for item in error.errors(include_input=False))
        raise SettingsError(f"the broker's options do not fit together: {problems}") from None


def _accuracy(accuracy: float | None) -> float | None:
    if accuracy is not None and not 0 < accuracy <= 1:
        raise SettingsError("--accuracy is a share above 0, as 0.02 for 2 %")
    return accuracy


def _timing(arguments: argparse.Namespace, meter: CalibrationMeter) -> Timing:
    """Return the seconds of each step; refuses what is too short for the meter, unless forced."""
    needs = NEEDS[meter.kind]
    least = {"--settle": needs.settle_s, "--hold": needs.hold_s}
    for option, given in (("--settle", arguments.settle), ("--hold", arguments.hold)):
        if given is not None and (given < 0 or (option == "--hold" and given < 1)):
            raise SettingsError(f"{option} {given:g} is no time: holds need a second at least")
        if given is not None and given < least[option] and not arguments.force:
            raise SettingsError(
                f"{option} {given:g} is too short for {meter.name}, which needs {least[option]:g} s: leave it"
                " out, or accept worse figures with --force"
            )
    return Timing(
        arguments.settle, arguments.hold, QUICK_IDLE_S if arguments.quick else None, arguments.force
    )


def _own_sensor(profile: DeviceProfile, arguments: argparse.Namespace) -> EnergySensor | None:
    """Return the sensor that the agent counts, if it measures and is not the very meter."""
    found = next(iter(find_sensors(profile, arguments.root)), None)
    if found is None or found.kind is not Kind.MEASURED:
        return None
    same = found.name == "inline_ina" and arguments.meter.startswith("sysfs:")
    return None if same else found


def _announce(
    console: Console,
    profile: DeviceProfile,
    meter: CalibrationMeter,
    sensor: EnergySensor | None,
    loads: Sequence[Load],
) -> None:
    console.print(
        f"{profile.title} [dim]({profile.id})[/dim] against {meter.name}, taken as {meter.scope.value}"
        f" ± {meter.accuracy:.1%} (k = 2)"
    )
    if sensor is not None:
        console.print(f"its own sensor {sensor.name} ({sensor.scope.value}) is compared with the meter")
    console.print(f"[dim]{len(loads)} steps: {', '.join(load.name for load in loads)}[/dim]")


def _measured(
    console: Console,
    arguments: argparse.Namespace,
    meter: CalibrationMeter,
    sensor: EnergySensor | None,
    timing: Timing,
    threads: int,
    loads: Sequence[Load],
    rig: _Rig,
) -> tuple[Step, ...]:
    """Run all steps with a bar that says which one is on and how long it will be."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=meter.kind == "manual") as progress:
        bar = progress.add_task("begins", total=None)
        seen: list[tuple[str, str]] = []

        def tell(load: Load, what: str, done: float, seconds: float) -> None:
            if done < 0.05:
                seen.append((load.name, what))
                if meter.kind == "manual":  # a bar would hide the question
                    console.print(f"{(len(seen) + 1) // 2}/{len(loads)} {load.name}: {what}, {seconds:.0f} s")
            _advance(progress, bar, f"{load.name}: {what}", done, seconds, len(seen), 2 * len(loads))

        session = Session(
            *(meter, sensor),
            timing=timing,
            threads=threads,
            root=arguments.root,
            tell=tell,
            domains=rig.domains,
            gpu=rig.gpu,
            link=rig.link,
        )
        return session.run(loads)


def _advance(
    progress: Progress, bar: TaskID, what: str, done: float, seconds: float, stage: int, stages: int
) -> None:
    share = (max(0, stage - 1) + done / max(seconds, 1e-9)) / stages
    progress.update(bar, description=f"{(stage + 1) // 2}/{stages // 2} {what}", total=1.0, completed=share)


def _made(
    arguments: argparse.Namespace,
    agent: str,
    profile: DeviceProfile,
    meter: CalibrationMeter,
    sensor: EnergySensor | None,
    steps: tuple[Step, ...],
    rig: _Rig,
) -> tuple[Calibration, list[Breach]]:
    """Fit and judge; returns the file's content and every rule that it breaks."""
    facts = MeterFacts(name=meter.name, kind=meter.kind, scope=meter.scope, accuracy=meter.accuracy)
    try:
        interface = rig.link.interface if rig.link else ""
        model = model_of(fit(steps, meter.accuracy), steps, meter.accuracy, interface)
    except SensorError as error:
        seen = "; ".join(f"{step.name} {step.utilisation:.0%} {step.watts:.2f} W" for step in steps)
        raise SensorError(f"{error} (seen: {seen})") from error
    broken = breaches(steps, model, facts, profile)
    lets_pass = [breach for breach in broken if breach.may_force and arguments.force]
    made = Calibration(
        schema=1,
        agent=agent,
        made=datetime.now(UTC).replace(microsecond=0),
        hedgerow=version("hedgerow"),
        seed=arguments.seed,
        quick=arguments.quick,
        not_measured=rig.missing,
        forced=tuple(map(str, lets_pass)),
        refused=tuple(str(breach) for breach in broken if breach not in lets_pass),
        device=host.facts(arguments.root),
        profile=profile.facts,
        meter=facts,
        model=model,
        sensor=sensor_of(steps, meter.accuracy, sensor.name, sensor.scope) if sensor else None,
        step=steps,
    )
    return made, broken


def _report(
    arguments: argparse.Namespace,
    console: Console,
    made: Calibration,
    broken: Sequence[Breach],
    place: Path,
) -> None:
    if arguments.json:
        rules = [asdict(breach) for breach in broken]
        verdict = {"accepted": not made.refused, "file": str(place), "breaches": rules}
        told: dict[str, Any] = made.model_dump(mode="json", by_alias=True)
        sys.stdout.write(json.dumps({**verdict, **told}) + "\n")
        return
    console.print(table_of(made))
    model = made.model
    if made.device.power_mode is not None:
        console.print(f"in the power mode {made.device.power_mode}, and used in that one alone")
    console.print(
        f"idle {model.p_idle_w.v:.3f} ± {model.p_idle_w.u:.3f} W, full {model.p_full_w.v:.3f} ±"
        f" {model.p_full_w.u:.3f} W, exponent {model.exponent:g}; hold-out off by {model.hold_out_error:.1%};"
        f" error bars ± {model.u_rel_gross:.1%} of all joules, ± {model.u_rel_net:.1%} above idle (k = 2)"
    )
    _tell_terms(console, model)
    if made.sensor is not None:
        much = made.sensor.error > MOST_ERROR
        use = "off by too much to be applied" if much else "its readings are corrected by it"
        console.print(
            f"meter = {made.sensor.gain.v:.3f} x {made.sensor.name} {made.sensor.offset_w.v:+.3f} W, off by"
            f" up to {made.sensor.error:.1%} [dim]({use})[/dim]"
        )
    for breach in broken:
        mark = "[red]refused[/red]" if str(breach) in made.refused else "[yellow]forced[/yellow]"
        console.print(f"{mark} {breach}\n  [dim]{breach.mend}[/dim]")
    if made.refused:
        console.print(f"not accepted; what was seen is in {place}, which no agent uses")
    else:
        console.print(
            f"written to {place}: an agent finds it beside its vault, or by energy.calibration; see it with"
            f" `hedgerow agent measure --profile {made.profile.id} --calibration {place}`"
        )


def _tell_terms(console: Console, model: FittedModel) -> None:
    """Say what was fitted beside idle and load."""
    if model.clock:
        full = ", ".join(f"{at.full_w.v:.3f} ± {at.full_w.u:.3f} W at {at.mhz:.0f} MHz" for at in model.clock)
        console.print(f"full by clock: {full}")
    if model.link is not None:
        down = "" if model.link.down is None else f", down {1000 * model.link.down.v:.2f}"
        console.print(f"{model.link.interface}: up {1000 * model.link.up.v:.2f}{down} mW per Mbit/s on top")
    if model.gpu_w is not None:
        console.print(f"GPU {model.gpu_w.v:.3f} ± {model.gpu_w.u:.3f} W on top")


def table_of(made: Calibration) -> Table:
    """Return the steps as a table, with what the model says of each."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("step")
    for name in ("busy", "MHz", "W", "±", "model", "off", "s", "°C"):
        table.add_column(name, justify="right")
    table.add_column("remarks")
    model = made.model
    for step in made.step:
        said = model.watts_of(step)
        table.add_row(
            step.name,
            f"{step.utilisation:.1%}",
            "?" if step.mhz is None else f"{step.mhz:.0f}",
            f"{step.watts:.2f}",
            f"{step.u_w:.2f}",
            f"{said:.2f}",
            f"{said / step.watts - 1:+.1%}" if step.watts else "?",
            f"{step.seconds:.0f}",
            "?" if step.temperature_c is None else f"{step.temperature_c:.0f}",
            "hold-out" if step.hold_out else "",
        )
    return table
