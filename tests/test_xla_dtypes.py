"""Dtypes for which torch has no kernel: the second engine refuses what torch refuses, and nothing else.

`make conformance-xla` does the same with all operators of torch's database.
"""

from __future__ import annotations

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import one_in
from torch import nn

from pytorch2jax import CaptureError, convert_pytnn_to_jax, t2j, torch2jax

DTYPES = [
    torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
]  # fmt: skip


PAIRED = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32]


def _decomposed(x, y):
    return torch.addcmul(x, y, y)


INDEX = torch.tensor([1, 0])
PAIRS = {
    "matmul": torch.matmul,
    "addmm": lambda x, y: torch.addmm(x, x, y),
    "einsum": lambda x, y: torch.einsum("ij,kj->ik", x, y),
    "linear": lambda x, y: F.linear(x, y),
    "index_put": lambda x, y: x.index_put((INDEX,), y),
    "copy in place": lambda x, y: x.clone().copy_(y),
    "add in place": lambda x, y: x.clone().add_(y),
    "add": torch.add,
    "floor_divide": lambda x, y: torch.floor_divide(x, y + y + 1 if y.dtype is not torch.bool else ~y | y),
    "cross_entropy": lambda x, y: F.cross_entropy(x, y[0] * 0),
    "binary_cross_entropy": lambda x, y: F.binary_cross_entropy(x, y),
    "embedding": lambda x, y: F.embedding(x, y),
    "layer_norm": lambda x, y: F.layer_norm(x, (2,), y[0]),
    "addcmul": _decomposed,
}
UNARY = {
    "softmax": lambda x: F.softmax(x, -1),
    "relu": torch.relu,
    "cumsum": lambda x: x.cumsum(0),
    "sort": lambda x: x.sort()[0],
    "mean": torch.mean,
    "det": torch.linalg.det,
    "avg_pool": lambda x: F.avg_pool1d(x[None], 2),
    "interpolate": lambda x: F.interpolate(x[None, None], scale_factor=2),
}


def outcome(call):
    try:
        return call()
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None


def agrees(fn, *tensors):
    """Nothing, or what is wrong."""
    expected = outcome(lambda: fn(*(t.clone() for t in tensors)))
    found = outcome(lambda: torch2jax(fn, backend="xla")(*(t2j(t, copy=True) for t in tensors)))
    if (expected is None) != (found is None):
        return f"torch {'refuses' if expected is None else 'computes'} it"
    if expected is None:
        return None
    if str(found.dtype) != str(expected.dtype).removeprefix("torch."):
        return f"{found.dtype} for {expected.dtype}"
    wide = torch.complex128 if expected.is_complex() else torch.float64
    return (
        None if np.allclose(np.asarray(found), expected.to(wide).numpy(), rtol=0.02, equal_nan=True) else "wrong values"
    )


REFUSED = {("cross_entropy", torch.uint8)}
"""Classes in bytes, which torch's own decomposition takes for no indices: an error, no value."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", one_in(3, list(PAIRS)))
def test_pairs_of_dtypes(name):
    wrong = {}
    for left, right in itertools.product(PAIRED, PAIRED):
        tensors = torch.tensor([[1, 0], [1, 1]]).to(left), torch.tensor([[1, 1], [0, 1]]).to(right)
        said = agrees(PAIRS[name], *tensors)
        if said and not (said == "torch computes it" and (name, right) in REFUSED):
            wrong[left, right] = said
    assert not wrong


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", one_in(3, list(UNARY)))
def test_dtypes(name):
    assert not {d: said for d in DTYPES if (said := agrees(UNARY[name], torch.tensor([[1, 0], [1, 1]]).to(d)))}


def test_large_arguments_are_not_computed_for_the_question():
    x, y = jnp.ones((4000, 4000), jnp.int32), jnp.ones((4000, 4000), jnp.float32)
    with pytest.raises(CaptureError, match=r"aten\.mm\.default: .*same dtype"):
        torch2jax(torch.matmul, backend="xla")(x, y)


def test_the_message_has_the_line_and_what_torch_says():
    apply, params = convert_pytnn_to_jax(nn.Linear(3, 3), backend="xla")
    with pytest.raises(CaptureError, match=r"(?s)Linear: expected dtypes .*Byte and Float.*x\.to\(dtype\)"):
        apply(params, jnp.ones((2, 3), jnp.uint8))

    def fn(x, y):
        return x @ y  # here

    with pytest.raises(CaptureError, match="test_xla_dtypes.py:.*# here"):
        jax.jit(torch2jax(fn, backend="xla"))(jnp.ones((2, 2), jnp.bfloat16), jnp.ones((2, 2), jnp.float32))


IMAGE = torch.tensor([[[[10, 250], [200, 30]]]], dtype=torch.uint8)
MASK = torch.tensor([True])
BYTES = {
    "bilinear": (lambda x: F.interpolate(x, (3, 3), mode="bilinear"), IMAGE),
    "bilinear with corners": (lambda x: F.interpolate(x, (3, 3), mode="bilinear", align_corners=True), IMAGE),
    "bicubic": (lambda x: F.interpolate(x, (3, 3), mode="bicubic"), IMAGE),
    "antialiased": (lambda x: F.interpolate(x, (3, 3), mode="bilinear", antialias=True), IMAGE),
    "nearest": (lambda x: F.interpolate(x, (3, 3)), IMAGE),
    "floats written to bytes": (lambda x, y: x.clone().copy_(y), IMAGE[0, 0], torch.tensor([-1.5, 300.0])),
    "floats in a slice of bytes": (
        lambda x, y: x.slice_scatter(y, 0, 0, 1),
        IMAGE[0, 0],
        torch.tensor([[-1.5, 300.0]]),
    ),
    "a number that does not fit": (lambda x: torch.full_like(x, -8.4), IMAGE),
    "a mask of another shape": (lambda x, m: x.index_put((m,), x[0, 0, 0]), IMAGE, MASK),
    "a mask in bytes": (lambda x, m: x.index_put((m,), x[0]), IMAGE[0, 0], torch.tensor([0, 1], dtype=torch.uint8)),
    "floats as indices": (lambda x, i: x.index_select(0, i), torch.ones(3), torch.ones(2)),
    "bits of floats": (torch.bitwise_and, torch.ones(3), torch.ones(3)),
    "a triangle and bools": (
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=True),
        torch.ones(2, 2),
        torch.ones(2, 2, dtype=torch.bool),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(BYTES))
def test_bytes_masks_and_indices(name):
    assert agrees(BYTES[name][0], *BYTES[name][1:]) is None


NUMBERS = [5, -8.4, 3.0, 300, -1, 5]  # of which torch takes some for bytes and refuses others
WITH_NUMBERS = {
    "full_like": lambda x, n: torch.full_like(x, n),
    "new_full": lambda x, n: x.new_full((2,), n),
    "full": lambda x, n: x + torch.full((2,), n, dtype=x.dtype),
    "fill_": lambda x, n: x.clone().fill_(n),
    "masked_fill": lambda x, n: x.masked_fill(x > 1, n),
    "threshold": lambda x, n: F.threshold(x, 1, n),
    "index_fill": lambda x, n: x.index_fill(0, INDEX[:1], n),
    "scatter": lambda x, n: x.scatter(0, INDEX, n),
    "where": lambda x, n: torch.where(x > 1, x, n),
    "written to a place": lambda x, n: x.clone().index_put_((INDEX[:1],), torch.tensor(n).to(x.dtype)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(WITH_NUMBERS))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_numbers_that_fit_and_do_not(name, dtype):
    """What torch says of one number says nothing about the next."""
    x = torch.tensor([1, 2], dtype=dtype)
    said = {(i, n): agrees(lambda x, n=n: WITH_NUMBERS[name](x, n), x) for i, n in enumerate(NUMBERS)}
    assert not {key: value for key, value in said.items() if value}


def test_nothing_of_a_dtype_says_nothing_about_something():
    """Torch's kernels refuse no dtype where there are no elements."""
    pool = torch2jax(lambda x: F.adaptive_avg_pool2d(x, (5, 7)), backend="xla")
    assert pool(jnp.ones((0, 8, 8, 8), jnp.float32)).shape == (0, 8, 5, 7)
    for shape in ((0, 8, 8, 8), (1, 8, 8, 8)):
        with pytest.raises(CaptureError, match="not implemented for 'Int'") if shape[0] else contextlib.nullcontext():
            pool(jnp.ones(shape, jnp.int32))


def test_dtypes_that_fake_tensors_get_wrong():
    """`native_layer_norm` of half precision with single-precision weights has its statistics in single precision."""
    x = torch.linspace(-1, 1, 6, dtype=torch.bfloat16).reshape(2, 3)

    def fn(x, weight):
        out, mean, rstd = torch.native_layer_norm(x, (3,), weight, weight, 1e-5)
        return out.float() + mean * rstd

    expected = fn(x, torch.ones(3))
    found = torch2jax(fn, backend="xla")(t2j(x, copy=True), jnp.ones(3, jnp.float32))
    assert str(found.dtype) == "float32"
    np.testing.assert_allclose(found, expected, rtol=1e-2)


RUNS = []


@torch.library.custom_op("pytorch2jax_tests::noted", mutates_args=())
def noted(x: torch.Tensor) -> torch.Tensor:
    RUNS.append(x.clone())
    return x * 2


@noted.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.mark.filterwarnings("ignore")
def test_operators_of_users_are_not_tried_out():
    RUNS.clear()
    for dtype in (jnp.float32, jnp.int32):
        x = jnp.full(3, 7, dtype)
        np.testing.assert_array_equal(torch2jax(noted, backend="xla")(x), 2 * x)
    assert [run.tolist() for run in RUNS] == [[7.0] * 3, [7] * 3]
