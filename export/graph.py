"""Writes the ONNX graph of our transformer, node by node.

The graph is about a dozen standard operators of one opset, and every node carries the name of the tensor
it belongs to. No tracer and no torch is needed, so a device exports what it trained in milliseconds. The
same parameters and metadata always give the same bytes.

What differs from the training code, without changing the function:

* the scale 1/sqrt(d/heads) is folded into the query rows;
* normalisation is folded into the embedding (in double precision), or kept as two operators where
  folding would cancel digits;
* with a class token, the last block computes query, output and FFL for that token only;
* a block without hidden units adds its `down.bias` and nothing else.

Between embedding and head, tokens are rows of a matrix, (tokens x batch, width), so that a product takes its
bias along (`Gemm`). The tokens come first and the batch second: then heads are read where they lie, as
onnxruntime takes the transposition of a leading axis into the product, and copies nothing. `Attention` wants
the batch first, so there it comes first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from foundation.errors import ExportError
from foundation.normalisation import Normalisation
from foundation.parameters import WEIGHTS, Array, Parameters
from foundation.spec import ModelSpec

OPSET = 17
INPUT = "input"
LOGITS = "logits"
PROBABILITIES = "probabilities"

# IR versions as released together with each opset, so that old runtimes open the file.
_IR_OF_OPSET = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
OPSETS = tuple(_IR_OF_OPSET)
_EPSILON = 1e-5
# Far below any score, and finite, as some runtimes make NaN of an infinite mask.
_MASKED = -1e9
# Folding loses to cancellation what |mean| / std amounts to: at 4, about two bits of float32.
_FOLD_LIMIT = 4.0


def build(
    spec: ModelSpec,
    parameters: Parameters,
    normalisation: Normalisation,
    *,
    metadata: Mapping[str, str],
    opset: int = OPSET,
    fold: bool | None = None,
    probabilities: bool = False,
    attention: bool = False,
) -> bytes:
    """Return the bytes of an ONNX model that maps raw samples to logits.

    `parameters` may be cut: the hidden width may differ in every block. The input is `input`, float32 of
    shape (batch, *spec.shape), or int64 of shape (batch, sequence) for text with sequence up to
    `spec.shape[0]`. The output is `logits`, (batch, classes) or (batch, sequence, classes) for text, and
    with `probabilities` also their softmax. `fold` says whether normalisation is folded into the
    embedding; `None` folds where that is accurate. With `attention`, heads are one `Attention` operator,
    which opset 23 brought; else a dozen simpler ones. `metadata` is stored in the model, sorted by key.

    Raises `ExportError` for parameters that do not fit the spec or are not finite, for a normalisation of
    another number of channels, and for an opset this writer does not know.
    """
    if opset not in _IR_OF_OPSET:
        raise ExportError(f"opset {opset} is not one of {sorted(_IR_OF_OPSET)}")
    if attention and opset < 23:
        raise ExportError(f"opset {opset} has no Attention operator; opset 23 has")
    weights = _checked(spec, parameters)
    writer = _Writer(weights, opset, None if spec.input == "text" else spec.tokens, attention=attention)
    x = _text(writer, spec) if spec.input == "text" else _patches(writer, spec, normalisation, fold)
    mask = _causal_mask(writer, spec) if spec.input == "text" else None
    for i in range(spec.depth):
        class_only = spec.pool == "cls" and i == spec.depth - 1
        x = _attention(writer, spec, f"blocks.{i}", x, mask, class_only=class_only)
        x = _ffl(writer, f"blocks.{i}", x)
    _head(writer, spec, x)
    if probabilities:
        writer.node("Softmax", PROBABILITIES, LOGITS, axis=-1)
    outputs = [LOGITS, PROBABILITIES] if probabilities else [LOGITS]
    return _serialised(writer, spec, outputs, metadata)


class _Writer:
    """Collects nodes and initializers; a node's output has the node's name.

    `tokens` is how many there are, `None` where the input tells it.
    """

    def __init__(
        self, weights: Parameters, opset: int, tokens: int | None, *, attention: bool = False
    ) -> None:
        self.weights = weights
        self.opset = opset
        self.tokens = tokens
        self.attention = attention
        self.axis = 1 if attention else 0
        """Which axis counts tokens, where rows are apart; the other of the first two is the batch."""
        self.model = helper.make_model(
            helper.make_graph([], "hedgerow", [], []),
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=_IR_OF_OPSET[opset],
            producer_name="hedgerow",
        )
        """Written in place: collected first, every tensor would be in memory three times."""
        self.graph = self.model.graph
        self.known: set[str] = set()
        """Names of constants, and of shapes that nodes compute where the input tells the number of tokens."""

    def constant(self, name: str, value: Array) -> str:
        """Store an array under a name, once, and return the name."""
        if name not in self.known:
            self.known.add(name)
            # np.ascontiguousarray would make a rank-0 array rank 1, and the model would not load.
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def integers(self, name: str, *values: int) -> str:
        """Store a vector of int64, as shapes and positions are."""
        return self.constant(name, np.array(values, np.int64))

    def number(self, name: str, value: float) -> str:
        """Store a float32 scalar."""
        return self.constant(name, np.array(value, np.float32))

    def tensor(self, name: str) -> str:
        """Store one of the model's tensors as it is."""
        return self.constant(name, self.weights[name])

    def node(self, operator: str, name: str, *inputs: str, **attributes: int | float | list[int]) -> str:
        """Append a node with one output and return the output's name."""
        node = helper.make_node(operator, list(inputs), [name], name)
        for key, value in sorted(attributes.items()):
            node.attribute.append(helper.make_attribute(key, value))
        self.graph.node.append(node)
        return name

    def split(self, name: str, x: str, pieces: Sequence[str], size: int) -> tuple[str, ...]:
        """Split axis 2 into named pieces of one size."""
        outputs = [f"{name}.{piece}" for piece in pieces]
        lengths = self.integers(f"{name}.split.sizes", *[size] * len(pieces))
        self.graph.node.append(helper.make_node("Split", [x, lengths], outputs, name=f"{name}.split", axis=2))
        return tuple(outputs)

    def linear(self, name: str, x: str, weight: Array, bias: str | None = None) -> str:
        """Append x @ weight.T (+ bias, of a matrix x), with the weight stored transposed."""
        stored = self.constant(f"{name}.weight.T", weight.T)
        if bias is None:
            return self.node("MatMul", name, x, stored)
        return self.node("Gemm", name, x, stored, self.tensor(bias))

    def together(self, name: str, x: str, width: int) -> str:
        """Make one matrix, (tokens x batch, width), of what has tokens and batch apart."""
        return self.node("Reshape", name, x, self.integers("together", -1, width))

    def apart(self, name: str, x: str, *rest: int) -> str:
        """Undo `together`: (tokens, batch, *rest), or (batch, tokens, *rest) where the batch is first."""
        shape = "apart." + ".".join(map(str, rest))
        if self.tokens is not None:
            self.integers(shape, *((self.tokens, -1) if self.axis == 0 else (-1, self.tokens)), *rest)
        elif shape not in self.known:
            self.known.add(shape)
            whole, last = self.integers("batch", -1), self.integers(f"{shape}.rest", *rest)
            first = ("sequence", whole) if self.axis == 0 else (whole, "sequence")
            self.node("Concat", shape, *first, last, axis=0)
        return self.node("Reshape", name, x, shape)

    def layer_norm(self, name: str, x: str) -> str:
        """Append a layer norm over the last axis."""
        scale, shift = self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")
        return self.node("LayerNormalization", name, x, scale, shift, axis=-1, epsilon=_EPSILON)

    def first_token(self, name: str, x: str) -> str:
        """Append what takes token 0 of rows that are apart: (batch, width)."""
        return self.node(
            "Gather", name, x, self.constant("token.first", np.array(0, np.int64)), axis=self.axis
        )


def _checked(spec: ModelSpec, parameters: Parameters) -> Parameters:
    """Return the weights as float32, in layout order, after comparing every shape with the spec."""
    arrays: dict[str, Array] = {}
    for name, dense in spec.layout:
        if name.endswith(".ffl.threshold"):
            continue
        if name not in parameters:
            raise ExportError(f"the parameters lack {name}")
        array = np.asarray(parameters[name], np.float32)
        if array.shape != (wanted := _shape_of(name, dense, parameters)):
            raise ExportError(f"{name} has shape {array.shape}, and the spec asks for {wanted}")
        if not np.isfinite(array).all():
            raise ExportError(f"{name} has values that are not finite")
        arrays[name] = array
    if extra := sorted(parameters.only(WEIGHTS).keys() - arrays.keys()):
        raise ExportError(f"the spec has no {extra[0]}")
    return Parameters(arrays)


def _shape_of(name: str, dense: tuple[int, ...], parameters: Parameters) -> tuple[int, ...]:
    """Return the shape that a tensor must have, given how many units its block kept."""
    block, found, part = name.partition(".ffl.")
    if not found or part == "down.bias":
        return dense
    bias = parameters.get(f"{block}.ffl.up.bias")
    hidden = dense[1] if part == "down.weight" else dense[0]
    kept = min(hidden, bias.size) if bias is not None else hidden
    return (dense[0], kept) if part == "down.weight" else (kept, *dense[1:])


def _patches(w: _Writer, spec: ModelSpec, normalisation: Normalisation, fold: bool | None) -> str:
    """Cut images or series into rows of one token each, positions added."""
    mean, std = _channel_statistics(spec, normalisation)
    folds = bool((np.abs(mean) <= _FOLD_LIMIT * std).all()) if fold is None else fold
    weight, bias = w.weights["embed.weight"].astype(np.float64), w.weights["embed.bias"].astype(np.float64)
    x = INPUT
    if normalisation.mean and folds:
        # (x - mean) / std is affine per channel, so it can live in the embedding.
        per_value, shift = _per_patch_value(spec, std), _per_patch_value(spec, mean)
        weight = weight / per_value
        bias = bias - weight @ shift
    elif normalisation.mean:
        shape = (-1, 1, 1) if spec.input == "image" else (-1,)
        x = w.node("Sub", "normalisation.centred", x, w.constant("normalisation.mean", _f32(mean, shape)))
        x = w.node("Div", "normalisation", x, w.constant("normalisation.std", _f32(std, shape)))
    x = w.linear("embed", _patch_rows(w, spec, x), weight.astype(np.float32))
    position = w.weights["position"].astype(np.float64)
    if spec.pool == "cls":
        # A row of zeros in front, to which the constant below adds the class token.
        room = [0] * 6
        room[w.axis] = 1
        x = w.node("Pad", "cls.room", x, w.integers("cls.pads", *room))
        added = position + np.vstack([w.weights["cls"][None], np.tile(bias, (spec.patches, 1))])
    else:
        added = position + bias
    added = np.expand_dims(added, 1 - w.axis)
    x = w.node("Add", "embedded", x, w.constant("position", added.astype(np.float32)))
    return w.together("tokens", x, spec.width)


def _patch_rows(w: _Writer, spec: ModelSpec, x: str) -> str:
    """Bring raw samples into one patch a row, patches and batch apart: (patches, batch, patch_size)."""
    first = w.axis == 0
    rows = w.integers(
        "patches.shape", *((spec.patches, -1) if first else (-1, spec.patches)), spec.patch_size
    )
    if spec.input == "series":
        if not first:
            return w.node("Reshape", "patches", x, rows)
        grid = w.integers("patches.grid.shape", 0, spec.patches, spec.patch_size)
        return w.node("Transpose", "patches", w.node("Reshape", "patches.grid", x, grid), perm=[1, 0, 2])
    c, height, width = spec.shape
    p = spec.patch
    grid = w.integers("patches.grid.shape", 0, c, height // p, p, width // p, p)
    x = w.node("Reshape", "patches.grid", x, grid)
    x = w.node("Transpose", "patches.ordered", x, perm=[2, 4, 0, 1, 3, 5] if first else [0, 2, 4, 1, 3, 5])
    return w.node("Reshape", "patches", x, rows)


def _channel_statistics(spec: ModelSpec, normalisation: Normalisation) -> tuple[Array, Array]:
    """Return mean and standard deviation per channel, as float64 of what training saw as float32."""
    channels = spec.shape[0] if spec.input == "image" else spec.shape[1]
    if not normalisation.mean:
        return np.zeros(channels), np.ones(channels)
    mean, std = (np.array(v, np.float32).astype(np.float64) for v in (normalisation.mean, normalisation.std))
    if mean.shape != (channels,) or std.shape != (channels,):
        raise ExportError(f"a normalisation of {mean.size} channels does not fit samples with {channels}")
    if not (std > 0).all():
        raise ExportError("a normalisation with a standard deviation of 0 cannot be applied")
    return mean, std


def _per_patch_value(spec: ModelSpec, channel_values: Array) -> Array:
    """Repeat one value per channel for every number of a patch, in the patch's own order."""
    if spec.input == "image":
        return np.repeat(channel_values, spec.patch * spec.patch)
    return np.tile(channel_values, spec.patch)


def _f32(values: Array, shape: tuple[int, ...]) -> Array:
    return values.astype(np.float32).reshape(shape)


def _text(w: _Writer, spec: ModelSpec) -> str:
    """Look up characters and add as many positions as there are."""
    ids = w.node("Transpose", "ids", INPUT, perm=[1, 0]) if w.axis == 0 else INPUT
    x = w.node("Gather", "embed", w.tensor("embed.weight"), ids, axis=0)
    w.node("Shape", "sequence", INPUT, start=1, end=2)
    position = w.constant("position", np.expand_dims(w.weights["position"], 1 - w.axis))
    bounds = (w.integers("sequence.start", 0), "sequence", w.integers("sequence.axis", w.axis))
    x = w.node("Add", "embedded", x, w.node("Slice", "position.used", position, *bounds))
    return w.together("tokens", x, spec.width)


def _causal_mask(w: _Writer, spec: ModelSpec) -> str:
    """Return a mask (sequence, sequence) that hides what comes later."""
    full = np.triu(np.full((spec.tokens, spec.tokens), _MASKED, np.float32), k=1)
    corner = w.node("Concat", "mask.corner", "sequence", "sequence", axis=0)
    bounds = (w.integers("mask.start", 0, 0), corner, w.integers("mask.axes", 0, 1))
    return w.node("Slice", "mask", w.constant("mask.full", full), *bounds)


def _attention(w: _Writer, spec: ModelSpec, block: str, x: str, mask: str | None, *, class_only: bool) -> str:
    """Append x + output(attention(norm1(x))); with `class_only`, for token 0 and no other."""
    name, d = f"{block}.attention", spec.width
    qkv = w.weights[f"{name}.qkv.weight"].astype(np.float64)
    qkv[:d] /= math.sqrt(d / spec.heads)
    scaled = qkv.astype(np.float32)
    if class_only:
        x = w.apart(f"{block}.tokens", x, d)
        normed = w.layer_norm(f"{block}.norm1", x)
        query = w.linear(f"{name}.query", w.first_token(f"{name}.class_token", normed), scaled[:d])
        pieces: tuple[str, ...] = ("key", "value")
        product = w.linear(f"{name}.kv", normed, scaled[d:])
        x = w.first_token(f"{block}.class_token", x)
    else:
        query = None
        normed = w.layer_norm(f"{block}.norm1", x)
        pieces = ("query", "key", "value")
        product = w.linear(f"{name}.qkv", normed, scaled)
    heads = _operator if w.attention else _heads
    mixed = heads(w, spec, name, query, pieces, product, mask)
    out = w.linear(f"{block}.output", mixed, w.weights[f"{block}.output.weight"], f"{block}.output.bias")
    return w.node("Add", f"{block}.attended", x, out)


def _heads(
    w: _Writer,
    spec: ModelSpec,
    name: str,
    query: str | None,
    pieces: Sequence[str],
    product: str,
    mask: str | None,
) -> str:
    """Append softmax(q k^T) v per head; heads are contiguous slices of the width.

    `product` has the pieces beside each other; `query`, where it is not one of them, is one row a sample.
    """
    size = spec.width // spec.heads
    rows = w.apart(f"{product}.heads", product, len(pieces) * spec.heads, size)
    *one, key, value = w.split(name, rows, pieces, spec.heads)
    if query is None:
        first = w.node("Transpose", f"{one[0]}.first", one[0], perm=[1, 2, 0, 3])
    else:
        first = w.node("Reshape", f"{query}.first", query, w.integers("query", -1, spec.heads, 1, size))
    key = w.node("Transpose", f"{key}.first", key, perm=[1, 2, 3, 0])
    value = w.node("Transpose", f"{value}.first", value, perm=[1, 2, 0, 3])
    scores = w.node("MatMul", f"{name}.scores", first, key)
    if mask is not None:
        scores = w.node("Add", f"{name}.masked", scores, mask)
    weights = w.node("Softmax", f"{name}.weights", scores, axis=-1)
    mixed = w.node("MatMul", f"{name}.mixed", weights, value)
    if query is None:
        mixed = w.node("Transpose", f"{name}.mixed.tokens", mixed, perm=[2, 0, 1, 3])
    return w.together(f"{name}.joined", mixed, spec.width)


def _operator(
    w: _Writer,
    spec: ModelSpec,
    name: str,
    query: str | None,
    pieces: Sequence[str],
    product: str,
    mask: str | None,
) -> str:
    """Append the same as `_heads` does, as one operator."""
    d = spec.width
    rows = product if query else w.apart(f"{product}.apart", product, len(pieces) * d)
    *one, key, value = w.split(name, rows, pieces, d)
    if query is not None:
        one = [w.node("Reshape", f"{query}.first", query, w.integers("query", -1, 1, d))]
    heads = {"q_num_heads": spec.heads, "kv_num_heads": spec.heads}
    inputs = (*one, key, value, *([mask] if mask else []))
    # The scale is in the query's rows already.
    mixed = w.node("Attention", f"{name}.mixed", *inputs, scale=1.0, **heads)
    return w.together(f"{name}.joined", mixed, d)


def _ffl(w: _Writer, block: str, x: str) -> str:
    """Append x + down(gelu(up(norm2(x)))); without hidden units, x + down.bias."""
    name = f"{block}.ffl"
    up, down = w.weights[f"{name}.up.weight"], w.weights[f"{name}.down.weight"]
    if len(up) == 0:
        return w.node("Add", name, x, w.tensor(f"{name}.down.bias"))
    hidden = w.linear(f"{name}.up", w.layer_norm(f"{block}.norm2", x), up, f"{name}.up.bias")
    # gelu(h) = h * (1 + erf(h / sqrt 2)) / 2, in the order in which onnxruntime knows and fuses it.
    ratio = w.node("Div", f"{name}.gelu.ratio", hidden, w.number("sqrt_two", math.sqrt(2)))
    erf = w.node("Erf", f"{name}.gelu.erf", ratio)
    gate = w.node("Add", f"{name}.gelu.gate", erf, w.number("one", 1.0))
    twice = w.node("Mul", f"{name}.gelu.twice", hidden, gate)
    active = w.node("Mul", f"{name}.gelu", twice, w.number("half", 0.5))
    return w.node("Add", name, x, w.linear(f"{name}.down", active, down, f"{name}.down.bias"))


def _head(w: _Writer, spec: ModelSpec, x: str) -> None:
    """Append the last norm, the pooling and the head, which is called `logits`."""
    x = w.layer_norm("norm", x)
    weight = w.weights["head.weight"]
    if spec.input != "text":
        pooled = x if spec.pool == "cls" else _mean(w, spec, x)  # of a class token nothing else is left
        w.linear(LOGITS, pooled, weight, "head.bias")
        return
    rows = w.linear("head", x, weight, "head.bias")
    if w.axis == 1:
        w.apart(LOGITS, rows, spec.classes)
    else:
        w.node("Transpose", LOGITS, w.apart("head.tokens", rows, spec.classes), perm=[1, 0, 2])


def _mean(w: _Writer, spec: ModelSpec, x: str) -> str:
    """Bring rows to (batch, width): the mean over the tokens."""
    x = w.apart("norm.tokens", x, spec.width)
    if w.opset < 18:
        return w.node("ReduceMean", "pooled", x, axes=[w.axis], keepdims=0)
    return w.node("ReduceMean", "pooled", x, w.integers("pooled.axes", w.axis), keepdims=0)


def _serialised(w: _Writer, spec: ModelSpec, outputs: list[str], metadata: Mapping[str, str]) -> bytes:
    text = spec.input == "text"
    kind, shape = (TensorProto.INT64, ("sequence",)) if text else (TensorProto.FLOAT, spec.shape)
    answer = ("batch", "sequence", spec.classes) if text else ("batch", spec.classes)
    w.graph.input.append(helper.make_tensor_value_info(INPUT, kind, ("batch", *shape)))
    for name in outputs:
        w.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, answer))
    helper.set_model_props(w.model, dict(sorted(metadata.items())))
    return bytes(w.model.SerializeToString(deterministic=True))
