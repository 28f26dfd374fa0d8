"""The arguments of a call: arrays on one side, static values and containers on the other."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import numpy as np

from pytorch2jax._containers import flatten_arguments
from pytorch2jax._dtypes import dtype_j2t
from pytorch2jax._errors import LeafTypeError
from pytorch2jax._transfer import as_array
from pytorch2jax._trees import is_static, path_string, static_key


class Arguments(NamedTuple):
    """The arguments of one call, taken apart."""

    treedef: Any
    leaves: tuple[Any, ...]  # static values, and None in the place of arrays
    positions: tuple[int, ...]  # where the arrays were
    arrays: list[Any]
    key: Hashable  # equal for arguments that differ in nothing but their arrays

    def path(self, number: int) -> str:
        """The address of the array with this number, for messages."""
        return _argument_path(self.treedef, self.positions[number])

    def position(self, number: int) -> int | None:
        """Of which positional argument the array with this number is a part; None for a keyword argument."""
        addresses, _ = jax.tree_util.tree_flatten_with_path(self.treedef.unflatten(range(self.treedef.num_leaves)))
        path = addresses[self.positions[number]][0]
        return None if path[0].idx else path[1].idx

    def are_plain(self) -> bool:
        """Whether they are arrays given by position, and nothing else."""
        everything = range(len(self.positions))
        return self.treedef == jax.tree.structure((tuple(everything), {}))


def take_apart(call: str, args: Any, kwargs: Any) -> Arguments:
    """Split the arguments of a call into arrays and static values.

    Raises:
        LeafTypeError: a leaf is neither an array nor a hashable Python value.
    """
    if not kwargs and all(isinstance(arg, jax.Array) for arg in args):
        return _plain(len(args))._replace(arrays=list(args))
    leaves, treedef = flatten_arguments((args, kwargs))
    positions: list[int] = []
    arrays: list[Any] = []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            array = leaf
        else:
            path = functools.partial(_argument_path, treedef, index)
            if is_static(leaf):
                leaves[index] = _static(call, path, leaf)
                continue
            array = as_array(call, path, leaf)
        positions.append(index)
        arrays.append(array)
        leaves[index] = None
    return _arguments(treedef, leaves, positions, arrays)


def parameters_of(fn: Callable[..., Any]) -> tuple[inspect.Parameter, ...] | None:
    """A function's parameters, or None where nobody knows them: of torch's built-in functions, and of TorchScript."""
    try:
        return tuple(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return None


@functools.lru_cache(maxsize=256)
def _plain(n: int) -> Arguments:
    """`n` arrays, given by position, without the arrays."""
    treedef = jax.tree.structure((tuple(range(n)), {}))
    return _arguments(treedef, [None] * n, list(range(n)), [])


def _arguments(treedef: Any, leaves: list[Any], positions: list[int], arrays: list[Any]) -> Arguments:
    key = (treedef, tuple(positions), tuple(map(static_key, leaves)))
    return Arguments(treedef, tuple(leaves), tuple(positions), arrays, key)


def _argument_path(treedef: Any, index: int) -> str:
    """The address of a leaf among the arguments, for messages: `args.0`, `kwargs.mask`."""
    addresses, _ = jax.tree_util.tree_flatten_with_path(treedef.unflatten(range(treedef.num_leaves)))
    path = addresses[index][0]
    return f"{'kwargs' if path[0].idx else 'args'}.{path_string(path[1:])}"


def _static(call: str, path: Callable[[], str], value: Any) -> Any:
    if isinstance(value, np.dtype) or (isinstance(value, type) and hasattr(value, "dtype")):
        return dtype_j2t(value)
    try:
        hash(value)
    except TypeError:
        raise LeafTypeError(
            f"{call}: {path()}: expected an array or a hashable Python value, got "
            f"{type(value).__name__}. Pass arrays, numbers, strings, None, dtypes, or pytrees of them."
        ) from None
    return value
