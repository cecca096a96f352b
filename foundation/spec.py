"""Which transformer: its input, width, depth and heads, and the names and shapes that follow."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from foundation.errors import SettingsError
from foundation.frozen import Frozen
from foundation.parameters import Array, Layout, Parameters


class ModelSpec(Frozen):
    """A small pre-norm transformer for images, series or text.

    `shape` is that of one sample: (channels, height, width) for images, (steps, channels) for series,
    (characters,) for text. `classes` is the number of answers; for text it is the vocabulary.
    """

    input: Literal["image", "series", "text"]
    shape: tuple[int, ...]
    classes: int = Field(ge=2, le=100_000)
    width: int = Field(64, ge=4, le=4096)
    depth: int = Field(2, ge=1, le=64)
    heads: int = Field(4, ge=1, le=64)
    ffl_ratio: float = Field(4.0, gt=0, le=16)
    patch: int = Field(4, ge=1, le=1024)
    """Side of a square patch for images, steps per token for series; unused for text."""
    pool: Literal["mean", "cls"] = "mean"
    """`cls` computes the last block for the class token only, which is exact and cheaper."""

    @model_validator(mode="after")
    def _fits(self) -> ModelSpec:
        dimensions = {"image": 3, "series": 2, "text": 1}[self.input]
        if len(self.shape) != dimensions or min(self.shape) < 1:
            raise ValueError(f"{self.input} needs a shape of {dimensions} positive numbers, not {self.shape}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        sides = {"image": self.shape[1:], "series": self.shape[:1], "text": ()}[self.input]
        if any(side % self.patch for side in sides):
            raise ValueError(f"patch {self.patch} does not divide {sides}; choose one that does")
        if self.input == "text" and self.pool == "cls":
            raise ValueError("text answers at every position: pool must be 'mean'")
        return self

    @property
    def hidden(self) -> int:
        """Hidden units of every dense FFL."""
        return max(1, round(self.width * self.ffl_ratio))

    @property
    def patch_size(self) -> int:
        """Numbers in one token's raw input."""
        if self.input == "image":
            return self.shape[0] * self.patch * self.patch
        return self.patch * self.shape[1] if self.input == "series" else 1

    @property
    def patches(self) -> int:
        """Tokens cut from one sample, without the class token."""
        if self.input == "image":
            return (self.shape[1] // self.patch) * (self.shape[2] // self.patch)
        return self.shape[0] // self.patch if self.input == "series" else self.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens that the blocks see."""
        return self.patches + (self.pool == "cls")

    @property
    def layout(self) -> Layout:
        """Names and shapes of all parameters of the dense model, thresholds included."""
        d, h = self.width, self.hidden
        names: list[tuple[str, tuple[int, ...]]] = []
        if self.input == "text":
            names += [("embed.weight", (self.classes, d))]
        else:
            names += [("embed.weight", (d, self.patch_size)), ("embed.bias", (d,))]
        if self.pool == "cls":
            names += [("cls", (d,))]
        names += [("position", (self.tokens, d))]
        for i in range(self.depth):
            b = f"blocks.{i}."
            names += [
                (b + "norm1.weight", (d,)),
                (b + "norm1.bias", (d,)),
                (b + "attention.qkv.weight", (3 * d, d)),
                (b + "output.weight", (d, d)),
                (b + "output.bias", (d,)),
                (b + "norm2.weight", (d,)),
                (b + "norm2.bias", (d,)),
                (b + "ffl.up.weight", (h, d)),
                (b + "ffl.up.bias", (h,)),
                (b + "ffl.down.weight", (d, h)),
                (b + "ffl.down.bias", (d,)),
                (b + "ffl.threshold", (h,)),
            ]
        names += [("norm.weight", (d,)), ("norm.bias", (d,))]
        names += [("head.weight", (self.classes, d)), ("head.bias", (self.classes,))]
        return tuple(names)

    @property
    def importance_scale(self) -> float:
        """Expected |up_j| * |down_j| of a hidden unit at initialisation: the `c` of `ThresholdPruning`."""
        up, down = _std("blocks.0.ffl.up.weight", self), _std("blocks.0.ffl.down.weight", self)
        return up * down * self.width


def _std(name: str, spec: ModelSpec) -> float:
    """Initial standard deviation of a weight: fan-in scaling, as in Glorot-style transformers."""
    if name in ("embed.weight",):
        return 1 / math.sqrt(spec.patch_size) if spec.input != "text" else 0.02 * math.sqrt(spec.width)
    if name in ("position", "cls"):
        return 0.02
    if name.endswith("ffl.down.weight"):
        return 1 / math.sqrt(spec.hidden)
    return 1 / math.sqrt(spec.width)


def initial_parameters(spec: ModelSpec, seed: int) -> Parameters:
    """Draw the initial model from a seed: the same on every device, so it need not travel.

    Weights are normal with fan-in scaling, biases and thresholds 0, norms 1. numpy's PCG64 gives the
    same bits on every platform.
    """
    rng = np.random.default_rng([seed, 0x4ED6E])
    arrays: dict[str, Array] = {}
    for name, shape in spec.layout:
        if "norm" in name:
            arrays[name] = np.full(shape, float(name.endswith("weight")), np.float32)
        elif name.endswith((".bias", ".threshold")):
            arrays[name] = np.zeros(shape, np.float32)
        else:
            arrays[name] = (rng.standard_normal(shape) * _std(name, spec)).astype(np.float32)
    return Parameters(arrays)


IMAGE_TOKENS = 16
SERIES_TOKENS = 8


class ModelSettings(Frozen):
    """The transformer, but for its input, which the data decide."""

    width: int = Field(64, ge=4, le=4096)
    depth: int = Field(2, ge=1, le=64)
    heads: int = Field(4, ge=1, le=64)
    ffl_ratio: float = Field(4.0, gt=0, le=16)
    patch: int | None = Field(None, ge=1)
    """Side of a patch, or steps per token; when not set, the largest that gives 16 (8) tokens."""
    pool: Literal["mean", "cls"] = "mean"

    def spec(self, kind: str, shape: tuple[int, ...], classes: int) -> ModelSpec:
        """Return the whole spec; raises `SettingsError` when model and data do not fit."""
        fields = self.model_dump(exclude={"patch"})
        patch = self.patch or fitting_patch(kind, shape)
        try:
            return ModelSpec(input=kind, shape=shape, classes=classes, patch=patch, **fields)
        except ValueError as error:
            raise SettingsError(f"the model does not fit the agents' data: {error}") from error


def fitting_patch(kind: str, shape: tuple[int, ...]) -> int:
    """Return the largest patch that divides the sample and leaves enough tokens; 1 when none does."""
    if kind == "image":
        _, height, width = shape
        fits = [
            p
            for p in range(1, min(height, width) + 1)
            if height % p == 0 and width % p == 0 and (height // p) * (width // p) >= IMAGE_TOKENS
        ]
    elif kind == "series":
        fits = [p for p in range(1, shape[0] + 1) if shape[0] % p == 0 and shape[0] // p >= SERIES_TOKENS]
    else:
        fits = []
    return max(fits, default=1)
