"""`hedgerow agent export`: this device's last model as an artifact of its own, without training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_agent.datasets import load as load_data
from edge_agent.last_model import LastModel
from edge_agent.last_model import load as load_model
from edge_agent.settings import AgentSettings
from foundation import settings
from foundation.artifact import Manifest
from foundation.errors import DataError, HedgerowError, SettingsError
from foundation.parameters import Array


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="hedgerow agent export",
        description="Export the last model of this device: proven, measured on this device, signed with its"
        " key. The agent may run meanwhile; what it serves is not touched.",
        epilog="Example: hedgerow agent export --config agent.toml -o exported --int8 auto",
    )
    result.add_argument("--config", type=Path, required=True, help="agent.toml")
    result.add_argument("-o", "--output", type=Path, required=True, help="folder for the artifact")
    result.add_argument(
        "--int8",
        choices=["auto", "on", "off"],
        help="8-bit weights: auto takes them where they are proven to be faster here and as accurate;"
        " default: the config's",
    )
    result.add_argument("--opset", type=int, default=17, help="17 to 23; 17 opens everywhere")
    result.add_argument("--probabilities", action="store_true", help="a second output: softmax of the logits")
    result.add_argument("--json", action="store_true", help="the manifest as JSON, for machines")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Export and tell; 0 done, 1 it failed, 2 a setting is wrong."""
    arguments = parser().parse_args(argv)
    try:
        told = settings.load(AgentSettings, arguments.config, os.environ, (), prefix="AGENT")[0]
        manifest = _export(told, arguments)
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow agent export: {error}\n")
        return 2 if isinstance(error, SettingsError) else 1
    if arguments.json:
        sys.stdout.write(manifest.model_dump_json(indent=1) + "\n")
    else:
        sys.stdout.write(summary(manifest, arguments.output) + "\n")
    return 0


def summary(manifest: Manifest, folder: Path) -> str:
    """Return what a person wants to know of an artifact."""
    m = manifest
    lines = [
        f"exported {m.agent}, run {m.run}, round {m.round}: {folder / m.sha256}",
        f"  {m.bytes} bytes, {m.parameters} of {m.dense_parameters} parameters, opset {m.opset}",
        f"  logits differ from the trained model's by at most {m.parity:.1e}",
    ]
    if m.validation is not None:
        lines.append(f"  accuracy {m.validation:.3f} on {m.validation_examples} validation examples")
    if m.latency_ms is not None and m.dense_latency_ms is not None:
        lines.append(f"  {m.latency_ms:.2f} ms a sample here; {m.dense_latency_ms:.2f} ms dense, in float32")
    if m.int8 is not None:
        lines.append(f"  8-bit weights: {'yes' if m.int8.used else 'no'}, {m.int8.why}")
    return "\n".join(lines)


def _export(told: AgentSettings, arguments: argparse.Namespace) -> Manifest:
    model = load_model(told.vault)
    _say(f"model of run {model.facts.run}, round {model.facts.round}")
    part = _validation(told, model)
    _say("writing, proving and measuring it")
    return model.export(
        *(arguments.output, told.vault, part),
        int8=arguments.int8 or told.export.int8,
        opset=arguments.opset,
        probabilities=arguments.probabilities,
    )


def _validation(told: AgentSettings, model: LastModel) -> tuple[Array, Array] | None:
    """Return x and y of the validation part; `None`, told, where this device's data do not give one."""
    _say("reading this device's data, for validation")
    folder = told.data_dir or (Path(d) if (d := os.environ.get("HEDGEROW_DATA")) else None)
    try:
        data = load_data(told.data, folder, told.vault / "stream")
    except DataError as error:
        _say(f"no validation: {error}")
        return None
    if (data.input, data.shape, data.labels) != (
        model.facts.spec.input,
        model.facts.spec.shape,
        model.facts.labels,
    ):
        _say("no validation: the data have other shapes or labels than the model")
        return None
    return (data.validation.x, data.validation.y) if len(data.validation.y) else None


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
