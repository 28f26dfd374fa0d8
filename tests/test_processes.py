"""Several processes: data-parallel training over JAX's distributed runtime, on the loopback address.

The processes run `process_worker.py`. The oracle is torch, in this process, with whole batches.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import process_worker
import pytest
import torch

from pytorch2jax import load_params

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT_S = 240  # nothing here takes a tenth of it on a quiet machine; a hang becomes a failure
SAVED, FINISHED, CONTINUED = 3, 6, 9  # steps


def environment():
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "XLA_FLAGS": ""}


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Run:
    """Processes that train together, and what they leave behind."""

    def __init__(self, folder, processes, **orders):
        folder.mkdir()
        self.folder, port = folder, free_port()
        self.logs = [folder / f"{i}.log" for i in range(processes)]
        self.running = []
        for i, log in enumerate(self.logs):
            text = json.dumps(dict(process=i, processes=processes, port=port, folder=str(folder), **orders))
            command = [sys.executable, str(ROOT / "tests" / "process_worker.py"), text]
            with log.open("w") as file:
                self.running.append(subprocess.Popen(command, env=environment(), stdout=file, stderr=file))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.running:
            process.kill()
            process.wait()

    def codes(self):
        """How the processes ended; it is an error if they do not end."""
        end = time.monotonic() + LIMIT_S
        return [process.wait(max(1.0, end - time.monotonic())) for process in self.running]

    def wait_until_all_have_started(self):
        end = time.monotonic() + LIMIT_S
        while not all((self.folder / f"{i}.started").exists() for i in range(len(self.running))):
            assert all(process.poll() is None for process in self.running), self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.1)

    def text(self):
        return "\n".join(f"--- {log.stem}\n{log.read_text()[-3000:]}" for log in self.logs)

    def arrays(self, when):
        """What each process had of the weights and of the optimizer's state, `before` or `after` its steps."""
        assert not any(self.codes()), self.text()
        found = []
        for i in range(len(self.running)):
            with np.load(self.folder / f"{i}.npz") as file:
                found.append([file[f"{when}{k}"] for k in range(len(file.files) // 2)])
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two processes write a checkpoint; four go on from there and write another one; a single one goes on from that."""
    folder = tmp_path_factory.mktemp("processes")
    checkpoints = {n: str(folder / f"checkpoint{n}") for n in (2, 4)}
    with Run(folder / "two", 2, steps=(0, SAVED), save=checkpoints[2]) as two:
        two.arrays("after")
        with Run(folder / "four", 4, steps=(SAVED, FINISHED), restore=checkpoints[2], save=checkpoints[4]) as four:
            four.arrays("after")
            with Run(folder / "one", 1, steps=(FINISHED, CONTINUED), restore=checkpoints[4]) as one:
                one.arrays("after")
                yield dict(two=two, four=four, one=one, checkpoints=checkpoints)


def trained_by_torch(steps):
    """The weights after some steps, by torch alone, as the leaves of `params`."""
    model = process_worker.torch_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(steps):
        x, y = map(torch.from_numpy, process_worker.batch(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "steps"), [("two", SAVED), ("four", FINISHED), ("one", CONTINUED)])
def test_the_weights_are_those_of_one_process(runs, name, steps):
    expected = trained_by_torch(steps).state_dict()
    arrays = runs[name].arrays("after")
    jax.tree.map(np.testing.assert_array_equal, arrays, [arrays[0]] * len(arrays))  # all processes agree
    training = process_worker.Training()
    params, _ = jax.tree.unflatten(jax.tree.structure(training.state), arrays[0])
    model = load_params(process_worker.torch_model(), params)
    untrained = process_worker.torch_model().state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(value, untrained[key], atol=1e-3)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("before", "after"), [("two", "four"), ("four", "one")])
def test_a_checkpoint_goes_to_another_number_of_processes(runs, before, after):
    (saved, *_), restored = runs[before].arrays("after"), runs[after].arrays("before")
    for arrays in restored:
        jax.tree.map(np.testing.assert_array_equal, arrays, saved)


@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [2, 4])
def test_a_checkpoint_is_written_once(runs, processes):
    """What all processes hold is written by the first one alone."""
    folder = pathlib.Path(runs["checkpoints"][processes])
    writers = {
        p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in folder.glob("ocdbt.process_*")
    }
    bytes_of_values = sum(a.nbytes for a in runs["one"].arrays("after")[0])
    assert writers["ocdbt.process_0"] >= bytes_of_values / 2
    assert sum(writers.values()) < 2 * max(bytes_of_values, 20_000)


@pytest.mark.exhaustive
@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_is_killed_the_others_end_with_an_error(tmp_path, killed):
    with Run(tmp_path / "run", 2, steps=(0, 1_000_000), pause_s=0.01) as run:
        run.wait_until_all_have_started()
        run.running[killed].send_signal(signal.SIGKILL)
        codes = run.codes()
        assert codes.pop(killed) == -signal.SIGKILL
        assert all(codes), run.text()
        for i, log in enumerate(run.logs):
            if i != killed:
                assert re.search(ENDED, log.read_text()), run.text()


ENDED = "Gloo|coordination service"


@pytest.mark.exhaustive
def test_the_example():
    command = [sys.executable, str(ROOT / "examples" / "data_parallel.py"), "--processes=2"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"processes\s*│\s*2 ", done.stdout)
    accuracy = re.search(r"accuracy after\s*│\s*([\d.]+)%", done.stdout)
    assert float(accuracy[1]) > 85


@pytest.mark.exhaustive
def test_the_example_refuses_what_it_cannot_do():
    command = [sys.executable, str(ROOT / "examples" / "data_parallel.py")]
    for options, message in (["--processes=7"], "expected a divisor of 96, got 7"), (["--process=0"], "both or none"):
        done = subprocess.run(
            [*command, *options], env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert done.returncode == 2
        assert message in done.stderr


# -- forks ----------------------------------------------------------------------------------------------------

WORKER = """
import sys, warnings
warnings.simplefilter("ignore")  # of JAX, that it does not like forks
import jax, jax.numpy as jnp, numpy as np, torch
from flax import linen, nnx
import equinox as eqx
import pytorch2jax

model = torch.nn.Linear(3, 2)
apply, params = pytorch2jax.convert_pytnn_to_jax(model)
second, _ = pytorch2jax.convert_pytnn_to_jax(model, backend="xla")
cls, variables = pytorch2jax.convert_pytnn_to_flax(model)
in_nnx = pytorch2jax.convert_pytnn_to_nnx(model)
in_equinox = pytorch2jax.convert_pytnn_to_equinox(model)
dense = linen.Dense(2)
in_torch = pytorch2jax.convert_flax_to_pytnn(dense, dense.init(jax.random.key(0), jnp.ones((1, 3))))
f = pytorch2jax.torch2jax(torch.sin)
g = pytorch2jax.jax2torch(jnp.sin)
leaf = torch.ones(3, requires_grad=True)
loss = g(leaf).sum()
apply(params, jnp.ones((1, 3))), second(params, jnp.ones((1, 3))), f(jnp.ones(3))  # JAX runs, and all is traced
x, t = np.ones((1, 3), np.float32), torch.ones(1, 3)
calls = {
    "torch2jax": lambda: f(x),
    "torch2jax of arrays": lambda: f(jnp_x),
    "apply": lambda: apply(params, x),
    "apply on numpy": lambda: apply(jax.tree.map(np.asarray, numpy_params), x),
    "xla": lambda: second(params, x),
    "linen": lambda: cls().apply({"params": variables}, x),
    "nnx": lambda: in_nnx(x),
    "equinox": lambda: in_equinox(x),
    "jax2torch": lambda: g(t),
    "jax2torch of numpy": lambda: g(x),
    "backward": lambda: loss.backward(),
    "flax in torch": lambda: in_torch(t),
    "t2j": lambda: pytorch2jax.t2j(t),
    "j2t": lambda: pytorch2jax.j2t(jnp_x),
    "convert": lambda: pytorch2jax.convert_pytnn_to_jax(model),
}
jnp_x, numpy_params = jnp.ones((1, 3)), jax.tree.map(np.asarray, params)

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return len(calls)

    def __getitem__(self, index):
        try:
            list(calls.values())[index]()
        except pytorch2jax.ForkError as error:
            return "spawn" in str(error)
        return False

# Each in a worker of its own; one that hangs ends after a while, with an error.
for index, name in enumerate(calls):
    sampler = [index]
    loader = torch.utils.data.DataLoader(
        Data(), sampler=sampler, num_workers=1, multiprocessing_context="fork", timeout=20
    )
    (found,) = loader
    assert found.all(), name
    print(name, flush=True)
"""


def test_calls_in_a_worker_of_a_data_loader_are_errors():
    """JAX would hang there, so that none of its functions may be called before the error."""
    command = [sys.executable, "-c", WORKER]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 15
