"""How converted models are called, what they take and return, and optax around them."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
import safetensors.torch
import torch
import transformers
from torch import nn

from pytorch2jax import (
    ConversionError,
    DtypeError,
    StructureError,
    convert_pytnn_to_equinox,
    convert_pytnn_to_flax,
    convert_pytnn_to_jax,
    convert_pytnn_to_nnx,
    label_params,
    load_params,
    params_to_state_dict,
)

pytestmark = pytest.mark.usefixtures("x32")


class TakesOurNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, train="theirs", rng=1.0, key=1.0, state=1.0, inference=1.0, rngs=1.0):
        scale = {"theirs": 1.0, "other": 2.0}[train] * rng * key * state * inference * rngs
        return self.dropout(self.linear(x)) * scale


@pytest.mark.parametrize(
    ("convert", "name"),
    [
        (convert_pytnn_to_jax, "rng, train"),
        (convert_pytnn_to_flax, "train"),
        (convert_pytnn_to_nnx, "rngs, train"),
        (convert_pytnn_to_equinox, "inference, key, state"),
    ],
)
def test_a_forward_with_our_names_is_refused_with_a_way_out(convert, name):
    with pytest.raises(ConversionError, match=rf"function needs for itself: {name}\..*prefix='jax_'"):
        convert(TakesOurNames())


def test_the_way_out():
    model, x, key = TakesOurNames(), jnp.ones((20, 3)), jax.random.key(0)
    apply, params = convert_pytnn_to_jax(model, prefix="jax_")
    plain = apply(params, x)
    np.testing.assert_allclose(apply(params, x, train="other", rng=3.0), 6 * plain, rtol=1e-5)
    assert (np.asarray(apply(params, x, jax_train=True, jax_rng=key)) == 0).any()
    module, params = convert_pytnn_to_flax(model, prefix="jax_")
    noisy = module().apply({"params": params}, x, train="other", jax_train=True, rngs={"dropout": key})
    assert (np.asarray(noisy) == 0).any()
    module = convert_pytnn_to_nnx(model, prefix="jax_")
    np.testing.assert_allclose(module(x, train="other"), 2 * plain, rtol=1e-5)
    assert (np.asarray(module(x, jax_train=True, jax_rngs=key)) == 0).any()
    module = convert_pytnn_to_equinox(model, prefix="jax_")
    np.testing.assert_allclose(module(x, key=2.0), 2 * plain, rtol=1e-5)
    assert (np.asarray(module(x, jax_inference=False, jax_key=key)) == 0).any()


def test_signatures_say_how_to_call():
    apply, _ = convert_pytnn_to_jax(nn.Linear(2, 2))
    assert str(inspect.signature(apply)) == "(params, input: torch.Tensor, *, rng=None, train=False)"
    apply, _, _ = convert_pytnn_to_jax(nn.Linear(2, 2), with_state=True, prefix="j_")
    assert str(inspect.signature(apply)) == "(params, state, input: torch.Tensor, *, j_rng=None, j_train=False)"


def test_none_and_nested_containers():
    class Model(nn.Module):
        def forward(self, batch, mask=None, *extra, options=None):
            x = batch["x"][0] * (2 if mask is None else mask)
            return {"out": (x, None), "options": options, "extra": list(extra)}

    apply, params = convert_pytnn_to_jax(Model())
    x = jnp.ones(2)
    out = apply(params, {"x": (x, None)}, None, x, 3, options={"a": [x, "s", None]})
    np.testing.assert_array_equal(out["out"][0], 2.0)
    assert out["options"]["a"][1:] == ["s", None]
    assert out["extra"][1] == 3
    np.testing.assert_array_equal(apply(params, {"x": [x]}, jnp.zeros(2))["out"][0], 0.0)


# Newer versions of transformers call it `cache`.
CACHE = "cache" if "cache" in inspect.signature(transformers.GPT2LMHeadModel.forward).parameters else "past_key_values"


def test_a_cache_that_torch_knows_goes_out_and_comes_in(monkeypatch):
    import torch.utils._pytree as torch_pytree
    from transformers.integrations import executorch

    for name in ("SUPPORTED_NODES", "SUPPORTED_SERIALIZED_TYPES", "SERIALIZED_TYPE_TO_PYTHON_TYPE"):
        monkeypatch.setattr(torch_pytree, name, dict(getattr(torch_pytree, name)))
    executorch.register_dynamic_cache_export_support()
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=7, n_positions=8, n_embd=4, n_layer=2, n_head=1)
    model = transformers.GPT2LMHeadModel(config).eval()
    apply, params = convert_pytnn_to_jax(model)
    first = jax.jit(lambda p, i: apply(p, input_ids=i))(params, jnp.array([[1, 2, 3]]))
    step = jax.jit(lambda p, i, cache: apply(p, input_ids=i, **{CACHE: cache}))
    second = step(params, jnp.array([[4]]), first[CACHE])
    expected = model(torch.tensor([[1, 2, 3, 4]]), use_cache=False).logits.detach()
    np.testing.assert_allclose(second.logits[:, -1], expected[:, -1], rtol=1e-4, atol=1e-6)
    assert "TorchContainer(DynamicCache" in repr(second[CACHE])
    assert all(leaf.shape[2] == 4 for leaf in jax.tree.leaves(second[CACHE]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.float64])
def test_models_in_other_dtypes(dtype):
    model = nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype))
    apply, params = convert_pytnn_to_jax(model)
    x = torch.ones(2, 3, dtype=dtype)
    expected = model(x).detach()
    narrow = {torch.float64: jnp.float32}.get(dtype, jnp.dtype(str(dtype).removeprefix("torch.")))
    if dtype != torch.float64:  # an argument stays what it is; the parameters are wide again inside torch
        out = apply(params, jnp.ones((2, 3), narrow))
        assert out.dtype == narrow
        assert jax.tree.leaves(params)[0].dtype == narrow
        np.testing.assert_allclose(
            np.asarray(out).astype(complex), expected.to(torch.complex64).numpy(), rtol=2e-2, atol=1e-2
        )
    load_params(model, params)


@pytest.mark.filterwarnings("ignore:.*quantiz.*", "ignore:.*deprecated.*")
def test_quantised_modules_are_refused():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ConversionError, match=r"0: a quantised module \(Linear\) has packed integer weights"):
        convert_pytnn_to_jax(model)


def test_safetensors_round_trip(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    _, params, state = convert_pytnn_to_jax(model, with_state=True)
    trained = jax.tree.map(lambda p: p + 1, params)
    safetensors.torch.save_file(params_to_state_dict(model, trained, state), tmp_path / "weights.safetensors")
    fresh = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "weights.safetensors"))
    np.testing.assert_array_equal(fresh[0].weight.detach(), trained["0"]["weight"])
    assert safetensors.flax.load_file(tmp_path / "weights.safetensors")["0.bias"].shape == (4,)


def test_orbax_round_trip_of_linen_variables(tmp_path):
    module, _ = convert_pytnn_to_flax(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    x = jnp.ones((2, 3))
    variables = jax.tree.map(lambda v: v + 1, module().init(jax.random.key(0), x))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "variables", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "variables", module().init(jax.random.key(0), x))
    np.testing.assert_array_equal(module().apply(restored, x), module().apply(variables, x))


def test_dtypes_on_the_way_back():
    model = nn.Linear(3, 2)
    _, params = convert_pytnn_to_jax(model)
    with pytest.raises(DtypeError, match=r"load_params: params\.(weight|bias): expected torch.float32, got bfloat16"):
        load_params(model, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))


def test_labels_by_path():
    params = {"encoder": {"layers": {"0": {"norm": {"bias": 0}}, "1": {"linear": {"bias": 0}}}}, "head": {"bias": 0}}
    labels = label_params(params, {"*.norm": "none", "encoder.layers.1": "slow"}, "fast")
    assert labels == {
        "encoder": {"layers": {"0": {"norm": {"bias": "none"}}, "1": {"linear": {"bias": "slow"}}}},
        "head": {"bias": "fast"},
    }
    with pytest.raises(StructureError, match=r"label_params: encodr: expected a pattern that fits a leaf"):
        label_params(params, {"encodr": "slow"}, "fast")


def test_low_rank_adapters_train_while_torch_stays_frozen_without_weight_gradients():
    """A few parameters of JAX's around a frozen torch block: no gradient of torch's weights is computed."""
    weight_gradients = []

    class Observed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            if ctx.needs_input_grad[1]:
                weight_gradients.append(1)
            return grad @ weight, grad.T @ x if ctx.needs_input_grad[1] else None

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return Observed.apply(x, self.weight).tanh()

    torch.manual_seed(0)
    apply, frozen = convert_pytnn_to_jax(Block())
    keys = jax.random.split(jax.random.key(0), 3)
    lora = {"down": 0.1 * jax.random.normal(keys[0], (6, 2)), "up": jnp.zeros((2, 6))}
    x, y = jax.random.normal(keys[1], (16, 6)), jax.random.normal(keys[2], (16, 6))

    def model(lora, x):
        for _ in range(2):
            x = apply(frozen, x) + x @ lora["down"] @ lora["up"]
        return x

    tx = optax.adam(1e-2)
    opt_state = tx.init(lora)

    @jax.jit
    def step(lora, opt_state):
        loss, gradient = jax.value_and_grad(lambda p: ((model(p, x) - y) ** 2).mean())(lora)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(lora, updates), opt_state, loss

    losses = []
    for _ in range(50):
        lora, opt_state, loss = step(lora, opt_state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert weight_gradients == []
