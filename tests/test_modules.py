"""`convert_pytnn_to_jax`, and the way back."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pytorch2jax
from pytorch2jax import (
    ConversionError,
    MissingLeafError,
    StateError,
    StructureError,
    convert_pytnn_to_jax,
    load_params,
    params_to_state_dict,
    torch2jax,
    trainable_mask,
)


class Tied(nn.Module):
    """Tied weights, a submodule under two names, a frozen weight, two kinds of buffers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.alias = self.body
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.body.bias.requires_grad_(False)
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.register_buffer("mask", torch.tensor([True, False, True, True]), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, i):
        return self.head(self.alias(self.body(self.embed(i)).tanh()) * self.scale * self.mask)


MODULES = {
    "linear": (lambda: nn.Linear(3, 2), (4, 3)),
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 2)), (4, 3)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), (2, 2, 5, 5)),
    "lstm": (lambda: nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True), (2, 5, 3)),
    "gru": (lambda: nn.GRU(3, 4), (2, 5, 3)),
    "attention": (lambda: SelfAttention(), (2, 5, 8)),
    "encoder": (lambda: nn.TransformerEncoder(encoder_layer(), 2), (2, 5, 8)),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (4, 3)),
    "old weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(3, 2)), (4, 3)),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)), (4, 3)),
    "parameter list": (lambda: Lists(), (4, 3)),
    "checkpointed": (lambda: Checkpointed(), (4, 3)),
}


def encoder_layer():
    return nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(3), torch.randn(3)])
        self.table = nn.ParameterDict({"a": torch.randn(3)})

    def forward(self, x):
        return x * self.weights[0] + self.weights[1] * self.table["a"]


class Checkpointed(nn.Module):
    """Runs part of its forward again during backward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(lambda x: self.linear(x).tanh(), x, use_reentrant=False)


@pytest.fixture(params=MODULES)
def converted(request):
    make, shape = MODULES[request.param]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().eval()
    x = torch.randn(shape)
    return model, convert_pytnn_to_jax(model), x


def numpy_leaves(out):
    return [np.asarray(t.detach()) for t in jax.tree.leaves(out, is_leaf=lambda x: isinstance(x, torch.Tensor))]


def test_outputs_equal_torch(converted):
    model, (apply, params), x = converted
    expected = numpy_leaves(model(x))
    for call in (apply, jax.jit(apply)):
        out = jax.tree.leaves(call(params, jnp.asarray(x.numpy())))
        for ours, theirs in zip(out, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_gradients_equal_torch(converted):
    model, (apply, params), x = converted

    def loss(params, x):
        return sum((y.astype(jnp.float32) ** 2).sum() for y in jax.tree.leaves(apply(params, x)))

    live = x.clone().requires_grad_()
    out = jax.tree.leaves(model(live), is_leaf=lambda t: isinstance(t, torch.Tensor))
    sum((y**2).sum() for y in out).backward()
    gradient, in_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, jnp.asarray(x.numpy()))
    np.testing.assert_allclose(in_x, live.grad, rtol=2e-4, atol=2e-5)
    expected = {name: p.grad for name, p in model.named_parameters()}
    got = {".".join(k.key for k in path): g for path, g in jax.tree_util.tree_leaves_with_path(gradient)}
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        np.testing.assert_allclose(got[name], g if g is not None else 0 * got[name], rtol=2e-4, atol=2e-5)


def test_params_are_nested_by_module_path_with_torchs_names(converted):
    model, (_, params), _ = converted
    names = {".".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert names == {name for name, _ in model.named_parameters()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        tensor = model.get_parameter(".".join(k.key for k in path))
        np.testing.assert_array_equal(leaf, tensor.detach())


def test_the_model_is_left_as_it_was(converted):
    model, (apply, params), x = converted
    before = copy.deepcopy(model.state_dict())
    training = [m.training for m in model.modules()]
    apply(params, jnp.asarray(x.numpy()))
    jax.grad(lambda p: jax.tree.leaves(apply(p, jnp.asarray(x.numpy())))[0].sum())(params)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [m.training for m in model.modules()] == training
    assert all(p.grad is None for p in model.parameters())


def test_state_dict_round_trip(converted):
    model, (_, params), _ = converted
    doubled = jax.tree.map(lambda p: 2 * p, params)
    state_dict = params_to_state_dict(model, doubled, state=False)
    assert state_dict.keys() == model.state_dict().keys()
    other = copy.deepcopy(model) if not any("weight_g" in n for n in state_dict) else model
    other.load_state_dict(state_dict)
    for name, p in other.named_parameters():
        np.testing.assert_array_equal(p.detach(), jax.tree_util.tree_reduce(lambda _, x: x, pick(doubled, name)))


def pick(tree, name):
    for key in name.split("."):
        tree = tree[key]
    return tree


def test_tied_shared_frozen_and_buffers():
    model = Tied().eval()
    apply, params, state = convert_pytnn_to_jax(model, with_state=True)
    assert jax.tree.map(jnp.shape, params) == {
        "embed": {"weight": (7, 4)},
        "body": {"weight": (4, 4), "bias": (4,)},
    }
    assert jax.tree.map(jnp.shape, state) == {"scale": (4,), "mask": (4,)}
    assert trainable_mask(model) == {"embed": {"weight": True}, "body": {"weight": True, "bias": False}}

    i = torch.tensor([1, 2, 6])
    loss = (model(i) ** 2).sum()
    loss.backward()
    gradient = jax.jit(jax.grad(lambda p: (apply(p, state, jnp.array([1, 2, 6]))[0] ** 2).sum()))(params)
    np.testing.assert_allclose(gradient["embed"]["weight"], model.embed.weight.grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient["body"]["weight"], model.body.weight.grad, rtol=1e-5, atol=1e-6)

    changed = jax.tree.map(lambda p: p + 1, params)
    state_dict = params_to_state_dict(model, changed)
    assert list(state_dict) == list(model.state_dict())
    np.testing.assert_array_equal(state_dict["head.weight"], changed["embed"]["weight"])
    np.testing.assert_array_equal(state_dict["alias.bias"], changed["body"]["bias"])
    embedding = model.embed.weight
    load_params(model, changed, {**state, "scale": state["scale"] * 3})
    assert model.embed.weight is embedding is model.head.weight
    np.testing.assert_array_equal(model.scale, 6.0)
    np.testing.assert_allclose(
        apply(changed, {**state, "scale": state["scale"] * 3}, jnp.array([1, 2, 6]))[0], model(i).detach(), rtol=1e-5
    )


def test_buffers_inside_when_they_are_no_argument():
    model = Tied().eval()
    apply, params = convert_pytnn_to_jax(model)
    expected = model(torch.tensor([1, 2])).detach()
    model.scale.zero_()
    np.testing.assert_allclose(apply(params, jnp.array([1, 2])), expected, rtol=1e-6)


def test_the_optax_loop_equals_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    apply, params, state = convert_pytnn_to_jax(model, with_state=True)
    x, y = torch.randn(16, 3).double(), torch.randn(16, 1).double()
    tx = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(params, state, opt_state, x, y):
        def loss(params):
            out, new_state = apply(params, state, x, train=True)
            return ((out - y) ** 2).mean(), new_state

        gradient, new_state = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(params, updates), new_state, opt_state

    opt_state = tx.init(params)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.train()
    xj, yj = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())
    for _ in range(10):
        params, state, opt_state = step(params, state, opt_state, xj, yj)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    for name, tensor in params_to_state_dict(model, params, state).items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-9, atol=1e-10)
    assert state["1"]["num_batches_tracked"] == 10


def test_train_flags():
    class Flags(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return x + (1 if self.training else 0) + (10 if self.inner.training else 0)

    model = Flags().train()
    model.inner.eval()
    apply, params = convert_pytnn_to_jax(model)
    model.eval()
    x = jnp.zeros(())
    assert [float(apply(params, x, train=flag)) for flag in (False, True, None, False, None)] == [0, 11, 1, 0, 1]


def test_narrow_parameters_are_wide_again_inside_torch(x32):
    seen = []

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.register_buffer("index", torch.tensor([2, 0]))

        def forward(self, x):
            seen.append((self.weight.dtype, self.index.dtype, x.dtype))
            return (self.weight * x)[self.index]

    apply, params, state = convert_pytnn_to_jax(Wide(), with_state=True)
    assert params["weight"].dtype == jnp.float32
    assert state["index"].dtype == jnp.int32
    out, _ = apply(params, state, jnp.ones(3))
    assert out.dtype == jnp.float32
    assert set(seen) == {(torch.float64, torch.int64, torch.float32)}
    assert jax.grad(lambda p: apply(p, state, jnp.ones(3))[0].sum())(params)["weight"].tolist() == [1.0, 0.0, 1.0]
    # Parameters that the user has cast stay as they are.
    seen.clear()
    apply(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), state, jnp.ones(3))
    assert {s[0] for s in seen} == {torch.bfloat16}


def test_plain_attributes_do_not_keep_anything():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = None
            self.history = []

        def forward(self, x):
            self.last = x * 2
            self.history.append(self.last)
            return self.last + len(self.history)

    apply, params = convert_pytnn_to_jax(Remembers())
    assert [float(apply(params, jnp.array(1.0))) for _ in range(3)] == [3.0, 3.0, 3.0]


def test_wrong_trees():
    apply, params = convert_pytnn_to_jax(nn.Sequential(nn.Linear(3, 2)))
    x = jnp.ones((1, 3))
    with pytest.raises(MissingLeafError, match=r"Sequential: params\.0\.bias: missing\..*as the conversion returned"):
        apply({"0": {"weight": params["0"]["weight"]}}, x)
    with pytest.raises(KeyError):
        apply({}, x)
    with pytest.raises(StructureError, match=r"params\.0\.extra: the model has no such tensor"):
        apply({"0": {**params["0"], "extra": x}}, x)
    with pytest.raises(StructureError, match=r"params\.0\.weight: expected shape \(2, 3\), got \(3, 2\)"):
        apply({"0": {**params["0"], "weight": jnp.ones((3, 2))}}, x)
    with pytest.raises(TypeError, match=r"params\.0\.weight: expected an array, got str"):
        apply({"0": {**params["0"], "weight": "w"}}, x)
    with pytest.raises(MissingLeafError, match="got list"):
        apply([1], x)
    model = nn.Linear(3, 2)
    with pytest.raises(MissingLeafError, match=r"load_params: params\.bias"):
        load_params(model, {"weight": jnp.ones((2, 3))})
    before = model.weight.detach().clone()
    with pytest.raises(StructureError):
        load_params(model, {"weight": jnp.ones((2, 3)), "bias": jnp.ones(3)})
    assert torch.equal(model.weight, before)  # nothing is written
    with pytest.raises(MissingLeafError, match="params_to_state_dict"):
        params_to_state_dict(model, {})


def test_other_mappings_and_numpy_leaves():
    import flax

    apply, params = convert_pytnn_to_jax(nn.Linear(3, 2))
    x = jnp.ones((1, 3), jnp.float32)
    expected = apply(params, x)
    np.testing.assert_array_equal(apply(flax.core.freeze(params), x), expected)
    np.testing.assert_array_equal(apply(jax.tree.map(np.asarray, params), x), expected)


def test_state_that_nobody_asked_for():
    apply, params = convert_pytnn_to_jax(nn.BatchNorm1d(3))
    with pytest.raises(StateError, match=r"state\.running_mean.*with_state=True"):
        apply(params, jnp.ones((4, 3)), train=True)
    apply(params, jnp.ones((4, 3), jnp.float32))


def test_what_cannot_be_converted():
    with pytest.raises(ConversionError, match="expected a torch.nn.Module, got function"):
        convert_pytnn_to_jax(lambda x: x)
    with pytest.raises(ConversionError, match="lazy module has no parameters yet"):
        convert_pytnn_to_jax(nn.Sequential(nn.LazyLinear(3)))
    model = nn.Linear(2, 2)
    model.lock = __import__("threading").Lock()
    with pytest.raises(ConversionError, match=r"copy.deepcopy.*TypeError"):
        convert_pytnn_to_jax(model)
    with pytest.raises(TypeError):
        convert_pytnn_to_jax(None)


def test_a_lazy_module_that_has_run():
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.ones(1, 2))
    apply, params = convert_pytnn_to_jax(model)
    assert apply(params, jnp.ones((4, 2), jnp.float32)).shape == (4, 3)


def test_scripted_modules_run_with_their_weights_as_constants():
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double())
    f = torch2jax(model)
    x = torch.randn(3, 2, dtype=torch.float64)
    live = x.clone().requires_grad_()
    model(live).sum().backward()
    np.testing.assert_allclose(f(jnp.asarray(x.numpy())), model(x).detach())
    np.testing.assert_allclose(jax.grad(lambda x: f(x).sum())(jnp.asarray(x.numpy())), live.grad)


def test_autocast_is_taken_along():
    apply, params = convert_pytnn_to_jax(nn.Linear(3, 2))
    x = jnp.ones((1, 3), jnp.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert apply(params, x).dtype == jnp.bfloat16
        jitted = jax.jit(apply)
        assert jitted(params, x).dtype == jnp.bfloat16
    assert jitted(params, x).dtype == jnp.bfloat16  # as it was traced
    assert apply(params, x).dtype == jnp.float32
    plain = jax.jit(lambda p, x: apply(p, x))
    plain(params, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(params, x).dtype == jnp.float32


def test_default_dtype_is_taken_along():
    f = torch2jax(lambda x: torch.zeros(2) + x)
    x = jnp.ones(2, jnp.float32)
    torch.set_default_dtype(torch.float64)
    try:
        jitted = jax.jit(f)
        assert jitted(x).dtype == jnp.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert jitted(x + 1).dtype == jnp.float64
    assert f(x).dtype == jnp.float32


def test_parameters_follow_others_to_their_device():
    """Arrays over DLPack are committed to a device, so that a training step was compiled twice."""
    _, params = convert_pytnn_to_jax(nn.Linear(3, 2))
    assert not any(leaf.committed for leaf in jax.tree.leaves(params))
    step = jax.jit(lambda p, n: (jax.tree.map(lambda a: a * 0.9, p), n + 1))
    n = jnp.zeros(())
    for _ in range(3):
        params, n = step(params, n)
    assert step._cache_size() == 1


# -- who holds a parameter -----------------------------------------------------------------------------------


class ListOfOurs(list):
    pass


class DictOfOurs(dict):
    pass


class Slotted:
    __slots__ = ("weight",)

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return x @ self.weight


@dataclasses.dataclass(slots=True)
class SlottedData:
    weight: object


class Scales(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


HOLDERS = {
    "list": (lambda w: [w], lambda held, x: x @ held[0]),
    "a subclass of list": (lambda w: ListOfOurs([w]), lambda held, x: x @ held[0]),
    "a subclass of dict": (lambda w: DictOfOurs(w=w), lambda held, x: x @ held["w"]),
    "slots": (Slotted, lambda held, x: x @ held.weight),
    "a dataclass with slots": (SlottedData, lambda held, x: x @ held.weight),
    "a bound call": (lambda w: Slotted(w).__call__, lambda held, x: held(x)),
    "partial": (lambda w: functools.partial(torch.nn.functional.linear, weight=w), lambda held, x: held(x)),
    "nested partials in a list": (
        lambda w: [functools.partial(functools.partial(torch.mul, w), other=2.0)],
        lambda held, x: x @ held[0](),
    ),
    "partial of an object": (lambda w: functools.partial(Slotted(w)), lambda held, x: held(x)),
    "key of a dict": (lambda w: {w: 1}, lambda held, x: x @ next(iter(held))),
    "list iterator": (lambda w: iter([w, w]), lambda held, x: x @ copy.copy(held).__next__()),
    "tuple": (lambda w: (w, 1), lambda held, x: x @ held[0]),
    "set": (lambda w: {w}, lambda held, x: x @ next(iter(held))),
    "deque": (lambda w: collections.deque([w]), lambda held, x: x @ held[0]),
    "a method of it": (lambda w: w.matmul, lambda held, x: held(x.t()).t()),
    "namespace": (lambda w: types.SimpleNamespace(w=w), lambda held, x: x @ held.w),
}


class Holds(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.w = nn.Parameter(torch.arange(9.0).reshape(3, 3))
        make, self.use = HOLDERS[kind]
        self.held = make(self.w)

    def forward(self, x):
        return self.use(self.held, x) + self.w.sum()


@pytest.mark.parametrize("backend", ["torch", "xla"])
@pytest.mark.parametrize("kind", HOLDERS)
def test_it_does_not_matter_who_holds_a_parameter(kind, backend):
    """The value of a call reaches each holder, and the gradient comes back; or it is refused, and never made up."""
    model, x = Holds(kind), torch.linspace(-1.0, 1.0, 6).reshape(2, 3)
    try:
        apply, params = convert_pytnn_to_jax(model, backend=backend)
        outs = [apply(params, x.numpy()) for _ in range(3)]
    except (StateError, ConversionError) as error:
        assert kind == "a method of it", error  # noqa: PT017
        return
    params = {"w": 2 * params["w"] + 1}
    with torch.no_grad():
        expected = model(x)
        model.w.mul_(2).add_(1)
    for out in outs:
        np.testing.assert_allclose(out, expected, rtol=1e-6)
    loss = model(x).pow(2).sum()
    loss.backward()
    for transform in (lambda f: f, jax.jit):
        value, gradient = transform(jax.value_and_grad(lambda p: (apply(p, x.numpy()) ** 2).sum()))(params)
        np.testing.assert_allclose(value, loss.detach(), rtol=1e-6)
        np.testing.assert_allclose(gradient["w"], model.w.grad, rtol=1e-5)


def test_a_parameter_out_of_a_tuple_in_a_hand_written_gradient_is_refused():
    """Autograd, which takes what it is passed for a constant, would give it a gradient of zero."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.eye(3))
            self.held = (self.w,)

        def forward(self, x):
            return Scales.apply(x, self.held[0])

    apply, params = convert_pytnn_to_jax(Model())
    with pytest.raises(StateError, match=r"w: used by a torch.autograd.Function from somewhere else"):
        apply(params, jnp.ones((2, 3)))


def test_a_parameter_out_of_a_tuple_in_a_batch_of_torchs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.arange(9.0).reshape(3, 3))
            self.held = (self.w,)

        def forward(self, x):
            return torch.vmap(lambda row: x @ row)(self.held[0])

    model = Model()
    apply, params = convert_pytnn_to_jax(model)
    expected = model(torch.ones(2, 3)).detach()
    try:
        np.testing.assert_allclose(apply(params, jnp.ones((2, 3))), expected)
    except StateError as error:
        assert "somewhere else" in str(error)  # noqa: PT017


# -- odd modules ---------------------------------------------------------------------------------------------


class HasSlots(nn.Module):
    __slots__ = ("scale",)

    def __init__(self):
        super().__init__()
        self.l, self.scale = nn.Linear(3, 2), 2.0

    def forward(self, x):
        return self.l(x) * self.scale


class AttributeOfAParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.w.scale, self.held = 2.0, (self.w,)

    def forward(self, x):
        return x * self.w * self.w.scale * self.held[0].scale


class DeletesAndPutsBack(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        weight = self.l.weight
        del self.l.weight
        self.l.weight = 2 * weight
        out = self.l(x)
        del self.l.weight
        self.l.weight = weight
        return out


class MadeInForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.sub, self.l = None, nn.Linear(3, 2)

    def forward(self, x):
        if self.sub is None:
            self.sub = nn.Tanh()
        return self.sub(self.l(x))


class SubmoduleNamedParams(nn.Module):
    def __init__(self):
        super().__init__()
        self.params, self.batch_stats = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.params(x) + self.batch_stats(x)


class SparseBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)
        self.register_buffer("unread", torch.eye(3).to_sparse())
        self.register_buffer("nothing", None)

    def forward(self, x):
        return self.l(x)


class ViewsOfOneTensor(nn.Module):
    def __init__(self):
        super().__init__()
        whole = torch.arange(6.0).reshape(2, 3)
        self.l, self.first, self.second, self.whole = nn.Linear(3, 3), whole[0], whole[1], whole

    def forward(self, x):
        return self.l(x) * self.first + self.second * self.whole


class CopiesALayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        copied = copy.deepcopy(self.l)
        assert copied.weight is not self.l.weight
        return self.l(x).tanh() * copied(x)  # torch takes the copy for something else than the layer


def frozen():
    return torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval()))


ODD = [
    HasSlots,
    AttributeOfAParameter,
    DeletesAndPutsBack,
    MadeInForward,
    SubmoduleNamedParams,
    SparseBuffer,
    ViewsOfOneTensor,
    CopiesALayer,
    frozen,
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize("backend", ["torch", "xla"])
@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_odd_modules(make, backend):
    if (make, backend) == (frozen, "xla"):
        pytest.skip("TorchScript reads values")
    torch.manual_seed(0)
    model, x = make(), torch.linspace(-1.0, 1.0, 6).reshape(2, 3)
    apply, params = convert_pytnn_to_jax(model, backend=backend)
    loss = model(x).pow(2).sum()
    trainable = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, trainable) if trainable else ()
    for call in (apply, jax.jit(apply), apply):
        np.testing.assert_allclose(call(params, x.numpy()), model(x).detach(), rtol=1e-5, atol=1e-6)
        gradients = jax.grad(lambda p, call=call: (call(p, x.numpy()) ** 2).sum())(params)
        found = [params_to_state_dict(model, gradients)[name] for name, _ in model.named_parameters()]
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_copies_of_a_layer_under_transformations(backend):
    torch.manual_seed(0)
    model, x = CopiesALayer().double(), torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(2, 3)
    apply, params = convert_pytnn_to_jax(model, backend=backend)

    def loss(weight, x):
        return apply({"l": {**params["l"], "weight": weight}}, x).sum()

    weight, bias, fixed = model.l.weight.detach(), model.l.bias.detach(), model.l(x).detach()

    def in_torch(weight):
        return (torch.nn.functional.linear(x, weight, bias).tanh() * fixed).sum()

    w, a = params["l"]["weight"], jnp.asarray(x.numpy())
    gradient = torch.func.grad(in_torch)(weight)
    by_example = jax.vmap(jax.grad(loss), (None, 0))(w, a)
    np.testing.assert_allclose(by_example.sum(0), gradient, rtol=1e-9)
    np.testing.assert_allclose(jax.jvp(lambda w: loss(w, a), (w,), (w,))[1], (gradient * weight).sum(), rtol=1e-9)
    np.testing.assert_allclose(jax.jacfwd(lambda w: loss(w, a))(w), gradient, rtol=1e-9)


def test_odd_modules_that_are_refused_by_name():
    x = jnp.ones((2, 3), jnp.float32)

    class Makes(nn.Module):
        def __init__(self):
            super().__init__()
            self.sub = None

        def forward(self, x):
            if self.sub is None:
                self.sub = nn.Linear(3, 2)
            return self.sub(x)

    for backend in ("torch", "xla"):
        apply, params = convert_pytnn_to_jax(Makes(), backend=backend)
        with pytest.raises(StateError, match="Makes: sub: made in `forward`.*Run the model once in torch"):
            apply(params, x)
    model = nn.Linear(3, 2)
    model._parameters["training"] = nn.Parameter(torch.ones(3))
    with pytest.raises(ConversionError, match="Linear: expected the attribute `training` to be the module's mode"):
        convert_pytnn_to_jax(model)
    model, linen = SubmoduleNamedParams(), pytorch2jax.convert_pytnn_to_flax(SubmoduleNamedParams())[0]()
    variables = linen.init(jax.random.key(0), x)
    with pytest.raises(ConversionError, match="expected no submodule called `params`.*inside of another Linen module"):
        linen.apply(variables, x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of .*ensors is in prototype stage")
def test_parameters_that_jax_cannot_hold_are_named():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    masked = torch.masked.masked_tensor(torch.ones(3), torch.tensor([True, False, True]))
    for value, kind in ((nested, "a nested tensor"), (masked, "a MaskedTensor"), (torch.eye(2).to_sparse(), "sparse")):
        model = nn.Sequential(nn.Linear(2, 2))
        model[0].weight = nn.Parameter(value)
        with pytest.raises(ConversionError, match=rf"convert: 0.weight: expected a dense parameter, got .*{kind}"):
            convert_pytnn_to_jax(model)


# -- found in use -----------------------------------------------------------------------------------------------


def test_objects_inside_of_a_module_are_put_back():
    class Box:
        mask = None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.box, self.nested = Box(), [[None]]
            self.box.mask = None

        def forward(self, x):
            if self.box.mask is None:
                self.box.mask = torch.arange(3.0)
            if self.nested[0][0] is None:
                self.nested[0][0] = torch.arange(3.0)
            return x * self.box.mask + self.nested[0][0]

    apply, params = convert_pytnn_to_jax(Model())
    for _ in range(2):
        assert apply(params, jnp.ones(3, jnp.float32)).tolist() == [0.0, 2.0, 4.0]


def test_a_module_that_streams_is_refused():
    class Streaming(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTMCell(3, 4)
            self.hidden = None

        def forward(self, x):
            self.hidden = self.cell(x, self.hidden)
            return self.hidden[0]

    apply, params = convert_pytnn_to_jax(Streaming())
    with pytest.raises(StateError, match=r"hidden: the forward pass keeps here what it computes from its arguments"):
        apply(params, jnp.ones((2, 3), jnp.float32))


@pytest.mark.parametrize("write", [lambda m, x: setattr(m, "ema", x.mean()), lambda m, x: m.ema.copy_(x.mean())])
def test_state_that_changes_on_some_calls_only_is_an_error(write):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros((), dtype=torch.int64))
            self.register_buffer("ema", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.n += 1
            if self.n % 2 == 0:
                write(self, x)
            return x

    apply, params, state = convert_pytnn_to_jax(Model(), with_state=True)
    _, state = apply(params, state, jnp.ones(3))
    with pytest.raises(StateError):
        apply(params, state, jnp.ones(3))


def test_parameters_that_forward_changes_are_an_error():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            with torch.no_grad():
                self.w.mul_(0.5)
            return x * self.w

    apply, params = convert_pytnn_to_jax(Model())
    with pytest.raises(StateError, match=r"params\.w: a parameter that the forward pass changes"):
        apply(params, jnp.ones(3))


def test_an_embedding_that_is_renormalised():
    model = nn.Embedding(5, 3, max_norm=0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    apply, params = convert_pytnn_to_jax(model)
    out = apply(params, jnp.array([1, 2]))
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 0.5, rtol=1e-5)
    np.testing.assert_array_equal(params["weight"], 1.0)


def test_a_closure_over_the_original_module_is_an_error_and_no_zero():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.f = lambda x: x * self.w

        def forward(self, x):
            return self.f(x)

    model = Model()
    apply, params = convert_pytnn_to_jax(model)
    with pytest.raises(StateError, match=r"w: used by the forward pass from somewhere else"):
        apply(params, jnp.ones(3))


def test_parameters_in_plain_lists():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
            self.both = [self.a, self.b]

        def forward(self, x):
            return x * self.both[0] + self.both[1]

    apply, params = convert_pytnn_to_jax(Model())
    x = jnp.full(3, 2.0, jnp.float32)
    gradient = jax.grad(lambda p: apply(p, x).sum())(params)
    assert gradient["a"].tolist() == [2.0] * 3
    assert gradient["b"].tolist() == [1.0] * 3


def test_load_params_into_a_model_that_shares_its_memory():
    model = nn.Linear(3, 3)
    _, params = convert_pytnn_to_jax(model, copy=False)
    load_params(model, jax.tree.map(lambda p: p * 2, params))
    assert torch.isfinite(model.weight).all()


class Holder:
    pass


@pytest.mark.parametrize("where", ["object", "nested list"])
def test_parameters_in_objects_and_nested_lists(where):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 3))
            self.holder = Holder()
            self.holder.w = self.w if where == "object" else [[self.w]]

        def forward(self, x):
            return x @ (self.holder.w if where == "object" else self.holder.w[0][0])

    apply, params = convert_pytnn_to_jax(Model())
    x = jnp.arange(3.0, dtype=jnp.float32)
    assert apply(params, x).tolist() == [3.0] * 3
    assert jax.grad(lambda p: apply(p, x).sum())(params)["w"].tolist() == [[0.0] * 3, [1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize("override", ["train", "eval"])
def test_train_and_eval_that_do_more_than_setting_flags(override):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.temperature = nn.Linear(3, 3), 1.0

        def forward(self, x):
            return self.linear(x) * self.temperature

    def train(self, mode=True):
        nn.Module.train(self, mode)
        self.temperature = 1.0 if mode else 0.1
        return self

    def evaluate(self):
        self.temperature = 0.1
        return nn.Module.eval(self)

    setattr(Model, override, train if override == "train" else evaluate)
    model = Model()
    apply, params = convert_pytnn_to_jax(model)
    x = torch.ones(2, 3)
    for _ in range(2):
        training = apply(params, jnp.ones((2, 3), jnp.float32), train=True)
        np.testing.assert_allclose(training, model.linear(x).detach(), rtol=1e-6)
        evaluation = apply(params, jnp.ones((2, 3), jnp.float32))
        np.testing.assert_allclose(evaluation, 0.1 * model.linear(x).detach(), rtol=1e-6)


def test_weights_that_are_fused_when_training_ends():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), None

        def train(self, mode=True):
            super().train(mode)
            self.fused = None if mode else self.a * self.b
            return self

        def forward(self, x):
            return x * (self.a * self.b if self.fused is None else self.fused)

    apply, params = convert_pytnn_to_jax(Fused().eval())
    x = jnp.full(3, 2.0, jnp.float32)
    assert apply(jax.tree.map(lambda p: 3 * p, params), x).tolist() == [18.0] * 3
    assert jax.grad(lambda p: apply(p, x).sum())(params)["a"].tolist() == [2.0] * 3


def test_what_was_computed_from_parameters_before_conversion_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.doubled = self.w * 2

        def forward(self, x):
            return x * self.doubled

    apply, params = convert_pytnn_to_jax(Model())
    with pytest.raises(StateError, match="doubled: used by the forward pass"):
        apply(params, jnp.ones(3))


class Alias(nn.Module):
    """Keeps something that shares memory with one of its tensors."""

    def __init__(self, make, use=True):
        super().__init__()
        self.w = nn.Parameter(torch.arange(3.0))
        self.register_buffer("b", torch.arange(3.0))
        self.kept, self.use = [make(self)], use

    def forward(self, x):
        return x * self.w + self.b + (self.kept[0].sum() if self.use else 0)


ALIASES = [lambda m: m.w.data, lambda m: m.w.detach(), lambda m: m.w.detach()[1:], lambda m: m.w.data.view(1, 3)]


@pytest.mark.parametrize("make", ALIASES)
@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_what_shares_memory_with_a_parameter_is_refused(make, backend):
    apply, params = convert_pytnn_to_jax(Alias(make), backend=backend)
    for call in (apply, jax.jit(apply)):
        with pytest.raises(StateError, match=r"kept\[0\]: used by the forward pass"):
            call(params, jnp.ones(3))
    model = Alias(make, use=False)
    apply, params = convert_pytnn_to_jax(model, backend=backend)
    np.testing.assert_array_equal(apply(params, jnp.ones(3)), model(torch.ones(3)).detach())


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_what_shares_memory_with_a_buffer_is_refused_where_that_is_passed(backend):
    model = Alias(lambda m: m.b[1:])
    apply, params = convert_pytnn_to_jax(model, backend=backend)
    np.testing.assert_array_equal(apply(params, jnp.ones(3)), model(torch.ones(3)).detach())
    apply, params, state = convert_pytnn_to_jax(model, backend=backend, with_state=True)
    with pytest.raises(StateError, match=r"kept\[0\]: used by the forward pass"):
        apply(params, state, jnp.ones(3))


@pytest.mark.parametrize("value", [lambda: torch.zeros(()), lambda: np.zeros(1)])
def test_plain_tensors_and_arrays_that_are_changed_in_place(value):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.n = nn.Linear(3, 3), value()

        def forward(self, x):
            self.n += 1
            return self.linear(x) * float(self.n.item())

    apply, params = convert_pytnn_to_jax(Counts())
    x = jnp.ones((2, 3), jnp.float32)
    if isinstance(value(), torch.Tensor):
        with pytest.raises(StateError, match=r"n: a tensor that the forward pass writes to and that is no buffer"):
            apply(params, x)
    else:  # it is put back
        first = apply(params, x)
        np.testing.assert_array_equal(apply(params, x), first)


def test_a_closure_is_seen_where_values_are_read_too():
    base = nn.Linear(3, 3)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = base
            self.fn = lambda z: base(z)

        def forward(self, x):
            return x if x.abs().max().item() > 1e6 else self.fn(x)

    apply, params = convert_pytnn_to_jax(Model())
    with pytest.raises(StateError, match="used by the forward pass from somewhere else"):
        apply(params, jnp.ones((1, 3), jnp.float32))
