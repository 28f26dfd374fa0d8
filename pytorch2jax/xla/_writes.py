"""Operators that write to their arguments, as operators that return what these become."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pytorch2jax._errors import CaptureError
from pytorch2jax.xla._bridged import bridged
from pytorch2jax.xla._graph import Equation, Var, replaced
from pytorch2jax.xla._internals import OpOverload, aten, functional_variant, is_known, variant_with_results
from pytorch2jax.xla._storage import geometry_of, new_value

if TYPE_CHECKING:
    from pytorch2jax.xla._recorder import Recorder


def in_place(recorder: Recorder, func: OpOverload, args: Any, kwargs: Any) -> Any:
    """Write down an operator that writes to its arguments."""
    knows_value = any(is_known(tensor) for tensor in _written(func, args, kwargs))
    out = _in_place(recorder, func, args, kwargs)
    if knows_value and func not in _MOVES:
        func(*args, **kwargs)  # on the value that `.item()` reads, or to forget it
    return out


def _in_place(recorder: Recorder, func: OpOverload, args: Any, kwargs: Any) -> Any:
    if func in _MOVES and not _grows(func, args):  # only the view changes, not the values
        with recorder:
            moved = _MOVES[func](*args, **kwargs)
        var = recorder.var_of(moved)
        out = func(*args, **kwargs)
        recorder.bind(args[0], var)
        return out
    written = _written(func, args, kwargs)
    whole = variant_with_results(func)
    if whole is not None:
        return _with_results(recorder, func, whole, args, kwargs, written)
    found = functional_variant(func)
    if found is None:
        return _by_the_bridge(recorder, func, args, kwargs, written)
    variant, takes_written = found
    if not takes_written:
        kwargs = {name: value for name, value in kwargs.items() if not any(value is w for w in written)}
        for name in {"dtype", "device"} & (set(_names(variant)) - set(_names(func))):
            kwargs[name] = getattr(written[0], name)
    if _names(func)[: len(args)] != _names(variant)[: len(args)] and set(_names(func)) <= set(_names(variant)):
        args, kwargs = (), {**dict(zip(_names(func), args, strict=False)), **kwargs}  # `polygamma` begins with `n`
    with recorder:
        new = variant(*args, **kwargs)
    values = list(new) if isinstance(new, (list, tuple)) else [new]
    for tensor, value in zip(written, values, strict=False):
        _write(recorder, tensor, value)
    if not func._schema.returns:
        return None
    alone = len(func._schema.returns) == 1 and str(func._schema.returns[0].type) == "Tensor"
    return written[0] if alone else tuple(written)


def batch_norm(
    recorder: Recorder,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Write down `native_batch_norm`, of which torch does not say that it writes to the running statistics."""
    if mean is None or var is None:
        with recorder:
            return aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, eps)
    if not training:
        with recorder:
            return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, var, momentum, eps)
    whole = aten._native_batch_norm_legit_functional.default
    args = (x, weight, bias, mean, var, training, momentum, eps)
    return _with_results(recorder, aten.native_batch_norm.default, whole, args, {}, [mean, var])


def _with_results(
    recorder: Recorder, func: OpOverload, whole: OpOverload, args: Any, kwargs: Any, written: list[torch.Tensor]
) -> Any:
    """An operator that has results, and writes to some of its arguments: statistics, noise."""
    with recorder:
        values = whole(*args, **kwargs)
    n = len(func._schema.returns)
    with torch.no_grad():
        for tensor, value in zip(written, values[n:], strict=True):
            _write(recorder, tensor, value)
    return values[0] if n == 1 else tuple(values[:n])


def _by_the_bridge(recorder: Recorder, func: OpOverload, args: Any, kwargs: Any, written: list[torch.Tensor]) -> Any:
    """An operator of somebody else's that has no other form: torch runs it on copies, and returns them."""
    given, named = (replaced(tree, recorder.var_of, torch.Tensor) for tree in (args, kwargs))
    out = func(*args, **kwargs)
    several = isinstance(out, (list, tuple))
    results = [] if out is None else list(out) if several else [out]
    values = [recorder.anew(tensor) for tensor in (*results, *written)]
    outputs = tuple(Var(value.shape, value.dtype) for value in values)
    operator = OnCopies(func)
    equation = Equation(operator, tuple(given), named, outputs, True, recorder.cuts(), recorder.draw_of(func))
    recorder.equations.append(bridged(equation))
    for value, var in zip(values, outputs, strict=True):
        recorder.bind(value, var)
    for tensor, value in zip(written, values[len(results) :], strict=True):
        _write(recorder, tensor, value)
    if out is None:
        return None
    return tuple(values[: len(results)]) if several else values[0]


class OnCopies:
    """An operator that writes to its arguments, as a function that returns its results and what it has written."""

    def __init__(self, operator: OpOverload) -> None:
        self._operator = operator

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        copies = {id(t): t.clone() for t in _written(self._operator, args, kwargs)}
        args, kwargs = replaced((args, kwargs), lambda t: copies.get(id(t), t), torch.Tensor)
        out = self._operator(*args, **kwargs)
        results = () if out is None else out if isinstance(out, (list, tuple)) else (out,)
        return (*results, *_written(self._operator, args, kwargs))

    def __str__(self) -> str:
        return str(self._operator)


def _write(recorder: Recorder, tensor: torch.Tensor, value: torch.Tensor) -> None:
    """A tensor, and all that share its memory, get a new value."""
    resized = False
    with recorder:
        if value.dtype != tensor.dtype:
            value = value.to(tensor.dtype)
        if value.shape != tensor.shape:
            if _broadcasts(value.shape, tensor.shape):
                value = value.expand(tensor.shape)
            else:  # an `out=` that is made as large as it has to be
                resized = _resize(recorder, tensor, value.shape)
    var, geometry = recorder.var_of(value), geometry_of(tensor)
    in_memory = var
    if not resized:
        recorder.var_of(tensor)  # a constant has not been seen before
        if recorder.keeps_derivative(tensor):
            in_memory = Var(var.shape, var.dtype)
            old = recorder.in_memory(tensor)
            recorder.equations.append(Equation(new_value, (var, old), {}, (in_memory,), False))
            if recorder.cuts():
                var = in_memory
    storage = recorder.storage_of(tensor)
    if storage.equations is not recorder.equations or not storage.write(geometry, in_memory):
        raise CaptureError(
            f"{recorder.name}: expected writes to tensors whose memory JAX can follow, got one to a part of a storage "
            f"that {tensor.dtype} shares with others, or from within a hand-written gradient. "
            'Use `backend="torch"`, which runs it as it is.'
        )
    recorder.note(tensor, var, storage)


def _resize(recorder: Recorder, tensor: torch.Tensor, shape: Sequence[int]) -> bool:
    """Give another shape to a tensor that all of is written to next; returns whether it has new memory."""
    recorder.var_of(tensor)
    memory = tensor.untyped_storage()
    before = memory.nbytes()
    recorder.unseen(tensor.resize_, shape)
    grown = memory.nbytes() > before
    if grown:
        recorder.storage_of(tensor).grow(memory.nbytes() // tensor.element_size())
    return grown


def _resized(x: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
    return x.as_strided(size, torch.empty(size, device="meta").stride(), x.storage_offset())


def _grows(func: Any, args: Any) -> bool:
    """Whether this makes a tensor larger than its memory; what is new there has any value."""
    if func not in (aten.resize_.default, aten.resize_as_.default):
        return False
    n = math.prod(args[1].shape if isinstance(args[1], torch.Tensor) else args[1])
    return (args[0].storage_offset() + n) * args[0].element_size() > args[0].untyped_storage().nbytes()


_MOVES: dict[Any, Any] = {
    aten.transpose_.default: aten.transpose.int,
    aten.t_.default: aten.t.default,
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.swapaxes_.default: aten.swapaxes.default,
    aten.swapdims_.default: aten.swapdims.default,
    aten.as_strided_.default: aten.as_strided.default,
    aten.detach_.default: aten.detach.default,
    aten.resize_.default: _resized,
    aten.resize_as_.default: lambda x, like, **options: _resized(x, like.shape),
}


def _names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments] if isinstance(func, OpOverload) else []


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of one shape can be expanded to the other."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(n in (1, m) for n, m in pairs)


def _written(func: OpOverload, args: Any, kwargs: Any) -> list[torch.Tensor]:
    written: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        written += [t for t in (value if isinstance(value, (list, tuple)) else (value,)) if t is not None]
    return written
