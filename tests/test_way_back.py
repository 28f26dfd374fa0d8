"""Parameters and statistics of every framework, back into torch, and torch's state dicts as parameters."""

from __future__ import annotations

import equinox as eqx
import flax.core
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx
from torch import nn

from pytorch2jax import (
    ConversionError,
    DtypeError,
    LeafTypeError,
    MissingLeafError,
    StatisticsWarning,
    StructureError,
    convert_pytnn_to_equinox,
    convert_pytnn_to_flax,
    convert_pytnn_to_jax,
    convert_pytnn_to_nnx,
    load_params,
    params_from_state_dict,
    params_to_state_dict,
)


class Net(nn.Module):
    """Tied weights, running statistics, a buffer that stays as it is, and one that no state dict has."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)
        self.outer = nn.Linear(3, 3)
        self.outer.weight = self.inner.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(1.0), persistent=False)
        self.double()

    def forward(self, x):
        return self.norm(self.outer(self.inner(x))) * self.scale + self.shift


X = jnp.linspace(-1, 2, 12).reshape(4, 3) ** 2


def _trained(kind):
    """The torch model; the forms in which a framework holds parameters and statistics after a training step."""
    torch.manual_seed(0)
    model = Net()
    halve = lambda tree: jax.tree.map(lambda p: p / 2, tree)  # noqa: E731
    if kind == "jax":
        apply, params, state = convert_pytnn_to_jax(model, with_state=True)
        _, state = apply(params, state, X, train=True)
        return model, {"nested dicts": (halve(params), state)}
    if kind == "linen":
        net, _ = convert_pytnn_to_flax(model)
        variables = net().init(jax.random.key(0), X)
        _, updates = net().apply(variables, X, train=True, mutable=["batch_stats"])
        variables = {**variables, **updates, "params": halve(variables["params"])}
        statistics = {"batch_stats": variables["batch_stats"]}
        return model, {
            "variables": (variables,),
            "params and the rest": (variables["params"], {k: v for k, v in variables.items() if k != "params"}),
            "params and statistics": (variables["params"], statistics),
            "without what never changes": ({"params": variables["params"], **statistics},),
        }
    if kind == "nnx":
        m = convert_pytnn_to_nnx(model)
        m(X, train=True)
        nnx.update(m, halve(nnx.state(m, nnx.Param)))
        state = nnx.state(m)
        return model, {"module": (m,), "state": (state,), "pure dict": (nnx.to_pure_dict(state),)}
    module, state = convert_pytnn_to_equinox(model, with_state=True)
    _, state = module(X, state, inference=False)
    module = eqx.tree_at(lambda m: m.params, module, replace_fn=halve)
    return model, {"module and state": (module, state)}


@pytest.mark.parametrize("kind", ["jax", "linen", "nnx", "equinox"])
def test_round_trips(kind):
    model, forms = _trained(kind)
    before = model.state_dict()
    with torch.no_grad():
        expected = {
            name: t / 2
            if isinstance(dict(model.named_parameters(remove_duplicate=False)).get(name), nn.Parameter)
            else t
            for name, t in before.items()
        }
        twin = Net()
        twin.load_state_dict(before)
        twin.train()(torch.tensor(np.asarray(X)))
    expected |= {name: t for name, t in twin.state_dict().items() if "running" in name or "num_batches" in name}
    for given in forms.values():
        found = params_to_state_dict(model, *given)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])
        other = load_params(Net(), *given)
        for name, tensor in other.state_dict().items():
            torch.testing.assert_close(tensor, expected[name])
        assert other.inner.weight is other.outer.weight


def test_statistics_that_do_not_come_along():
    for kind, missing in (
        ("jax", lambda given: given[:1]),
        ("linen", lambda given: ({"params": given[0]["params"]},)),
        ("nnx", lambda given: (nnx.state(given[0], nnx.Param),)),
        ("equinox", lambda given: given[:1]),
    ):
        model, forms = _trained(kind)
        given = missing(next(iter(forms.values())))
        for call in (load_params, params_to_state_dict):
            with pytest.warns(
                StatisticsWarning, match=rf"{call.__name__}: state.norm.running_mean.*`state=False`"
            ) as said:
                call(model, *given)
            assert said[0].filename == __file__
            call(model, *given, state=False)  # without a warning
    load_params(nn.Linear(2, 2).double(), convert_pytnn_to_jax(nn.Linear(2, 2).double())[1])


def test_a_submodule_that_is_called_params():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.params = nn.Linear(2, 2)

        def forward(self, x):
            return self.params(x)

    model = Odd()
    _, params = convert_pytnn_to_jax(model)
    assert load_params(model, jax.tree.map(jnp.zeros_like, params)).params.weight.sum() == 0


# -- state dicts ---------------------------------------------------------------------------------------------------


def test_safetensors_of_tied_weights(tmp_path):
    model = Net()
    _, params, state = convert_pytnn_to_jax(model, with_state=True)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(params_to_state_dict(model, params, state), path)
    for source in (path, str(path), safetensors.torch.load_file(path), model.state_dict()):
        found, found_state = params_from_state_dict(Net(), source, with_state=True)
        jax.tree.map(np.testing.assert_array_equal, found, params)
        jax.tree.map(np.testing.assert_array_equal, found_state, state)
    one_name = {name: t for name, t in model.state_dict().items() if name != "inner.weight"}
    jax.tree.map(np.testing.assert_array_equal, params_from_state_dict(Net(), one_name), params)


def test_state_dicts_of_arrays_and_other_precisions():
    model = nn.Linear(2, 3)
    arrays = {name: jnp.asarray(t.detach().numpy()).astype(jnp.bfloat16) for name, t in model.state_dict().items()}
    params = params_from_state_dict(model, arrays)
    assert params["weight"].dtype == jnp.float32
    np.testing.assert_array_equal(params["weight"], arrays["weight"].astype(jnp.float32))


def test_state_dicts_for_models_without_values():
    with torch.device("meta"):
        model = nn.Linear(2, 3)
    params = params_from_state_dict(model, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
    np.testing.assert_array_equal(params["weight"], np.ones((3, 2)))


def test_values_that_nobody_has():
    with torch.device("meta"):
        model = Net()
    state_dict = Net().state_dict()
    with pytest.raises(ConversionError, match=r"shift: expected a model that has the values of buffers"):
        params_from_state_dict(model, state_dict)


def test_boxes_of_flax():
    model = nn.Linear(2, 3)
    _, params = convert_pytnn_to_jax(model)
    boxed = jax.tree.map(lambda x: flax.linen.Partitioned(0 * x, names=(None,) * x.ndim), params)
    for given in (boxed, {"params": boxed}, flax.core.freeze({"params": boxed})):
        assert load_params(nn.Linear(2, 3), given).weight.abs().sum() == 0


def test_what_comes_out_is_a_copy():
    source = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    params = params_from_state_dict(nn.Linear(2, 3), source)
    source["weight"].zero_()
    np.testing.assert_array_equal(params["weight"], np.ones((3, 2)))


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ({"weight": torch.ones(3, 2)}, MissingLeafError, "bias: missing"),
        (
            {"weight": torch.ones(3, 2), "bias": torch.ones(3), "b": torch.ones(3)},
            StructureError,
            "b: the model has no",
        ),
        ({"weight": torch.ones(2, 2), "bias": torch.ones(3)}, StructureError, r"weight: expected shape \(3, 2\)"),
        (
            {"weight": torch.ones(3, 2), "bias": torch.ones(3, dtype=torch.int64)},
            DtypeError,
            "bias: expected torch.float",
        ),
        ({"weight": "ones", "bias": torch.ones(3)}, LeafTypeError, "weight: expected an array"),
        (3, LeafTypeError, "expected a dict of tensors by name, or the path"),
    ],
)
def test_state_dicts_that_do_not_fit(source, error, match):
    with pytest.raises(error, match=match):
        params_from_state_dict(nn.Linear(2, 3), source)


def test_a_state_dict_in_the_place_of_params_is_recognised():
    model = Net()
    apply, _ = convert_pytnn_to_jax(model)
    for call in (lambda: apply(model.state_dict(), X), lambda: load_params(model, model.state_dict(), state=False)):
        with pytest.raises(MissingLeafError, match=r"expected nested dicts.*flat names.*params_from_state_dict"):
            call()
