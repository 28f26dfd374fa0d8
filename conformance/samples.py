"""Samples of operators: which are taken, and how each becomes a call."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import torch
from torch.testing._internal.common_methods_invocations import op_db

_LOOKED_AT = 60
"""So many of the samples that torch has for an operator are looked at."""

_LARGEST = 20_000
"""Samples with more elements than this are left out."""


def _without_seeds() -> None:
    """Torch's tests set a seed within random operators; here the seed is JAX's key."""
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.testing._internal") and hasattr(module, "wrapper_set_seed"):
            module.wrapper_set_seed = _draw


def _draw(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


_without_seeds()

OPERATORS = {f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name: op for op in op_db}
"""Torch's operators by their names; several entries for one operator have the variant in the name."""


PAIRED = (
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
)
"""Dtypes that arguments are given in any two of."""


class Call:
    """A torch function with arguments that are tensors and other values.

    Args:
        fn: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.fn = fn
        self._leaves, self._treedef = jax.tree.flatten((args, kwargs))
        self._positions = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors: list[torch.Tensor] = [self._leaves[i] for i in self._positions]
        # Torch marks the inputs that it has a derivative for. One that is a view of another is a leaf only after this.
        self.active = [i for i, t in enumerate(self.tensors) if t.requires_grad]
        self.tensors = [t.detach() for t in self.tensors]

    def arguments(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with `values` in the place of the tensors."""
        leaves = list(self._leaves)
        for position, value in zip(self._positions, values, strict=True):
            leaves[position] = value
        return self._treedef.unflatten(leaves)

    def with_function(self, fn: Callable[..., Any]) -> Call:
        """The same arguments for another function."""
        args, kwargs = self.arguments([t.clone().requires_grad_(i in self.active) for i, t in enumerate(self.tensors)])
        return Call(fn, args, kwargs)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Call:
        """The same function of other tensors, of which none has derivatives."""
        args, kwargs = self.arguments(tensors)
        return Call(self.fn, args, kwargs)

    def run(self, values: Sequence[torch.Tensor] | None = None) -> Any:
        """What torch returns, for other tensors or for copies of its own."""
        values = [t.clone() for t in self.tensors] if values is None else values
        args, kwargs = self.arguments(values)
        return self.fn(*args, **kwargs)

    def describe(self) -> str:
        """The arguments in one line."""
        args, kwargs = self.arguments([_Description(t) for t in self.tensors])
        parts = [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())]
        return f"({', '.join(parts)})"[:300]


class _Description:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._text = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"

    def __repr__(self) -> str:
        return self._text


def calls(op: Any, dtype: torch.dtype, count: int, *, derivatives: bool = False) -> list[Call]:
    """Some calls of an operator; the same ones each time.

    Args:
        op: an entry of torch's database.
        dtype: of the tensors.
        count: at most so many: the first sample, then those that are most unlike the ones before.
        derivatives: for derivatives: active inputs are marked, and what torch's own tests do to inputs and outputs
            where derivatives depend on a choice (the sign of an eigenvector) is part of the function.
    """
    samples = []
    for sample in itertools.islice(_all_samples(op, dtype, derivatives), _LOOKED_AT):
        call = Call(_function(op, sample, derivatives), (sample.input, *sample.args), sample.kwargs)
        if sum(t.numel() for t in call.tensors) <= _LARGEST:
            samples.append((call, _features(call, sample)))
    chosen: list[Call] = []
    seen: set[Any] = set()
    while samples and len(chosen) < count:
        best = max(range(len(samples)), key=lambda i: (not chosen and i == 0, len(samples[i][1] - seen), -i))
        call, features = samples.pop(best)
        if chosen and not features - seen:
            break
        chosen.append(call)
        seen |= features
    return chosen


def pairs(op: Any, dtype: torch.dtype, count: int) -> list[Call]:
    """Calls whose first tensor has this dtype, while the others have another, each of `PAIRED` in turn.

    The kinds of dtype that torch would not make samples of are what these are for. So the numbers are those of a sample
    in single precision, or in another dtype that the operator has.
    """
    supported = op.supported_dtypes("cpu")
    usual = next((d for d in (torch.float32, torch.int64, torch.bool, torch.complex64) if d in supported), None)
    made = []
    for call in calls(op, usual, count) if usual else ():
        kinds = PAIRED if len(call.tensors) > 1 else (dtype,)
        made += [
            call.with_tensors([t.to(dtype if i == 0 else kind) for i, t in enumerate(call.tensors)]) for kind in kinds
        ]
    return made


def _all_samples(op: Any, dtype: torch.dtype, derivatives: bool) -> Iterator[Any]:
    torch.manual_seed(0)
    yield from op.sample_inputs("cpu", dtype, requires_grad=derivatives)


def _function(op: Any, sample: Any, derivatives: bool) -> Callable[..., Any]:
    if not derivatives:
        return op.op
    wrapper, process = op.gradcheck_wrapper, sample.output_process_fn_grad
    if getattr(wrapper, "__name__", "") == "wrapper_set_seed":
        wrapper = _draw

    def function(*args: Any, **kwargs: Any) -> Any:
        return process(wrapper(op.op, *args, **kwargs))

    function.__qualname__ = op.name
    return function


def _features(call: Call, sample: Any) -> set[Any]:
    """What is special about a sample."""
    found: set[Any] = {("keyword", name) for name in sample.kwargs} | {("arguments", len(sample.args))}
    found |= {(name, value) for name, value in sample.kwargs.items() if isinstance(value, (bool, str, type(None)))}
    found |= {("type", i, type(value).__name__) for i, value in enumerate(sample.args)}
    for number, tensor in enumerate(call.tensors[:3]):
        empty, contiguous = tensor.numel() == 0, tensor.is_contiguous()
        found |= {(number, "axes", min(tensor.dim(), 3)), (number, "empty", empty), (number, "in order", contiguous)}
        found |= {(number, "conjugated", tensor.is_conj()), (number, "negated", tensor.is_neg())}
    return found
