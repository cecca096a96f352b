"""The one command. Each verb imports its own side only when it is called."""

from __future__ import annotations

import json
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

app = typer.Typer(
    name="hedgerow",
    help="Personalized federated learning for the edge: personal, sparse transformers, every joule counted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

LATE, NPZ, BOARDS, POISON = "Late joiners", "Data of your own", "Real boards", "Poison"
"""Headings in the help of `simulate`."""
CHAOS = "With --chaos"

PASS_ON: dict[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


STRATEGIES = ", ".join(
    sorted(
        path.stem
        for path in (Path(__file__).parents[1] / "coordinator" / "strategies").glob("*.py")
        if path.stem not in ("__init__", "base")
    )
)
"""All there are, by the names of their files: importing them would take a second."""
PARTITIONS = (
    "iid, pathological:K (classes per device), dirichlet:ALPHA, or by:GROUP (by:subject for uci-har, by:role"
    " for shakespeare, by:ARRAY for a .npz)."
)

X = Annotated[
    str | None, typer.Option("--x", metavar="ARRAY", help="Samples in a .npz.", rich_help_panel=NPZ)
]
Y = Annotated[str | None, typer.Option("--y", metavar="ARRAY", help="Labels in a .npz.", rich_help_panel=NPZ)]
Group = Annotated[
    str | None,
    typer.Option(
        metavar="ARRAY", help="People, sites or other groups in a .npz; see by:GROUP.", rich_help_panel=NPZ
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="ARRAY",
        help="Each row's part in a .npz: 0 training, 1 test; or 0, 1, 2 or the words training, validation,"
        " test.",
        rich_help_panel=NPZ,
    ),
]


class Int8(StrEnum):
    """Whether weights become 8-bit integers."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hedgerow {version('hedgerow')}")
        raise typer.Exit


@app.callback()
def _top(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Personalized federated learning for the edge."""


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    """Read KEY=VALUE pairs; values are JSON where they can be, text otherwise."""
    result: dict[str, Any] = {}
    for pair in pairs or []:
        key, mark, value = pair.partition("=")
        if not mark or not key:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--set")
        try:
            result[key] = json.loads(value)
        except ValueError:
            result[key] = value  # plain text, as in --set optimizer=sgd
    return result


@app.command()
def demo(
    devices: Annotated[int, typer.Option(help="Agents, each a process with its own share.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds of training.")] = 10,
    strategy: Annotated[str, typer.Option(help=f"One of {STRATEGIES}.")] = "pfl_tpp",
    dataset: Annotated[
        str,
        typer.Option(
            help="digits needs no files; mnist, fashion-mnist, cifar10, uci-har, shakespeare and every"
            " FILE.npz are looked for in --data-dir."
        ),
    ] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(envvar="HEDGEROW_DATA", help="Folder of the data sets.")
    ] = None,
    partition: Annotated[str, typer.Option(help=PARTITIONS)] = "dirichlet:0.3",
    seed: Annotated[int, typer.Option(help="Decides shares, initial model and batches.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Use so many samples of the data set.")] = None,
    x: X = None,
    y: Y = None,
    group: Group = None,
    split: Split = None,
    broker: Annotated[
        str | None, typer.Option(help="mqtt://user:password@host:port; without it one is started.")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Device profile for modelled joules, such as raspberry-pi-4b.")
    ] = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A strategy's setting, such as target=0.95.")
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Run FedAvg with the dense model as well, and compare.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running at the end.")] = False,
    port: Annotated[int, typer.Option(help="Of the coordinator's page; another if it is taken.")] = 8080,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run a whole federation on this machine: broker, coordinator, agents, personal models.

    Example: hedgerow demo --devices 4 --rounds 10 --reference
    """
    from hedgerow.demo import DemoOptions, run

    options = DemoOptions(
        devices=devices,
        rounds=rounds,
        strategy=strategy,
        dataset=dataset,
        data_dir=data_dir,
        partition=partition,
        seed=seed,
        limit=limit,
        arrays={k: v for k, v in {"x": x, "y": y, "group": group, "split": split}.items() if v is not None},
        broker=broker,
        profile=profile,
        reference=reference,
        keep=keep,
        port=port,
        json=as_json,
        settings=_settings(settings),
    )
    raise typer.Exit(run(options))


@app.command()
def simulate(
    devices: Annotated[int, typer.Option(min=1, help="Virtual devices, each with its own share.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of training.")] = 10,
    strategy: Annotated[str, typer.Option(help=f"One of {STRATEGIES}.")] = "pfl_tpp",
    dataset: Annotated[
        str,
        typer.Option(
            help="digits needs no files; mnist, fashion-mnist, cifar10, uci-har, shakespeare and every"
            " FILE.npz are looked for in --data-dir."
        ),
    ] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(envvar="HEDGEROW_DATA", help="Folder of the data sets.")
    ] = None,
    partition: Annotated[str, typer.Option(help=PARTITIONS)] = "dirichlet:0.3",
    seed: Annotated[
        int, typer.Option(min=0, help="Decides shares, initial model and batches: same seed, same result.")
    ] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use so many samples of the data set, over all devices.")
    ] = None,
    x: X = None,
    y: Y = None,
    group: Group = None,
    split: Split = None,
    fraction: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the devices asked in each round.")
    ] = 1.0,
    late: Annotated[
        int, typer.Option(min=0, help="So many devices, the last ones, join late.", rich_help_panel=LATE)
    ] = 0,
    late_after: Annotated[
        int, typer.Option(min=0, help="The round after which they join.", rich_help_panel=LATE)
    ] = 0,
    hostile: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DEVICE=ATTACK",
            help="Rehearse an attack: 0=nan, huge, sign_flip or label_flip. Several devices may.",
            rich_help_panel=POISON,
        ),
    ] = None,
    robust: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="What the aggregation does about it: rule=median, outlier=3, clip=1; see docs/poison.md.",
            rich_help_panel=POISON,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A strategy's setting, such as target=0.95."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="KEY=VALUE",
            help="Of the transformer: width=64, depth=2, heads=4, ffl_ratio=4, patch=7, pool=cls.",
        ),
    ] = None,
    device_model: Annotated[
        list[str] | None,
        typer.Option(
            "--device-model",
            metavar="KEY=VALUE[,KEY=VALUE]",
            help="A device's own model, for strategies that let devices differ. Several are dealt in turn.",
        ),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Device profile for modelled joules, such as raspberry-pi-4b.")
    ] = "auto",
    artifacts: Annotated[
        bool, typer.Option("--artifacts", help="Export and prove every device's ONNX model at the end.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="Keep everything here; the same command goes on where it was stopped."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Devices that train at once; one for each core if not given.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="process trains in threads of this one; ray over a Ray cluster, with the same result."
        ),
    ] = "process",
    ray_address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster, such as auto or ray://host:10001; without it one is started."),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="mqtt://HOST:PORT",
            help="Talk over this broker, so that real boards can join.",
            rich_help_panel=BOARDS,
        ),
    ] = None,
    boards: Annotated[int, typer.Option(min=0, help="Wait for so many of them.", rich_help_panel=BOARDS)] = 0,
    federation: Annotated[
        str, typer.Option(help="Name on the broker, for their agent.toml.", rich_help_panel=BOARDS)
    ] = "simulation",
    deadline_s: Annotated[
        float | None,
        typer.Option("--deadline", min=1, help="Seconds that a round may take.", rich_help_panel=BOARDS),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all rounds and devices as JSON; progress goes to stderr.")
    ] = False,
) -> None:
    """Run a federation of many virtual devices in this one process.

    Engine and agents are the real ones; only the network is a broker in
    memory. So it shows what a strategy does to accuracy, units, bytes and
    seconds of work, for many devices and without any. `hedgerow demo` runs
    the same as processes of their own over MQTT.

    Accuracy as "sent" is of the model that comes down at the start of a
    round, "after" of the same after local training, both on each device's
    own held-out part. With an average (fedavg, fedprox) "after" is
    fine-tuning: what the devices made of it is not what they get next.

    Examples:

    hedgerow simulate

    hedgerow simulate --dataset fashion-mnist --data-dir ~/data --partition pathological:2 --limit 6000

    hedgerow simulate --strategy fedavg --devices 100 --fraction 0.1 --set epochs=1 --model width=32

    hedgerow simulate --folder run-1 --artifacts --json > run-1.json

    hedgerow simulate --devices 12 --late 2 --late-after 5

    hedgerow simulate --dataset gait.npz --data-dir ~/data --partition by:person --split part

    hedgerow simulate --strategy fedavg --hostile 0=huge --hostile 1=sign_flip --robust outlier=3

    hedgerow simulate --listen mqtt://192.168.1.10:1883 --boards 1

    hedgerow simulate --engine ray --devices 1000 --ray-address auto
    """
    from hedgerow.simulate import run_command

    code = run_command(
        {
            "devices": devices,
            "rounds": rounds,
            "strategy": strategy,
            "settings": _settings(settings),
            "model": _settings(model),
            "device_models": [_settings(one.split(",")) for one in device_model or []],
            "dataset": dataset,
            "partition": partition,
            "limit": limit,
            "x": x,
            "y": y,
            "group": group,
            "split": split,
            "seed": seed,
            "fraction": fraction,
            "late": late,
            "hostile": _settings(hostile),
            "robust": _settings(robust),
            "late_after": late_after,
            "boards": boards,
            **({} if deadline_s is None else {"deadline_s": deadline_s}),
            "profile": profile,
            "artifacts": artifacts,
        },
        folder=folder,
        data_dir=data_dir,
        workers=workers,
        engine=engine,
        ray_address=ray_address,
        listen=listen,
        federation=federation,
        as_json=as_json,
    )
    raise typer.Exit(code)


@app.command()
def compare(
    strategies: Annotated[
        str,
        typer.Option(
            help=f"Some of {STRATEGIES}, with commas between. NAME:KEY=VALUE;KEY=VALUE is one with other"
            " settings, NAME@LABEL:... gives it a name. In a shell, put all of it into quotes."
        ),
    ] = "pfl_tpp,fedtp",
    dataset: Annotated[
        str,
        typer.Option(
            help="digits needs no files; mnist, fashion-mnist, cifar10, uci-har, shakespeare and every"
            " FILE.npz are looked for in --data-dir."
        ),
    ] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(envvar="HEDGEROW_DATA", help="Folder of the data sets.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Virtual devices, each with its own share.")] = 10,
    partition: Annotated[str, typer.Option(help=PARTITIONS)] = "dirichlet:0.3",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of training.")] = 10,
    seeds: Annotated[str, typer.Option(help="Every strategy runs once with each: 0,1,2")] = "0",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use so many samples of the data set, over all devices.")
    ] = None,
    fraction: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the devices asked in each round.")
    ] = 1.0,
    x: X = None,
    y: Y = None,
    group: Group = None,
    split: Split = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="KEY=VALUE", help="Of the transformer, such as width=64."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[STRATEGY.]KEY=VALUE",
            help="A setting of one strategy (or label), or of all that have it, such as epochs=3.",
        ),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Device profile for modelled joules, such as raspberry-pi-4b.")
    ] = "auto",
    only: Annotated[
        bool, typer.Option("--only", help="Leave out the baselines fedavg, local and fedper if not named.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Keep the runs here; the same command goes on where it was. Without it, in a folder under"
            " ./compare-runs that is named by the fleet."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Devices that train at once; one for each core if not given.")
    ] = None,
    json_to: Annotated[
        str | None, typer.Option("--json", metavar="PATH", help="Write everything as JSON; - is stdout.")
    ] = None,
    html_to: Annotated[
        Path | None, typer.Option("--html", metavar="PATH", help="Write one page with tables and figures.")
    ] = None,
    csv_to: Annotated[
        Path | None,
        typer.Option("--csv", metavar="PATH", help="Write a row for every strategy, seed, round and device."),
    ] = None,
) -> None:
    """Compare strategies on the same fleet of virtual devices, with the same seeds, in one report.

    fedavg, local and fedper always stand beside what is named, and FedAvg's
    accuracy after local training has a row of its own (fedavg + fine-tuning):
    without them a saving says little. Accuracy as sent in round r is that of
    the model trained in the rounds before; what it took is counted
    accordingly, and savings are against FedAvg.

    Stopped or killed, the same command goes on where it was. With more
    strategies or seeds, only what is missing runs.

    Examples:

    hedgerow compare --rounds 5 --devices 4 --limit 800 --html report.html

    hedgerow compare --strategies "pfl_tpp,pfl_tpp@lean:lean=true" --seeds 0,1,2 --set epochs=3

    hedgerow compare --dataset fashion-mnist --partition pathological:2 --json report.json --csv report.csv
    """
    from hedgerow.compare import run_command

    code = run_command(
        {
            "strategies": strategies,
            "seeds": seeds,
            "sets": tuple(_settings(settings).items()),
            "only": only,
            "devices": devices,
            "rounds": rounds,
            "model": _settings(model),
            "dataset": dataset,
            "partition": partition,
            "limit": limit,
            "fraction": fraction,
            "x": x,
            "y": y,
            "group": group,
            "split": split,
            "profile": profile,
        },
        folder=folder,
        data_dir=data_dir,
        workers=workers,
        json_to=json_to,
        html_to=html_to,
        csv_to=csv_to,
    )
    raise typer.Exit(code)


report = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(report, name="report")


@report.callback()
def _report() -> None:
    """Say what a run cost: `hedgerow report energy`."""


@report.command()
def energy(
    folder: Annotated[
        Path, typer.Option(help="Of a coordinator, or of a simulation; it may be in use, nothing is changed.")
    ] = Path("coordinator-data"),
    run: Annotated[str | None, typer.Option(help="Name of the run; the newest one if not given.")] = None,
    accuracy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Also: joules until this accuracy, for every device and the mean."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|FOLDER",
            help="Also: the same devices in another run of the store, or in the newest of another store.",
        ),
    ] = None,
    radio: Annotated[
        float | None,
        typer.Option(
            metavar="KM",
            help="Also: radiated RF energy of a radio at this distance, modelled; not battery energy.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, every reading included.")
    ] = False,
    csv_to: Annotated[
        Path | None, typer.Option("--csv", metavar="PATH", help="Write a row for every device, round, stage.")
    ] = None,
) -> None:
    """Show joules, seconds and bytes of a run by device, round and stage.

    Joules are measured (a sensor saw them), mixed (a model filled its holes)
    or modelled (CPU time in a profile's power model), and each has a scope:
    where the meter sits. Kinds and scopes are never added. ± is the error
    bar at k = 2. Seconds are always measured.

    Examples:

    hedgerow report energy

    hedgerow report energy --folder /var/lib/hedgerow/coordinator --run greenhouse --csv greenhouse.csv

    hedgerow report energy --run pruned --against dense --accuracy 0.8

    hedgerow report energy --folder run-1 --radio 0.25 --json
    """
    from hedgerow.ledger import run_command

    code = run_command(
        folder,
        run=run,
        accuracy=accuracy,
        against=against,
        radio_km=radio,
        as_json=as_json,
        csv_to=csv_to,
    )
    raise typer.Exit(code)


@app.command()
def export(
    run: Annotated[str, typer.Option("--from", metavar="RUN", help="Name of the run.")],
    device: Annotated[str, typer.Option(help="Name of the agent.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the artifact.")],
    folder: Annotated[
        Path, typer.Option(help="Of a coordinator, or of a simulation; it may be in use.")
    ] = Path("coordinator-data"),
    int8: Annotated[
        Int8,
        typer.Option(
            help="8-bit weights. `auto` wants proof on a device's own validation data, which are not here:"
            " it stays with float32 and says so."
        ),
    ] = Int8.AUTO,
    opset: Annotated[
        int, typer.Option(min=17, max=23, help="17 opens everywhere; 23 has attention as one operator.")
    ] = 17,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="A second output: softmax of the logits.")
    ] = False,
    normalisation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='JSON with "mean" and "std" per channel of the device\'s values.'),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Export a device's model from the coordinator: what it would send that device next.

    That is the whole model with fedavg, fedprox, fedtp, pfedhn and pfedla. With strategies that leave a
    part on the device, or let it choose its model, the device has the only whole copy:
    `hedgerow agent export --config agent.toml -o DIR` there.

    Example: hedgerow export --from greenhouse --device kitchen -o exported
    """
    from hedgerow.export import run_command

    code = run_command(
        *(run, device, folder, output),
        int8=int8.value,
        opset=opset,
        probabilities=probabilities,
        normalisation=normalisation,
        as_json=as_json,
    )
    raise typer.Exit(code)


model_verbs = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(model_verbs, name="model")

Artifacts = Annotated[Path, typer.Argument(metavar="DIR", help="A device's vault, or its artifacts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ADDRESS = "http://127.0.0.1:8080"
Devices = Annotated[
    list[str] | None,
    typer.Option("--device", help="Through the coordinator, on this device; may be given several times."),
]
Everywhere = Annotated[bool, typer.Option("--all", help="Through the coordinator, on every device.")]
Address = Annotated[str, typer.Option("--coordinator", metavar="URL", help="The coordinator's page.")]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help="With an operator's token, where one is asked for; or HEDGEROW_TOKEN."),
]
Cacert = Annotated[
    Path | None, typer.Option("--cacert", help="PEM of the authority that vouches for the coordinator.")
]
Wait = Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for devices' answers.")]


@model_verbs.callback()
def _model() -> None:
    """Say what a device's personal models cost, and choose which one answers."""


@model_verbs.command("show")
def model_show(folder: Artifacts = Path("vault"), as_json: AsJson = False) -> None:
    """Show a device's models, which one serves, and which were refused or rolled back, and why.

    Example: hedgerow model show /var/lib/hedgerow/vault
    """
    from hedgerow.model_choice import show

    raise typer.Exit(show(folder, as_json=as_json))


@model_verbs.command("list")
def model_list(
    folder: Annotated[Path, typer.Option(help="The coordinator's.")] = Path("coordinator-data"),
    device: Annotated[str | None, typer.Option(help="Of one device alone.")] = None,
    run: Annotated[str | None, typer.Option(help="Of one run alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show every device's models as the coordinator knows them: run, round, accuracy, ring and state.

    Proven, waiting for its ring, serving, pinned, refused or rolled back. Nothing
    is asked of the devices; the coordinator may be running.

    Examples:

    hedgerow model list --folder /var/lib/hedgerow/coordinator

    hedgerow model list --folder coordinator-data --device pi-garden --json
    """
    from hedgerow.model_remote import show

    raise typer.Exit(show(folder, device=device, run=run, as_json=as_json))


@model_verbs.command("get")
def model_get(
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    device: Annotated[str, typer.Argument(help="Name of the device.")],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE.onnx|DIR", help="The model alone, or the artifact below a folder."
        ),
    ],
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a device's model: what the coordinator would send it next, where it has the whole of it.

    As `hedgerow export`, but from elsewhere: the coordinator makes and proves
    it, it is checked here against its hashes, and then takes its place. A
    folder can be served: `hedgerow serve DIR`. With strategies that leave a
    part on the device it is refused (3), and the device has the only whole
    copy. Takes an operator.

    Examples:

    hedgerow model get greenhouse kitchen -o kitchen.onnx

    hedgerow model get greenhouse kitchen -o kitchen --coordinator https://laptop.lan:8080 --token-file token
    """
    from hedgerow.client import Client
    from hedgerow.model_get import get

    raise typer.Exit(get(Client(coordinator, token_file, cacert), run, device, output, as_json=as_json))


@model_verbs.command("pin")
def model_pin(
    folder: Artifacts = Path("vault"),
    wanted: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Its round, or the beginning of its SHA-256; else what serves."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The same, with --device or --all.")] = None,
    device: Devices = None,
    everywhere: Everywhere = False,
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    reason: Annotated[str, typer.Option(help="Kept in the audit.")] = "",
    wait: Wait = 10.0,
    as_json: AsJson = False,
) -> None:
    """Let one model serve whatever comes, until `hedgerow model unpin`.

    A pinned model has to prove itself, but is compared with nothing and never
    rolled back. Newer ones still arrive and wait. With --device or --all it is
    said through the coordinator; a pin of the device's owner has precedence.

    Examples:

    hedgerow model pin /var/lib/hedgerow/vault

    hedgerow model pin /var/lib/hedgerow/vault 12

    hedgerow model pin --device pi-garden --model 12
    """
    wanted = model or wanted
    if device or everywhere:
        _remote(("pin", device, everywhere), coordinator, token_file, cacert, reason, wait, as_json, wanted)
    from hedgerow.model_choice import pin

    raise typer.Exit(pin(folder, wanted, as_json=as_json))


@model_verbs.command("unpin")
def model_unpin(
    folder: Artifacts = Path("vault"),
    device: Devices = None,
    everywhere: Everywhere = False,
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    reason: Annotated[str, typer.Option(help="Kept in the audit.")] = "",
    wait: Wait = 10.0,
    as_json: AsJson = False,
) -> None:
    """Let the newest model serve again, if it proves itself and is not worse.

    Examples:

    hedgerow model unpin /var/lib/hedgerow/vault

    hedgerow model unpin --all
    """
    if device or everywhere:
        _remote(("unpin", device, everywhere), coordinator, token_file, cacert, reason, wait, as_json)
    from hedgerow.model_choice import unpin

    raise typer.Exit(unpin(folder, as_json=as_json))


@model_verbs.command("rollback")
def model_rollback(
    folder: Artifacts = Path("vault"),
    reason: Annotated[str, typer.Option(help="Told to the coordinator, too.")] = "rolled back by hand",
    model: Annotated[
        str | None, typer.Option("--model", help="With --device or --all: another than the one that serves.")
    ] = None,
    device: Devices = None,
    everywhere: Everywhere = False,
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    wait: Wait = 10.0,
    as_json: AsJson = False,
) -> None:
    """Go back to the model before the one that serves, which is not taken again.

    Examples:

    hedgerow model rollback /var/lib/hedgerow/vault --reason "wrong on the night shift"

    hedgerow model rollback --device pi-garden --reason "wrong on the night shift"

    hedgerow model rollback --all --model 12 --coordinator https://laptop.lan:8080 --token-file token
    """
    if device or everywhere:
        _remote(
            ("rollback", device, everywhere), coordinator, token_file, cacert, reason, wait, as_json, model
        )
    from hedgerow.model_choice import rollback

    raise typer.Exit(rollback(folder, reason, as_json=as_json))


rollout_verbs = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
model_verbs.add_typer(rollout_verbs, name="rollout")


@rollout_verbs.callback()
def _rollout() -> None:
    """See how far new models are let go, let the next ring go by hand, or stop and roll all back.

    Through the coordinator's API, where `rollout.enabled` is true; what is changed
    is in `hedgerow coordinator audit` with the token's name. Ends with 0 done,
    1 failed, 2 misuse, 3 refused: not allowed, or no rollout is under way.
    """


@rollout_verbs.command("show")
def model_rollout_show(
    last: Annotated[int, typer.Option(min=1, max=1000, help="The newest N.")] = 1,
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    as_json: AsJson = False,
) -> None:
    """Show the newest rollout: its ring, what it waits for, and how every device stands. A viewer may.

    Example: hedgerow model rollout show --coordinator https://laptop.lan:8080 --token-file token
    """
    from hedgerow.client import Client
    from hedgerow.model_rollout import show

    raise typer.Exit(show(Client(coordinator, token_file, cacert), last=last, as_json=as_json))


@rollout_verbs.command("go")
def model_rollout_go(
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    as_json: AsJson = False,
) -> None:
    """Let the next ring go now, whatever it waits for. Takes an operator.

    Example: hedgerow model rollout go
    """
    from hedgerow.client import Client
    from hedgerow.model_rollout import go

    raise typer.Exit(go(Client(coordinator, token_file, cacert), as_json=as_json))


@rollout_verbs.command("stop")
def model_rollout_stop(
    reason: Annotated[
        str, typer.Option(help="Kept in the audit and told to the devices.")
    ] = "stopped by hand",
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    as_json: AsJson = False,
) -> None:
    """Stop the rollout under way. Takes an operator.

    Devices that serve its model go back to the one before; those that wait keep theirs.

    Example: hedgerow model rollout stop --reason "the greenhouse is being repainted"
    """
    from hedgerow.client import Client
    from hedgerow.model_rollout import stop

    raise typer.Exit(stop(Client(coordinator, token_file, cacert), reason, as_json=as_json))


def _remote(
    what: tuple[Literal["pin", "unpin", "rollback"], list[str] | None, bool],
    coordinator: str,
    token_file: Path | None,
    cacert: Path | None,
    reason: str,
    wait_s: float,
    as_json: bool,
    model: str | None = None,
) -> NoReturn:
    """Say it through the coordinator."""
    from hedgerow.client import Client
    from hedgerow.model_remote import order

    verb, devices, everywhere = what
    if devices and everywhere:
        typer.echo("hedgerow model: --device and --all do not go together", err=True)
        raise typer.Exit(2)
    api = Client(coordinator, token_file, cacert)
    code = order(api, verb, devices or [], model=model, reason=reason, wait_s=wait_s, as_json=as_json)
    raise typer.Exit(code)


class Side(StrEnum):
    """Whose settings."""

    COORDINATOR = "coordinator"
    AGENT = "agent"


@app.command()
def init(
    side: Annotated[Side, typer.Argument(help="Whose settings.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="coordinator.toml or agent.toml here; - is stdout."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Let it take the place of one that is there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a settings file to begin with: every setting, with its default, bounds and what it is for.

    What has to be looked at stands there; the rest is in comments. It is made
    from what the programs read, so it is whole for this version.

    Examples:

    hedgerow init coordinator

    hedgerow init agent -o /etc/hedgerow/agent.toml
    """
    from hedgerow.init import run_command

    raise typer.Exit(run_command(side.value, output, force=force, as_json=as_json))


@app.command()
def fleet(
    watch: Annotated[
        bool,
        typer.Option("--watch", "-w", help="Follow it, until Ctrl-C; in a pipe, a line for each change."),
    ] = False,
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The picture as JSON; with --watch a line each, with what changed.")
    ] = False,
) -> None:
    """Show every device: what it does, accuracy, FFL units kept, joules, temperature, model, why it does not.

    Joules count from the start of the device's program and say how they are
    known: measured, mixed or modelled (≈). °C is of its hottest zone when its
    last round ended. The model is the one that answers there. What stands after
    a stage is how far it is, and the time left. In a pipe there is a line for
    each device. A viewer's token will do.

    Ends with 0 done, 1 failed, 2 misuse, 3 refused.

    Examples:

    hedgerow fleet

    hedgerow fleet --watch --coordinator https://laptop.lan:8080 --token-file token

    hedgerow fleet --json
    """
    from hedgerow.client import Client
    from hedgerow.fleet import show

    raise typer.Exit(show(Client(coordinator, token_file, cacert), watch=watch, as_json=as_json))


run_verbs = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(run_verbs, name="run")

RunName = Annotated[str | None, typer.Argument(metavar="[RUN]", help="Its name; else the one under way.")]


@run_verbs.callback()
def _run() -> None:
    """Start, pause, resume, stop and look at runs through the coordinator.

    Ends with 0 done, 1 failed, 2 misuse, 3 refused: not allowed, or not now.
    """


@run_verbs.command("start")
def run_start(
    name: Annotated[str | None, typer.Argument(help="Of the run; made from strategy and time else.")] = None,
    strategy: Annotated[str | None, typer.Option(help=f"One of {STRATEGIES}.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of training.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Decides the initial model and who is asked.")
    ] = None,
    min_agents: Annotated[int | None, typer.Option(min=1, help="Online before the first round.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A strategy's setting, such as target=0.95.")
    ] = None,
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    as_json: AsJson = False,
) -> None:
    """Start a run; what is left out is as in the coordinator's settings. Refused while one is under way.

    Examples:

    hedgerow run start

    hedgerow run start greenhouse-2 --strategy fedtp --rounds 20 --set epochs=1
    """
    from hedgerow.client import Client
    from hedgerow.run import start

    asked: dict[str, Any] = {
        "name": name,
        "strategy": strategy,
        "rounds": rounds,
        "seed": seed,
        "min_agents": min_agents,
    }
    asked |= {"settings": _settings(settings)} if settings else {}
    raise typer.Exit(start(Client(coordinator, token_file, cacert), asked, as_json=as_json))


@run_verbs.command("pause")
def run_pause(
    run: RunName = None,
    reason: Annotated[str, typer.Option(help="Kept in the run's row.")] = "paused by hand",
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    as_json: AsJson = False,
) -> None:
    """Let the round under way end, and open no other until `hedgerow run resume`, over restarts as well.

    Example: hedgerow run pause --reason "the power is needed elsewhere"
    """
    from hedgerow.client import Client
    from hedgerow.run import change

    client = Client(coordinator, token_file, cacert)
    raise typer.Exit(change(client, "pause", run, {"reason": reason}, as_json=as_json))


@run_verbs.command("resume")
def run_resume(
    run: RunName = None,
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a paused run.

    Example: hedgerow run resume
    """
    from hedgerow.client import Client
    from hedgerow.run import change

    client = Client(coordinator, token_file, cacert)
    raise typer.Exit(change(client, "resume", run, {}, as_json=as_json))


@run_verbs.command("stop")
def run_stop(
    run: RunName = None,
    reason: Annotated[str, typer.Option(help="Kept in the run's row.")] = "stopped by hand",
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    as_json: AsJson = False,
) -> None:
    """End the run under way; what its closed rounds made stays.

    Example: hedgerow run stop greenhouse-2 --reason "accurate enough"
    """
    from hedgerow.client import Client
    from hedgerow.run import change

    client = Client(coordinator, token_file, cacert)
    raise typer.Exit(change(client, "stop", run, {"reason": reason}, as_json=as_json))


@run_verbs.command("list")
def run_list(
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    as_json: AsJson = False,
) -> None:
    """Show all runs, the newest first.

    Example: hedgerow run list --coordinator https://laptop.lan:8080 --token-file token
    """
    from hedgerow.client import Client
    from hedgerow.run import show_all

    raise typer.Exit(show_all(Client(coordinator, token_file, cacert), as_json=as_json))


@run_verbs.command("show")
def run_show(
    run: RunName = None,
    coordinator: Address = ADDRESS,
    token_file: TokenFile = None,
    cacert: Cacert = None,
    as_json: AsJson = False,
) -> None:
    """Show one run and its rounds: updates, accuracy, joules by kind, bytes, seconds.

    Example: hedgerow run show greenhouse-2 --json
    """
    from hedgerow.client import Client
    from hedgerow.run import show

    raise typer.Exit(show(Client(coordinator, token_file, cacert), run, as_json=as_json))


@app.command(context_settings=PASS_ON)
def coordinator(context: typer.Context) -> None:
    """Run the coordinator of a federation: `hedgerow coordinator --config coordinator.toml`."""
    from coordinator.__main__ import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=PASS_ON)
def agent(context: typer.Context) -> None:
    """Run the agent on this device: `hedgerow agent --config agent.toml`."""
    from edge_agent.__main__ import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=PASS_ON)
def serve(context: typer.Context) -> None:
    """Serve a personal model over HTTP, without torch: `hedgerow serve vault/artifacts --port 9000`."""
    from edge_agent.serving.__main__ import main as run

    raise typer.Exit(run(context.args))


@app.command()
def wheelhouse(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="An empty or new folder.")],
    platform: Annotated[str, typer.Option(help="The board's processor: aarch64 or x86_64.")] = "aarch64",
    python: Annotated[str, typer.Option(help="Its Python: 3.11, 3.12 and so on.")] = "3.11",
    extra: Annotated[
        list[str] | None,
        typer.Option(help="What it does: train, serve, join, coordinator ... Several may be given."),
    ] = None,
    glibc: Annotated[
        str, typer.Option(help="Its C library (ldd --version): Debian 12 has 2.36, Ubuntu 20.04 2.31.")
    ] = "2.31",
    wheel: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Hedgerow's own wheel; else the checkout's is built.")
    ] = None,
    constraints: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Versions to take; else the checkout's, if it is one.")
    ] = None,
    index_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Another index, such as torch's own for CPU wheels.")
    ] = None,
    extra_index_url: Annotated[
        str | None, typer.Option(metavar="URL", help="One more index, beside the usual one.")
    ] = None,
    find_links: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A folder of wheels that are here already.")
    ] = None,
    no_index: Annotated[bool, typer.Option("--no-index", help="Ask no index, --find-links alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was fetched as JSON.")] = False,
) -> None:
    """Fetch every wheel that a board without internet needs, with a script that installs them there.

    Runs where there is internet; nothing is built or run for the board. Says
    what has no wheel for it. The folder holds the wheels, constraints.txt,
    SHA256SUMS and install.sh.

    Examples:

    hedgerow wheelhouse --platform aarch64 --python 3.11 --extra train --extra serve -o wheels

    sh wheels/install.sh /opt/hedgerow
    """
    from hedgerow.wheelhouse import Target, run_command

    index = ["--no-index"] * no_index
    for option, value in (("--index-url", index_url), ("--extra-index-url", extra_index_url)):
        index += [option, value] if value else []
    for folder in find_links or []:
        index += ["--find-links", str(folder)]
    target = Target(platform, python, glibc)
    code = run_command(
        target, extra or [], out, wheel=wheel, constraints=constraints, index=index, as_json=as_json
    )
    raise typer.Exit(code)


@app.command()
def doctor(
    chaos: Annotated[
        bool, typer.Option("--chaos", help="Kill processes, and look what comes of it.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A sample of ten instead of the whole matrix.", rich_help_panel=CHAOS),
    ] = False,
    kills: Annotated[
        int | None,
        typer.Option(help="Random instants as well; 20 (2 with --quick).", rich_help_panel=CHAOS),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the instants, and the runs.", rich_help_panel=CHAOS)] = 0,
    broker: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A broker that runs, such as mqtt://host:1883; it is connected to, never killed. Else"
            " --chaos starts its own.",
        ),
    ] = None,
    sealed: Annotated[
        bool,
        typer.Option(
            "--sealed", help="The agents join first; every letter has a seal.", rich_help_panel=CHAOS
        ),
    ] = False,
    logs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep all logs here; else only when something differs.", rich_help_panel=CHAOS
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Look at this machine: versions, brokers, ports, clock, memory, disk.

    With --chaos it starts a federation of real processes (broker, coordinator,
    two agents, a serving process) in a folder of its own, runs it once
    unbroken, and then once for everything that can be killed (-9): each
    process, and each pair, as the round enters each of its stages, and at
    random instants. Each is started again, and every run has to end in the
    state of the unbroken one, with no update lost or counted twice, and with
    a personal model that proves itself at every moment. About ten seconds for
    each kill. Nothing of yours is touched. Ends with 1 if anything differs.

    Examples:

    hedgerow doctor

    hedgerow doctor --chaos --quick

    hedgerow doctor --chaos --quick --sealed

    hedgerow doctor --chaos --kills 200 --logs chaos-logs --json
    """
    if chaos:
        from hedgerow.chaos import ChaosOptions
        from hedgerow.chaos import run_command as run_chaos

        options = ChaosOptions(
            quick=quick, kills=kills, seed=seed, broker=broker, sealed=sealed, logs=logs, json=as_json
        )
        raise typer.Exit(run_chaos(options))
    if quick or sealed or kills is not None or logs is not None:
        raise typer.BadParameter(
            "--quick, --kills, --sealed and --logs belong to --chaos", param_hint="--chaos"
        )
    from hedgerow.doctor import run_command as look

    raise typer.Exit(look(broker, as_json=as_json))


@model_verbs.command("report")
def model_report(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A device's vault, its artifacts, or one artifact.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="agent.toml: the model of its vault.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Device profile for joules: an id or file; else the device's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure the personal model on this device beside the uncut one.

    p50 and p99 of one run (wall time) for batches of 1 and 32, samples a
    second, file, memory and cold start of `hedgerow serve`, parity with the
    trained model, accuracy on the device's own test part, and joules of
    1,000 inferences: measured, mixed or modelled, ± at k = 2. Takes about
    half a minute; stop training meanwhile, or it is measured as well.

    The uncut model is written anew from the same spec with drawn weights:
    what it costs does not depend on them, and how well it answers is unknown.

    Examples:

    hedgerow model report /var/lib/hedgerow/vault

    hedgerow model report --config agent.toml --json
    """
    from hedgerow.model import run_command

    raise typer.Exit(run_command(folder, config=config, profile=profile, as_json=as_json))


def main() -> None:
    """Run the command line."""
    app(prog_name="hedgerow")


if __name__ == "__main__":
    main()
