"""Named arrays: roles, slices, layouts, flat vectors."""

from __future__ import annotations

import numpy as np
import pytest

from foundation.parameters import EVERYTHING, WEIGHTS, Parameters, Role, from_flat, layout_size, role_of
from foundation.spec import ModelSpec, initial_parameters

SPEC = ModelSpec(input="image", shape=(1, 8, 8), classes=3, width=8, depth=2, heads=2, patch=4, pool="cls")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("blocks.3.attention.qkv.weight", Role.ATTENTION),
        ("blocks.3.output.weight", Role.REST),
        ("blocks.0.ffl.up.weight", Role.FFL),
        ("blocks.0.ffl.down.bias", Role.FFL),
        ("blocks.0.ffl.threshold", Role.THRESHOLD),
        ("head.weight", Role.HEAD),
        ("embed.weight", Role.REST),
        ("cls", Role.REST),
        ("norm.bias", Role.REST),
    ],
)
def test_a_name_says_the_role(name: str, role: Role) -> None:
    assert role_of(name) is role


def test_roles_divide_a_model_without_rest() -> None:
    model = initial_parameters(SPEC, 1)
    parts = [model.only({role}) for role in Role]
    assert all(parts)
    assert sorted(name for part in parts for name in part) == sorted(model)
    assert model.only(EVERYTHING) == model
    assert set(model) - set(model.only(WEIGHTS)) == {"blocks.0.ffl.threshold", "blocks.1.ffl.threshold"}


def test_prefixes_come_and_go() -> None:
    model = initial_parameters(SPEC, 1)
    both = Parameters({**model.prefixed("teacher/"), "alone": np.zeros(1)})
    assert both.under("teacher/") == model
    assert list(both.under("teacher/")) == list(model)
    assert "alone" not in both.under("teacher/")


def test_what_arrives_replaces() -> None:
    old = Parameters({"a": np.zeros(2), "b": np.ones(2)})
    new = old.updated({"b": np.full(2, 5.0), "c": np.zeros(1)})
    assert [new["a"][0], new["b"][0], list(new)] == [0, 5, ["a", "b", "c"]]
    assert old["b"][0] == 1


def test_a_parameters_cannot_be_written_or_hashed_and_does_not_follow_its_source() -> None:
    source = {"a": np.zeros(2)}
    parameters = Parameters(source)
    source["b"] = np.ones(1)
    assert list(parameters) == ["a"]
    with pytest.raises(TypeError):
        parameters["a"] = np.ones(2)  # type: ignore[index]
    with pytest.raises(TypeError):
        hash(parameters)


def test_equality_is_of_names_shapes_and_values() -> None:
    a = Parameters({"x": np.zeros((1, 2)), "y": np.ones(1)})
    assert a == Parameters({"y": np.ones(1), "x": np.zeros((1, 2))})
    assert a != Parameters({"x": np.zeros((1, 2))})
    assert a != Parameters({"x": np.zeros(2), "y": np.ones(1)})
    assert a != Parameters({"x": np.zeros((1, 2)), "y": np.full(1, 2.0)})
    assert a != "something else"


def test_flat_and_back() -> None:
    model = initial_parameters(SPEC, 1)
    vector = model.flat()
    assert vector.dtype == np.float32
    assert vector.shape == (model.size,) == (layout_size(SPEC.layout),)
    assert from_flat(vector, model.layout) == model
    assert Parameters().flat().shape == (0,)
    with pytest.raises(ValueError, match="does not fit a layout"):
        from_flat(vector[1:], model.layout)
    with pytest.raises(ValueError, match="does not fit a layout"):
        from_flat(vector.reshape(1, -1), model.layout)


def test_a_change_is_sent_minus_trained() -> None:
    sent = Parameters({"a": np.full(2, 3.0), "kept": np.zeros(1)})
    change = sent - {"a": np.full(2, 1.0), "other": np.zeros(1)}
    assert list(change) == ["a"]
    assert change["a"].tolist() == [2, 2]


def test_sizes_and_words() -> None:
    parameters = Parameters({"a": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float32)})
    assert (parameters.size, parameters.nbytes, parameters.layout) == (7, 28, (("a", (2, 3)), ("b", ())))
    assert repr(parameters) == "Parameters(2 arrays, 7 values)"


def test_the_first_model_is_the_same_everywhere() -> None:
    model = initial_parameters(SPEC, 7)
    assert model.layout == SPEC.layout
    assert model == initial_parameters(SPEC, 7)
    assert model != initial_parameters(SPEC, 8)
    assert all(a.dtype == np.float32 for a in model.values())
    assert model["norm.weight"].tolist() == [1] * 8
    assert not model["head.bias"].any()
