"""Train a torch encoder inside a Flax model on several processes, data-parallel, and compare with torch.

The encoder is a small `torch.nn.TransformerEncoder` that reads scikit-learn's digits, row by row; a `flax.linen.Dense`
head is trained together with it by optax. Each process holds a part of each batch; the gradients of the weights, which
all of them hold, are summed over the processes by JAX's collectives. Nothing is downloaded.

Run it with `python examples/data_parallel.py`, which starts two processes on this machine, or as many as
`--processes` says. To have one process on each of several machines, start it on each with the same `--coordinator`
(an address and port of the first one) and `--processes`, and with a `--process` of its own, from 0. It exits with an
error where JAX and torch differ.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

# Processes on the same machine share its cores; threads of torch that wait for each other sleep instead of spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import flax.linen as nn
import jax
import numpy as np
import optax
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from pytorch2jax import convert_pytnn_to_flax, load_params

SEED = 0
WIDTH = 32
CLASSES = 10
BATCH = 96  # of all processes together
EPOCHS = 10
RATE = 3e-3
AXIS = "data"
LOSS_TOLERANCE = 1e-3
COMPARED_STEPS = 8  # the first ones, which torch takes, too, with whole batches in one process
HEARTBEAT_S = 10  # a process that has been silent for so long is dead, and the others end
START_S = 120  # to wait for the others at the start


class Digits(NamedTuple):
    """Images of 8 by 8 numbers between 0 and 1, and what they show."""

    images: np.ndarray
    labels: np.ndarray

    def rows(self, rows: Any) -> Digits:
        """Some of the images."""
        return Digits(self.images[rows], self.labels[rows])


def load() -> tuple[Digits, Digits]:
    """Images for training and for testing; the same in each process."""
    digits = load_digits()
    data = Digits((digits.images / 16).astype(np.float32), digits.target.astype(np.int32))
    train, test = train_test_split(np.arange(len(data.labels)), test_size=360, stratify=data.labels, random_state=SEED)
    return data.rows(train), data.rows(test)


def batches(data: Digits) -> Iterator[Digits]:
    """Shuffled batches for all epochs; the same in each process."""
    rng = np.random.default_rng(SEED)
    for _ in range(EPOCHS):
        order = rng.permutation(len(data.labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield data.rows(order[start : start + BATCH])


# -- the model ------------------------------------------------------------------------------------------


class Encoder(torch.nn.Module):
    """Reads the rows of an image as the words of a sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Linear(8, WIDTH)
        self.position = torch.nn.Parameter(0.1 * torch.randn(8, WIDTH))
        layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embedding(images) + self.position).mean(1)


class Classifier(nn.Module):
    """The converted encoder and a linear head."""

    encoder_class: type[nn.Module]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        return nn.Dense(CLASSES, name="head")(self.encoder_class(name="encoder")(images))


class Trainer:
    """The Flax model on all devices of all processes, and the state of its training."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        model = Classifier(convert_pytnn_to_flax(encoder)[0])
        optimizer = optax.adam(RATE)
        self._mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
        everywhere = NamedSharding(self._mesh, P())
        params = model.init(jax.random.key(SEED), np.zeros((1, 8, 8), np.float32))["params"]
        self.params = jax.tree.map(lambda p: jax.make_array_from_process_local_data(everywhere, np.asarray(p)), params)
        self.optimizer_state = jax.jit(optimizer.init, out_shardings=everywhere)(self.params)

        def local(params: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
            def loss(params: Any) -> jax.Array:
                logits = model.apply({"params": params}, images)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum() / BATCH

            # The weights are the same on all devices: their gradients are summed over the devices on the way.
            value, gradients = jax.value_and_grad(loss)(params)
            return jax.lax.psum(value, AXIS), gradients

        specs = dict(in_specs=(P(), P(AXIS), P(AXIS)), out_specs=(P(), P()))
        value_and_gradients = jax.shard_map(local, mesh=self._mesh, check_vma=True, **specs)

        def step(params: Any, optimizer_state: Any, batch: Digits) -> tuple[Any, Any, jax.Array]:
            value, gradients = value_and_gradients(params, *batch)
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
            return optax.apply_updates(params, updates), optimizer_state, value

        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._logits = jax.jit(lambda params, images: model.apply({"params": params}, images))

    def step(self, batch: Digits) -> float:
        """Take one step; the loss before it. Each process puts its own part of the batch on its devices."""
        n = BATCH // jax.process_count()
        own = batch.rows(slice(jax.process_index() * n, (jax.process_index() + 1) * n))
        sharding = NamedSharding(self._mesh, P(AXIS))
        placed = Digits(*(jax.make_array_from_process_local_data(sharding, part) for part in own))
        self.params, self.optimizer_state, loss = self._step(self.params, self.optimizer_state, placed)
        return float(loss)

    def local_params(self) -> Any:
        """The weights as this process has them."""
        return jax.tree.map(lambda p: p.addressable_data(0), self.params)

    def correct(self, data: Digits) -> int:
        """How many images this process classifies correctly."""
        return int((np.asarray(self._logits(self.local_params(), data.images)).argmax(1) == data.labels).sum())


class TorchTrainer:
    """The same training step in torch, in one process, with whole batches."""

    def __init__(self, encoder: torch.nn.Module, params: Any) -> None:
        self._encoder, self._head = encoder, torch.nn.Linear(WIDTH, CLASSES)
        self.load(params)
        self._optimizer = torch.optim.Adam([*encoder.parameters(), *self._head.parameters()], lr=RATE)

    def load(self, params: Any) -> None:
        """Take over the weights of the Flax model."""
        load_params(self._encoder, params["encoder"])
        load_params(self._head, _as_linear(params["head"]))

    def step(self, batch: Digits) -> float:
        """Take one step; the loss before it."""
        self._optimizer.zero_grad()
        logits = self._head(self._encoder(torch.tensor(batch.images)))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(batch.labels, dtype=torch.int64))
        loss.backward()
        self._optimizer.step()
        return loss.item()


def _as_linear(dense: Any) -> dict[str, jax.Array]:
    """The leaves of a Flax `Dense` as those of a torch `Linear`."""
    return {"weight": dense["kernel"].T, "bias": dense["bias"]}


# -- one process ----------------------------------------------------------------------------------------


def train() -> None:
    """What each process does. The first one reports, and compares its first steps with torch's."""
    first = jax.process_index() == 0
    train_data, test_data = load()
    torch.manual_seed(SEED)
    encoder = Encoder().eval()
    trainer = Trainer(encoder)
    reference = TorchTrainer(encoder, trainer.local_params()) if first else None
    before, difference, losses, start = trainer.correct(test_data), 0.0, [], 0.0
    for step, batch in enumerate(
        tqdm(list(batches(train_data)), desc="training", unit="step", mininterval=0.5, disable=not first)
    ):
        if step == COMPARED_STEPS:
            start = time.perf_counter()
        losses.append(trainer.step(batch))
        if reference is not None and step < COMPARED_STEPS:
            difference = max(difference, abs(losses[-1] - reference.step(batch)))
    seconds = (time.perf_counter() - start) / (len(losses) - COMPARED_STEPS)
    after = trainer.correct(test_data)
    if first:
        Console().print(table(len(test_data.labels), before, after, difference, losses[-1], seconds))
    if not difference <= LOSS_TOLERANCE:  # written so that a NaN fails
        sys.exit(f"Failed: losses differ from torch's by {difference:.1e}, expected {LOSS_TOLERANCE:.0e}.")


def table(tests: int, before: int, after: int, difference: float, loss: float, seconds: float) -> Table:
    """The results as a table."""
    shown = Table(title="A torch encoder trained in Flax, data-parallel", title_justify="left")
    shown.add_column("Measured")
    shown.add_column("Value", justify="right")
    shown.add_column("How", style="dim")
    shown.add_row("processes", str(jax.process_count()), f"{jax.device_count()} devices, {BATCH} images a step")
    shown.add_row(
        "losses, JAX - torch", f"{difference:.1e}", f"largest of {COMPARED_STEPS} steps, torch in one process"
    )
    shown.add_row("loss", f"{loss:.3f}", "last step")
    shown.add_row("accuracy before", f"{before / tests:.1%}", f"{tests} test images")
    shown.add_row("accuracy after", f"{after / tests:.1%}", f"{EPOCHS} epochs")
    shown.add_row("training step", f"{1000 * seconds:.0f} ms", f"mean without the first {COMPARED_STEPS}")
    return shown


# -- several processes ----------------------------------------------------------------------------------


def join(coordinator: str, processes: int, process: int) -> None:
    """Join the others, train, and leave with them."""
    jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=process,
        initialization_timeout=START_S,
        heartbeat_timeout_seconds=HEARTBEAT_S,
        shutdown_timeout_seconds=START_S,
        cluster_detection_method="deactivate",
    )
    train()
    jax.distributed.shutdown()


def start(processes: int) -> None:
    """Start processes on this machine and wait for them; where one fails, the others end, too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, f"--coordinator={coordinator}", f"--processes={processes}"]
    cores = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(cores), **os.environ}
    running = [subprocess.Popen([*command, f"--process={i}"], env=environment) for i in range(processes)]
    try:
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                break
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()  # SIGTERM, in JAX, is a warning
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit(f"Failed: the processes ended with {codes}, expected zeros.")


def main() -> None:
    """Train alone, start processes, or join them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help=f"how many in all; a divisor of {BATCH} (2)")
    parser.add_argument("--process", type=int, help="the number of this one, to join others")
    parser.add_argument("--coordinator", help="address:port of the first one, to join others")
    options = parser.parse_args()
    if options.processes < 1 or BATCH % options.processes:
        parser.error(f"--processes: expected a divisor of {BATCH}, got {options.processes}.")
    if (options.process is None) != (options.coordinator is None):
        parser.error("--process and --coordinator: expected both or none of them.")
    if options.process is not None:
        join(options.coordinator, options.processes, options.process)
    elif options.processes == 1:
        train()
    else:
        start(options.processes)


if __name__ == "__main__":
    main()
