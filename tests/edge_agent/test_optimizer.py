from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from edge_agent.training.optimizer import Adam, Sgd


def trained(make: type[torch.optim.Optimizer], **settings: object) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = make(model.parameters(), **settings)  # type: ignore[call-arg, arg-type]
    x = torch.randn(16, 6)
    for _ in range(5):
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (Adam, torch.optim.AdamW, {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "fused": True}),
        (Sgd, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    ],
)
def test_the_steps_are_those_of_torch_to_the_bit(
    ours: type[torch.optim.Optimizer], theirs: type[torch.optim.Optimizer], settings: dict[str, object]
) -> None:
    for a, b in zip(trained(ours, **settings), trained(theirs, **settings), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, torch.zeros_like(a))


@pytest.mark.parametrize("name", ["Adam", "Sgd"])
def test_the_compiler_stays_out_of_memory(name: str) -> None:
    code = f"""
import sys, torch
from edge_agent.training.optimizer import {name}
model = torch.nn.Linear(4, 2)
optimizer = {name}(model.parameters(), lr=0.1)
optimizer.zero_grad(set_to_none=True)
model(torch.ones(3, 4)).sum().backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
print("torch._dynamo" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
