"""Checks of `jax.vmap`, on one level and on two, with a loop of torch's calls as the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch

from conformance.compare import as_arrays, as_tensors, compare, leaves_of
from conformance.converted import KEY, Converted, Unchanged, Way
from conformance.exceptions import BACKEND
from conformance.oracle import Differentiable, TorchCannotError, is_random, values
from conformance.samples import Call

DTYPES = (torch.float64, torch.int64, torch.bool)
"""Operators that have floating point numbers are batched with these alone."""

_BATCH = (1.0, 0.9, 1.1)
"""Each example of a batch is the sample times one of these, where it is floating point."""


def batch(op: Any, call: Call, way: Way) -> None:
    """`jax.vmap`, with all arguments batched, and with the first one only."""
    if is_random(call):
        return _batch_of_keys(call, way)
    if not call.tensors or "empty" in op.name:
        raise TorchCannotError("nothing to compare")
    function = Converted(call)
    for batched in {len(call.tensors), 1}:
        examples = _examples(call, range(batched))
        expected = _stacked([leaves_of(values(call, example)) for example in examples])
        arrays = as_arrays(_batched(examples, range(batched)))
        axes = tuple(0 if i < batched else None for i in range(len(arrays)))
        with Unchanged(arrays):
            got = way(jax.vmap(function, in_axes=axes))(*arrays)
        compare(f"vmap of {batched} arguments", got, expected)
    return None


def _batch_of_keys(call: Call, way: Way) -> None:
    """A random function with a key for each example, and with one key for all of them, gives what a loop gives."""
    arrays, keys = as_arrays(call.tensors), jax.random.split(jax.random.key(KEY), len(_BATCH))
    converted = Converted(call)

    def draw(key: Any, *arrays: Any) -> list[Any]:
        return converted(*arrays, rng=key)

    rows = [as_tensors(draw(key, *arrays)) for key in keys]
    expected = _stacked(rows)
    compare("vmap over keys", way(jax.vmap(draw, in_axes=(0, *(None for _ in arrays))))(keys, *arrays), expected)
    if call.tensors:
        copies = [jnp.stack([array] * len(_BATCH)) for array in arrays]
        expected = _stacked([rows[0]] * len(_BATCH))
        got = way(jax.vmap(draw, in_axes=(None, *(0 for _ in arrays))))(keys[0], *copies)
        compare("vmap with one key", got, expected)


def batch_of_gradients(op: Any, call: Call, way: Way) -> None:
    """`jax.vmap` of a gradient, for each example its own."""
    if is_random(call):
        raise TorchCannotError("random")
    examples = _examples(call, call.active)
    torchs = [Differentiable(call, example) for example in examples]
    expected = _stacked([t.reverse() for t in torchs])
    arrays = as_arrays(_batched(examples, call.active))
    primals = [arrays[i] for i in call.active]
    cotangents = as_arrays(_stacked([t.cotangents for t in torchs]))
    converted = Converted(call)

    def pull(primals: Any, cotangents: Any) -> Any:
        return jax.vjp(converted.of_active(arrays), *primals)[1](cotangents)

    with Unchanged([*arrays, *cotangents]):
        compare("vmap of vjp", way(jax.vmap(pull))(primals, cotangents), expected)


def _examples(call: Call, batched: Sequence[int]) -> list[list[torch.Tensor]]:
    return [
        [
            t * f if i in batched and (t.is_floating_point() or t.is_complex()) else t.clone()
            for i, t in enumerate(tensors)
        ]
        for f in _BATCH
        for tensors in [call.tensors]
    ]


def _batched(examples: list[list[torch.Tensor]], batched: Sequence[int]) -> list[torch.Tensor]:
    columns = zip(*examples, strict=True)
    return [torch.stack(column) if i in batched else column[0] for i, column in enumerate(columns)]


def _stacked(rows: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    try:
        return [torch.stack(column) for column in zip(*rows, strict=True)]
    except RuntimeError as error:
        raise TorchCannotError("each example has another shape") from error


Levels = tuple[bool, bool]
"""Whether something is batched on the outer and on the inner of two levels."""

_OUTER, _INNER = (1.0, 0.9), (1.0, 0.85, 0.95)
"""Factors of the examples on either level: what is batched on both has their products. What is at most 1 remains so."""

_LEVELS: tuple[Levels, ...] = ((False, False), (True, False), (False, True), (True, True))

_MIXED = 3 if BACKEND == "torch" else 2  # each mix is compiled
"""So many arguments have levels of their own; those behind have the levels of the last of these."""

_JACOBIANS: tuple[tuple[Levels, Levels], ...] = (
    ((True, False), (False, True)),  # `vmap(jacrev)`
    ((True, False), (True, True)),
    ((False, True), (True, False)),
)
"""Levels of the point at which a derivative is taken, and of its directions."""


def batch_of_batches(op: Any, call: Call, way: Way) -> None:
    """`jax.vmap` of `jax.vmap`, with arguments that either level batches, or both, or none, in every mix."""
    if not call.tensors or "empty" in op.name or is_random(call):
        raise TorchCannotError("nothing to compare")
    function = Converted(call)
    for mix in itertools.product(_LEVELS, repeat=min(len(call.tensors), _MIXED)):
        if not all(map(any, zip(*mix, strict=True))):
            continue  # a level that batches nothing
        levels = [mix[min(i, _MIXED - 1)] for i in range(len(call.tensors))]
        expected = _grid(lambda *factors, at=levels: leaves_of(values(call, _example(call.tensors, at, *factors))))
        arrays = as_arrays(_spread(call.tensors, levels))
        with Unchanged(arrays):
            got = way(_twice(function, levels))(*arrays)
        compare(f"vmap twice, {levels}", got, expected)


def jacrev(op: Any, call: Call, way: Way) -> None:
    """`jax.vmap(jax.jacrev(f))`: gradients in several directions at each of several points."""
    for levels in _JACOBIANS:
        _at_several(call, way, "reverse", levels)


def jacfwd(op: Any, call: Call, way: Way) -> None:
    """`jax.vmap(jax.jacfwd(f))`: the same in forward mode."""
    for levels in _JACOBIANS:
        _at_several(call, way, "forward", levels)


def hessian(op: Any, call: Call, way: Way) -> None:
    """`jax.vmap(jax.hessian(f))`: second derivatives, forward over reverse, and reverse over reverse."""
    for levels in _JACOBIANS:
        _at_several(call, way, "forward over reverse", levels)
        _at_several(call, way, "reverse over reverse", levels)


def _at_several(call: Call, way: Way, mode: str, levels: tuple[Levels, Levels]) -> None:
    """Compare derivatives in several directions at several points with a loop."""
    if is_random(call):
        raise TorchCannotError("random")
    at_points, at_directions = levels
    torchs = Differentiable(call)
    if "over" in mode and any(t.is_complex() for t in torchs.cotangents):
        raise TorchCannotError("a complex Hessian is not symmetric")
    arrays = as_arrays(torchs.tensors)
    function = Converted(call).of_active(arrays)
    directions = torchs.cotangents if mode == "reverse" else torchs.tangents
    cotangents = as_arrays(torchs.cotangents)

    def derivative(primals: Any, directions: Any) -> Any:
        def pull(primals: Any) -> Any:
            return jax.vjp(function, *primals)[1](cotangents)

        if mode == "reverse":
            return jax.vjp(function, *primals)[1](directions)
        if mode == "forward":
            return jax.jvp(function, tuple(primals), tuple(directions))[1]
        if mode == "reverse over reverse":
            return jax.vjp(pull, primals)[1](tuple(directions))[0]
        return jax.jvp(pull, (primals,), (directions,))[1]

    def one(*factors: float) -> list[torch.Tensor]:
        tensors = list(call.tensors)
        for i in call.active:
            tensors[i] = _scaled(tensors[i], at_points, *factors)
        there = Differentiable(call, tensors)
        scaled = [_scaled(t, at_directions, *factors) for t in directions]
        if mode == "reverse":
            there.cotangents = scaled
            return there.reverse()
        there.tangents = scaled
        return there.forward() if mode == "forward" else there.second()[: len(scaled)]

    expected = _grid(one)
    primals = as_arrays(_spread(torchs.primals, [at_points] * len(torchs.primals)))
    given = as_arrays(_spread(directions, [at_directions] * len(directions)))
    with Unchanged([*primals, *given]):
        got = way(_twice(derivative, levels))(primals, given)
    compare(f"vmap twice of {mode} mode, {levels}", got, expected)


def _scaled(tensor: torch.Tensor, levels: Levels, outer: float, inner: float) -> torch.Tensor:
    """A tensor in one example of a batch of batches."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.clone()
    return tensor * (outer if levels[0] else 1.0) * (inner if levels[1] else 1.0)


def _example(tensors: Sequence[torch.Tensor], levels: Sequence[Levels], *factors: float) -> list[torch.Tensor]:
    return [_scaled(t, at, *factors) for t, at in zip(tensors, levels, strict=True)]


def _spread(tensors: Sequence[torch.Tensor], levels: Sequence[Levels]) -> list[torch.Tensor]:
    """The tensors with an axis in front for each level that batches them."""
    spread = []
    for tensor, (outer, inner) in zip(tensors, levels, strict=True):
        rows = [
            torch.stack([_scaled(tensor, (outer, inner), o, i) for i in _INNER])
            if inner
            else _scaled(tensor, (outer, inner), o, 1.0)
            for o in _OUTER
        ]
        spread.append(torch.stack(rows) if outer else rows[0])
    return spread


def _twice(function: Callable[..., Any], levels: Sequence[Levels]) -> Callable[..., Any]:
    outer, inner = (tuple(0 if at[level] else None for at in levels) for level in (0, 1))
    return jax.vmap(jax.vmap(function, in_axes=inner), in_axes=outer)


def _grid(example: Callable[[float, float], list[torch.Tensor]]) -> list[torch.Tensor]:
    """What a function has for each example, with two axes in front."""
    return _stacked([_stacked([example(outer, inner) for inner in _INNER]) for outer in _OUTER])
