"""Additions to the local loss."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foundation.nn.bridge import tensor_of, to_module
from foundation.nn.transformer import Transformer, loss_of
from foundation.parameters import BoolArray, Parameters
from foundation.spec import ModelSpec
from foundation.work import Distillation, Proximal

TEACHING_BATCH = 256


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


class Lesson:
    """Distillation from a teacher as it was sent: a T^2 KL(teacher || student) + (1 - a) cross-entropy.

    The teacher stands still, so what it says of every training sample is worked out once.
    """

    def __init__(self, term: Distillation, spec: ModelSpec, teacher: Parameters) -> None:
        self.term, self._spec, self._teacher = term, spec, teacher
        self._said = torch.empty(0)

    @torch.no_grad()
    def prepare(self, x: Tensor) -> None:
        """Ask the teacher about all training samples, (examples, ...): log-probabilities at temperature T."""
        model = to_module(self._spec, self._teacher)
        logits = torch.cat([model(piece) for piece in torch.split(x, TEACHING_BATCH)])
        self._said = F.log_softmax(logits / self.term.temperature, dim=-1)

    def loss(self, logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """Return the loss of a batch, whose samples are `rows` of those that the teacher was asked about."""
        alpha, temperature = self.term.alpha, self.term.temperature
        student = F.log_softmax(logits / temperature, dim=-1).flatten(0, -2)
        teacher = self._said[rows].flatten(0, -2)
        far = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        result: Tensor = alpha * temperature**2 * far
        return result if alpha == 1 else result + (1 - alpha) * loss_of(logits, targets)
