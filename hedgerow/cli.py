"""The one command. Each verb imports its own side only when it is called."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="hedgerow",
    help="Personalized federated learning for the edge: personal, sparse transformers, every joule counted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PASS_ON: dict[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


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
    strategy: Annotated[str, typer.Option(help="fedavg, fedtp, local or pfl_tpp.")] = "pfl_tpp",
    dataset: Annotated[
        str, typer.Option(help="digits needs no files; others look in --data-dir.")
    ] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(envvar="HEDGEROW_DATA", help="Folder of the data sets.")
    ] = None,
    partition: Annotated[
        str, typer.Option(help="iid, pathological:K (classes per device), dirichlet:ALPHA or natural.")
    ] = "dirichlet:0.3",
    seed: Annotated[int, typer.Option(help="Decides shares, initial model and batches.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Use so many samples of the data set.")] = None,
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
    strategy: Annotated[str, typer.Option(help="fedavg, fedtp, local or pfl_tpp.")] = "pfl_tpp",
    dataset: Annotated[
        str,
        typer.Option(
            help="digits needs no files; mnist, fashion-mnist, cifar10, uci-har and shakespeare are looked"
            " for in --data-dir."
        ),
    ] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(envvar="HEDGEROW_DATA", help="Folder of the data sets.")
    ] = None,
    partition: Annotated[
        str, typer.Option(help="iid, pathological:K (classes per device), dirichlet:ALPHA or natural.")
    ] = "dirichlet:0.3",
    seed: Annotated[
        int, typer.Option(min=0, help="Decides shares, initial model and batches: same seed, same result.")
    ] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use so many samples of the data set, over all devices.")
    ] = None,
    fraction: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the devices asked in each round.")
    ] = 1.0,
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
    own held-out part.

    Examples:

    hedgerow simulate

    hedgerow simulate --dataset fashion-mnist --data-dir ~/data --partition pathological:2 --limit 6000

    hedgerow simulate --strategy fedavg --devices 100 --fraction 0.1 --set epochs=1 --model width=32

    hedgerow simulate --folder run-1 --artifacts --json > run-1.json
    """
    from hedgerow.simulate import run_command

    code = run_command(
        {
            "devices": devices,
            "rounds": rounds,
            "strategy": strategy,
            "settings": _settings(settings),
            "model": _settings(model),
            "dataset": dataset,
            "partition": partition,
            "limit": limit,
            "seed": seed,
            "fraction": fraction,
            "profile": profile,
            "artifacts": artifacts,
        },
        folder=folder,
        data_dir=data_dir,
        workers=workers,
        as_json=as_json,
    )
    raise typer.Exit(code)


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


def main() -> None:
    """Run the command line."""
    app(prog_name="hedgerow")


if __name__ == "__main__":
    main()
