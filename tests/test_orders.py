"""Forward mode, second and third order, where torch's own kernels have gaps; the oracle is finite differences."""

from __future__ import annotations

import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, arrays, one_in, scalar, table

import pytorch2jax
from pytorch2jax import UnsupportedTransformError, torch2jax, use_tape

pytestmark = pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning", "ignore:Accessing the data pointer")

_NAMES = ["encoder", "lstm", "weight_norm", "attention", "norms", "batch statistics", "linalg", "old-style function"]
_SMOOTH = [case for case in CASES if case.name in [*_NAMES, "gradient inside", "memory address", "in place", "matmul"]]
_SMOOTH += [
    Case("instance_norm", lambda: lambda x: F.instance_norm(x), [(2, 3, 5)]),
    Case("group_norm", lambda: lambda x: F.group_norm(x, 2), [(2, 4, 3)]),
    Case("normalised with running statistics", lambda: _eval_batch_norm, [(5, 3)]),
    Case("determinant", lambda: torch.linalg.det, [(3, 3)]),
    Case("gelu", lambda: F.gelu, [(4,)]),
]


def _eval_batch_norm(x):
    mean, variance, weight = torch.arange(3.0), torch.arange(1.0, 4.0), torch.arange(2.0, 5.0)
    return F.batch_norm(x, *(t.to(x.dtype) for t in (mean, variance, weight)), training=False)


QUICK = ("norms", "in place", "gradient inside", "old-style function", "normalised with running statistics")
SLOW_TO_COMPILE = ("encoder", "lstm")


def problem_of(param):
    """A scalar function of its first input, a point and a direction."""
    case, engine = param
    _, jax_fn, inputs = case.build(engine)
    x, *others = arrays(inputs)
    direction = jnp.cos(1.0 + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    with use_tape(engine != "recomputed"):
        yield lambda x: scalar(jax_fn)(x, *others), x, direction


@pytest.fixture(params=table(_SMOOTH, ("tape", "xla"), QUICK, without=SLOW_TO_COMPILE))
def problem(request):
    yield from problem_of(request.param)


@pytest.fixture(
    params=table(_SMOOTH, ("tape", "recomputed", "xla"), [*QUICK, "attention", "linalg", "group_norm", "gelu"])
)
def first_order_problem(request):
    yield from problem_of(request.param)


def forward(f, v):
    return lambda x: jax.jvp(f, (x,), (v,))[1]


def reverse(f, v):
    return lambda x: jnp.vdot(jax.grad(f)(x), v)


def assert_derivative(derivative, f, x, v, eps=1e-5):
    """`derivative(x)` against central differences of `f` along `v`."""
    expected = (f(x + eps * v) - f(x - eps * v)) / (2 * eps)
    np.testing.assert_allclose(derivative(x), expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("outer", [forward, reverse])
def test_first_order(first_order_problem, outer):
    f, x, v = first_order_problem
    assert_derivative(outer(f, v), f, x, v)


@pytest.mark.parametrize("outer", [forward, reverse])
@pytest.mark.parametrize("inner", one_in(2, [reverse, forward]))
def test_second_order(problem, outer, inner):
    f, x, v = problem
    first = inner(f, v)
    assert_derivative(outer(first, v), first, x, v)
    np.testing.assert_allclose(jax.jit(outer(first, v))(x), outer(first, v)(x), rtol=1e-10)


@pytest.mark.parametrize(
    "modes", one_in(3, [(reverse, forward, forward), (reverse, reverse, reverse), (forward, reverse, forward)])
)
def test_third_order(problem, modes, request):
    if "determinant" in request.node.name and modes == (forward, reverse, forward):
        pytest.skip("torch's fourth derivative formula of det, which this takes, is 0 / 0")
    f, x, v = problem
    second = modes[1](modes[2](f, v), v)
    assert_derivative(modes[0](second, v), second, x, v)


def test_hessian(problem):
    f, x, v = problem
    hessian = jax.jit(jax.hessian(f))(x).reshape(x.size, x.size)
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-8, atol=1e-9)
    eps = 1e-5
    expected = (jax.grad(f)(x + eps * v) - jax.grad(f)(x - eps * v)) / (2 * eps)
    np.testing.assert_allclose(hessian @ v.ravel(), expected.ravel(), rtol=2e-6, atol=2e-7)


_SQUARE = torch.linspace(0.3, 0.9, 9, dtype=torch.float64).reshape(3, 3) + torch.eye(3, dtype=torch.float64)
_TARGETS = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 1]])


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.triangular_solve(x.flip(0), x).solution,
        lambda x: torch.cholesky_inverse(x.tril()),
        lambda x: torch.ones_like(x).scatter_reduce(0, _TARGETS, x, "prod", include_self=False),
        lambda x: (2 * x).scatter_reduce(0, _TARGETS, x, "prod"),
        lambda x: (2 * x).scatter_reduce_(0, _TARGETS, x, reduce="prod"),
    ],
    ids=["triangular_solve", "cholesky_inverse", "scatter_reduce", "scatter_reduce with self", "scatter_reduce_"],
)
def test_operators_for_which_torchs_forward_mode_is_wrong(function):
    f, x = torch2jax(lambda x: (function(x) ** 3).sum()), jnp.asarray(_SQUARE.numpy())
    v = jnp.cos(1.0 + jnp.arange(9.0)).reshape(3, 3)
    for inner in (forward, reverse):
        assert_derivative(inner(f, v), f, x, v)
        for outer in (forward, reverse):
            assert_derivative(outer(inner(f, v), v), inner(f, v), x, v)
    batched = jax.vmap(jax.hessian(f))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(batched[1], jax.jacrev(jax.jacrev(f))(2 * x), rtol=1e-8, atol=1e-9)


def test_vmap_of_hessian_is_a_hessian_for_each():
    _, jax_fn, inputs = next(c for c in CASES if c.name == "encoder").build()
    (x,) = arrays(inputs)
    f = scalar(jax_fn)
    batched = jax.vmap(jax.hessian(f))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(batched, jnp.stack([jax.hessian(f)(x), jax.hessian(f)(2 * x)]), rtol=1e-8, atol=1e-9)


def test_check_grads_to_second_order_in_both_modes():
    _, jax_fn, inputs = next(c for c in CASES if c.name == "matmul").build()
    jax.test_util.check_grads(jax_fn, arrays(inputs), order=2, modes=["fwd", "rev"])


def test_complex_derivatives_follow_jax():
    def in_torch(x, y):
        return torch.sin(x) * y.conj() + (x * y).abs()

    def in_jax(x, y):
        return jnp.sin(x) * y.conj() + jnp.abs(x * y)

    key = jax.random.split(jax.random.key(0), 6)
    x, y, dx, dy, c = (jax.random.normal(k, (3,), dtype=jnp.complex128) for k in key[:5])
    f = torch2jax(in_torch)
    np.testing.assert_allclose(f(x, y), in_jax(x, y))
    np.testing.assert_allclose(jax.jvp(f, (x, y), (dx, dy))[1], jax.jvp(in_jax, (x, y), (dx, dy))[1])
    for ours, theirs in zip(jax.vjp(f, x, y)[1](c), jax.vjp(in_jax, x, y)[1](c), strict=True):
        np.testing.assert_allclose(ours, theirs)
    # A real input of a complex function, and the second derivative.
    real = jnp.arange(1.0, 4.0)
    np.testing.assert_allclose(
        jax.vjp(lambda r: f(r + 0j, y), real)[1](c)[0], jax.vjp(lambda r: in_jax(r + 0j, y), real)[1](c)[0]
    )
    second = jax.grad(lambda x: jnp.abs(jax.grad(lambda x: jnp.abs(f(x, y)).sum())(x)).sum())(x)
    expected = jax.grad(lambda x: jnp.abs(jax.grad(lambda x: jnp.abs(in_jax(x, y)).sum())(x)).sum())(x)
    np.testing.assert_allclose(second, expected)


def test_what_torch_cannot_differentiate_is_refused_by_name():
    targets = torch.tensor([[1, 2]])

    def loss(x):
        return F.ctc_loss(x.log_softmax(-1), targets, torch.tensor([4]), torch.tensor([2]))

    f = torch2jax(loss)
    x = jnp.linspace(-1.0, 1.0, 12).reshape(4, 1, 3)
    jax.grad(f)(x)
    with pytest.raises(UnsupportedTransformError, match=r"(?s)jvp\(.*ctc_loss.*Replace the operator"):
        jax.hessian(f)(x)
    with pytest.raises(NotImplementedError):
        jax.hessian(f)(x)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, w: F.layer_norm(x, (3, 4), w, w),
        lambda x, w: F.batch_norm(x, None, None, w[:, 0], w[:, 1], training=True),
        lambda x, w: F.instance_norm(x, None, None, w[:, 0], w[:, 1]),
        lambda x, w: torch.nn.BatchNorm1d(3).double().train()(x) + torch.nn.InstanceNorm1d(3).double()(x),
    ],
)
def test_the_plain_normalisations_equal_the_fused_ones(norm):
    from pytorch2jax._composite import CompositeNorms

    x, w = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    with CompositeNorms():
        plain = norm(x, w)
    torch.testing.assert_close(plain, norm(x, w))


def test_the_plain_batch_norm_updates_its_statistics_as_the_fused_one():
    from pytorch2jax._composite import CompositeNorms

    x = torch.randn(4, 3, 5)
    for make in (lambda: torch.nn.BatchNorm1d(3), lambda: torch.nn.InstanceNorm1d(3, track_running_stats=True)):
        plain, fused = make(), make()
        with CompositeNorms():
            plain(x)
        fused(x)
        torch.testing.assert_close(plain.state_dict(), fused.state_dict())


def test_only_the_arguments_with_a_tangent_are_differentiated():
    """A frozen extractor costs no torch backward."""
    runs = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            return x * 2

        @staticmethod
        def backward(ctx, g):
            runs.append(ctx.name)
            return g * 2, None

    f = torch2jax(lambda x, y: Counted.apply(x, "x") * Counted.apply(y, "y"))
    x, y = jnp.arange(3.0), jnp.ones(3)
    jax.jit(jax.grad(lambda head: (f(x, y) * head).sum()))(jnp.ones(3)).block_until_ready()
    assert runs == []
    jax.jit(jax.grad(lambda y: f(x, y).sum()))(y).block_until_ready()
    assert runs == ["y"]


def test_float0_cotangents_for_integers_and_bools():
    f = torch2jax(lambda x, i, b: torch.where(b, x[i], x[i] * 2))
    x, i, b = jnp.arange(3.0), jnp.array([2, 0, 0]), jnp.array([True, False, True])
    _, pull = jax.vjp(f, x, i, b)
    gx, gi, gb = pull(jnp.ones(3))
    np.testing.assert_array_equal(gx, [3.0, 0.0, 1.0])
    assert gi.dtype == gb.dtype == jax.dtypes.float0
    gradient = jax.grad(lambda x, i: f(x, i, b).sum(), argnums=(0, 1), allow_int=True)(x, i)
    assert gradient[1].dtype == jax.dtypes.float0


def test_gradients_in_low_precision():
    f = torch2jax(lambda x: (x * x).sum())
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        gradient = jax.grad(f)(jnp.arange(3, dtype=dtype))
        assert gradient.dtype == dtype
        np.testing.assert_array_equal(gradient.astype(jnp.float32), [0, 2, 4])


def test_a_hessian_of_a_module_with_respect_to_its_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Tanh()).double()
    apply, params = pytorch2jax.convert_pytnn_to_jax(model)
    x = jnp.arange(6.0).reshape(3, 2)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def f(p):
        return (apply(unravel(p), x) ** 2).sum()

    v = jnp.cos(jnp.arange(flat.size))
    eps = 1e-5
    expected = (jax.grad(f)(flat + eps * v) - jax.grad(f)(flat - eps * v)) / (2 * eps)
    np.testing.assert_allclose(jax.hessian(f)(flat) @ v, expected, rtol=1e-6, atol=1e-7)


def test_a_jvp_that_writes_in_place_to_what_it_needs_is_refused():
    def fn(x):
        with torch.no_grad():
            shift = x.sum()  # for which torch's forward mode is not used
        y = x.exp()
        y.add_(shift)
        return y

    x = jnp.linspace(0.1, 1.0, 4)
    with pytest.raises(UnsupportedTransformError, match=r"jvp\(.*fn\): .*writes in place.*Make a new tensor"):
        jax.jvp(torch2jax(fn), (x,), (x,))
    f = torch2jax(fn, backend="xla")
    np.testing.assert_allclose(jax.jvp(f, (x,), (x,))[1], np.exp(x) * x)


def test_forward_mode_of_a_backward_that_is_not_linear_is_refused_by_the_second_engine():
    class Clips(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.clamp(-1, 1)

    f, x = torch2jax(Clips.apply, backend="xla"), jnp.ones(3)
    np.testing.assert_array_equal(jax.grad(lambda x: (5 * f(x)).sum())(x), np.ones(3))
    with pytest.raises(UnsupportedTransformError, match="expected reverse mode.*backward is not linear"):
        jax.jvp(f, (x,), (x,))
