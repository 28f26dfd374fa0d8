"""Private and version-dependent names of torch that capturing needs."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.autograd.function import Function

__all__ = ["HigherOrderOperator", "OpOverload"]

aten = torch.ops.aten


def decomposition(operator: OpOverload) -> Callable[..., Any] | None:
    """The operator in terms of others, or None. Views are left whole, but for those that may copy, like `to`."""
    if operator.is_view:
        return operator.decompose if operator._can_decompose() else None
    found = _decompositions().get(operator)
    if found is not None:
        return found
    if operator.namespace == "prims":
        return getattr(operator, "impl_aten", None)
    if operator._can_decompose():
        return operator.decompose
    return None


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    from torch._decomp import decomposition_table  # half a second: only when it is needed

    import torch._refs  # noqa: F401  # which fills it

    return decomposition_table


@functools.cache
def functional_variant(operator: OpOverload) -> tuple[OpOverload, bool] | None:
    """The operator that returns what this one writes, and whether it takes the written arguments, too.

    `add_` has `add`, which takes all its arguments; `add.out` has `add.Tensor`, which does without `out`.
    """
    namespace, name = operator._schema.name.split("::")
    packets = getattr(torch.ops, namespace)
    if name.endswith("_"):
        # `__iand__` has `__and__`.
        candidates = (f"__{name[3:]}",) if name.endswith("__") else (name[:-1], f"{name[:-1]}_functional")
        for candidate in candidates:
            packet = getattr(packets, candidate, None)
            found = None if packet is None else _with_arguments(packet, _arguments(operator), operator._overloadname)
            if found is not None:
                return found, True
        return None
    written = [a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if not all(a.kwarg_only for a in operator._schema.arguments if a.name in written):
        packet = getattr(packets, f"{name}_functional", None)
        found = None if packet is None else _with_arguments(packet, _arguments(operator))
        return None if found is None else (found, True)
    wanted = [argument for argument in _arguments(operator) if argument[0] not in written]
    packet = getattr(packets, name)
    found = _with_arguments(packet, wanted) or _with_arguments(packet, [*wanted, *_HOW_TO_CREATE])
    return None if found is None else (found, False)


_HOW_TO_CREATE = [(a.name, str(a.type)) for a in aten.full.default._schema.arguments[2:]]
"""What operators that create a tensor ask for where there is no `out`."""


def _arguments(operator: OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in operator._schema.arguments]


def _with_arguments(packet: Any, wanted: list[tuple[str, str]], named: str = "") -> OpOverload | None:
    """The overload that takes these arguments; else the one of that name.

    `pow_.Scalar` is `pow.Tensor_Scalar`: in `pow.Scalar`, the base is a number.
    """
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        if _arguments(candidate) == wanted and not candidate._schema.is_mutable:
            return candidate
    fallback = getattr(packet, named) if named in packet.overloads() else None
    return None if fallback is None or fallback._schema.is_mutable else fallback


_PATCH = threading.Lock()


@contextlib.contextmanager
def custom_functions(call: Callable[..., Any]) -> Iterator[None]:
    """`torch.autograd.Function`: in this thread, `F.apply(*args)` is `call(apply, F, *args)`, with the real `apply`."""
    thread = threading.get_ident()
    original = Function.__dict__["apply"].__func__

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(cls, *args, **kwargs)
        return call(functools.partial(original, cls), cls, *args, **kwargs)

    with _PATCH:
        Function.apply = classmethod(apply)
        try:
            yield
        finally:
            Function.apply = classmethod(original)
