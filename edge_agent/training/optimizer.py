"""torch's optimizers without its compiler, which their methods load only to tell it to keep out.

Three methods of every `torch.optim.Optimizer` are wrapped for `torch.compile`, and the wrappers import
`torch._dynamo`: 83 MB and more than a second on a device that never compiles. Here the same methods are
called without the wrappers; the numbers are the same to the bit. Steps are marked as `hooked` already, which
leaves out the profiler's wrapper: nobody asks for its record, and a step of a small model is short.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch


class Adam(torch.optim.AdamW):
    """AdamW, uncompiled."""

    add_param_group: Callable[..., None] = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad: Callable[..., None] = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step; there is no closure to call."""
        inspect.unwrap(torch.optim.AdamW.step)(self)

    step.hooked = True  # type: ignore[attr-defined]


class Sgd(torch.optim.SGD):
    """Gradient descent with momentum, uncompiled."""

    add_param_group: Callable[..., None] = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad: Callable[..., None] = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step; there is no closure to call."""
        inspect.unwrap(torch.optim.SGD.step)(self)

    step.hooked = True  # type: ignore[attr-defined]
