"""Cold start: the embedding, found on the device, whose generated parameters suit its data.

Everything but the embedding is frozen: hypernetwork, and what it does not generate. One exchange, and the
coordinator learns nothing of the device but a few numbers (Shamsian et al. 2021, section 5.3, let the
coordinator do these steps over many exchanges; sending the hypernetwork down once is our choice).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from edge_agent.training.optimizer import Adam
from foundation.nn.bridge import array_of, tensor_of
from foundation.nn.hypernet import forward
from foundation.nn.transformer import Transformer, loss_of
from foundation.parameters import Array, Parameters
from foundation.work import EmbeddingFit


@dataclass(frozen=True, slots=True)
class Fitted:
    """The embedding that was found, (n,), and what the hypernetwork generates from it."""

    embedding: Array
    generated: Parameters


def fit_embedding(
    model: Transformer, sent: Parameters, x: Tensor, y: Tensor, fit: EmbeddingFit, batch_size: int, seed: int
) -> Fitted:
    """Train `embedding` among what was sent through the frozen hypernetwork `hypernet/...` and the model.

    `model` gives every parameter that is not generated, and is not changed. x, y are the training samples.
    """
    network = {name: tensor_of(array) for name, array in sent.under("hypernet/").items()}
    row = torch.nn.Parameter(tensor_of(sent["embedding"])[None])
    fixed = {name: parameter.detach() for name, parameter in model.named_parameters()}
    optimizer = Adam([row], fit.learning_rate, weight_decay=0.0)
    for epoch in range(fit.epochs):
        rng = np.random.default_rng([seed, 0xE3B, epoch])
        for rows in torch.split(torch.from_numpy(rng.permutation(len(y))), batch_size):
            optimizer.zero_grad(set_to_none=True)
            generated = {name: value[0] for name, value in forward(network, row).items()}
            loss = loss_of(functional_call(model, fixed | generated, (x[rows],)), y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        outputs = forward(network, row)
    return Fitted(array_of(row[0]), Parameters((name, array_of(value[0])) for name, value in outputs.items()))
