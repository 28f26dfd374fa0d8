"""Memory that tensors share, as values: what a write to one tensor means for the others.

Torch's views are sizes, strides and an offset into a storage. A graph has no storages, so that for each one this keeps
the variable that holds all of it, and a write to a part makes a new one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pytorch2jax.xla._graph import Equation, Unifiable, Var
from pytorch2jax.xla._sizes import as_array, count, slice_of, with_slices


class Geometry(NamedTuple):
    """Where the elements of a tensor are in its storage; strides and offset in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def fills(self, n_elements: int) -> bool:
        """Whether each element of the storage is one of the tensor's."""
        if self.offset or self.size != n_elements:
            return False
        expected = 1
        for stride, n in sorted((s, n) for s, n in zip(self.stride, self.shape, strict=True) if n != 1):
            if stride != expected:
                return False
            expected *= n
        return True

    def in_memory_order(self) -> tuple[int, ...]:
        """The axes from the longest stride to the shortest."""
        return tuple(sorted(range(len(self.shape)), key=lambda i: (-self.stride[i], self.shape[i] == 1, i)))


def geometry_of(tensor: torch.Tensor) -> Geometry:
    """Where a tensor is in its storage."""
    return Geometry(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))


class Part(NamedTuple):
    """A part of an array as slices of it: its axes, cut and put into another order.

    base: the shape that the array is reshaped to, axes from the longest stride to the shortest.
    slices: what is taken of each axis: from where, how many elements, and how far apart.
    order: the axes of the part, without those of length 1, in the order of the array's.
    """

    base: tuple[int, ...]
    slices: tuple[tuple[int, int, int], ...]
    order: tuple[int, ...]


def _part_of(base: tuple[int, ...], part: Geometry) -> Part | None:
    """`part` as slices of a dense array of shape `base` in C order, if it is that."""
    free = sorted((i for i, n in enumerate(part.shape) if n != 1), key=lambda i: -part.stride[i])
    slices, order, rest = [], [], part.offset
    for length, stride in zip(base, _c_strides(base), strict=True):
        start, rest = divmod(rest, stride)
        if start >= length:
            return None
        found = next((i for i in free if _fits(part, i, start, length, stride)), None)
        if found is None:
            slices.append((start, 1, 1))
            continue
        free.remove(found)
        order.append(found)
        slices.append((start, part.shape[found], part.stride[found] // stride))
    return None if free or rest else Part(base, tuple(slices), tuple(order))


def _fits(part: Geometry, axis: int, start: int, length: int, stride: int) -> bool:
    """Whether an axis of `part` runs along one of that length and stride."""
    steps, rest = divmod(part.stride[axis], stride)
    return steps > 0 and rest == 0 and start + (part.shape[axis] - 1) * steps < length


def _refined(base: tuple[int, ...], part: Geometry) -> tuple[int, ...] | None:
    """`base` with axes for all strides of `part`, if that is possible."""
    n = math.prod(base)
    strides = {s for s in (*_c_strides(base), *part.stride) if s > 0}
    refined, before = [], n
    for stride in sorted(strides, reverse=True):
        if stride > before or before % stride:
            return None
        refined.append(before // stride)
        before = stride
    return tuple(refined) if before == 1 else None


def _c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = []
    stride = 1
    for n in reversed(shape):
        strides.append(stride)
        stride *= n
    return tuple(reversed(strides))


def _indices(part: Geometry) -> Any:
    """The place in memory of each element."""
    places: Any = np.full((1,) * len(part.shape), 0) + as_array(part.offset)
    for axis, (n, stride) in enumerate(zip(part.shape, part.stride, strict=True)):
        along = [1] * len(part.shape)
        along[axis] = n
        places = places + as_array(stride) * count(n).reshape(along)
    return places


class Access(Unifiable):
    """Reading a part of a storage, or writing to it, as a function of arrays.

    Args:
        whole: where the elements of the array are that holds everything.
        part: where those of the part are.
    """

    def __init__(self, whole: Geometry, part: Geometry) -> None:
        self._key: Any = type(self), whole, part
        self._part = part
        self._order = whole.in_memory_order()
        self._shape = tuple(whole.shape[i] for i in self._order)
        candidates = (_refined(self._shape, part), self._shape) if part.size else ()
        found = (_part_of(base, part) for base in candidates if base is not None)
        self._slices = next((p for p in found if p is not None), None)
        self._axes = [i for i, n in enumerate(part.shape) if n != 1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Access) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def unified(self, accesses: Sequence[Any], unified: Callable[[Sequence[Any]], Any]) -> Access:
        """One for all sizes of those at several, with formulas for their numbers."""
        numbers = unified([(a._part, a._order, a._shape, a._slices, a._axes) for a in accesses])
        new = copy.copy(self)
        part, new._order, new._shape, slices, new._axes = numbers
        new._key, new._part = (type(self), *numbers[:3]), Geometry(*part)
        new._slices = None if slices is None else Part(*slices)
        return new

    def _memory(self, whole: jax.Array) -> jax.Array:
        base = (-1,) if self._slices is None else self._slices.base
        return whole.transpose(self._order).reshape(base)

    def _whole(self, memory: jax.Array) -> jax.Array:
        return memory.reshape(self._shape).transpose(np.argsort(self._order))


class Read(Access):
    """`whole -> part`."""

    def __call__(self, whole: jax.Array) -> jax.Array:
        memory, shape = self._memory(whole), self._part.shape
        if self._slices is None:
            return memory[_indices(self._part)]
        order = self._slices.order
        for axis, (start, length, step) in enumerate(self._slices.slices):
            memory = slice_of(memory, start, length, axis, step)
        taken = memory.reshape([shape[i] for i in order])
        return taken.transpose([order.index(i) for i in self._axes]).reshape(shape)

    def __repr__(self) -> str:
        return "read a view"


class Write(Access):
    """`(whole, part) -> whole`."""

    def __call__(self, whole: jax.Array, part: jax.Array) -> jax.Array:
        if not self._part.size:
            return whole
        memory = self._memory(whole)
        if self._slices is None:
            return self._whole(memory.at[_indices(self._part)].set(part))
        taken = part.reshape([self._part.shape[i] for i in self._axes])
        taken = taken.transpose([self._axes.index(i) for i in self._slices.order])
        lengths = [length for _, length, _ in self._slices.slices]
        return self._whole(with_slices(memory, taken.reshape(lengths), self._slices.slices))

    def __repr__(self) -> str:
        return "write to a view"


def new_value(new: jax.Array, old: jax.Array) -> jax.Array:
    """What a write while grad mode is off makes of a tensor: another value, the derivative that it had."""

    @jax.custom_jvp
    def replace(new: jax.Array, old: jax.Array) -> jax.Array:
        return new

    @replace.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        return replace(*primals), tangents[1]

    return replace(new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new


class Storage:
    """One storage while a function is captured.

    Args:
        n_elements: its size, in elements of the tensor that it was first seen with.
        equations: where to write down what has to be done to follow it.
    """

    def __init__(self, n_elements: int, equations: list[Equation]) -> None:
        self.version = 0
        self.equations = equations
        self._n_elements = n_elements
        self._whole: tuple[Geometry, Var] | None = None  # the present value of everything
        self._known: dict[Geometry, Var] = {}  # and of parts

    def copy(self, equations: list[Equation]) -> Storage:
        """The same in another list of equations; what happens to it there stays there."""
        other = Storage(self._n_elements, equations)
        other.version, other._whole, other._known = self.version, self._whole, dict(self._known)
        return other

    def add(self, geometry: Geometry, var: Var) -> None:
        """A tensor in this storage has this value now."""
        self._known.setdefault(geometry, var)
        if self._whole is None and geometry.fills(self._n_elements):
            self._whole = geometry, var

    def grow(self, n_elements: int) -> None:
        """There is more memory now, and all of it is written next."""
        self._n_elements, self._whole, self._known = n_elements, None, {}

    def read(self, geometry: Geometry) -> Var | None:
        """The present value of a tensor, or None if that cannot be told."""
        if geometry not in self._known:
            if self._whole is None or self._whole[0].dtype != geometry.dtype:
                return None
            whole, var = self._whole
            self._known[geometry] = self._emit(Read(whole, geometry), (var,), geometry)
        return self._known[geometry]

    def write(self, geometry: Geometry, var: Var) -> bool:
        """A tensor gets a new value; returns False where it cannot be told what that means for others."""
        if geometry.fills(self._n_elements):
            self._whole, known = (geometry, var), {}
        elif self._whole is not None and self._whole[0].dtype == geometry.dtype:
            whole, before = self._whole
            after = self._emit(Write(whole, geometry), (before, var), whole)
            self._whole, known = (whole, after), {whole: after}
        elif set(self._known) <= {geometry}:  # nobody else has seen it
            known = {}
        else:
            return False
        self.version += 1
        self._known = {**known, geometry: var}
        return True

    def _emit(self, function: Any, inputs: tuple[Var, ...], like: Geometry) -> Var:
        var = Var(like.shape, like.dtype)
        self.equations.append(Equation(function, inputs, {}, (var,), False))
        return var
