"""Additions to the local loss."""

from __future__ import annotations

import numpy as np
import torch

from foundation.nn.bridge import tensor_of
from foundation.nn.transformer import Transformer
from foundation.parameters import BoolArray, Parameters
from foundation.work import Proximal


class ProximalPull:
    """The gradient of mu/2 * |w - w_sent|^2 over everything that arrived (FedProx, eq. 2 of Li et al.).

    The reference is cut along with the model, so that dropped units pull at nothing.
    """

    def __init__(self, term: Proximal, sent: Parameters, masks: dict[str, BoolArray]) -> None:
        self.mu, self._sent = term.mu, sent
        self.refresh(masks)

    def refresh(self, masks: dict[str, BoolArray]) -> None:
        """Cut the reference to the units that are still there."""
        self._reference = {}
        for name, array in self._sent.items():
            block, _, part = name.partition(".ffl.")
            mask = masks.get(f"{block}.ffl")
            if mask is not None and part in ("up.weight", "up.bias"):
                array = array[mask]
            elif mask is not None and part == "down.weight":
                array = array[:, mask]
            self._reference[name] = tensor_of(np.asarray(array))

    @torch.no_grad()
    def add_gradient(self, model: Transformer) -> None:
        """Add mu * (w - w_sent) to the gradients that are there."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and name in self._reference:
                parameter.grad.add_(parameter - self._reference[name], alpha=self.mu)
