"""The model as the Open Inference Protocol (V2) and its extensions describe it."""

from __future__ import annotations

from pydantic_core import to_json

from edge_agent.serving.protocol import INPUT, OUTPUTS, datatype
from foundation.artifact import Manifest

EXTENSIONS = (
    "binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics",
)  # fmt: skip


def metadata(name: str, manifest: Manifest) -> dict[str, object]:
    """Return the protocol's description of a model, with our manifest under `properties`.

    Properties are texts by the protocol: what is none in the manifest is there as JSON, and what is unknown
    is left out.
    """
    return {
        "name": name,
        "versions": [str(manifest.round)],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": INPUT, "datatype": datatype(manifest), "shape": [-1, *_input(manifest)]}],
        "outputs": [
            {"name": output, "datatype": kind, "shape": [-1, *_output(output, manifest)]}
            for output, kind in OUTPUTS.items()
        ],
        "properties": {
            key: value if isinstance(value, str) else to_json(value).decode()
            for key, value in manifest.model_dump(mode="json").items()
            if value is not None
        },
    }


def configuration(name: str, manifest: Manifest, most_samples: int, window_s: float) -> dict[str, object]:
    """Return the model configuration; dims are without the batch axis, as `max_batch_size` tells it."""
    found: dict[str, object] = {
        "name": name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "version_policy": {"specific": {"versions": [manifest.round]}},
        "max_batch_size": most_samples,
        "input": [{"name": INPUT, "data_type": f"TYPE_{datatype(manifest)}", "dims": list(_input(manifest))}],
        "output": [
            {"name": output, "data_type": f"TYPE_{kind}", "dims": list(_output(output, manifest))}
            for output, kind in OUTPUTS.items()
        ],
        "instance_group": [{"name": name, "kind": "KIND_CPU", "count": 1}],
        "default_model_filename": "model.onnx",
    }
    if window_s:
        found["dynamic_batching"] = {"max_queue_delay_microseconds": round(1e6 * window_s)}
    return found


def index(name: str, version: str, *, loaded: bool) -> list[dict[str, str]]:
    """Return the repository's index: the one model."""
    state, reason = ("READY", "") if loaded else ("UNAVAILABLE", "unloaded")
    return [{"name": name, "version": version, "state": state, "reason": reason}]


def _input(manifest: Manifest) -> tuple[int, ...]:
    return (-1,) if manifest.input == "text" else manifest.shape


def _output(output: str, manifest: Manifest) -> tuple[int, ...]:
    sequence = (-1,) if manifest.input == "text" else ()
    return sequence if output == "label" else (*sequence, len(manifest.labels))
