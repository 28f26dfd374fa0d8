"""Torch's threads and XLA's on the same cores: inside a larger program, and on eight devices of the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.bridges import BRIDGES, torch_device
from benchmarks.case import FLAX, OURS, WRAP, Call, Case, LeftOutError
from benchmarks.models import ENCODER

PARTS = "the parts, one by one"
TOGETHER = "one program"
IN_SEQUENCE = "one device, in sequence"
SHARDED = "8 devices"
DEVICES = 8
MATMULS = 4
WIDTH = 1024


def matmuls(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Work for XLA; keeps the shape and the scale."""
    tokens = x.reshape(-1, x.shape[-1])
    for _ in range(MATMULS):
        tokens = jnp.tanh(tokens @ weight) @ weight.T / WIDTH
    return tokens.reshape(x.shape)


def larger_program(together: bool) -> Callable[[str], Call]:
    """XLA's matmuls, then the value and gradient of the encoder, then matmuls again: in one program or in three."""

    def set_up(bridge: str) -> Call:
        apply, params, x = BRIDGES[bridge](ENCODER, False)
        weight = jax.random.normal(jax.random.key(0), (x.shape[-1], WIDTH)) / WIDTH**0.5

        def vjp_step(params: Any, x: jax.Array) -> Any:
            out, pull = jax.vjp(lambda params: apply(params, x), params)
            return out, pull(2 * out)

        def whole(params: Any, x: jax.Array, weight: jax.Array) -> Any:
            out, grads = vjp_step(params, matmuls(x, weight))
            return matmuls(out, weight), grads

        whole_fn, vjp_fn, matmul_fn = map(jax.jit, (whole, vjp_step, matmuls))

        def parts() -> Any:
            before = jax.block_until_ready(matmul_fn(x, weight))
            out, grads = jax.block_until_ready(vjp_fn(params, before))
            return matmul_fn(out, weight), grads

        return (lambda: whole_fn(params, x, weight)) if together else parts

    return set_up


def gradient_of_shards(sharded: bool) -> Callable[[str], Call]:
    """The value and gradient for eight batches: one after the other, or under `jax.shard_map`, with a `psum`."""

    def set_up(bridge: str) -> Call:
        if torch_device() != "cpu":
            raise LeftOutError("it splits the host into eight devices")
        apply, params, x = BRIDGES[bridge](ENCODER, False)
        mesh = Mesh(jax.devices(), ("shard",))
        replicated, split = PartitionSpec(), PartitionSpec("shard")

        def step(params: Any, x: jax.Array) -> Any:
            return jax.value_and_grad(lambda params: (apply(params, x) ** 2).sum())(params)

        def summed(params: Any, x: jax.Array) -> Any:
            return jax.lax.psum(step(params, x), "shard")

        if sharded:
            params = jax.device_put(params, NamedSharding(mesh, replicated))
            batches = jax.device_put(jnp.concatenate([x] * DEVICES), NamedSharding(mesh, split))
            specs = dict(in_specs=(replicated, split), out_specs=replicated)
            fn = jax.jit(jax.shard_map(summed, mesh=mesh, check_vma=False, **specs))
            return lambda: fn(params, batches)
        step_fn, add = jax.jit(step), jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

        def in_sequence() -> Any:
            total = jax.block_until_ready(step_fn(params, x))
            for _ in range(DEVICES - 1):
                total = jax.block_until_ready(add(total, step_fn(params, x)))
            return total

        return in_sequence

    return set_up


MIXED = Case(
    "mixed",
    "A torch step inside a larger XLA program",
    "ms",
    f"{2 * MATMULS} matrix products of XLA, value and gradient of the {ENCODER.name}, and as many products again: as "
    "one program, against three programs that each start when the last has ended. Operating-system threads in "
    "parentheses.",
    {name: name for name in (OURS, WRAP, FLAX)},
    {PARTS: larger_program(together=False), TOGETHER: larger_program(together=True)},
    reference=PARTS,
)
SHARDS = Case(
    "shards",
    "`jax.shard_map` over 8 devices of the host",
    "ms",
    f"Value and gradient of the {ENCODER.name}, for eight batches: on eight devices "
    "(`--xla_force_host_platform_device_count=8`) with a `psum`, against one device and one batch after the other. "
    "Operating-system threads in parentheses.",
    {name: name for name in (OURS, FLAX)},
    {IN_SEQUENCE: gradient_of_shards(sharded=False), SHARDED: gradient_of_shards(sharded=True)},
    reference=IN_SEQUENCE,
    environment={"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"},
)
