"""A program on shards of its inputs, where XLA partitions a computation over several devices by itself.

To XLA a torch call is opaque, so that it would gather all inputs on all devices and run the same call on each. Where
the user says which axes of inputs and outputs run through the function unchanged (the batch, most of all), each device
calls torch on its own part. These axes have names here, *factors*, as in Shardy's rules:

    y = f(w, x)        w: (o, i), x: (b, i), y: (b, o)        may be split along b, and along o

Derivatives follow. A cotangent of `w` has no axis b: it is a sum over b, so that the shards add up theirs.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pytorch2jax._buffers import Buffers
from pytorch2jax._dtypes import is_inexact
from pytorch2jax._internals import ShardingRule, axes_of_sharding, custom_partitioning
from pytorch2jax._program import Axes, Factors, Program, RootProgram
from pytorch2jax._tape import HANDLE, FromTape, Taped
from pytorch2jax._transforms import Derived, Jvp, Select, Vjp, Vmap

Bind = Callable[..., list[Any]]


class Keeper(list[Any]):
    """Keeps alive what an executable needs that XLA gets from Python after the executable was lowered.

    number: no other one's, also when this one is gone.
    """

    _numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.number = next(self._numbers)


class Shard(Derived):
    """A program as it runs on one device; what its lowering makes is kept by the executable that it is part of."""

    def __init__(self, base: Program, keeper: Keeper) -> None:
        super().__init__(base, keeper.number)
        self.in_specs, self.out_specs = base.in_specs, base.out_specs
        self.n_linear, self.constant = base.n_linear, base.constant
        self.keeper = weakref.ref(keeper)

    def run(self, *args: Any) -> Any:
        return self.base.run(*args)

    def deliver(self, tensors: Sequence[Any], buffers: Buffers) -> None:
        self.base.deliver(tensors, buffers)

    def kept_by(self) -> list[Any] | None:
        return self.keeper()

    def abandon(self) -> None:
        self.base.abandon()


def partitioned(program: Program, bind: Bind) -> tuple[Callable[..., list[Any]], Keeper]:
    """A program as a JAX function that XLA can partition.

    Args:
        program: a program whose root has `factors`.
        bind: binds the primitive: `bind(program, *arrays)`.

    Returns:
        The function, and what has to live as long as the executable.
    """
    keeper = Keeper()
    factors = factors_of(program)
    call = custom_partitioning(lambda *arrays: bind(program, *arrays))

    def partition(mesh: Any, arguments: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
        axes = _axes_by_factor(mesh, factors.inputs, arguments, program.root.shardable)
        local = on_shards(program, {f: math.prod(mesh.shape[a] for a in names) for f, names in axes.items()})
        shard = Shard(local, keeper)

        def on_one_device(*arrays: Any) -> list[Any]:
            outputs = bind(shard, *_own_seed(program.root, axes, arrays))
            return [
                _reduced(output, axes, dims, index in program.constant, spec == HANDLE)
                for index, (output, dims, spec) in enumerate(
                    zip(outputs, factors.outputs, program.out_specs, strict=True)
                )
            ]

        return (
            mesh,
            on_one_device,
            _shardings(mesh, factors.outputs, axes),
            tuple(_shardings(mesh, factors.inputs, axes)),
        )

    call.def_partition(partition, decode_shardings=False, sharding_rule=_rule(factors, program.root.shardable))
    return call, keeper


def _rule(factors: Factors, shardable: frozenset[str]) -> Any:
    """The rule by which Shardy propagates shardings through the program."""
    whole: list[str] = []

    def mapping(kind: str, index: int, dims: Axes) -> Any:
        names = []
        for number, factor in enumerate(dims):
            if factor not in shardable:
                factor = f"{kind}{index}n{number}"
                whole.append(factor)
            names.append(factor)
        return tuple(names)

    inputs = tuple(mapping("x", i, dims) for i, dims in enumerate(factors.inputs))
    outputs = tuple(mapping("y", i, dims) for i, dims in enumerate(factors.outputs))
    return ShardingRule(inputs, outputs, need_replication_factors=tuple(whole))


def _axes_by_factor(
    mesh: Any, inputs: Sequence[Axes], arguments: Sequence[Any], shardable: frozenset[str]
) -> dict[str, tuple[str, ...]]:
    """Over which axes of the mesh each factor is split."""
    found: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for dims, argument in zip(inputs, arguments, strict=True):
        for factor, size, names in zip(dims, argument.shape, axes_of_sharding(mesh, argument.sharding), strict=False):
            if factor not in shardable or factor in found or not names or taken.intersection(names):
                continue
            if size % math.prod(mesh.shape[a] for a in names) == 0:
                found[factor] = names
                taken.update(names)
    return found


def _shardings(mesh: Any, arrays: Sequence[Axes], axes: Mapping[str, tuple[str, ...]]) -> list[NamedSharding]:
    return [NamedSharding(mesh, PartitionSpec(*[axes.get(factor or "") for factor in dims])) for dims in arrays]


def _own_seed(root: RootProgram, axes: Mapping[str, tuple[str, ...]], arrays: Sequence[Any]) -> list[Any]:
    """The inputs, where the first is a seed with one for each shard."""
    arrays = list(arrays)
    names = tuple(a for names in axes.values() for a in names)
    if root.is_seeded and names:
        shard = jax.lax.axis_index(names).astype(jnp.uint32)
        arrays[0] = arrays[0] ^ (shard * jnp.uint32(0x9E3779B9))
    return arrays


def _reduced(output: Any, axes: Mapping[str, tuple[str, ...]], dims: Axes, is_state: bool, is_handle: bool) -> Any:
    """An output as all shards have it: a derivative is the sum of theirs, new state the mean."""
    names = tuple(a for factor, names in axes.items() if factor not in dims for a in names)
    if not names or is_handle:
        return output
    if is_state:
        return jax.lax.pmean(output, names) if is_inexact(output.dtype) else jax.lax.pmax(output, names)
    return jax.lax.psum(output, names)


# -- factors of derived programs ---------------------------------------------------------------------------


def factors_of(program: Program) -> Factors:
    """The factors of a program's inputs and outputs, from those of its root."""
    if isinstance(program, RootProgram):
        assert program.factors is not None
        return program.factors
    assert isinstance(program, Derived)
    inputs, outputs = factors_of(program.base)
    match program:
        case Jvp():
            return Factors(
                inputs + tuple(inputs[i] for i in program.active), tuple(outputs[i] for i in program.outputs)
            )
        case Vjp():
            return Factors(
                inputs + tuple(outputs[i] for i in program.outputs), tuple(inputs[i] for i in program.active)
            )
        case Vmap():
            return Factors(_with_axis(inputs, program.in_dims), _with_axis(outputs, program.out_dims))
        case Select():
            return Factors(inputs, tuple(outputs[i] for i in program.kept))
        case Taped():
            return Factors(inputs, (*outputs, (None,)))
        case FromTape():
            return Factors((*inputs[: program.where], (None,), *inputs[program.where :]), outputs)
    raise NotImplementedError(f"{program.describe()} on several devices")


def _with_axis(arrays: Sequence[Axes], dims: Sequence[int | None]) -> tuple[Axes, ...]:
    return tuple(a if d is None else (*a[:d], None, *a[d:]) for a, d in zip(arrays, dims, strict=True))


def on_shards(program: Program, counts: Mapping[str, int]) -> Program:
    """The same program for inputs of which each factor is split into so many parts."""
    if not counts:
        return program
    if isinstance(program, RootProgram):
        return program.on_shards(counts)
    assert isinstance(program, Derived)
    arguments = [on_shards(a, counts) if isinstance(a, Program) else a for a in program.arguments]
    return on_shards(program.base, counts).derive(type(program), *arguments)
