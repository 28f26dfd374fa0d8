"""Every rule for derivatives by `jax.test_util.check_grads`, to third order, and real layers by finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import some
from torch import nn

from pytorch2jax import UnsupportedTransformError, convert_pytnn_to_jax, torch2jax, use_tape

X, W = jnp.linspace(-0.9, 1.1, 6).reshape(2, 3), jnp.linspace(0.3, -0.8, 6).reshape(3, 2)


class Cubed(torch.autograd.Function):
    """With a backward of its own that torch can differentiate."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 3 * x**2


def writes(x, w):
    y = x @ w
    y[0] *= x[1, :2]
    return y.sin()


RULES = {
    "one output": lambda f: f(lambda x, w: torch.tanh(x @ w)),
    "several outputs": lambda f: f(lambda x, w: (torch.sin(x), {"y": x @ w, "n": (x > 0).long()})),
    "an output that is selected": lambda f: lambda x, w: f(lambda x, w: (x.exp(), x @ w))(x, w)[1],
    "one active input": lambda f: lambda x, w: f(lambda x, w: torch.tanh(x @ w))(x, W),
    "an input": lambda f: f(lambda x, w: (x, x @ w)),
    "in place": lambda f: f(writes),
    "a backward of its own": lambda f: f(lambda x, w: Cubed.apply(x) @ w),
    "a gradient inside": lambda f: f(lambda x, w: torch.func.grad(lambda x: (x @ w).sin().sum())(x)),
    "batched": lambda f: lambda x, w: jax.vmap(f(lambda r, w: torch.tanh(r @ w)), (0, None))(x, w),
    "batched, each its own": lambda f: lambda x, w: jax.vmap(f(lambda r, c: torch.tanh(r * c)))(x.T, w),
    "a batch without rules": lambda f: lambda x, w: jax.vmap(f(lambda r, w: (r @ w).sin()), (0, None))(x, w),
    "composed": lambda f: lambda x, w: jnp.sin(f(torch.matmul)(jnp.cos(x), w)) + f(torch.matmul)(x, w),
    "scanned": lambda f: lambda x, w: jax.lax.scan(lambda c, _: (f(torch.tanh)(c @ w @ w.T), None), x, None, 2)[0],
    "checkpointed": lambda f: jax.checkpoint(f(lambda x, w: torch.tanh(x @ w))),
    "jitted": lambda f: jax.jit(f(lambda x, w: torch.tanh(x @ w))),
}


@pytest.mark.parametrize("tape", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["tape", "recomputed"])
@pytest.mark.parametrize("name", some(RULES, ["jitted"]))
def test_rules_to_third_order(name, tape):
    options = {"vmap_method": "sequential"} if name == "a batch without rules" else {}
    with use_tape(tape):
        f = RULES[name](lambda fn: torch2jax(fn, **options))

        def inexact(x, w):
            return [o for o in jax.tree.leaves(f(x, w)) if jnp.issubdtype(o.dtype, jnp.inexact)]

        jax.test_util.check_grads(inexact, (X, W), order=3, modes=["fwd", "rev"], rtol=2e-4, atol=2e-4)


def test_complex_numbers_to_second_order():
    z = X + 0.5j * X[::-1]
    f = torch2jax(lambda z: torch.sin(z) * z.conj())
    jax.test_util.check_grads(f, (z,), order=2, modes=["fwd", "rev"], rtol=1e-4, atol=1e-4)


LAYERS = {
    "Linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "Bilinear": (lambda: nn.Bilinear(4, 4, 3), (2, 4), (2, 4)),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 2, 5)),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2, groups=2), (1, 2, 6, 6)),
    "Conv3d": (lambda: nn.Conv3d(1, 2, 2, dilation=2), (1, 1, 4, 4, 4)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), (1, 2, 3, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (3, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (3, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(2, affine=True), (2, 2, 3, 3)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "LSTM": (lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True), (3, 2, 3)),
    "GRU": (lambda: nn.GRU(3, 4), (3, 2, 3)),
    "RNN": (lambda: nn.RNN(3, 4), (3, 2, 3)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), *[(2, 3, 8)] * 3),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), (3, 2, 8)),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0), (3, 2, 8), (3, 2, 8)),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), (1, 2, 3, 3)),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), (1, 2, 4, 4)),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), (1, 2, 4, 4)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(2), (1, 2, 5, 5)),
    "LPPool1d": (lambda: nn.LPPool1d(2, 2), (1, 2, 4)),
    "GELU": (nn.GELU, (6,)),
    "SiLU": (nn.SiLU, (6,)),
    "Softplus": (nn.Softplus, (6,)),
    "ELU": (nn.ELU, (6,)),
    "PReLU": (nn.PReLU, (6,)),
    "GLU": (nn.GLU, (2, 4)),
    "Softmax": (lambda: nn.Softmax(-1), (2, 4)),
    "CosineSimilarity": (nn.CosineSimilarity, (2, 4), (2, 4)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), (1, 4, 2, 2)),
    "Fold": (lambda: nn.Fold((3, 3), (2, 2)), (1, 8, 4)),
    "HuberLoss": (nn.HuberLoss, (4,), (4,)),
    "GaussianNLLLoss": (lambda: _Likelihood(), (4,), (4,)),
}


class _Likelihood(nn.Module):
    def __init__(self):
        super().__init__()
        self.variance = nn.Parameter(torch.full((4,), 0.7))
        self.loss = nn.GaussianNLLLoss()

    def forward(self, x, y):
        return self.loss(x, y, self.variance.exp())


@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.exhaustive), True], ids=["eval", "train"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_by_finite_differences(name, train):
    """Parameters and inputs along one direction, in both modes."""
    make, *shapes = LAYERS[name]
    torch.manual_seed(0)
    apply, params, state = convert_pytnn_to_jax(make().double(), with_state=True)
    inputs = [jnp.asarray(torch.randn(s, dtype=torch.float64).numpy()) for s in shapes]

    def loss(tree):
        out, _ = apply(tree[0], state, *tree[1], train=train)
        leaves = [o for o in jax.tree.leaves(out) if jnp.issubdtype(o.dtype, jnp.inexact)]
        return sum((jnp.cos(jnp.arange(o.size)).reshape(o.shape) * o).sum() for o in leaves)

    point = (params, inputs)
    direction = jax.tree.map(lambda p: jnp.sin(1.0 + jnp.arange(p.size)).reshape(p.shape), point)

    @jax.jit
    def at(step):
        return loss(jax.tree.map(lambda p, d: p + step * d, point, direction))

    step = 1e-5
    expected = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    gradient = jax.jit(jax.grad(loss))(point)
    reverse = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    np.testing.assert_allclose(reverse, expected, rtol=1e-6, atol=1e-8)
    forward = jax.jit(lambda: jax.jvp(loss, (point,), (direction,))[1])()
    np.testing.assert_allclose(forward, expected, rtol=1e-6, atol=1e-8)


# -- found in use -----------------------------------------------------------------------------------------------

KEY = jax.random.key(0)


def test_inference_mode_around_a_gradient():
    gradient = jax.jit(jax.grad(lambda x: torch2jax(torch.sin)(x).sum()))
    expected = gradient(jnp.ones(1))
    with torch.inference_mode():
        np.testing.assert_array_equal(gradient(jnp.ones(1)), expected)
        np.testing.assert_array_equal(jax.grad(lambda x: torch2jax(torch.sin)(x).sum())(jnp.ones(1)), expected)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


class NumpyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.detach().numpy() * np.exp(ctx.saved_tensors[0].detach().numpy()))


@pytest.mark.parametrize("function", [OnceDifferentiable, NumpyBackward])
def test_a_backward_that_cannot_be_differentiated_is_an_error_and_no_zero(function):
    f = torch2jax(lambda x: function.apply(x) + x.sin())
    x = jnp.zeros(2)
    np.testing.assert_allclose(jax.grad(lambda x: f(x).sum())(x), 2.0)
    for derivative in (
        lambda: jax.jvp(f, (x,), (x + 1,)),
        lambda: jax.jacfwd(f)(x),
        lambda: jax.hessian(lambda x: f(x).sum())(x),
        lambda: jax.grad(lambda x: jax.grad(lambda x: f(x).sum())(x).sum())(x),
    ):
        with pytest.raises((UnsupportedTransformError, RuntimeError), match=r"differentia"):
            derivative()


def test_operators_of_aten_themselves_have_right_second_derivatives():
    def fused(x):
        return torch.ops.aten.layer_norm(x, [4]).tanh() + torch.native_layer_norm(x, [4], None, None, 1e-5)[0]

    def plain(x):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        normed = (x - mean) / jnp.sqrt(variance + 1e-5)
        return jnp.tanh(normed) + normed

    x = jax.random.normal(KEY, (2, 4))
    v = jnp.cos(x)
    f = torch2jax(fused)

    def second(f):
        def first(x):
            return jax.jvp(lambda x: (f(x) ** 2).sum() + f(x)[0, 0], (x,), (v,))[1]

        return jax.jvp(first, (x,), (v,))[1], jax.grad(first)(x)

    for ours, theirs in zip(second(f), second(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_linear_transpose_of_a_linear_function():
    f = torch2jax(lambda x, y: 3 * x * y)
    y = jnp.array([1.0, 2.0])
    (out,) = jax.linear_transpose(lambda x: f(x, y), jnp.ones(2))(jnp.array([1.0, 10.0]))
    assert out.tolist() == [3.0, 60.0]


def test_forward_mode_respects_no_grad():
    def f(w):
        with torch.no_grad():
            frozen = w * w
        return (frozen * w).sum()

    g, w = torch2jax(f), jnp.array([2.0, 3.0])
    assert jax.grad(g)(w).tolist() == [4.0, 9.0]
    assert jax.jacfwd(g)(w).tolist() == [4.0, 9.0]
    assert jnp.diag(jax.hessian(g)(w)).tolist() == [0.0, 0.0]
    batch = jnp.stack([w, 2 * w])
    np.testing.assert_array_equal(jax.vmap(jax.jacfwd(g))(batch), batch**2)


@pytest.mark.parametrize(
    "write", [lambda g: g.data.mul_(2), lambda g: g.mul_(2), lambda g: np.multiply(g.numpy(), 2, out=g.numpy())]
)
def test_a_backward_that_writes_to_its_cotangent(write):
    class Writes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            write(g)
            return g

    cotangent = jnp.ones(3)
    _, pull = jax.vjp(torch2jax(lambda x: Writes.apply(x)), jnp.ones(3))
    for _ in range(2):
        assert pull(cotangent)[0].tolist() == [2.0] * 3
    assert cotangent.tolist() == [1.0] * 3


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpoints_have_a_gradient():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.model, x * 1.0, use_reentrant=True)

    apply, params = convert_pytnn_to_jax(Checkpointed())
    plain, inner = convert_pytnn_to_jax(model)
    x = jax.random.normal(KEY, (2, 3))
    for _ in range(2):
        gradient = jax.grad(lambda p, x: (apply(p, x) ** 2).sum(), argnums=(0, 1))(params, x)
        expected = jax.grad(lambda p, x: (plain(p, x) ** 2).sum(), argnums=(0, 1))(inner, x)
        np.testing.assert_allclose(gradient[1], expected[1])
        np.testing.assert_allclose(gradient[0]["model"]["0"]["weight"], expected[0]["0"]["weight"])


def test_saved_statistics_have_no_derivative():
    """The mean and scale that torch's normalisations return besides have none in torch, whatever the order."""
    x, c = torch.randn(4, 3, dtype=torch.float64), [torch.randn(s, dtype=torch.float64) for s in ((4, 3), (3,), (3,))]

    def norm(x):
        return torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)

    leaf = x.clone().requires_grad_()
    first = torch.autograd.grad(norm(leaf)[0], leaf, c[0], create_graph=True)[0]
    expected = torch.autograd.grad(first, leaf, torch.cos(x))[0]
    cotangents = tuple(jnp.array(t.numpy()) for t in c)
    f = torch2jax(norm)

    def pull(x):
        return jax.vjp(f, x)[1](cotangents)[0]

    got = jax.vjp(pull, jnp.array(x.numpy()))[1](jnp.cos(x.numpy()))[0]
    np.testing.assert_allclose(got, expected, rtol=1e-8)


@pytest.mark.filterwarnings("ignore:Sparse ", "ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.to_sparse().to_dense() * 2,
        lambda x: torch.sparse.mm(x.to_sparse(), x),
        lambda x: x.to_sparse_csr() @ x,
        lambda x: torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 2]]), x[0, :2], (3, 3)).to_dense() * x,
    ],
    ids=["to_sparse", "sparse.mm", "csr", "of a part of x"],
)
def test_sparse_tensors_inside(fn):
    """They have no memory of their own that could be asked for, which ended each call with an error."""
    x = jnp.array([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0], [0.0, 0.0, 4.0]])
    tensor = torch.from_numpy(np.array(x)).requires_grad_()
    expected = fn(tensor)
    (gradient,) = torch.autograd.grad((expected**2).sum(), tensor)
    f = torch2jax(fn)

    def loss(x):
        return (f(x) ** 2).sum()

    for run in (lambda f: f, jax.jit):
        np.testing.assert_allclose(run(f)(x), expected.detach())
        np.testing.assert_allclose(run(jax.grad(loss))(x), gradient)
    np.testing.assert_allclose(jax.vmap(f)(jnp.stack([x, 2 * x]))[0], expected.detach())


def test_second_derivatives_of_an_empty_normalisation():
    """Torch takes an empty vector for a batch without examples."""
    empty = jnp.zeros(0)
    f = torch2jax(lambda x, mean, var: F.batch_norm(x, mean, var))
    assert jax.hessian(lambda x: f(x, empty, empty).sum())(empty).shape == (0, 0)
