"""The table of torch functions that the tests of the transformations run over, and helpers around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pytorch2jax


class OldStyleCube(torch.autograd.Function):
    """`x**3` with a backward of the old kind, which `torch.func` refuses."""

    backward_runs = 0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        OldStyleCube.backward_runs += 1
        (x,) = ctx.saved_tensors
        return 3 * grad * x**2


def _force(x):
    """Minus the gradient of an energy, taken inside the function, as interatomic potentials do."""
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    energy = (x**4).sum() + x.prod()
    return -torch.autograd.grad(energy, x, create_graph=True)[0]


def _touches_memory(x):
    assert x.data_ptr() != 0
    return x.sin() * x


def _module(module: nn.Module) -> Callable[..., Any]:
    module = module.double().eval().requires_grad_(False)
    return lambda *args: module(*args)


def _lstm() -> Callable[..., Any]:
    lstm = nn.LSTM(4, 5, batch_first=True).double().requires_grad_(False)
    return lambda x: lstm(x)[0]


def _encoder() -> Callable[..., Any]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
    return _module(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def _weight_norm() -> Callable[..., Any]:
    return _module(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))


@dataclasses.dataclass(frozen=True)
class Case:
    """One torch function with example inputs.

    make: makes the function, so that modules get their weights after seeding.
    shapes: the shapes of its float64 inputs.
    loops: `torch.vmap` cannot batch it.
    """

    name: str
    make: Callable[[], Callable[..., Any]]
    shapes: Sequence[tuple[int, ...]]
    loops: bool = False

    def __str__(self) -> str:
        return self.name

    def build(self, engine: str = "tape") -> tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor]]:
        """The torch function, the JAX function, and inputs."""
        torch.manual_seed(1)
        fn = self.make()
        inputs = [torch.randn(shape, dtype=torch.float64) for shape in self.shapes]
        return fn, pytorch2jax.torch2jax(fn, backend="xla" if engine == "xla" else "torch"), inputs


def _case(name: str, fn: Callable[..., Any], *shapes: tuple[int, ...], **options: Any) -> Case:
    return Case(name, lambda: fn, shapes, **options)


CASES = [
    _case("sin", torch.sin, (3,)),
    _case("scalar", lambda x: x * x.exp(), ()),
    _case("matmul", lambda x, y: torch.sin(x) @ y, (2, 3), (3, 4)),
    _case("two outputs", lambda x, y: (x * y, (x - y).tanh()), (3,), (3,)),
    _case("dict output", lambda x: {"a": x.sin(), "b": [x.sum(), None]}, (3,)),
    _case("unused input", lambda x, y: x.cos(), (3,), (2,)),
    _case("view", lambda x: x.T[1:], (3, 2)),
    _case("aliases", lambda x: (x, x.view(-1)), (2, 3)),
    _case("in place", lambda x: x.mul_(2).sin_(), (3,)),
    _case("in place on a view", lambda x: (x[0].add_(1), x * 2)[1], (2, 3)),
    _case("integer output", lambda x: (x.argmax(), x * 2), (4,)),
    _case("indexing", lambda x: x[torch.tensor([2, 0, 0])], (3, 2)),
    _case("sort", lambda x: x.sort(dim=-1).values, (2, 5)),
    _case("norms", lambda x: F.layer_norm(x, (4,)) + F.rms_norm(x, (4,)), (3, 4)),
    _case("batch statistics", lambda x: F.batch_norm(x, None, None, training=True), (5, 3)),
    _case("attention", lambda q, k: F.scaled_dot_product_attention(q, k, k), (2, 3, 4), (2, 5, 4)),
    _case("convolution", lambda x, w: F.conv2d(x, w, padding=1).relu(), (1, 2, 4, 4), (3, 2, 3, 3)),
    _case("linalg", lambda x: torch.linalg.solve(x @ x.mT + torch.eye(3, dtype=x.dtype), x), (3, 3)),
    Case("weight_norm", _weight_norm, [(2, 4)]),
    Case("encoder", _encoder, [(2, 3, 8)]),
    Case("lstm", _lstm, [(2, 3, 4)]),
    _case("old-style function", OldStyleCube.apply, (3,), loops=True),
    _case("gradient inside", _force, (3,), loops=True),
    _case("memory address", _touches_memory, (3,), loops=True),
    _case("reads a value", lambda x: x * 2 if x.sum().item() > 1e9 else x.sin() * 3, (3,), loops=True),
]


DEVICES = jax.devices("cpu")
"""Eight (`conftest.py`)."""

REFUSED = ("memory address", "reads a value")
"""Cases that `backend="xla"` refuses."""


def table(
    cases: Sequence[Case], engines: Sequence[str], quick: Sequence[str], without: Sequence[str] = ()
) -> list[Any]:
    """Cases × engines, as parameters of a fixture; each is a case and the name of an engine.

    Args:
        cases: the rows.
        engines: some of `"tape"`, `"recomputed"` (`backend="torch"` without the tape, to be asked for where gradients
            of first order are tested, because nothing else depends on the tape) and `"xla"`.
        quick: the names of those cases that `make test` runs; the others, and all that is recomputed, are exhaustive.
        without: the names of those that are not for `"xla"`, besides those that it refuses.
    """
    return [
        pytest.param(
            (case, engine),
            id=f"{case}-{engine}",
            marks=() if case.name in quick and engine != "recomputed" else pytest.mark.exhaustive,
        )
        for case in cases
        for engine in engines
        if engine != "xla" or case.name not in (*REFUSED, *without)
    ]


def some(values: Iterable[Any], quick: Sequence[Any]) -> list[Any]:
    """Values of one parameter, of which `make test` runs those in `quick`; the others are exhaustive."""
    assert {*quick} <= {*values}
    return [pytest.param(v, marks=() if v in quick else pytest.mark.exhaustive) for v in values]


def one_in(n: int, values: Sequence[Any]) -> list[Any]:
    """Values of one parameter, of which `make test` runs each `n`-th; the others are exhaustive."""
    return [pytest.param(v, marks=() if i % n == 0 else pytest.mark.exhaustive) for i, v in enumerate(values)]


def arrays(tensors: Sequence[torch.Tensor]) -> list[jax.Array]:
    """Copies of tensors as arrays."""
    return [pytorch2jax.t2j(t, copy=True) for t in tensors]


def tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    """Copies of arrays as tensors."""
    return [torch.from_numpy(np.array(v)) for v in values]


def leaves(tree: Any) -> list[np.ndarray]:
    """The arrays or tensors of an output, as NumPy arrays."""
    return [
        (x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x))
        for x in jax.tree.leaves(tree)
        if x is not None
    ]


def assert_same(actual: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Compare two outputs leaf by leaf, in value, shape and dtype."""
    actual, expected = leaves(actual), leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        np.testing.assert_allclose(a, e, rtol=rtol, atol=atol)


def assert_same_numbers(actual: Any, expected: Any) -> None:
    """Compare two ways of computing the same: equal but for rounding, relative to the largest value of each leaf.

    Nothing that torch computes is compared to the bit: the kernels of MKL and oneDNN that run, and with them the last
    bits, depend on the processor, the alignment of memory, the number of threads and the size of a batch. (What is only
    copied, drawn or counted is compared to the bit, by `np.testing.assert_array_equal`.)
    """
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        assert a.shape == e.shape
        a, e = (x.astype(np.float64) if x.dtype.kind == "V" else x for x in (a, e))
        if a.dtype.kind not in "fc":
            np.testing.assert_array_equal(a, e)
            continue
        scale = np.max(np.abs(e), initial=np.finfo(e.dtype).tiny)
        np.testing.assert_allclose(a, e, rtol=0, atol=float(scale) * 200 * np.finfo(e.dtype).eps)


def scalar(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A JAX function's inexact outputs, weighted and summed up, so that it can be differentiated."""

    def summed(*args: Any) -> Any:
        outputs = [x for x in jax.tree.leaves(fn(*args)) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return sum((jnp.sin(x) * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)).sum() for x in outputs)

    return summed


def torch_scalar(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same in torch."""

    def summed(*args: torch.Tensor) -> torch.Tensor:
        outputs = [x for x in jax.tree.leaves(fn(*args)) if x.is_floating_point()]
        weights = [torch.arange(x.numel(), dtype=x.dtype).cos().reshape(x.shape) for x in outputs]
        return sum((x.sin() * w).sum() for x, w in zip(outputs, weights, strict=True))

    return summed


def torch_gradients(fn: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Torch's own backward of `torch_scalar(fn)`."""
    live = [x.clone().requires_grad_() for x in inputs]
    copies = [x * 1 for x in live]  # functions that write to their inputs may not write to leaves
    found = torch.autograd.grad(torch_scalar(fn)(*copies), live, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, live, strict=True)]
