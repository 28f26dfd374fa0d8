"""Private and version-dependent names of torch that capturing needs."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._ops import OpOverload
from torch.nn.modules import module as modules
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _disable_current_modes

from pytorch2jax._internals import is_fake, torch_pytree

__all__ = ["OpOverload"]

aten = torch.ops.aten


def decomposition(operator: OpOverload) -> Callable[..., Any] | None:
    """The operator in terms of others, or None.

    Views are taken apart only where torch itself does so: `x.to(dtype)` may be a view, and most often is not. Such
    functions arrive whole where decompositions call them.
    """
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
    import torch._refs  # noqa: F401  # fills the table; half a second: only when it is needed
    from torch._decomp import decomposition_table

    return decomposition_table


def istft_without_a_check(*args: Any, **kwargs: Any) -> torch.Tensor:
    """`torch.istft`, which does not look whether the windows leave gaps."""
    from torch._refs import istft  # see `_decompositions`

    return istft(*args, **kwargs)


def _bernoulli(x: torch.Tensor, p: float = 0.5, **options: Any) -> torch.Tensor:
    return aten.bernoulli.p(x, p, **options)


@functools.cache
def functional_variant(operator: OpOverload) -> tuple[Callable[..., Any], bool] | None:
    """The operator that returns what this one writes, and whether it takes the written arguments, too.

    `add_` has `add`, which takes all its arguments; `add.out` has `add.Tensor`, which does without `out`.
    """
    if operator is aten.bernoulli_.float:
        return _bernoulli, True
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


@functools.cache
def variant_with_results(operator: OpOverload) -> OpOverload | None:
    """The operator that returns the results of this one, and then what this one writes to arguments in their order."""
    namespace, name = operator._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), f"{name}_functional", None)
    if packet is None or operator._overloadname not in packet.overloads():
        return None
    found = getattr(packet, operator._overloadname)
    return found if len(found._schema.returns) > len(operator._schema.returns) else None


def is_traced_by_others() -> bool:
    """Whether somebody else's mode below ours writes operators down, too: `make_fx`."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def has_backward_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody wants to be called in the backward pass of a module."""
    everywhere = modules._global_backward_hooks or modules._global_backward_pre_hooks
    return bool(module._backward_hooks or module._backward_pre_hooks or everywhere)


def is_known(tensor: torch.Tensor) -> bool:
    """Whether a fake tensor has a value: it was made of a number."""
    return getattr(tensor, "constant", None) is not None


def is_followed_by_autograd(tree: Any) -> bool:
    """Whether autograd goes from some tensors of a capture to one of the function's own: an argument, or one it made.

    Tensors from elsewhere, the parameters of a global module among them, are constants, whatever they require.
    """
    if not torch.is_grad_enabled():
        return False
    tensors = [x for x in torch_pytree.tree_leaves(tree) if isinstance(x, torch.Tensor) and x.requires_grad]
    if any(x.is_leaf and is_fake(x) for x in tensors):
        return True
    nodes, seen = [x.grad_fn for x in tensors if x.grad_fn is not None], set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and is_fake(leaf):
            return True
        nodes += [following for following, _ in node.next_functions if following is not None]
    return False


@contextlib.contextmanager
def outside_of_modes() -> Iterator[None]:
    """Without the modes that watch operators or make fake tensors of them, and without the levels of `torch.func`."""
    with _disable_current_modes(), torch._C._DisableFuncTorch(), torch._C._DisableTorchDispatch():
        yield


_PATCH_OF_BATCH_NORM = threading.Lock()


@contextlib.contextmanager
def cumulative_batch_norms(forward: Callable[..., Any]) -> Iterator[None]:
    """In this thread, `forward(module, x)` is called for batch norms in training that average over all batches."""
    thread = threading.get_ident()

    def replacement(module: Any, input: torch.Tensor) -> torch.Tensor:
        counts = module.training and module.track_running_stats and module.num_batches_tracked is not None
        ours = counts and module.momentum is None and threading.get_ident() == thread
        return forward(module, input) if ours else real(module, input)

    with _PATCH_OF_BATCH_NORM:
        real = _BatchNorm.forward
        _BatchNorm.forward = replacement  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            _BatchNorm.forward = real  # type: ignore[method-assign]
