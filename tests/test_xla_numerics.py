"""Numbers as torch has them: rounding, signs, NaN, empty tensors, dtypes. And where they differ, as documented."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import one_in
from torch.utils import _pytree as pytree

import pytorch2jax
from pytorch2jax import DtypeError

NAN, INF = float("nan"), float("inf")


def leaves(tree):
    """The arrays or tensors of an output, as NumPy arrays."""
    flat = pytree.tree_leaves(tree)
    return [np.asarray(pytorch2jax.t2j(x.detach(), copy=True) if isinstance(x, torch.Tensor) else x) for x in flat]


def check(fn, *inputs, rtol=0.0):
    """Same bits as torch, but for the sign and payload of NaN; with `rtol`, same signs and almost the rest."""
    expected = leaves(fn(*inputs))
    arrays = [pytorch2jax.t2j(t, copy=True) for t in inputs]
    for jitted in (False, True):
        f = pytorch2jax.torch2jax(fn, backend="xla")
        actual = leaves((jax.jit(f) if jitted else f)(*arrays))
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype
            assert a.shape == e.shape
            if a.dtype == jnp.bfloat16:
                a, e = a.astype(np.float32), e.astype(np.float32)
            np.testing.assert_allclose(a, e, rtol=rtol, atol=0, equal_nan=True)
            if a.dtype.kind == "f":
                np.testing.assert_array_equal(np.signbit(a)[~np.isnan(a)], np.signbit(e)[~np.isnan(e)])


ODD = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 0.5, -0.5, 3.5, INF, -INF, NAN], dtype=torch.float64)
INTS = torch.tensor([-7, -3, -1, 0, 1, 3, 7])


@pytest.mark.parametrize(
    "fn",
    [
        torch.round,
        torch.trunc,
        torch.floor,
        torch.ceil,
        torch.frac,
        torch.abs,
        torch.neg,
        torch.relu,
        F.relu6,
        F.hardswish,
        F.leaky_relu,
        torch.isnan,
        torch.isinf,
        torch.signbit,
        torch.sqrt,
        torch.reciprocal,
        lambda x: x.clamp(-1, 1),
        lambda x: x.nan_to_num(),
        lambda x: torch.round(x, decimals=0),
        lambda x: x[:9].int(),  # beyond its range, C leaves open what happens
        lambda x: x == x,
        lambda x: torch.where(x > 0, x, -x),
        lambda x: torch.maximum(x, torch.zeros_like(x)),
        lambda x: torch.fmax(x, torch.zeros_like(x)),
        lambda x: x.max(),
        lambda x: x[:-1].max(),
        lambda x: x.sort(),
        lambda x: x.sort(descending=True),
        lambda x: x.topk(4).values,
        lambda x: x.cummax(0),
        lambda x: x.argmax(),
        lambda x: x.argmin(),
        lambda x: x.median(0),
        lambda x: x.nanmedian(),
        lambda x: x.unsqueeze(0).max(1),
        lambda x: torch.copysign(torch.ones_like(x), x),
    ],
)
def test_signs_infinities_and_nan(fn):
    check(fn, ODD, rtol=5e-16)  # XLA multiplies by the inverse of a constant


@pytest.mark.parametrize("mode", ["floor", "trunc"])
@pytest.mark.parametrize("divisor", one_in(3, [-2, 2, 3]))
def test_integer_division(mode, divisor):
    check(lambda x: torch.div(x, divisor, rounding_mode=mode), INTS)
    check(lambda x: x // divisor, INTS)
    check(lambda x: x % divisor, INTS)
    check(lambda x: torch.fmod(x, divisor), INTS)
    check(lambda x: x / divisor, INTS, rtol=2e-7)  # XLA multiplies by the inverse
    halves = INTS / 2
    check(lambda x: torch.div(x, divisor, rounding_mode=mode), halves)
    check(lambda x: x // divisor, halves)
    check(lambda x: x % divisor, halves)


def test_floor_division_of_floats_does_not_round_up():
    x = torch.tensor([1.0, -1.0, 6.0, 0.3], dtype=torch.float64)
    check(lambda x: x // 0.1, x)
    check(lambda x: torch.div(x, 0.1, rounding_mode="floor"), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool])
def test_dtypes_are_torchs(dtype):
    x = torch.tensor([0, 1, 3]).to(dtype)
    check(lambda x: x + 1, x)
    check(lambda x: x * 1.5, x, rtol=1e-2)
    check(lambda x: x.sum(), x)
    check(lambda x: x / 2, x, rtol=1e-2)
    check(lambda x: x.float().mean().to(x.dtype), x, rtol=1e-2)
    check(lambda x: torch.where(x > 0, x, 2), x)
    check(lambda x: torch.cat([x, torch.ones(2, dtype=torch.float32)]), x)
    check(lambda x: torch.tensor(2.0, dtype=torch.float64) * x, x, rtol=1e-2)


EMPTY = torch.empty(0, 3, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize(
    "fn",
    [
        torch.sum,
        torch.prod,
        torch.mean,
        lambda x: x.sum(0),
        lambda x: x.prod(0),
        lambda x: x.mean(0),
        lambda x: x.var(0),
        lambda x: x.all(),
        lambda x: x.any(),
        lambda x: x.logsumexp(0),
        lambda x: x.norm(),
        lambda x: x.cumsum(0),
        lambda x: x.softmax(0),
        lambda x: x @ torch.ones(3, 2, dtype=x.dtype),
        lambda x: torch.ones(2, 0, dtype=x.dtype) @ x,
        lambda x: x.sort(0),
        lambda x: F.layer_norm(x, (3,)),
        lambda x: torch.cat([x, x]),
        lambda x: x[torch.zeros(0, dtype=torch.long)],
    ],
)
def test_empty_tensors(fn):
    check(fn, EMPTY)


def test_the_exact_gelu_is_exact():
    x = torch.linspace(-2, 5, 101, dtype=torch.float64)  # below, `1 + erf` has few digits left
    check(F.gelu, x, rtol=1e-12)
    check(lambda x: F.gelu(x, approximate="tanh"), x, rtol=1e-12)


def test_autocast_and_bfloat16():
    def fn(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ x
        return y, y.float().softmax(-1)

    check(fn, torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), rtol=2e-2)


def test_indices_out_of_range_are_clamped():
    """Torch raises; XLA cannot. It is documented: reads give the nearest element, writes there are dropped."""
    x = jnp.arange(4.0)
    gather = pytorch2jax.torch2jax(lambda x, i: x.gather(0, i), backend="xla")
    np.testing.assert_array_equal(gather(x, jnp.array([1, 9])), [1.0, 3.0])
    add = pytorch2jax.torch2jax(lambda x, i: x.scatter_add(0, i, torch.ones_like(x)), backend="xla")
    np.testing.assert_array_equal(add(x, jnp.array([0, 0, 9, 9])), [2.0, 1.0, 2.0, 3.0])


def test_without_64_bits(x32):
    f = pytorch2jax.torch2jax(lambda x, i: (x[i], i.sum(), x.double().mean()), backend="xla")
    x, i = jnp.arange(4.0), jnp.array([2, 0])
    picked, total, mean = f(x, i)
    assert (picked.dtype, total.dtype, mean.dtype) == (jnp.float32, jnp.int32, jnp.float32)
    np.testing.assert_array_equal(picked, [2.0, 0.0])


@pytest.mark.parametrize(
    "fn",
    [
        lambda i: (i * 2654435761) % 1000,
        lambda i: i + 2**31,
        lambda i: i.add(i, alpha=-(2**40)),
        lambda i: i & 0xFFFFFFFF,
        lambda i: i > 2**40,
        lambda i: i.masked_fill(i > 7, 2**62),
        lambda i: i.clamp(max=2**40),
        lambda i: torch.where(i > 7, i, 2**62),
        lambda i: torch.full((2,), 2**40) - i,
        lambda i: i + torch.arange(2**33, 2**33 + 2),
        lambda i: i + torch.randint(0, 2**40, (2,)),
    ],
)
def test_numbers_that_do_not_fit_into_32_bits(x32, fn):
    with pytest.raises(
        pytorch2jax.NarrowingError, match=r'aten\..* 32 bits.*=-?\d+\. .*jax_enable_x64.*backend="torch"'
    ):
        pytorch2jax.torch2jax(fn, backend="xla")(jnp.array([7, 8]))


LEAST, MOST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda i: torch.full((2,), LEAST) + 0 * i, [-(2**31)] * 2),
        (lambda i: i.masked_fill(i > 7, MOST), [7, 2**31 - 1]),
        (lambda i: i.clamp(max=MOST), [7, 8]),
        (lambda i: i[: 2**62], [7, 8]),
        (lambda i: i < MOST, [True, True]),
        (lambda i: i.double() * 2.0**40, [7 * 2**40, 8 * 2**40]),
        (lambda i: i.double() > 2**40, [False, False]),
        (lambda i: i * (2**31 - 1) // (2**31 - 1) * 0, [0, 0]),
    ],
)
def test_numbers_that_stand_for_infinity_or_are_no_integers_of_64_bits(x32, fn, expected):
    np.testing.assert_array_equal(pytorch2jax.torch2jax(fn, backend="xla")(jnp.array([7, 8])), expected)


@pytest.mark.parametrize("size", one_in(3, [(2, 1), (1, 1), (2, 2)]))
@pytest.mark.parametrize(
    "how", [{"padding": 1}, {"padding": (2, 3), "stride": (2, 1)}, {"padding": 4, "dilation": (1, 3)}]
)
def test_convolutions_with_kernels_larger_than_the_image(size, how):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)

    def fn(x, weight, bias):
        return F.conv2d(x, weight, bias, **how).sin().sum()

    f = pytorch2jax.torch2jax(fn, backend="xla")
    arrays = [pytorch2jax.t2j(t, copy=True) for t in (x, weight, bias)]
    assert "conv_general_dilated" not in str(jax.make_jaxpr(f)(*arrays))
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(fn(*tensors), tensors)
    for ours, theirs in zip(jax.grad(f, (0, 1, 2))(*arrays), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def gradients(fn, inputs):
    """Torch's, and those in JAX: by themselves, and of a batch of one example."""
    tensors = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(fn(*tensors).sum(), tensors)
    f = pytorch2jax.torch2jax(lambda *x: fn(*x).sum(), backend="xla")
    arrays = [pytorch2jax.t2j(t, copy=True) for t in inputs]
    places = tuple(range(len(arrays)))
    batched = jax.vmap(jax.grad(f, places))(*(a[None] for a in arrays))
    return leaves(expected), leaves(jax.grad(f, places)(*arrays)), leaves([a[0] for a in batched])


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("fn", "inputs"),
    [
        (F.hardswish, [tensor(-3, 3, NAN, 1, -4, 5)]),
        (F.relu6, [tensor(0, 6, NAN)]),  # torch's vectorised kernels have another derivative for NaN than its others
        (F.hardtanh, [tensor(-1, 1, NAN)]),
        (F.hardsigmoid, [tensor(-3, 3, NAN)]),
        (F.elu, [tensor(0, NAN, -1)]),
        (F.selu, [tensor(0, NAN, -1)]),
        (F.softshrink, [tensor(0.5, -0.5, NAN)]),
        (F.relu, [tensor(0, NAN)]),
        (torch.abs, [tensor(0, -0.0, NAN)]),
        (torch.angle, [tensor(0, -1, NAN)]),
        (lambda x, y: torch.complex(x, y).angle(), [tensor(0, 0, 1), tensor(0, 1, 1)]),
        (torch.median, [tensor(1, 2, 2, 3)]),
        (torch.median, [tensor(1, NAN, NAN)]),
        (torch.nanmedian, [tensor(NAN, 2, 2, 3)]),
        (lambda x: x.median(0).values, [tensor(1, 2, 3)]),
        (torch.max, [tensor(1, 3, 3)]),
        (torch.min, [tensor(1, NAN, NAN)]),
        (torch.maximum, [tensor(1, 1, 2, NAN, 1), tensor(1, 2, 1, 1, NAN)]),
        (torch.minimum, [tensor(1, 1, 2, NAN, 1), tensor(1, 2, 1, 1, NAN)]),
        (torch.hypot, [tensor(3, 1, INF, 0), tensor(4, INF, 1, 0)]),
        (F.binary_cross_entropy, [tensor(0, 1, 0.5), tensor(0, 1, 0.2)]),
        (lambda x: F.binary_cross_entropy(x.sigmoid(), tensor(1, 1, 0, 0)), [tensor(50, -90, 50, -90)]),
    ],
)
def test_derivatives_at_single_points(fn, inputs):
    expected, *ours = gradients(fn, inputs)
    for actual in ours:
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-7, equal_nan=True)


def test_tangents_of_constants_do_not_matter_where_derivatives_are_infinite():
    def slope(fn):
        x, tangent = jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])
        return jax.jvp(pytorch2jax.torch2jax(fn, backend="xla"), (x,), (tangent,))[1]

    np.testing.assert_array_equal(slope(lambda x: torch.hypot(x, torch.tensor([INF, 1.0]))), [0.0, 0.0])
    loss = slope(lambda x: F.binary_cross_entropy(x, torch.tensor([1.0, 0.0]).to(x), reduction="none"))
    np.testing.assert_array_equal(loss, [0.0, 0.0])


RESIDUALS = tensor(-2, -1, -0.5, 0, 0.25, 0.5, 1, INF)
PROBABILITIES = tensor(0, 1, 0.3, 0.5, 0.7, 1, 0, 1)


@pytest.mark.parametrize("reduction", one_in(3, ["none", "mean", "sum"]))
@pytest.mark.parametrize(
    ("loss", "x"),
    [
        (F.huber_loss, RESIDUALS),
        (lambda *a, **k: F.huber_loss(*a, delta=0.5, **k), RESIDUALS),
        (F.smooth_l1_loss, RESIDUALS),
        (lambda *a, **k: F.smooth_l1_loss(*a, beta=0.5, **k), RESIDUALS),
        (F.binary_cross_entropy, PROBABILITIES),
        (lambda *a, **k: F.binary_cross_entropy(*a, weight=torch.arange(8.0, dtype=torch.float64), **k), PROBABILITIES),
    ],
)
def test_losses_have_torchs_second_derivatives(loss, x, reduction):
    target = torch.where(x == x.round(), x.clamp(0, 1), 0.5) if x is PROBABILITIES else torch.zeros_like(x)

    def fn(x):
        return loss(x, target, reduction=reduction).sum()

    f, array = pytorch2jax.torch2jax(fn, backend="xla"), pytorch2jax.t2j(x, copy=True)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(fn(leaf), leaf, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), leaf)
    np.testing.assert_allclose(f(array), fn(x), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(f)(array), slope.detach(), rtol=1e-12)
    # Torch adds 1e-12 to probabilities.
    np.testing.assert_allclose(jax.hessian(f)(array).sum(0), curvature, rtol=1e-10)


def test_second_derivatives_of_cross_entropy_in_single_precision():
    f = pytorch2jax.torch2jax(lambda x: F.binary_cross_entropy(x, torch.tensor([0.0, 1.0, 0.5])), backend="xla")
    curvature = jax.jit(jax.hessian(f))(jnp.array([0.0, 1.0, 0.5], jnp.float32))
    np.testing.assert_allclose(curvature, np.diag([0, 0, 4 / 3]), rtol=1e-6)


@pytest.mark.parametrize("loss", [F.huber_loss, F.smooth_l1_loss])
def test_second_derivatives_of_losses_taken_by_torch(loss):
    def fn(x):
        return torch.func.hessian(lambda y: loss(y, torch.zeros_like(y)))(x)

    check(fn, torch.tensor([0.0, 0.5, 2.0]), rtol=1e-6)


@pytest.mark.parametrize("loss", [F.huber_loss, F.smooth_l1_loss, F.binary_cross_entropy])
def test_losses_in_half_precision_are_computed_in_single(loss):
    x = torch.tensor([0.1, 0.2, 0.9]).bfloat16()
    check(lambda x: loss(x, torch.tensor([1.0, 0.0, 1.0]).bfloat16()), x, rtol=1e-2)


def test_smooth_l1_without_a_parabola():
    expected, *ours = gradients(lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), beta=0.0), [tensor(0, NAN, -1, 2)])
    for actual in ours:
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("how", [{"max_norm": 0.5}, {"max_norm": 0.5, "norm_type": 1.0}])
def test_renormalised_embeddings(how):
    """The rows that are used are made shorter, which autograd does not see."""
    weight, index = torch.tensor([[3.0, 4.0], [0.1, 0.2], [5.0, 6.0]], dtype=torch.float64), torch.tensor([0, 1, 0])

    def fn(weight):
        return F.embedding(index, weight.clone(), **how).square()

    expected, *ours = gradients(fn, [weight])
    for actual in ours:
        np.testing.assert_allclose(actual, expected, rtol=1e-7)
    check(fn, weight, rtol=1e-6)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch does not have it")
@pytest.mark.parametrize("dtype", one_in(2, [torch.float32, torch.bfloat16]))
@pytest.mark.parametrize(
    ("left", "right", "ends"),
    [
        ((6, 8), (3, 8, 16), [2, 2, 6]),
        ((2, 4, 8), (8, 16), [3, 16]),
        ((8, 16), (16, 8), [3, 3, 16]),
        ((2, 4, 8), (2, 8, 16), None),
    ],
)
def test_grouped_products(left, right, ends, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in (left, right)]
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)

    def fn(x, y):
        return F.grouped_mm(x, y, offs=offsets).sin()

    assert (
        pytorch2jax.torch2jax(fn, backend="xla")(*map(pytorch2jax.t2j, inputs)).dtype
        == pytorch2jax.t2j(inputs[0]).dtype
    )
    for actual, expected in zip(*gradients(fn, inputs)[:2], strict=True):
        atol = 1e-5 if dtype == torch.float32 else 0.1
        np.testing.assert_allclose(actual.astype(np.float32), expected.astype(np.float32), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("shape", one_in(3, [(3, 4), (3,), (3, 1)]))
@pytest.mark.parametrize("how", [{}, {"full": True, "reduction": "sum", "eps": 0.5}, {"reduction": "none"}])
def test_gaussian_likelihoods(shape, how):
    x, target = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4), torch.ones(3, 4, dtype=torch.float64)
    variance = torch.linspace(0, 1, int(np.prod(shape)), dtype=torch.float64).reshape(shape)

    def fn(x, variance):
        return F.gaussian_nll_loss(x, target, variance, **how)

    check(fn, x, variance, rtol=1e-12)
    expected, *ours = gradients(fn, [x, variance])
    for actual in ours:
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-12)


def test_gaussian_likelihoods_with_one_variance_for_all():
    check(lambda x: F.gaussian_nll_loss(x, torch.zeros_like(x), 0.5), torch.arange(3.0), rtol=1e-6)


def test_hard_samples_have_the_derivative_of_soft_ones():
    def fn(x):
        return (F.gumbel_softmax(x, hard=True) * torch.tensor([1.0, 2.0, 4.0])).sum()

    f = pytorch2jax.torch2jax(fn, backend="xla")
    x, key = jnp.array([1.0, 1.5, 0.5]), jax.random.key(0)
    assert min(abs(float(f(x, rng=key)) - value) for value in (1, 2, 4)) < 1e-6
    assert np.abs(jax.grad(lambda x: f(x, rng=key))(x)).max() > 0


def test_batch_norm_with_the_average_over_all_batches():
    model = torch.nn.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    apply, params, state = pytorch2jax.convert_pytnn_to_jax(model, with_state=True, backend="xla")
    for batch in torch.arange(24.0, dtype=torch.float64).reshape(2, 4, 3).sin():
        out, state = apply(params, state, pytorch2jax.t2j(batch, copy=True), train=True)
        np.testing.assert_allclose(out, model(batch).detach(), rtol=1e-10)
    for name, buffer in model.named_buffers():
        np.testing.assert_allclose(state[name], buffer, rtol=1e-12)


# -- what JAX may be told to forbid --------------------------------------------------------------------------


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.batch = torch.nn.Linear(8, 4), torch.nn.LayerNorm(4), torch.nn.BatchNorm1d(4)
        self.convolution, self.attention = torch.nn.Conv1d(1, 2, 3), torch.nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        y = self.batch(self.norm(self.first(x)).relu())
        z = self.convolution(y[:, None]).sum((1, 2)) * 2 + torch.arange(x.shape[0])
        return z[:, None] + self.attention(y[None], y[None], y[None])[0][0]


@pytest.mark.parametrize(
    "strict", [lambda: jax.numpy_rank_promotion("raise"), lambda: jax.numpy_dtype_promotion("strict")]
)
@pytest.mark.parametrize("train", one_in(2, [True, False]))
def test_what_jax_forbids_in_users_functions(strict, train):
    torch.manual_seed(0)
    model, x = Layers().train(train), torch.linspace(-1.0, 1.0, 24).reshape(3, 8)
    apply, params, state = pytorch2jax.convert_pytnn_to_jax(model, with_state=True, backend="xla")
    loss = model(x).pow(2).sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    with strict():

        def total(params):
            out = apply(params, state, x.numpy(), train=train)[0]
            return (out**2).sum(), out

        for transform in (lambda f: f, jax.jit):
            gradients, out = transform(jax.grad(total, has_aux=True))(params)
            np.testing.assert_allclose((out**2).sum(), loss.detach(), rtol=1e-4)
            found = dict(jax.tree_util.tree_leaves_with_path(gradients))
            for (name, _), theirs in zip(model.named_parameters(), expected, strict=True):
                ours = next(leaf for path, leaf in found.items() if ".".join(k.key for k in path) == name)
                np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


# -- bits as another dtype -----------------------------------------------------------------------------------


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize(
    "source", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
@pytest.mark.parametrize(
    "target",
    [
        torch.bool,
        torch.uint8,
        torch.int16,
        torch.bfloat16,
        torch.float32,
        torch.int64,
        torch.float64,
        torch.complex64,
        torch.complex128,
    ],
)
def test_views_of_bits(source, target, x64):
    """The same bits as torch's, or an error where JAX has half of them."""
    bits = (torch.arange(64) % 2).to(torch.uint8)
    x = bits.view(source).reshape(2, -1)

    def fn(x):
        return x.view(target)

    wide = (torch.int64, torch.float64, torch.complex128)
    if not x64 and source in wide:
        pytest.skip("JAX has no such arrays")
    with jax.enable_x64(x64):
        f, array = pytorch2jax.torch2jax(fn, backend="xla"), pytorch2jax.t2j(x, copy=True)
        if not x64 and target in wide:
            with pytest.raises(DtypeError, match="expected tensors whose bits JAX has"):
                f(array)
            return
        out, expected = f(array), fn(x)
    assert out.shape == tuple(expected.shape)
    assert out.dtype == pytorch2jax.dtype_t2j(target)
    assert np.asarray(out).tobytes() == expected.contiguous().view(torch.uint8).numpy().tobytes()
