"""Classes of the user's as containers: they come out as they went in, and JAX's registry of them is left alone."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import nn
from transformers.modeling_outputs import ModelOutput

from pytorch2jax import convert_pytnn_to_jax, jax2torch, torch2jax


@dataclasses.dataclass
class Kept:
    value: Any
    name: str = "kept"

    def doubled(self):
        return self.value * 2


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    value: Any
    name: str = "slotted"


class Pair:
    """Known to torch's pytrees alone."""

    def __init__(self, value, name):
        self.value, self.name = value, name


torch_pytree.register_pytree_node(Pair, lambda p: ([p.value], p.name), lambda values, name: Pair(*values, name))


@dataclasses.dataclass
class Output(ModelOutput):
    value: Any = None
    name: Any = None


CLASSES = [Kept, Slotted, Pair, Output]


def returning(cls):
    return torch2jax(lambda x: cls(x + 1, name="mine"))


def a_class_like(cls):
    """Another class of the same kind, which nobody has seen yet."""
    if cls is Pair:
        new = type("Pair", (Pair,), {})
        torch_pytree.register_pytree_node(new, lambda p: ([p.value], p.name), lambda values, name: new(*values, name))
        return new
    if cls is Output:
        return dataclasses.dataclass(type("Output", (Output,), {}))
    fields = [("value", Any), ("name", str)]
    return dataclasses.make_dataclass("New", fields, slots=cls is Slotted, frozen=cls is Slotted)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("jitted", [False, True])
def test_they_can_be_registered_later(cls, jitted):
    new = a_class_like(cls)
    f = jax.jit(returning(new)) if jitted else returning(new)
    before = f(jnp.ones(2))
    flattened = []

    def flatten(kept):
        flattened.append(kept)
        return [kept.value], kept.name

    jax.tree_util.register_pytree_node(new, flatten, lambda name, values: new(*values, name=name))
    for out in (before, f(jnp.ones(2)), returning(new)(jnp.ones(2))):
        assert isinstance(out, new)
        np.testing.assert_array_equal(out.value, [2.0, 2.0])
        assert out.name == "mine"
        jax.jit(lambda out: out)(out)
    assert type(out) is new
    jax.tree.leaves(out)
    assert flattened


@pytest.mark.parametrize("cls", CLASSES)
def test_they_are_what_torch_returns(cls):
    out = jax.jit(returning(cls))(jnp.ones(2))
    assert isinstance(out, cls)
    assert out.__class__ is cls
    assert type(out).__name__ == cls.__name__
    assert out.name == "mine"
    np.testing.assert_array_equal(jax.tree.leaves(out)[0], [2.0, 2.0])
    np.testing.assert_array_equal(jax.jit(lambda out: jax.tree.map(lambda x: x * 3, out))(out).value, [6.0, 6.0])
    grads = jax.grad(lambda x: returning(cls)(x).value.sum())(jnp.ones(2))
    np.testing.assert_array_equal(grads, [1.0, 1.0])
    stacked = jax.vmap(returning(cls))(jnp.ones((3, 2)))
    assert stacked.value.shape == (3, 2)


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_and_pickles_are_of_the_class_itself(cls):
    out = returning(cls)(jnp.ones(2))
    for again in (copy.copy(out), copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert type(again) is cls
        assert again.name == "mine"
        np.testing.assert_array_equal(again.value, [2.0, 2.0])


def test_a_dataclass_behaves_as_one():
    out = returning(Kept)(jnp.ones(()))
    assert out == Kept(out.value, "mine")
    assert out.doubled() == 4.0
    assert repr(out) == repr(Kept(out.value, "mine"))
    assert dataclasses.asdict(out) == {"value": out.value, "name": "mine"}
    assert type(dataclasses.replace(out, name="other")) is Kept


@pytest.mark.parametrize("cls", [Pair, Output])
@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_what_torch_knows_goes_in(cls, backend):
    seen = []

    def fn(kept, scale):
        seen.append(type(kept))
        return cls(kept.value * scale, name=kept.name)

    f = torch2jax(fn, backend=backend)
    for given in (cls(jnp.ones(2), name="given"), returning(cls)(jnp.zeros(2))):
        before = type(given)
        out = f({"inside": given}["inside"], 3.0)
        np.testing.assert_array_equal(out.value, [3.0, 3.0])
        assert out.name == given.name
        assert type(given) is before  # the argument itself is left alone
    assert set(seen) == {cls}
    out = jax2torch(lambda kept: kept.value * 2)(cls(torch.ones(2), name="given"))
    assert out.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_a_module_that_returns_one(backend):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            return Kept(Slotted(self.linear(x)))

    model = Model()
    apply, params = convert_pytnn_to_jax(model, backend=backend)
    out = jax.jit(apply)(params, jnp.ones(2, jnp.float32))
    assert isinstance(out, Kept)
    assert isinstance(out.value, Slotted)
    np.testing.assert_allclose(out.value.value, model(torch.ones(2)).value.value.detach(), rtol=1e-6)


def test_a_class_that_does_not_want_subclasses_is_a_leaf():
    @dataclasses.dataclass
    class Final:
        value: Any

        def __init_subclass__(cls, **kwargs):
            raise TypeError("no subclasses")

    out = torch2jax(lambda x: Final(x + 1))(jnp.ones(2))
    assert type(out) is Final
    np.testing.assert_array_equal(out.value, [2.0, 2.0])
    with pytest.raises(TypeError, match="Final"):
        jax.jit(torch2jax(lambda x: Final(x + 1)))(jnp.ones(2))
    jax.tree_util.register_dataclass(Final, ["value"], [])
    assert type(jax.jit(torch2jax(lambda x: Final(x + 1)))(jnp.ones(2))) is Final
