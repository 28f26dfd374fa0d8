"""What converters take besides a module: methods, example inputs, declared outputs, specs of shards, caches."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from pytorch2jax import (
    ConversionError,
    DeviceError,
    OptionError,
    OutputMismatchError,
    convert_pytnn_to_equinox,
    convert_pytnn_to_flax,
    convert_pytnn_to_jax,
    convert_pytnn_to_nnx,
    t2j,
)

BACKENDS = pytest.mark.parametrize("backend", ["torch", "xla"])


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(3, 2), nn.Linear(2, 3)
        self.double()

    def encode(self, x, *, scale=1.0):
        return self.down(x) * scale

    def forward(self, x):
        return self.up(self.encode(x))


def _calls(model, **options):
    """The four converters, each as a function of the arguments."""
    apply, params = convert_pytnn_to_jax(model, **options)
    linen, variables = convert_pytnn_to_flax(model, **options)
    return {
        "jax": lambda *args, **kwargs: apply(params, *args, **kwargs),
        "linen": lambda *args, **kwargs: linen().apply({"params": variables}, *args, **kwargs),
        "nnx": convert_pytnn_to_nnx(model, **options),
        "equinox": convert_pytnn_to_equinox(model, **options),
    }


@BACKENDS
def test_methods(backend):
    model = Autoencoder()
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    expected = model.encode(x, scale=2.0).detach()
    for given, options in ((model.encode, {}), (model, {"method": "encode"}), (model, {"method": Autoencoder.encode})):
        for call in _calls(given, backend=backend, **options).values():
            np.testing.assert_allclose(call(t2j(x), scale=2.0), expected)
    for given, options in ((model.forward, {}), (model, {"method": "forward"}), (model, {"method": "__call__"})):
        np.testing.assert_allclose(_calls(given, backend=backend, **options)["jax"](t2j(x)), model(x).detach())


class _Renamed(nn.Module):
    """A method under another name than its own, and one that a child class overrides."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def encode(self, x):
        return self.first(x)

    kept = encode


class _Overriding(_Renamed):
    def encode(self, x):
        return self.second(x) * 100


@pytest.mark.parametrize("as_option", [False, True])
def test_a_method_is_itself_and_not_another_of_its_name(as_option):
    model = _Overriding().double()
    x = torch.ones(2, 3, dtype=torch.float64)
    method = model.kept
    apply, params = convert_pytnn_to_jax(model, method=method) if as_option else convert_pytnn_to_jax(method)
    np.testing.assert_allclose(apply(params, jnp.ones((2, 3))), model.kept(x).detach())
    apply, params = convert_pytnn_to_jax(model, method=_Overriding.encode)
    np.testing.assert_allclose(apply(params, jnp.ones((2, 3))), model.encode(x).detach())


def test_methods_that_the_module_does_not_have():
    class Child(Autoencoder):
        def encode(self, x):
            return self.down(x) * 100

    child, model = Child(), _Overriding()
    with pytest.raises(OptionError, match="expected a method that Child has, got 'encode'"):
        convert_pytnn_to_jax(super(Child, child).encode)
    with pytest.raises(OptionError, match="expected a method that Child has, got 'encode'"):
        convert_pytnn_to_jax(child, method=Autoencoder.encode)
    with pytest.raises(OptionError, match="of another _Overriding"):
        convert_pytnn_to_jax(model, method=_Overriding().encode)
    with pytest.raises(OptionError, match="expected one method, got the bound method `encode` and 'kept'"):
        convert_pytnn_to_jax(model.encode, method="kept")
    with pytest.raises(OptionError, match="submodule `first`"):
        convert_pytnn_to_jax(model, method="first")


def test_what_is_no_method():
    with pytest.raises(OptionError, match="method: expected a method of Autoencoder, got 'decode'"):
        convert_pytnn_to_jax(Autoencoder(), method="decode")
    with pytest.raises(OptionError, match="method: expected the name"):
        convert_pytnn_to_jax(Autoencoder(), method=3)
    with pytest.raises(ConversionError, match="expected a torch.nn.Module"):
        convert_pytnn_to_jax(torch.sin)


class Picky(nn.Module):
    """Reads values, and accepts positive ones alone."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x):
        if not float(x.min()) > 0.5:
            raise ValueError("not these")
        return x * self.scale


EXAMPLES = {
    "arrays": {"example_args": (jnp.full(3, 0.75),)},
    "tensors": {"example_args": (torch.full((3,), 0.75, dtype=torch.float64),)},
    "keywords": {"example_kw": {"x": jnp.full(3, 0.75)}},
    "declared": {"output_shapes": jax.ShapeDtypeStruct((3,), jnp.float64)},
}


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_models_that_accept_no_made_up_values_run_under_jit(name):
    with pytest.raises(Exception, match="not these"):
        jax.jit(_calls(Picky())["jax"])(jnp.ones(3))
    for kind, call in _calls(Picky(), **EXAMPLES[name]).items():
        run = eqx.filter_jit(call) if kind == "equinox" else nnx.jit(call) if kind == "nnx" else jax.jit(call)
        args, kwargs = ((), {"x": jnp.ones(3)}) if name == "keywords" else ((jnp.ones(3),), {})
        np.testing.assert_allclose(run(*args, **kwargs), 2 * np.ones(3))


def test_examples_are_tried_when_the_model_is_converted():
    with pytest.raises(Exception, match="mat1 and mat2|size"):
        convert_pytnn_to_jax(Autoencoder(), example_args=(jnp.ones((2, 7)),))


def test_declared_outputs_are_compared():
    with pytest.raises(OutputMismatchError, match=r"expected float64\[4\]"):
        _calls(Autoencoder(), output_shapes=jax.ShapeDtypeStruct((4,), jnp.float64))["jax"](jnp.ones(3))


class Counting(nn.Module):
    """Changes its state in a call that fake tensors cannot follow."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.seen += float(x.sum())
        return x * 2


def test_declared_models_give_back_their_state():
    shapes = jax.ShapeDtypeStruct((3,), jnp.float64)
    apply, params, state = convert_pytnn_to_jax(Counting(), with_state=True, output_shapes=shapes)
    for run in (apply, jax.jit(apply)):
        out, new = run(params, state, jnp.ones(3))
        np.testing.assert_allclose(out, 2 * np.ones(3))
        assert new["seen"] == 3


@BACKENDS
@pytest.mark.parametrize("n", [1, 8])
def test_explicit_axes(backend, n):
    model = Autoencoder()
    mesh = jax.make_mesh((n,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    declared = jax.ShapeDtypeStruct((16, 3), jnp.float64)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((16, 3)), NamedSharding(mesh, P("data")))
        for options in ({}, {"output_shapes": declared}, {"example_args": (jnp.ones((16, 3)),)}):
            for call in _calls(model, out_specs=P("data"), backend=backend, **options).values():
                out = call(x)
                assert out.sharding.spec in (P("data", None), P("data"))
                np.testing.assert_allclose(out, model(torch.ones(16, 3, dtype=torch.float64)).detach())
        apply, params = convert_pytnn_to_jax(model, out_specs=P("data"), backend=backend)
        gradient = jax.jit(jax.grad(lambda p: apply(p, x).sum()))(params)
    model(torch.ones(16, 3, dtype=torch.float64)).sum().backward()
    np.testing.assert_allclose(gradient["down"]["weight"], model.down.weight.grad)


def test_explicit_axes_and_state():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    apply, params, state = convert_pytnn_to_jax(nn.BatchNorm1d(3).double(), with_state=True, out_specs=P("data"))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((4, 3)), NamedSharding(mesh, P("data")))
        assert apply(params, state, x)[0].shape == (4, 3)
        with pytest.raises(DeviceError, match="expected a call that changes no buffer"):
            apply(params, state, x, train=True)


# -- keywords of other frameworks ---------------------------------------------------------------------------------


class Lenient(nn.Module):
    def forward(self, x, **kwargs):
        return x


class Trained(nn.Module):
    def forward(self, x, training=False, **kwargs):
        return x * (2 if training else 1)


@pytest.mark.parametrize(
    ("kind", "keyword", "value", "advice"),
    [
        ("jax", "deterministic", False, "Pass `train=True`"),
        ("jax", "training", True, "Pass `train=True`"),
        ("linen", "inference", True, "Pass `train=False`"),
        ("nnx", "is_training", False, "Pass `train=False`"),
        ("equinox", "train", True, "Pass `inference=False`"),
        ("equinox", "deterministic", True, "Pass `inference=True`"),
    ],
)
def test_flags_of_other_frameworks(kind, keyword, value, advice):
    with pytest.raises(OptionError, match=f"`{keyword}`: expected a keyword that `forward` names.*{advice}"):
        _calls(Lenient())[kind](jnp.ones(2), **{keyword: value})


def test_flags_that_forward_names_reach_it():
    for call in _calls(Trained()).values():
        np.testing.assert_array_equal(call(jnp.ones(2), training=True), 2 * np.ones(2))


# -- caches of transformers ----------------------------------------------------------------------------------------


def _llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval(), config


@BACKENDS
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
def test_caches_go_out_and_come_in(kind, jitted, backend):
    model, config = _llama()
    apply, params = convert_pytnn_to_jax(model, backend=backend)
    ids = torch.arange(8).reshape(2, 4)

    def cache():
        if kind == "static":
            return transformers.StaticCache(config=config, max_cache_len=8)
        return transformers.DynamicCache() if kind == "dynamic" else None

    first = (lambda p, ids: apply(p, ids, past_key_values=given)) if (given := cache()) is not None else apply
    first, later = (jax.jit(first), jax.jit(apply)) if jitted else (first, apply)
    expected, found = model(ids, past_key_values=cache()), first(params, t2j(ids))
    for step in range(3):
        np.testing.assert_allclose(found.logits, expected.logits.detach(), atol=1e-6)  # in parts in single precision
        assert isinstance(found.past_key_values, transformers.Cache)
        assert isinstance(found.past_key_values.layers[0].keys, jax.Array)
        token = ids[:, step : step + 1]
        before = found.past_key_values
        expected = model(token, past_key_values=expected.past_key_values)
        shapes = [layer.keys.shape for layer in before.layers]
        found = later(params, t2j(token), past_key_values=before)
        assert [layer.keys.shape for layer in before.layers] == shapes  # a cache that is given is not written to
    if given is not None:
        assert given.get_seq_length() == 0


def test_static_caches_are_carried_by_loops():
    model, config = _llama()
    apply, params = convert_pytnn_to_jax(model, backend="xla")
    ids = torch.arange(1, 5).reshape(1, 4)
    cache = transformers.StaticCache(config=config, max_cache_len=16)
    out = apply(params, t2j(ids), past_key_values=cache)

    def step(carry, _):
        token, cache = carry
        out = apply(params, token, past_key_values=cache)
        token = out.logits[:, -1:].argmax(-1)
        return (token, out.past_key_values), token

    token = out.logits[:, -1:].argmax(-1)
    _, tokens = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=5))((token, out.past_key_values))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 4:]
    assert [int(token[0, 0]), *map(int, tokens.ravel())] == expected.tolist()


def test_caches_of_encoders_and_decoders():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    apply, params = convert_pytnn_to_jax(model)
    ids = torch.arange(8).reshape(2, 4)
    for run in (apply, jax.jit(apply)):
        expected, found = model(ids, decoder_input_ids=ids), run(params, t2j(ids), decoder_input_ids=t2j(ids))
        assert isinstance(found.past_key_values, transformers.EncoderDecoderCache)
        token = ids[:, :1]
        expected = model(ids, decoder_input_ids=token, past_key_values=expected.past_key_values)
        found = run(params, t2j(ids), decoder_input_ids=t2j(token), past_key_values=found.past_key_values)
        np.testing.assert_allclose(found.logits, expected.logits.detach(), atol=1e-6)  # in parts in single precision


def test_gradients_through_a_cache():
    model, _ = _llama()
    apply, params = convert_pytnn_to_jax(model)
    ids = jnp.arange(4).reshape(1, 4)

    def loss(params):
        cache = apply(params, ids).past_key_values
        return (apply(params, ids[:, :1], past_key_values=cache).logits ** 2).sum()

    expected = model(torch.arange(4)[None])
    (model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=expected.past_key_values).logits ** 2).sum().backward()
    found = jax.jit(jax.grad(loss))(params)["model"]["layers"]["0"]["self_attn"]["k_proj"]["weight"]
    np.testing.assert_allclose(found, model.model.layers[0].self_attn.k_proj.weight.grad, atol=1e-8)


@BACKENDS
@pytest.mark.parametrize("jitted", [False, True])
def test_caches_of_sliding_windows(jitted, backend):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, sliding_window=4,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).double().eval()
    apply, params = convert_pytnn_to_jax(model, backend=backend)
    run = jax.jit(apply) if jitted else apply
    ids = torch.arange(6)[None]
    expected, found = model(ids), run(params, t2j(ids))
    for step in range(3):
        token = ids[:, step : step + 1]
        expected = model(token, past_key_values=expected.past_key_values)
        found = run(params, t2j(token), past_key_values=found.past_key_values)
        np.testing.assert_allclose(found.logits, expected.logits.detach(), atol=1e-6)  # in parts in single precision


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_outputs_of_transformers_pass_through_equinox(backend):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return BaseModelOutput(last_hidden_state=self.fc(x), attentions=(x, x + 1))

    model = Model().double()
    module = convert_pytnn_to_equinox(model, backend=backend)
    expected = model.fc(torch.ones(1, 2, dtype=torch.float64)).detach()
    out = module(jnp.ones((1, 2)))
    arrays, others = eqx.partition(out, eqx.is_array)
    assert list(eqx.combine(arrays, others)) == ["last_hidden_state", "attentions"]
    out = eqx.filter_jit(module)(jnp.ones((1, 2)))
    np.testing.assert_allclose(out.last_hidden_state, expected)
    assert list(out) == ["last_hidden_state", "attentions"]
    out = eqx.filter_vmap(module)(jnp.ones((3, 1, 2)))
    assert out.last_hidden_state.shape == (3, 1, 2)
    nothing = jax.tree.map(lambda _: None, out)
    assert jax.tree.structure(nothing, is_leaf=lambda x: x is None) == jax.tree.structure(out)
