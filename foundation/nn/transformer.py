"""One small pre-norm transformer for images, series and text; tensor names carry roles.

The forward pass is a list of stages (embed, then attention and FFL of every block, then the answer), so
that a trainer can start in the middle from cached activations when everything below stands still.
FFL widths may differ from block to block: a pruned model is an ordinary model of another width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foundation.nn import kernels
from foundation.spec import ModelSpec

kernels.choose()


class Linear(nn.Linear):
    """A linear map whose values come from outside: drawing them here costs more than a short evaluation."""

    def reset_parameters(self) -> None:
        """Draw nothing; foundation/spec.py does."""


class Embedding(nn.Embedding):
    """The same for an embedding."""

    def reset_parameters(self) -> None:
        """Draw nothing; foundation/spec.py does."""


class Attention(nn.Module):
    """Projections to query, key and value, and the scaled dot product; no bias, as in FedTP."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.causal = spec.heads, spec.input == "text"
        self.qkv = Linear(spec.width, 3 * spec.width, bias=False)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Map (batch, tokens, width) to the same shape, or to the first `queries` tokens only."""
        batch, tokens, width = x.shape
        if queries is None:
            q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).unbind(2)
        else:
            weight = self.qkv.weight
            q = F.linear(x[:, :queries], weight[:width]).view(batch, queries, self.heads, -1)
            k, v = F.linear(x, weight[width:]).view(batch, tokens, 2, self.heads, -1).unbind(2)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=self.causal
        )
        return mixed.transpose(1, 2).reshape(batch, -1, width)


class FFL(nn.Module):
    """The feed-forward layer; its hidden width is whatever pruning has left."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        result: Tensor = self.down(F.gelu(self.up(x)))
        return result


class Block(nn.Module):
    """Attention and FFL, each behind its norm and around its residual."""

    def __init__(self, spec: ModelSpec, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width)
        self.attention = Attention(spec)
        self.output = Linear(spec.width, spec.width)
        self.norm2 = nn.LayerNorm(spec.width)
        self.ffl = FFL(spec.width, hidden)

    def attend(self, x: Tensor) -> Tensor:
        """Return x + attention, (batch, tokens, width)."""
        result: Tensor = x + self.output(self.attention(self.norm1(x)))
        return result

    def attend_first(self, x: Tensor) -> Tensor:
        """Return the same for the class token alone, (batch, 1, width): exact, and cheaper."""
        result: Tensor = x[:, :1] + self.output(self.attention(self.norm1(x), queries=1))
        return result

    def feed(self, x: Tensor) -> Tensor:
        """Return x + FFL."""
        result: Tensor = x + self.ffl(self.norm2(x))
        return result


class Transformer(nn.Module):
    """The model of a `ModelSpec`, with as many FFL units per block as `widths` says; its values are not set.

    Input is (batch, *spec.shape), normalised, float32; for text (batch, characters) of int64. Output is
    (batch, classes); for text (batch, characters, classes).
    """

    def __init__(self, spec: ModelSpec, widths: Sequence[int] | None = None) -> None:
        super().__init__()
        widths = widths or [spec.hidden] * spec.depth
        if len(widths) != spec.depth or min(widths) < 1:
            raise ValueError(f"{spec.depth} blocks need {spec.depth} positive FFL widths, not {list(widths)}")
        self.spec = spec
        self.embed: nn.Module = (
            Embedding(spec.classes, spec.width)
            if spec.input == "text"
            else Linear(spec.patch_size, spec.width)
        )
        if spec.pool == "cls":
            self.cls = nn.Parameter(torch.empty(spec.width))
        self.position = nn.Parameter(torch.empty(spec.tokens, spec.width))
        self.blocks = nn.ModuleList(Block(spec, hidden) for hidden in widths)
        self.norm = nn.LayerNorm(spec.width)
        self.head = Linear(spec.width, spec.classes)

    @property
    def stages(self) -> list[tuple[tuple[str, ...], Callable[[Tensor], Tensor]]]:
        """The forward pass in order: for each stage the tensor-name prefixes it reads, and the function."""
        result: list[tuple[tuple[str, ...], Callable[[Tensor], Tensor]]] = [
            (("embed.", "position", "cls"), self._embedded)
        ]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            b = f"blocks.{i}."
            last = i == self.spec.depth - 1 and self.spec.pool == "cls"
            attend = block.attend_first if last else block.attend
            result += [((b + "norm1.", b + "attention.", b + "output."), attend)]
            result += [((b + "norm2.", b + "ffl."), block.feed)]
        return [*result, (("norm.", "head."), self._answer)]

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run stages `start` to `stop`; without them, the whole model."""
        for _, stage in self.stages[start:stop]:
            x = stage(x)
        return x

    def frozen_stages(self) -> int:
        """Return how many leading stages have no parameter that wants a gradient."""
        moving = [name for name, p in self.named_parameters() if p.requires_grad]
        for i, (prefixes, _) in enumerate(self.stages):
            if any(name.startswith(prefixes) for name in moving):
                return i
        return len(self.stages)

    def _embedded(self, x: Tensor) -> Tensor:
        if self.spec.input != "text":
            x = patches(x, self.spec)
        x = self.embed(x)
        if self.spec.pool == "cls":
            x = torch.cat([self.cls.expand(x.shape[0], 1, -1), x], dim=1)
        return x + self.position[: x.shape[1]]

    def _answer(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.spec.input != "text":
            x = x.mean(dim=1) if self.spec.pool == "mean" else x[:, 0]
        result: Tensor = self.head(x)
        return result


def patches(x: Tensor, spec: ModelSpec) -> Tensor:
    """Cut samples into tokens of raw numbers, (batch, patches, patch_size).

    Image patches go row by row, each flattened as (channels, patch, patch); a series is cut into
    stretches of `patch` steps, each flattened as (steps, channels).
    """
    p = spec.patch
    if spec.input == "series":
        return x.reshape(x.shape[0], spec.patches, spec.patch_size)
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, spec.patches, spec.patch_size)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy; text counts every position."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
