"""Torch functions over several devices: what users say, and calls on explicitly sharded arrays."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import AxisType, PartitionSpec

from pytorch2jax._arguments import Arguments
from pytorch2jax._errors import OptionError
from pytorch2jax._inference import Spec
from pytorch2jax._internals import explicit_axes
from pytorch2jax._program import Axes, Factors

_BATCH = "batch"


class Splitting(Protocol, Hashable):
    """Along which axes a function may be split over devices."""

    def factors(
        self, call: str, own: Sequence[Spec], arguments: Arguments, inputs: Sequence[Spec], outputs: Sequence[Spec]
    ) -> Factors:
        """The factors of its inputs, its own and the arguments, and of its outputs."""


class BatchAxes(NamedTuple):
    """The axis of the batch in each argument, in the way of `jax.vmap`'s `in_axes`; in all outputs it is the first."""

    axes: int | tuple[int | None, ...]

    def factors(
        self, call: str, own: Sequence[Spec], arguments: Arguments, inputs: Sequence[Spec], outputs: Sequence[Spec]
    ) -> Factors:
        """See `Splitting`.

        Raises:
            OptionError: an argument or an output does not have that axis, or batches differ in length.
        """
        named: list[Axes] = [(None,) * len(spec.shape) for spec in own]
        sizes: dict[str, int] = {}
        for number, spec in enumerate(inputs):
            axis = self._axis(call, arguments.position(number), len(spec.shape))
            if axis is not None and not -len(spec.shape) <= axis < len(spec.shape):
                raise OptionError(
                    f"{call}: batch_axes: expected an axis of {arguments.path(number)}, which has shape "
                    f"{list(spec.shape)}, got {axis}."
                )
            if axis is not None:
                sizes[arguments.path(number)] = spec.shape[axis]
            named.append(
                tuple(
                    _BATCH if axis is not None and d == axis % len(spec.shape) else None for d in range(len(spec.shape))
                )
            )
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{path}: {size}" for path, size in sizes.items())
            raise OptionError(f"{call}: batch_axes: expected batches of the same length, got {listed}.")
        size = next(iter(sizes.values()), None)
        for number, spec in enumerate(outputs):
            if size is not None and spec.shape[:1] != (size,):
                raise OptionError(
                    f"{call}: batch_axes: expected the batch, of length {size}, in the first axis of each output, got "
                    f"shape {list(spec.shape)} for output {number}. What is summed over the batch has to be so "
                    "outside of the torch function."
                )
        return Factors(
            tuple(named),
            tuple(
                (_BATCH, *[None] * (len(s.shape) - 1)) if size is not None else (None,) * len(s.shape) for s in outputs
            ),
        )

    def _axis(self, call: str, position: int | None, ndim: int) -> int | None:
        """The batch axis of an argument; `position` is None for keyword arguments."""
        if isinstance(self.axes, int):
            return self.axes if ndim else None
        if position is None:
            return None
        if position >= len(self.axes):
            raise OptionError(
                f"{call}: batch_axes: expected an axis (or None) for each positional argument, got "
                f"{len(self.axes)} of them for more arguments."
            )
        return self.axes[position]


class Rule(NamedTuple):
    """A rule in the notation of Shardy, such as `"b i, o i -> b o"`: names for the axes of all arrays, in order."""

    text: str

    def factors(
        self, call: str, own: Sequence[Spec], arguments: Arguments, inputs: Sequence[Spec], outputs: Sequence[Spec]
    ) -> Factors:
        """See `Splitting`.

        Raises:
            OptionError: the rule does not fit the arrays.
        """
        left, _, right = self.text.partition("->")
        return Factors(
            tuple((None,) * len(spec.shape) for spec in own) + self._side(call, "arguments", left, inputs),
            self._side(call, "outputs", right, outputs),
        )

    def _side(self, call: str, side: str, text: str, specs: Sequence[Spec]) -> tuple[Axes, ...]:
        arrays = tuple(tuple(part.split()) for part in text.split(","))
        if [len(a) for a in arrays] != [len(s.shape) for s in specs]:
            shapes = ", ".join(str(list(s.shape)) for s in specs)
            raise OptionError(
                f"{call}: sharding_rule: expected a name for each axis of the {side}, of shapes {shapes}, got "
                f"{text.strip()!r} in {self.text!r}."
            )
        return arrays


def splitting(call: str, batch_axes: Any, sharding_rule: Any) -> BatchAxes | Rule | None:
    """What the user says in one of the two ways.

    Raises:
        OptionError: in both, or in another form.
    """
    if sharding_rule is not None:
        name = r"[A-Za-z]\w*"
        arrays = rf"\s*(?:{name}\s*)*(?:,\s*(?:{name}\s*)*)*"
        if (
            batch_axes is not None
            or not isinstance(sharding_rule, str)
            or not re.fullmatch(f"{arrays}->{arrays}", sharding_rule)
        ):
            raise OptionError(
                f"{call}: sharding_rule: expected a text such as 'b i, o i -> b o', without `batch_axes`, got "
                f"{sharding_rule!r} and batch_axes={batch_axes!r}."
            )
        return Rule(sharding_rule)
    if batch_axes is None:
        return None
    axes = tuple(batch_axes) if isinstance(batch_axes, list) else batch_axes
    numbers = axes if isinstance(axes, tuple) else (axes,)
    if not all(type(n) is int or (n is None and isinstance(axes, tuple)) for n in numbers):
        raise OptionError(
            f"{call}: batch_axes: expected a number, or a tuple with a number or None for each positional argument, "
            f"got {batch_axes!r}."
        )
    return BatchAxes(axes)


def shardable(factors: Factors, constant: frozenset[int]) -> frozenset[str]:
    """The factors along which a function can be split: those of an input, and of all outputs besides state."""
    names = {f for dims in factors.inputs for f in dims if f is not None}
    for index, dims in enumerate(factors.outputs):
        if index not in constant:
            names &= set(dims)
    return frozenset(names)


# -- explicit axes of a mesh ---------------------------------------------------------------------------------


def run_on_shards(
    call: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out_specs: Any
) -> Any:
    """`run(args, kwargs)` on each shard of what is sharded along explicit axes of a mesh.

    Args:
        call: the function's name, for messages.
        run: gets arguments, keyword arguments, and on shards a function that gives the part of declared outputs.
        args, kwargs: the arguments.
        out_specs: the specs of the outputs.

    Raises:
        OptionError: `out_specs` are no specs, name an axis that is not explicit, or do not divide an output.
    """
    for spec in jax.tree.leaves(out_specs, is_leaf=lambda s: isinstance(s, PartitionSpec)):
        if not isinstance(spec, PartitionSpec):
            raise OptionError(
                f"{call}: out_specs: expected a `jax.sharding.PartitionSpec` for each output, or one for all, got "
                f"{spec!r}. Along the axis {spec!r} of the mesh it is `PartitionSpec({spec!r})`."
                if isinstance(spec, str)
                else f"{call}: out_specs: expected a `jax.sharding.PartitionSpec` for each output, or one for all, got "
                f"{type(spec).__name__}."
            )
    treedef: Any
    leaves, treedef = jax.tree.flatten((args, kwargs))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    avals = [jax.typeof(leaves[i]) for i in positions]
    mesh = _mesh_of(avals)
    axes = {axis for aval in avals for axis in explicit_axes(aval)} | _explicit(call, out_specs, mesh)
    if not axes:
        return run(args, kwargs)
    in_specs = tuple(aval.sharding.spec for aval in avals)

    def on_one_shard(*arrays: Any) -> Any:
        filled = list(leaves)
        for position, array in zip(positions, arrays, strict=True):
            filled[position] = array
        args, kwargs = treedef.unflatten(filled)
        return run(args, kwargs, functools.partial(_local_shapes, call, out_specs, mesh))

    mapped = jax.shard_map(on_one_shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes)
    return mapped(*[leaves[i] for i in positions])


def whole_shapes(shapes: Any) -> Any:
    """What is declared, where nothing is split: all of it."""
    return shapes


def _local_shapes(call: str, out_specs: Any, mesh: Any, shapes: Any) -> Any:
    """What one device has of declared outputs."""
    specs = jax.tree.broadcast(out_specs, shapes, is_leaf=lambda s: isinstance(s, PartitionSpec))

    def local(whole: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        counts = [math.prod(mesh.shape[axis] for axis in _axes_in(entry)) for entry in spec]
        counts += [1] * (len(whole.shape) - len(counts))
        if len(counts) > len(whole.shape) or any(n % k for n, k in zip(whole.shape, counts, strict=True)):
            raise OptionError(
                f"{call}: out_specs: expected axes that divide the declared output of shape {list(whole.shape)}, got "
                f"{spec} over a mesh of {dict(mesh.shape)}."
            )
        return jax.ShapeDtypeStruct(tuple(n // k for n, k in zip(whole.shape, counts, strict=True)), whole.dtype)

    return jax.tree.map(local, shapes, specs)


def _axes_in(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _mesh_of(avals: Sequence[Any]) -> Any:
    for aval in avals:
        if explicit_axes(aval):
            return aval.sharding.mesh
    return jax.sharding.get_abstract_mesh()


def _explicit(call: str, out_specs: Any, mesh: Any) -> set[str]:
    """The axes that `out_specs` name."""
    types = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    named: set[str] = set()
    for spec in jax.tree.leaves(out_specs, is_leaf=lambda s: isinstance(s, PartitionSpec)):
        for entry in spec:
            named.update(_axes_in(entry))
    others = sorted(axis for axis in named if types.get(axis) is AxisType.Auto)
    if others:
        raise OptionError(
            f"{call}: out_specs: expected explicit axes of the mesh, got {', '.join(others)}, along which XLA "
            "partitions by itself. Say `batch_axes` instead, or call the function inside `jax.shard_map`, or make the "
            "mesh with `axis_types=(AxisType.Explicit, ...)`."
        )
    return {axis for axis in named if types.get(axis) is AxisType.Explicit}
