"""A torch model of one's own becomes an artifact like any other."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.folder import load_artifact, resolve
from export.proof import answers, open_session
from export.sign import DeviceKey, Keys
from export.torch_model import export_torch_model
from export.verify import Validation
from foundation.errors import ExportError, ProofFailed
from foundation.parameters import Array

KEY = DeviceKey(bytes(32))
LABELS = ("null", "eins", "zwei")


@pytest.fixture(params=["present", "older"])
def exporter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of torch's exporters is used: the present one, or the older one where onnxscript is missing."""
    if request.param == "older":
        monkeypatch.setattr("export.torch_model.find_spec", lambda _: None)
    else:
        pytest.importorskip("onnxscript")
    return str(request.param)


def samples(count: int = 12) -> Array:
    return np.random.default_rng(0).standard_normal((count, 1, 8, 8)).astype(np.float32)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 3)
    )


class OneBatch(nn.Module):
    """Depends on its batch, which a traced graph cannot know."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * float(len(x))


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Characters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.embedding(x)))
        return found


def test_a_torch_model_becomes_a_signed_artifact(exporter: str, tmp_path: Path) -> None:
    model = network()
    x = samples()
    y = np.zeros(len(x), np.int64)
    manifest = export_torch_model(
        *(model, x, tmp_path),
        input="image", labels=LABELS, agent="kitchen", key=KEY, validation=Validation(x, y),
    )  # fmt: skip
    assert model.training, "it is left as it was"
    loaded, content, probe = load_artifact(resolve(tmp_path), Keys([KEY]), agent="kitchen")
    assert loaded == manifest
    assert (manifest.shape, manifest.labels, manifest.parameters) == ((1, 8, 8), LABELS, 40 + 771)
    assert manifest.parity <= 1e-5
    assert manifest.validation is not None
    model.eval()
    with torch.inference_mode():
        expected = model(torch.from_numpy(x)).numpy()
    for batch in (1, 7, 12):
        found = answers(open_session(content), x[:batch])
        np.testing.assert_allclose(found, expected[:batch], atol=1e-5)
    assert len(probe.inputs) == 8


def test_8_bit_weights_of_a_torch_model(exporter: str, tmp_path: Path) -> None:
    manifest = export_torch_model(
        *(network(), samples(), tmp_path), input="image", labels=LABELS, int8="on", measure_latency=False
    )
    assert manifest.int8 is not None
    assert manifest.int8.used
    assert manifest.bytes < manifest.dense_bytes


def test_text_of_any_length(exporter: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 3, (4, 6))
    export_torch_model(*(Characters(), x, tmp_path), input="text", labels=LABELS, measure_latency=False)
    model = load_artifact(resolve(tmp_path))[1]
    assert answers(open_session(model), x[:3, :5]).shape == (3, 5, 3)


def test_a_model_that_is_another_one_at_another_batch_size_is_refused(exporter: str, tmp_path: Path) -> None:
    told = pytest.warns(torch.jit.TracerWarning) if exporter == "older" else nullcontext()
    with told, pytest.raises((ProofFailed, ExportError)):
        export_torch_model(OneBatch(), samples(), tmp_path, input="image", labels=LABELS)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="returns tuple"):
        export_torch_model(Two(), samples(), tmp_path, input="image", labels=LABELS)
    with pytest.raises(ExportError, match="logits have shape"):
        export_torch_model(network(), samples(), tmp_path, input="image", labels=LABELS[:2])
    with pytest.raises(ExportError, match="give 2 or more"):
        export_torch_model(network(), samples(1), tmp_path, input="image", labels=LABELS)


def test_nothing_else_of_the_package_needs_torch() -> None:
    code = (
        "import sys; import export.__main__, export.package, export.quantise, export.sign;"
        "assert not {'torch', 'cryptography'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
