"""What a user can say about a torch function besides its arguments, in the forms that `torch2jax` takes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

import jax
import numpy as np
import torch

from pytorch2jax._containers import flatten_arguments
from pytorch2jax._dtypes import canonical_dtype_t2j, dtype_j2t
from pytorch2jax._errors import OptionError
from pytorch2jax._program import Batching
from pytorch2jax._sharding import BatchAxes, Rule, splitting
from pytorch2jax._trees import is_static


class Options(NamedTuple):
    """How a torch function runs and is differentiated.

    widen_ints: while `jax_enable_x64` is off, hand int32 arrays to torch as int64, its index type.
    depth: the highest order of derivatives, or None for any.
    batching: how `jax.vmap` evaluates it, or None for the first way that torch supports.
    expands: in direct batches, what is not batched gets a batch axis of length one.
    dtypes: torch's dtype of each array among the arguments, where an example tells.
    splitting: along which axes it may be split over devices.
    backend: which engine runs it; see `_engines`.
    """

    widen_ints: bool = True
    depth: int | None = None
    batching: Batching | None = None
    expands: bool = False
    dtypes: tuple[torch.dtype | None, ...] = ()
    splitting: BatchAxes | Rule | None = None
    backend: str = "torch"


_VMAP_METHODS: dict[str | None, tuple[Batching | None, bool]] = {
    None: (None, False),
    "sequential": (Batching.LOOP, False),
    "sequential_unrolled": (Batching.LOOP, False),
    "broadcast_all": (Batching.DIRECT, False),
    "legacy_vectorized": (Batching.DIRECT, False),
    "expand_dims": (Batching.DIRECT, True),
}


def checked_options(
    call: str,
    *,
    widen_ints: bool,
    depth: int | None,
    vmap_method: str | None,
    example_dtypes: Sequence[torch.dtype | None],
    batch_axes: Any,
    sharding_rule: Any,
    backend: str = "torch",
) -> Options:
    """The options of `torch2jax`.

    Raises:
        OptionError: one has a value that does not exist.
    """
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 0):
        raise OptionError(f"{call}: depth: expected None or a number of derivatives (0, 1, ...), got {depth!r}.")
    if vmap_method not in _VMAP_METHODS:
        known = ", ".join(map(repr, _VMAP_METHODS))
        raise OptionError(f"{call}: vmap_method: expected one of {known}, got {vmap_method!r}.")
    batching, expands = _VMAP_METHODS[vmap_method]
    split = splitting(call, batch_axes, sharding_rule)
    return Options(widen_ints, depth, batching, expands, tuple(example_dtypes), split, checked_backend(call, backend))


def checked_backend(call: str, backend: Any) -> str:
    """The name of an engine.

    Raises:
        OptionError: there is none of that name.
    """
    if backend not in ("torch", "xla"):
        raise OptionError(f"{call}: backend: expected 'torch' or 'xla', got {backend!r}.")
    return str(backend)


Backend: TypeAlias = Literal["torch", "xla"]


class ConverterOptions(TypedDict, total=False):
    """The options that all converters have, for their overloads by `with_state`."""

    copy: bool
    prefix: str
    method: str | None
    example_args: Sequence[Any]
    example_kw: Mapping[str, Any] | None
    output_shapes: Any
    out_specs: Any
    batch_axes: int | Sequence[int | None] | None
    backend: Backend


_CALLS = threading.RLock()


def lock_of(call: str, lock: Any) -> contextlib.AbstractContextManager[Any] | None:
    """What to hold around calls: the lock of all functions for `True`, a lock, or nothing for `False`.

    Raises:
        OptionError: `lock` is something else.
    """
    if lock is None or lock is False:
        return None
    if lock is True:
        return _CALLS
    if not (hasattr(lock, "__enter__") and hasattr(lock, "__exit__")):
        raise OptionError(f"{call}: lock: expected True, False or a lock (`threading.Lock()`), got {lock!r}.")
    context: contextlib.AbstractContextManager[Any] = lock
    return context


# -- output shapes -----------------------------------------------------------------------------------------


def normalised_shapes(call: str, shapes: Any, arrays: Sequence[Any]) -> Any:
    """Declared outputs as a pytree of objects with `shape` and `dtype`.

    Args:
        call: the function's name, for messages.
        shapes: a pytree of these, of `torch.Size`, and of tuples or lists of whole numbers.
        arrays: the arguments; shapes alone get their floating dtype.

    Raises:
        OptionError: there are shapes alone, and the arguments have no floating dtype, or several.
    """

    def normalised(leaf: Any) -> Any:
        if not _is_shape(leaf):
            return leaf
        return jax.ShapeDtypeStruct(tuple(map(int, leaf)), _floating_dtype(call, arrays))

    return jax.tree.map(normalised, shapes, is_leaf=lambda x: _is_shape(x) or hasattr(x, "shape"))


def shapes_key(shapes: Any) -> Hashable:
    """A key that is equal for equal declarations."""
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: _is_shape(x) or hasattr(x, "shape"))
    return treedef, tuple(map(_shape_key, leaves))


def _shape_key(leaf: Any) -> Hashable:
    return (tuple(leaf.shape), str(leaf.dtype)) if hasattr(leaf, "dtype") else repr(leaf)


def _is_shape(value: Any) -> bool:
    """Whether this is a shape without a dtype."""
    if isinstance(value, torch.Size):
        return True
    is_scalar = isinstance(value, tuple) and not value  # a function returns one array at least
    return is_scalar or (isinstance(value, (tuple, list)) and len(value) > 0 and all(map(_is_whole, value)))


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _floating_dtype(call: str, arrays: Sequence[Any]) -> np.dtype:
    found = {np.dtype(a.dtype) for a in arrays if dtype_j2t(a.dtype).is_floating_point}
    if len(found) != 1:
        kinds = ", ".join(sorted(map(str, found))) or "none"
        raise OptionError(
            f"{call}: output_shapes: expected shapes with dtypes (jax.ShapeDtypeStruct), because the arguments do not "
            f"have one floating dtype that the outputs could have, too, got shapes alone (floating dtypes: {kinds})."
        )
    return found.pop()


# -- what is not differentiated ------------------------------------------------------------------------------


class Constants(NamedTuple):
    """The arguments that are not differentiated.

    argnums: whole positional arguments, by number.
    mask: a pytree of bools in the form of the positional arguments, or of their beginning; None for no mask.
    """

    argnums: tuple[int, ...] = ()
    mask: Any = None

    def held(self, call: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, those that are not differentiated as constants of JAX's.

        Raises:
            OptionError: numbers or mask do not fit the arguments.
        """
        held = list(args)
        for number in self.argnums:
            if not -len(held) <= number < len(held):
                raise OptionError(
                    f"{call}: nondiff_argnums: expected numbers of positional arguments, below {len(held)}, got "
                    f"{number}."
                )
            held[number] = jax.tree.map(_constant, held[number])
        if self.mask is None:
            return tuple(held)
        treedef: Any
        leaves, treedef = jax.tree.flatten(tuple(held))
        mask = jax.tree.leaves(self.mask)
        if len(mask) != len(leaves):
            try:
                mask = jax.tree.leaves(jax.tree.broadcast(self.mask, tuple(held)))
            except ValueError as error:
                raise OptionError(
                    f"{call}: nondiff_mask: expected bools in the structure of the positional arguments, {treedef}, "
                    f"got {jax.tree.structure(self.mask)}."
                ) from error
        held = [_constant(leaf) if constant else leaf for leaf, constant in zip(leaves, mask, strict=True)]
        return tuple(treedef.unflatten(held))


def _constant(leaf: Any) -> Any:
    return jax.lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf


def constants(call: str, argnums: Any, mask: Any) -> Constants | None:
    """`nondiff_argnums` and `nondiff_mask` as they are given to `torch2jax`, or None if there are none.

    Raises:
        OptionError: `argnums` are not whole numbers.
    """
    if argnums is None and mask is None:
        return None
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums or ())
    if not all(type(n) is int for n in numbers):
        raise OptionError(f"{call}: nondiff_argnums: expected whole numbers, got {argnums!r}.")
    return Constants(numbers, tuple(mask) if isinstance(mask, list) else mask)


# -- examples --------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """Arguments like those of later calls: tensors, arrays or `jax.ShapeDtypeStruct`, in any pytree."""

    leaves: tuple[Any, ...]
    treedef: Any
    positions: tuple[int, ...]  # of what is no static value

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Examples:
        """The arguments of an example call."""
        leaves, treedef = flatten_arguments((args, kwargs))
        return cls(tuple(leaves), treedef, tuple(i for i, leaf in enumerate(leaves) if not is_static(leaf)))

    @property
    def dtypes(self) -> tuple[torch.dtype | None, ...]:
        """The torch dtype that each of them asks for."""
        found = [self.leaves[i] for i in self.positions]
        return tuple(x.dtype if isinstance(x, torch.Tensor) else None for x in found)

    def specs(self) -> list[jax.ShapeDtypeStruct]:
        """They as JAX sees them."""
        return [_example_spec(self.leaves[i]) for i in self.positions]

    def check(self, call: Callable[..., Any]) -> None:
        """Trace a call on arguments like these; errors as those of the call."""

        def fill(*arrays: Any) -> Any:
            filled = list(self.leaves)
            for position, array in zip(self.positions, arrays, strict=True):
                filled[position] = array
            args, kwargs = jax.tree.unflatten(self.treedef, filled)
            return call(*args, **kwargs)

        jax.eval_shape(fill, *self.specs())


def _example_spec(example: Any) -> jax.ShapeDtypeStruct:
    dtype = canonical_dtype_t2j(example.dtype) if isinstance(example.dtype, torch.dtype) else example.dtype
    return jax.ShapeDtypeStruct(tuple(example.shape), dtype)
