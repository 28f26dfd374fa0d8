"""Calls of `torch.autograd.Function`, as somebody sees them who stands outside: private names of torch."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import FunctionMeta, _SingleLevelFunction

from pytorch2jax._internals import torch_pytree


class FunctionCall(NamedTuple):
    """A call `cls.apply(*args, **kwargs)` of a `torch.autograd.Function`.

    args, kwargs: as the author's `forward` gets them, without the context.
    forward: calls the author's `forward`, as `apply` was about to do.
    """

    cls: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    forward: Callable[[], Any]

    def apply(self, *args: Any) -> Any:
        """Torch's own `apply` of the class, with other arguments."""
        return torch._C._FunctionBase.__dict__["apply"].__get__(None, self.cls)(*args, **self.kwargs)


class BackwardCall(NamedTuple):
    """A call `cls.backward(ctx, *cotangents)`, in grad mode.

    backward: what its author wrote.
    ctx: the author's context.
    cotangents: one for each output.
    inputs: what `apply` was called with, and its keywords; None if nobody saw that.
    forward: calls the author's `forward` on such inputs, with a context of another make.
    """

    cls: Any
    backward: Callable[..., Any]
    ctx: Any
    cotangents: tuple[torch.Tensor | None, ...]
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None

    def forward(self, ctx: Any, *args: Any, **kwargs: Any) -> Any:
        forward = type.__getattribute__(self.cls, "forward")
        if _takes_context(self.cls):
            return forward(ctx, *args, **kwargs)
        out = forward(*args, **kwargs)
        type.__getattribute__(self.cls, "setup_context")(ctx, args, out)
        return out


class NoticedFunctions:
    """What calls there were.

    classes: of which functions.
    run_others: whether one of them was given a function or module, in whose tensors its backward may be interested.
    """

    def __init__(self) -> None:
        self.classes: set[type] = set()
        self.run_others = False


class _Hooks(threading.local):
    """In each thread: who wants to see calls of `torch.autograd.Function`, and the grad modes of those under way."""

    def __init__(self) -> None:
        self.hook: Callable[[FunctionCall], Any] | None = None
        self.backward: Callable[[BackwardCall], Any] | None = None
        self.calls: list[tuple[Any, bool]] = []
        self.noticed: NoticedFunctions | None = None
        self.kwargs: dict[str, Any] = {}


_HOOKS = _Hooks()
_PATCH = threading.Lock()
_patches = 0  # how many threads watch


def custom_functions(hook: Callable[[FunctionCall], Any]) -> contextlib.AbstractContextManager[None]:
    """In this thread, `hook(call)` runs in the place of `forward` of each `torch.autograd.Function`.

    `apply` itself may have been taken from its class before (`cube = Cube.apply`), and since torch 2.14 it is written
    in C++. But in all versions it asks the class for what it needs: for `_backward_cls` as soon as it is called, and
    for `forward` when it has turned grad mode off. The hook runs in the grad mode of the caller.
    """
    return _watching(hook=hook)


@contextlib.contextmanager
def noticed_functions() -> Iterator[NoticedFunctions]:
    """Notice the calls that this thread makes within the context."""
    noticed = NoticedFunctions()
    with _watching(noticed=noticed):
        yield noticed


def recorded_backwards(hook: Callable[[BackwardCall], Any]) -> contextlib.AbstractContextManager[None]:
    """In this thread, `hook(call)` runs in the place of each `backward` that is called in grad mode."""
    return _watching(backward=hook)


@contextlib.contextmanager
def _watching(**watchers: Any) -> Iterator[None]:
    """Have these among `_HOOKS`, and calls from now on."""
    global _patches
    before = {name: getattr(_HOOKS, name) for name in (*watchers, "calls")}
    with _PATCH:
        _patches += 1
        if _patches == 1:
            FunctionMeta.__getattribute__ = _attribute  # type: ignore[method-assign]
    vars(_HOOKS).update(watchers, calls=[])
    try:
        yield
    finally:
        vars(_HOOKS).update(before)
        with _PATCH:
            _patches -= 1
            if _patches == 0:
                del FunctionMeta.__getattribute__


def _attribute(cls: Any, name: str) -> Any:
    """`getattr(cls, name)` for a `torch.autograd.Function`, while somebody wants to see the calls of these."""
    value = type.__getattribute__(cls, name)
    watched = _ATTRIBUTES.get(name)
    return value if watched is None else watched(cls, value)


def _beginning(cls: Any, value: Any) -> Any:
    """`apply` begins."""
    if _HOOKS.noticed is not None:
        _HOOKS.noticed.classes.add(cls)
    if any(watcher is not None for watcher in (_HOOKS.hook, _HOOKS.backward, _HOOKS.noticed)):
        _HOOKS.calls.append((cls, torch.is_grad_enabled()))
    return value


def _forward(cls: Any, value: Any) -> Any:
    calls = _HOOKS.calls
    if not calls or calls[-1][0] is not cls or torch.is_grad_enabled():
        return value
    _, grad = calls.pop()
    if _HOOKS.hook is not None:
        return functools.partial(_forward_by, _HOOKS.hook, cls, value, grad)
    return functools.partial(_forward_noted, cls, value)


def _forward_by(
    hook: Callable[[FunctionCall], Any], cls: Any, forward: Callable[..., Any], grad: bool, *given: Any, **kwargs: Any
) -> Any:
    def as_it_is() -> Any:
        with torch.no_grad():
            return forward(*given, **kwargs)

    call = FunctionCall(cls, given[1:] if _takes_context(cls) else given, kwargs, as_it_is)
    with torch.set_grad_enabled(grad), _forward_grad():
        return hook(call)


def _forward_noted(cls: Any, forward: Callable[..., Any], *given: Any, **kwargs: Any) -> Any:
    """The author's `forward`, whose context gets the inputs, too."""
    noticed = _HOOKS.noticed
    if noticed is not None:
        values = [*given[_takes_context(cls) :], *kwargs.values()]
        leaves = torch_pytree.tree_leaves(values)
        noticed.run_others |= any(callable(v) and not isinstance(v, torch.Tensor) for v in leaves)
    if _HOOKS.backward is None:
        return forward(*given, **kwargs)
    if _takes_context(cls):
        setattr(given[0], _INPUTS, (given[1:], kwargs))
    else:
        _HOOKS.kwargs = kwargs
    return forward(*given, **kwargs)


def _setup_context(cls: Any, value: Any) -> Any:
    if _HOOKS.backward is None or value is _NO_CONTEXT or torch.is_grad_enabled():
        return value

    def noted(ctx: Any, inputs: Any, output: Any) -> Any:
        setattr(ctx, _INPUTS, (tuple(inputs), _HOOKS.kwargs))
        return value(ctx, inputs, output)

    return noted


def _backward(cls: Any, value: Any) -> Any:
    hook = _HOOKS.backward
    if hook is None or value in _NO_BACKWARD or not torch.is_grad_enabled():
        return value
    return lambda ctx, *cotangents: hook(BackwardCall(cls, value, ctx, cotangents, getattr(ctx, _INPUTS, None)))


_INPUTS = "_pytorch2jax_inputs"
# What classes inherit that do not have one of their own. Asked for later, they would be asked of `_attribute`.
_NO_CONTEXT = _SingleLevelFunction.setup_context
_NO_BACKWARD = frozenset({_SingleLevelFunction.backward, _SingleLevelFunction.vjp})
_ATTRIBUTES: dict[str, Callable[[Any, Any], Any]] = {
    "_backward_cls": _beginning,
    "forward": _forward,
    "setup_context": _setup_context,
    "backward": _backward,
    "vjp": _backward,
}


def _takes_context(cls: Any) -> bool:
    """Whether `forward` gets the context, as in the older of the two styles."""
    return type.__getattribute__(cls, "setup_context") is _NO_CONTEXT


@contextlib.contextmanager
def _forward_grad() -> Iterator[None]:
    before = torch._C._is_fwd_grad_enabled()
    torch._C._set_fwd_grad_enabled(True)
    try:
        yield
    finally:
        torch._C._set_fwd_grad_enabled(before)
