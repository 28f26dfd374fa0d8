"""Calls of `torch.autograd.Function`: written down with the backward that its author wrote."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pytorch2jax._autograd_functions import FunctionCall
from pytorch2jax._errors import CaptureError
from pytorch2jax._internals import is_fake
from pytorch2jax.xla._custom import CustomGradient
from pytorch2jax.xla._graph import Var
from pytorch2jax.xla._internals import is_followed_by_autograd

if TYPE_CHECKING:
    from pytorch2jax.xla._recorder import Recorder


def record_function(recorder: Recorder, call: FunctionCall) -> Any:
    """Write down a call of a `torch.autograd.Function`: its forward and its backward, which are captured both."""
    cls, args = call.cls, call.args
    if cls.__module__ == "torch.utils.checkpoint":
        run, _, *rest = args
        return run(*rest)
    where = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    active = [i for i in where if args[i].is_floating_point() or args[i].is_complex()]
    if recorder.is_hand_written:
        return call.forward()
    if not active or recorder.cuts():
        return _without_gradient(recorder, call)
    if is_followed_by_autograd([args[i] for i in active]):
        raise CaptureError(
            f"{recorder.name}: {cls.__qualname__}: a torch.autograd.Function in a function that takes derivatives "
            "itself, which would have to go through it (with `output_shapes=` nobody has seen whether it does: leave "
            'that out). Use `backend="torch"`, which runs it as it is.'
        )
    given = [recorder.var_of(args[i]) for i in where]
    first_draw = recorder.n_draws
    with recorder.hand_written():
        function, out = _captured(recorder, call, where, active)
    several = isinstance(out, (tuple, list))
    results = [recorder.anew(o) if isinstance(o, torch.Tensor) else o for o in (out if several else (out,))]
    made = [r for r in results if isinstance(r, torch.Tensor)]
    recorder.write(function, given, made, first_draw)
    return tuple(results) if several else results[0]


def _without_gradient(recorder: Recorder, call: FunctionCall) -> Any:
    """What `forward` returns. If that is an argument, `apply` makes a view of it, unseen: it gets one of ours."""
    tensors = [a for a in call.args if isinstance(a, torch.Tensor)]
    for tensor in tensors:
        recorder.var_of(tensor)
    before = [recorder.storage_of(t).version for t in tensors]
    out = call.forward()
    same = [t for t, version in zip(tensors, before, strict=True) if recorder.storage_of(t).version == version]

    def own(value: Any) -> Any:
        return value.view_as(value) if any(value is t for t in same) else value

    return type(out)(map(own, out)) if type(out) in (tuple, list) else own(out)


def _captured(
    recorder: Recorder, call: FunctionCall, where: list[int], active: list[int]
) -> tuple[CustomGradient, Any]:
    """The function as one of arrays, and what it returned."""
    cls, args = call.cls, call.args
    inner = list(args)
    primals: list[Var] = []
    for i in where:
        # A backward pass may use what was passed again, under another name: the parameters of what it runs once more.
        if not (is_fake(args[i]) and args[i].is_leaf and not args[i].requires_grad):
            inner[i] = recorder.anew(args[i])
            recorder.take(inner[i])
        primals.append(recorder.var_of(inner[i]))
    before = [recorder.storage_of(inner[i]).version for i in where]
    # The gradient of what was passed twice is the sum for both, and goes to the first of them.
    leaves = list({id(inner[i]): inner[i].requires_grad_() for i in active}.values())
    try:
        try:
            out = call.apply(*inner)
        except RuntimeError as error:
            if "leaf Variable that requires grad" not in str(error):
                raise
            raise _writes_to_inputs(recorder, cls) from error
        tensors = [o for o in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(o, torch.Tensor)]
        outputs = tuple(recorder.var_of(o) for o in tensors)
        if before != [recorder.storage_of(inner[i]).version for i in where]:
            raise _writes_to_inputs(recorder, cls)
        forward, recorder.equations = recorder.equations, []
        differentiable = [i for i, o in enumerate(tensors) if o.requires_grad]
        cotangents = [recorder.anew(tensors[i]) for i in differentiable]
        arriving = tuple(map(recorder.take, cotangents))
        gradients: Sequence[torch.Tensor | None] = [None] * len(leaves)
        if differentiable:
            ends = [tensors[i] for i in differentiable]
            with _refusing_accumulation(recorder, cls, leaves):
                gradients = torch.autograd.grad(ends, leaves, cotangents, allow_unused=True)
        by_leaf = {id(leaf): g for leaf, g in zip(leaves, gradients, strict=True) if g is not None}
        found = [by_leaf.pop(id(inner[i]), None) for i in active]
        pulled = tuple(None if g is None else recorder.var_of(g) for g in found)
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)
    return CustomGradient(
        name=cls.__qualname__,
        primals=tuple(primals),
        active=tuple(where.index(i) for i in active),
        forward=tuple(forward),
        outputs=outputs,
        differentiable=tuple(differentiable),
        cotangents=arriving,
        backward=tuple(recorder.equations),
        gradients=pulled,
    ), out


@contextlib.contextmanager
def _refusing_accumulation(recorder: Recorder, cls: Any, leaves: list[torch.Tensor]) -> Iterator[None]:
    """Around a backward: refuse one that calls `torch.autograd.backward`, which gives gradients to what it reaches."""
    reached = [t for t in recorder.arguments if (t.is_floating_point() or t.is_complex()) and t.is_leaf]
    quiet = [t for t in reached if not t.requires_grad]
    for tensor in quiet:
        tensor.requires_grad_()
    try:
        yield
    finally:
        for tensor in quiet:
            tensor.requires_grad_(False)
    constants = [c for c in recorder.constants.values() if c.is_leaf and c.grad is not None and is_fake(c.grad)]
    left = [t for t in (*reached, *leaves, *constants) if t.grad is not None]
    for tensor in left:
        tensor.grad = None
    if left:
        raise CaptureError(
            f"{recorder.name}: {cls.__qualname__}: expected a backward that returns all gradients, got one that calls "
            "`torch.autograd.backward`, which leaves those of parameters in `.grad`. Pass the parameters to the "
            'Function, and return what `torch.autograd.grad` gives for them, or use `backend="torch"`, which counts '
            "what is in `.grad`."
        )


def _writes_to_inputs(recorder: Recorder, cls: Any) -> CaptureError:
    return CaptureError(
        f"{recorder.name}: {cls.__qualname__}: expected a torch.autograd.Function that leaves its inputs as they are, "
        'got one that writes to them, for which JAX has no rule. Use `backend="torch"`.'
    )
