"""Tensors that stand for a module's parameters and buffers wherever the module keeps them.

The private copy of a module (`_skeleton.py`) has no parameters: each call brings them. Where they are in the module's
own slots, or in plain containers, a call puts them there. Whatever else holds one (a `functools.partial`, a tuple, an
object with `__slots__`, a subclass of list) holds a stand-in, and each function of torch's that is given a stand-in
gets the tensor of the present call in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pytorch2jax._errors import StateError
from pytorch2jax._internals import is_inside_autograd_function, torch_pytree, without_subclasses


class Values:
    """The tensors of the present call, for those that stand for them.

    names: their addresses, for messages.
    tensors: one for each stand-in; None while there is no call.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.tensors: Sequence[torch.Tensor] | None = None


class StandIn(torch.Tensor):
    """A tensor without data that stands for one of a call; made by `stand_in`."""

    _call: Values
    _number: int
    _is_param: bool  # by which torch knows an `nn.Parameter`

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch's on what stands behind."""
        present, named = torch_pytree.tree_map_only(StandIn, _present, (args, kwargs or {}))
        with without_subclasses():
            return func(*present, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse, in a call: an operator took a stand-in for a tensor with data. Between calls it is one on `meta`."""
        found = [x for x in torch_pytree.tree_leaves((args, kwargs or {})) if isinstance(x, StandIn)]
        for stand_in in found:
            if stand_in._call.tensors is not None:
                raise _refused(stand_in, f"`{func}`")
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


def stand_in(tensor: torch.Tensor, values: Values, number: int) -> torch.Tensor:
    """A tensor that stands for `values.tensors[number]`, with the shape and dtype of `tensor`."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    made: StandIn = torch.Tensor._make_subclass(StandIn, empty, False)
    made._call, made._number, made._is_param = values, number, isinstance(tensor, nn.Parameter)
    return made


def _present(found: StandIn) -> torch.Tensor:
    tensors = found._call.tensors
    if tensors is None:
        return found
    if is_inside_autograd_function():
        # It may have been passed to it, and autograd, which asks no tensor, would take it for a constant.
        raise _refused(found, "a torch.autograd.Function")
    return tensors[found._number]


def _refused(found: StandIn, user: str) -> StateError:
    return StateError(
        f"{found._call.names[found._number]}: used by {user} from somewhere else than the module's own attributes (a "
        "partial, a tuple, an object), where the parameters that JAX passes cannot get. Reach it through `self` of the "
        "module that owns it."
    )
