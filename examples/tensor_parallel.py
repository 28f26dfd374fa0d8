"""A torch MLP block split over two axes of a mesh: the batch over one, the hidden layer over the other.

The first linear layer is split by its output features, the second by its input features; between them nothing is
exchanged, after them a sum over the devices puts the parts together. Each device runs torch on its shards. The same
training on one device gives the same numbers, which is checked.

Run it with `python examples/tensor_parallel.py`. Without accelerators it makes eight devices of the host.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pytorch2jax import t2j, torch2jax

N_ROWS, WIDTH, HIDDEN = 256, 32, 128
N_STEPS = 50
TOLERANCE = 1e-3  # sums in another order, over all steps

linear = torch2jax(torch.nn.functional.linear)
gelu_linear = torch2jax(lambda x, w, b: torch.nn.functional.gelu(torch.nn.functional.linear(x, w, b)))


class Params(NamedTuple):
    """The weights of the block, in torch's layout: `(out, in)`."""

    up: Any
    up_bias: Any
    down: Any
    down_bias: Any


SPECS = Params(up=P("model"), up_bias=P("model"), down=P(None, "model"), down_bias=P())


def block(params: Params, x: jax.Array) -> jax.Array:
    """The block on one device."""
    return linear(gelu_linear(x, params.up, params.up_bias), params.down, params.down_bias)


def block_on_shards(params: Params, x: jax.Array) -> jax.Array:
    """The block on the shards of one device, inside `jax.shard_map`."""
    part = linear(gelu_linear(x, params.up, params.up_bias), params.down)
    return jax.lax.psum(part, "model") + params.down_bias


def initial_params() -> Params:
    """As torch initialises them."""
    torch.manual_seed(0)
    up, down = torch.nn.Linear(WIDTH, HIDDEN), torch.nn.Linear(HIDDEN, WIDTH)
    return Params(*map(t2j, (up.weight, up.bias, down.weight, down.bias)))


def data() -> tuple[jax.Array, jax.Array]:
    """Points, and what becomes of them."""
    x = jax.random.normal(jax.random.key(0), (N_ROWS, WIDTH))
    return x, jnp.sin(x) + x[:, ::-1] ** 2


def train(apply: Any, params: Params, x: jax.Array, y: jax.Array, name: str) -> tuple[Params, list[float]]:
    """Train with optax, in one jitted step; the shardings of the arguments decide where it runs."""
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params: Params, state: Any) -> tuple[Params, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: ((apply(p, x) - y) ** 2).mean())(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in tqdm(range(N_STEPS), desc=name, leave=False):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return params, losses


def main() -> int:
    """Train on one device and on all of them, and compare."""
    console = Console()
    n_model = 2 if jax.device_count() % 2 == 0 else 1
    mesh = jax.make_mesh((jax.device_count() // n_model, n_model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, (x, y) = initial_params(), data()
    alone, losses = train(block, params, x, y, "one device")

    parallel = jax.shard_map(block_on_shards, mesh=mesh, in_specs=(SPECS, P("data")), out_specs=P("data"))
    sharded = Params(*(jax.device_put(p, NamedSharding(mesh, s)) for p, s in zip(params, SPECS, strict=True)))
    rows = NamedSharding(mesh, P("data"))
    together, losses_together = train(
        parallel, sharded, jax.device_put(x, rows), jax.device_put(y, rows), "all devices"
    )

    table = Table("weights", "shape", "on each device", "largest difference")
    differences = [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(alone, together, strict=True)]
    for name, p, difference in zip(Params._fields, together, differences, strict=True):
        table.add_row(name, str(p.shape), str(p.addressable_shards[0].data.shape), f"{difference:.1e}")
    console.print(f"mesh: {dict(mesh.shape)}; loss {losses[0]:.3f} -> {losses[-1]:.3f}", table)
    worst = max(*differences, abs(losses[-1] - losses_together[-1]))
    if worst > TOLERANCE:
        console.print(f"[red]the two runs differ by {worst:.1e}, expected less than {TOLERANCE:.0e}[/red]")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
