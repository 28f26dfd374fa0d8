"""One of several processes that train a converted torch model: `tests/test_processes.py` starts it.

It gets its orders as JSON, so that the processes of a run differ in nothing but `process`.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from pytorch2jax import convert_pytnn_to_flax

BATCH, FEATURES, CLASSES = 16, 6, 3
OPTIMIZER = optax.adam(0.05)


class Orders(NamedTuple):
    """What a process does.

    folder: where it leaves `{process}.npz` with its weights, and `{process}.started` after the second step.
    steps: the numbers of the first step and of the one after the last.
    restore, save: checkpoints to read before the first step and to write after the last.
    pause_s: how long it waits after each step.
    """

    process: int
    processes: int
    port: int
    folder: str
    steps: tuple[int, int]
    restore: str | None = None
    save: str | None = None
    pause_s: float = 0.0


def torch_model() -> torch.nn.Module:
    """The same weights in each process."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, CLASSES)
    ).double()


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole batch of a step."""
    rng = np.random.default_rng(step)
    return rng.normal(size=(BATCH, FEATURES)), rng.integers(0, CLASSES, BATCH)


class Training:
    """A converted model on all devices of all processes."""

    def __init__(self) -> None:
        module = convert_pytnn_to_flax(torch_model())[0]
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        self.everywhere, self._by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        params = _init(module)
        params = jax.tree.map(lambda p: jax.make_array_from_process_local_data(self.everywhere, np.asarray(p)), params)
        self.state = params, jax.jit(OPTIMIZER.init, out_shardings=self.everywhere)(params)

        def local(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
            def loss(params: Any) -> jax.Array:
                logits = module().apply({"params": params}, x)
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).sum() / BATCH

            value, gradients = jax.value_and_grad(loss)(params)
            return jax.lax.psum(value, "data"), gradients

        specs = dict(in_specs=(P(), P("data"), P("data")), out_specs=(P(), P()))
        value_and_gradients = jax.shard_map(local, mesh=mesh, check_vma=True, **specs)

        @jax.jit
        def step(state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
            params, optimizer_state = state
            value, gradients = value_and_gradients(params, x, y)
            updates, optimizer_state = OPTIMIZER.update(gradients, optimizer_state, params)
            return (optax.apply_updates(params, updates), optimizer_state), value

        self._step = step

    def step(self, number: int) -> None:
        """Take a step; the process puts its own rows of the batch on its devices."""
        n, process = BATCH // jax.process_count(), jax.process_index()
        own = (part[process * n : (process + 1) * n] for part in batch(number))
        self.state, loss = self._step(
            self.state, *(jax.make_array_from_process_local_data(self._by_rows, part) for part in own)
        )
        loss.block_until_ready()

    def save(self, path: str) -> None:
        """Write a checkpoint, all processes together."""
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(pathlib.Path(path), self.state)

    def restore(self, path: str) -> None:
        """Read a checkpoint of any number of processes."""
        with ocp.StandardCheckpointer() as checkpointer:
            self.state = checkpointer.restore(pathlib.Path(path), jax.tree.map(_shape_on(self.everywhere), self.state))

    def leaves(self) -> list[np.ndarray]:
        """What this process has of the weights and of the optimizer's state."""
        return [np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(self.state)]


def _init(module: type[nn.Module]) -> Any:
    return module().init(jax.random.key(0), np.zeros((1, FEATURES)))["params"]


def _shape_on(sharding: NamedSharding) -> Any:
    return lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def work(orders: Orders) -> None:
    """Train as ordered."""
    folder = pathlib.Path(orders.folder)
    training = Training()
    if orders.restore:
        training.restore(orders.restore)
    before = training.leaves()
    for number in range(*orders.steps):
        training.step(number)
        if number == orders.steps[0] + 1:
            (folder / f"{orders.process}.started").touch()
        time.sleep(orders.pause_s)
    if orders.save:
        training.save(orders.save)
    arrays = {f"before{i}": a for i, a in enumerate(before)} | {f"after{i}": a for i, a in enumerate(training.leaves())}
    np.savez(folder / f"{orders.process}.npz", **arrays)


def main() -> None:
    """Join the others and train."""
    orders = Orders(**json.loads(sys.argv[1]))
    jax.config.update("jax_enable_x64", True)
    if orders.processes > 1:
        jax.distributed.initialize(
            coordinator_address=f"127.0.0.1:{orders.port}",
            num_processes=orders.processes,
            process_id=orders.process,
            initialization_timeout=60,
            heartbeat_timeout_seconds=10,
            shutdown_timeout_seconds=20,
            cluster_detection_method="deactivate",
        )
    work(orders)
    if orders.processes > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
