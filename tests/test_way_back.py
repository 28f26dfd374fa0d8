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
    trainable_mask,
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


# -- what wraps a model, hooks, and what cannot be written to ---------------------------------------------------------


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models_have_a_way_back_with_their_own_names(wrap):
    model = wrap(Net())
    _, params, state = convert_pytnn_to_jax(model, with_state=True)
    doubled = jax.tree.map(lambda p: p * 2, params)
    expected = {name: tensor.clone().numpy() for name, tensor in model.state_dict().items()}
    back = params_to_state_dict(model, doubled, state)
    assert back.keys() == expected.keys()
    load_params(model, doubled, state)
    for name, tensor in model.state_dict().items():
        factor = 2 if "running" not in name and "tracked" not in name and "scale" not in name else 1
        np.testing.assert_array_equal(tensor, expected[name] * factor)
        np.testing.assert_array_equal(back[name], tensor)
    for source in (model.state_dict(), Net().state_dict()):
        again = params_from_state_dict(model, source)
        assert jax.tree.structure(again) == jax.tree.structure(params)
    assert jax.tree.structure(trainable_mask(model)) == jax.tree.structure(params)


def test_entries_that_hooks_of_state_dicts_make():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self._register_state_dict_hook(self._rename)

        @staticmethod
        def _rename(module, state_dict, prefix, local):
            state_dict["renamed"] = state_dict.pop("fc.weight")
            state_dict["twice"] = state_dict["renamed"] * 2

    model = Hooked()
    before = model.fc.weight.clone()
    _, params = convert_pytnn_to_jax(model)
    found = params_to_state_dict(model, jax.tree.map(lambda p: p * 0 + 7, params))
    assert {name: tensor.unique().tolist() for name, tensor in found.items()} == {
        "fc.bias": [7.0],
        "renamed": [7.0],
        "twice": [14.0],
    }
    assert torch.equal(model.fc.weight, before)


def test_models_that_cannot_hold_the_values():
    _, params = convert_pytnn_to_jax(nn.Linear(3, 2))
    with torch.device("meta"):
        empty = nn.Linear(3, 2)
    with pytest.raises(ConversionError, match=r"load_params: weight: .*meta device.*to_empty"):
        load_params(empty, params)
    assert params_to_state_dict(empty, params)["bias"].device.type == "cpu"
    model = nn.Linear(3, 2)
    model.bias = nn.Parameter(torch.zeros(1).expand(2))
    before = model.weight.clone()
    with pytest.raises(ConversionError, match=r"load_params: bias: .*share memory"):
        load_params(model, params)
    assert torch.equal(model.weight, before)


def test_an_equinox_module_without_state_has_the_statistics_of_its_conversion():
    norm = nn.BatchNorm1d(3).train()
    norm(torch.randn(8, 3) * 3 + 5)
    module = convert_pytnn_to_equinox(norm)
    new = load_params(nn.BatchNorm1d(3), module)
    assert torch.equal(new.running_mean, norm.running_mean)
    assert torch.equal(params_to_state_dict(nn.BatchNorm1d(3), module)["running_var"], norm.running_var)


def test_tied_names_with_different_values():
    model = Net()
    names = dict(model.state_dict())
    names["outer.weight"] = names["inner.weight"] + 1
    with pytest.raises(StructureError, match=r"inner\.weight, outer\.weight: expected equal values.*tied"):
        params_from_state_dict(model, names)


def test_the_whole_result_of_a_converter():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    apply, params, state = convert_pytnn_to_jax(model, with_state=True)
    for given in ((apply, params, state), (params, state), (convert_pytnn_to_flax(model)[0], params, state)):
        assert load_params(model, given) is model
    assert load_params(model, convert_pytnn_to_equinox(model, with_state=True)) is model
    assert load_params(nn.Linear(3, 2), convert_pytnn_to_jax(nn.Linear(3, 2)))


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ({"module.weight": torch.ones(3, 2), "module.bias": torch.ones(3)}, r"begin with `module\.`.*removeprefix"),
        ({"0": {"weight": torch.ones(3, 2)}}, "nested dicts.*load_params"),
        ("nowhere.safetensors", "nowhere.safetensors: expected a .safetensors file, got none"),
        (__file__, "expected a .safetensors file, got another, .*torch.load"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(3).to_sparse()}, "bias: expected a dense tensor"),
        ({"weight": torch.ones(3, 2)}, "bias: missing.*got 1, without these"),
    ],
)
def test_sources_that_are_no_state_dict_of_the_model(source, match):
    with pytest.raises(StructureError, match=match):
        params_from_state_dict(nn.Linear(2, 3), source)


def test_the_way_back_under_jit():
    _, params = convert_pytnn_to_jax(nn.Linear(2, 3))
    with pytest.raises(LeafTypeError, match=r"load_params: params\.weight: .*got a tracer.*outside"):
        jax.jit(lambda p: load_params(nn.Linear(2, 3), p).weight)(params)
    with pytest.raises(LeafTypeError, match=r"params_from_state_dict: weight: .*got a tracer"):
        jax.jit(lambda w: params_from_state_dict(nn.Linear(2, 3), {"weight": w, "bias": jnp.ones(3)}))(jnp.ones((3, 2)))


def test_a_state_dict_in_the_place_of_variables():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    module, _ = convert_pytnn_to_flax(model)
    x = jnp.ones((4, 3), jnp.float32)
    variables = module().init(jax.random.key(0), x)
    with pytest.raises(MissingLeafError, match="flat names.*params_from_state_dict"):
        module().apply({**variables, "params": model.state_dict()}, x)
    with pytest.raises(MissingLeafError, match=r"batch_stats\.1\.running_mean.*missing.*all variables"):
        module().apply({"params": variables["params"]}, x)


def test_a_state_dict_in_the_place_of_an_nnx_state():
    module = convert_pytnn_to_nnx(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(StructureError, match=r"0\.weight: .*state_dict.*params_from_state_dict"):
        nnx.update(module, {"0.weight": jnp.ones((2, 3))})
