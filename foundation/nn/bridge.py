"""Parameters to module and back."""

from __future__ import annotations

import numpy as np
import torch

from foundation.nn.transformer import Transformer
from foundation.parameters import Array, Parameters
from foundation.spec import ModelSpec


def to_module(spec: ModelSpec, parameters: Parameters) -> Transformer:
    """Build the module that `parameters` describe; FFL widths are read from the arrays.

    Thresholds are not part of the module and are passed over. Raises `KeyError` or `RuntimeError` when
    arrays are missing or have other shapes than the spec's.
    """
    widths = [parameters[f"blocks.{i}.ffl.up.weight"].shape[0] for i in range(spec.depth)]
    model = Transformer(spec, widths)
    weights = {name: tensor_of(parameters[name]) for name, _ in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_()
    return model


def to_parameters(model: Transformer) -> Parameters:
    """Return copies of the module's parameters as float32 arrays, in the order of the spec's layout."""
    weights = dict(model.named_parameters())
    return Parameters((n, array_of(weights[n])) for n, _ in model.spec.layout if n in weights)


def tensor_of(array: Array) -> torch.Tensor:
    """Return a copy of an array as a contiguous float32 tensor.

    The copy is in torch's own memory, aligned to 64 bytes. numpy aligns to 16, and MKL rounds by alignment:
    the same training in another thread, or after a restart, would come to other bits.
    """
    return torch.tensor(np.asarray(array, dtype=np.float32, order="C"))


def array_of(tensor: torch.Tensor) -> Array:
    """Return a copy of a tensor as a float32 array."""
    return tensor.detach().to(torch.float32).cpu().numpy().copy()
