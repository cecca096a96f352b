"""Exports one set of parameters from the command line: `python -m export --help`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from export.graph import OPSET, OPSETS
from export.package import export_artifact
from export.sign import DeviceKey
from export.verify import Validation
from foundation.artifact import Probe
from foundation.errors import ExportError
from foundation.normalisation import Normalisation
from foundation.parameters import Array, Parameters
from foundation.spec import ModelSpec

DONE, FAILED, REFUSED = 0, 1, 3


def main(arguments: list[str] | None = None) -> int:
    """Export and return the exit code: 0 done, 1 a file is missing or malformed, 3 the model is refused."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    options = _parser().parse_args(arguments)
    try:
        manifest = _export(options)
    except ExportError as error:
        sys.stderr.write(f"refused: {error}\n")
        return REFUSED
    except (OSError, ValueError, KeyError, ValidationError, SafetensorError, BadZipFile) as error:
        sys.stderr.write(f"failed: {error}\n")
        return FAILED
    sys.stdout.write(manifest + "\n")
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument("parameters", type=Path, help="safetensors file with the dense parameters")
    parser.add_argument("spec", type=Path, help="JSON file with the model's spec")
    parser.add_argument("probe", type=Path, help="npz with raw `inputs` and the trained model's `logits`")
    parser.add_argument("folder", type=Path, help="where artifacts live; written below it")
    parser.add_argument("--masks", type=Path, help="npz with one boolean mask per `blocks.i.ffl`")
    parser.add_argument("--normalisation", type=Path, help="JSON file with mean and std per channel")
    parser.add_argument("--labels", type=Path, help="JSON file with a list of names, one per class")
    parser.add_argument("--agent", default="local")
    parser.add_argument("--run", default="local")
    parser.add_argument("--round", type=int, default=0)
    parser.add_argument("--strategy", default="local")
    parser.add_argument(
        "--tolerance", type=float, help="largest difference of a logit; default from the probe"
    )
    parser.add_argument("--opset", type=int, default=OPSET, choices=OPSETS)
    parser.add_argument("--int8", choices=["auto", "on", "off"], default="off", help="8-bit weights")
    parser.add_argument("--validation", type=Path, help="npz with raw `x` and the right `y`")
    parser.add_argument("--probabilities", action="store_true", help="a second output: softmax of the logits")
    parser.add_argument("--key", type=Path, help="sign with this key file of 32 bytes")
    return parser


def _export(options: argparse.Namespace) -> str:
    spec = ModelSpec.model_validate_json(options.spec.read_text())
    normalisation = Normalisation()
    if options.normalisation:
        normalisation = Normalisation.model_validate_json(options.normalisation.read_text())
    labels = [str(i) for i in range(spec.classes)]
    if options.labels:
        labels = [str(label) for label in json.loads(options.labels.read_text())]
    probe = _arrays(options.probe)
    manifest = export_artifact(
        spec,
        Parameters(load_file(options.parameters)),
        _arrays(options.masks) if options.masks else {},
        normalisation,
        labels,
        Probe(probe["inputs"], probe["logits"]),
        options.folder,
        agent=options.agent,
        run=options.run,
        round=options.round,
        strategy=options.strategy,
        tolerance=options.tolerance,
        opset=options.opset,
        int8=options.int8,
        probabilities=options.probabilities,
        validation=_validation(options.validation) if options.validation else None,
        key=DeviceKey.load(options.key) if options.key else None,
    )
    return manifest.model_dump_json(indent=1)


def _validation(path: Path) -> Validation:
    arrays = _arrays(path)
    return Validation(arrays["x"], arrays["y"])


def _arrays(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


if __name__ == "__main__":
    sys.exit(main())
