from __future__ import annotations

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN is left as it is here")
@pytest.mark.parametrize(
    "module", ["coordinator.hypernet", "edge_agent.training.trainer", "coordinator.multihead"]
)
def test_both_sides_compute_without_a_kernel_per_shape(module: str) -> None:
    # Both or neither: bits of a run would else depend on what a process imports.
    ask = f"import torch, {module}; print(torch.backends.mkldnn.enabled)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
