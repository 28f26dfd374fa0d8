"""Threads, devices, signals and the end of the interpreter, while torch runs. Nothing here may hang.

Tests that need eight devices run in a process of their own, which runs this file again; tests about signals and exits
are programs in processes of their own.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import DEVICES, assert_same_numbers, some
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from pytorch2jax import convert_pytnn_to_jax, torch2jax, use_tape
from pytorch2jax._tape import TAPE

N = len(DEVICES)
LIMIT_S = 200  # far more than anything here takes; a hang becomes a failure
ROOT = pathlib.Path(__file__).resolve().parent.parent


def in_threads(*calls):
    """Run functions at the same time, each in a thread of its own; their results."""
    results, errors = [None] * len(calls), []
    ready = threading.Barrier(len(calls))

    def work(i, call):
        try:
            ready.wait(LIMIT_S)
            results[i] = call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results


def same(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, expected)


# -- threads ------------------------------------------------------------------------------------------------


def slow_at(dtype, started, go_on):
    """A compiled function whose constants have this default dtype, and that waits in the middle of a call."""

    def fn(x):
        first = torch.ones(3) / 3
        if not isinstance(x, torch._subclasses.FakeTensor) and started is not None:
            started.set()
            assert go_on.wait(LIMIT_S)
        return x + (first + torch.ones(3) / 3)

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return jax.jit(torch2jax(fn)).lower(jnp.zeros(3, jnp.float32)).compile()
    finally:
        torch.set_default_dtype(before)


def test_calls_with_other_default_dtypes_wait_for_each_other_and_leave_the_users():
    started, go_on = threading.Event(), threading.Event()
    wide, narrow = slow_at(torch.float64, started, go_on), slow_at(torch.float32, None, None)
    x = jnp.zeros(3, jnp.float32)

    def meanwhile():
        assert started.wait(LIMIT_S)
        threading.Timer(0.2, go_on.set).start()
        return [narrow(x).block_until_ready() for _ in range(3)]

    first, others = in_threads(lambda: wide(x).block_until_ready(), meanwhile)
    assert torch.get_default_dtype() is torch.float32
    assert first.dtype == jnp.float64
    for other in others:
        assert other.dtype == jnp.float32
        np.testing.assert_array_equal(other, np.float32(1 / 3) + np.float32(1 / 3))
    results = in_threads(*[lambda: wide(x), lambda: narrow(x)] * 3)
    assert [r.dtype for r in results] == [jnp.float64, jnp.float32] * 3
    assert torch.get_default_dtype() is torch.float32


def test_what_a_user_sets_during_a_call_stays_set():
    started, go_on = threading.Event(), threading.Event()
    wide, x = slow_at(torch.float64, started, go_on), jnp.zeros(3, jnp.float32)

    def meanwhile():
        assert started.wait(LIMIT_S)
        torch.use_deterministic_algorithms(True)
        threading.Timer(0.2, go_on.set).start()
        return torch2jax(lambda x: x * torch.ones(3))(x)  # traced at the user's settings, not at those of the call

    try:
        _, found = in_threads(lambda: wide(x).block_until_ready(), meanwhile)
        assert found.dtype == jnp.float32
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_default_dtype() is torch.float32
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tape", [True, False])
def test_two_threads_train_one_module(tape):
    """Statistics and masks are each thread's own, although both run the same torch module."""
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)
    ).double()
    apply, params, state = convert_pytnn_to_jax(net, with_state=True)

    @jax.jit
    def step(params, state, x, key):
        def loss(params):
            y, after = apply(params, state, x, rng=key, train=True)
            return (y**2).sum(), after

        (value, after), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda p, g: p - 0.01 * g, params, gradients), after

    def train(seed):
        p, s, values = params, state, []
        for key in jax.random.split(jax.random.key(seed), 25):
            value, p, s = step(p, s, jax.random.normal(key, (6, 4)), key)
            values.append(value)
        return values, p, s

    with use_tape(tape):
        expected = [train(seed) for seed in (0, 1)]
        assert not np.allclose(expected[0][0], expected[1][0])
        jax.tree.map(assert_same_numbers, in_threads(lambda: train(0), lambda: train(1)), expected)
    assert len(TAPE) == 0


def test_threads_trace_and_compile_the_same_function_at_once():
    runs = []

    def fn(x):
        if not isinstance(x, torch._subclasses.FakeTensor):
            runs.append(1)
        return torch.sin(x)

    f = torch2jax(fn)
    call = jax.jit(jax.value_and_grad(lambda x: f(x).sum()))
    x = jnp.linspace(0.0, 1.0, 7)
    for value, gradient in in_threads(*[lambda: call(x)] * 4):
        same((value, gradient), (jnp.sin(x).sum(), jnp.cos(x)))
    assert len(runs) == 4


# -- programs in processes of their own -----------------------------------------------------------------------


# A process that a shell starts in the background ignores Ctrl-C, and so do its children.
HEEDS_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def run(program, *arguments, devices=1):
    """Run a program to its end, and return what it printed; it is an error if it fails, crashes or hangs."""
    done = subprocess.run(
        [sys.executable, "-c", HEEDS_CTRL_C + textwrap.dedent(program), *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONFAULTHANDLER": "1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    for sign in ("Fatal Python error", "terminate called", "Exception ignored", "Traceback"):
        assert sign not in done.stderr, done.stderr[-4000:]
    return done.stdout


INTERRUPTED = """
import json, os, signal, sys, threading, time
import jax, jax.numpy as jnp, numpy as np, torch
from pytorch2jax import torch2jax

armed = False
x = jnp.arange(4.0)

def interrupt_soon():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

def wait(x):
    global armed
    if armed and not isinstance(x, torch._subclasses.FakeTensor):
        armed = False
        interrupt_soon()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.01)

def slow(x):
    wait(x)
    return 2 * x

class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        wait(g)
        return 2 * g

f, g = torch2jax(slow), torch2jax(SlowBackward.apply)
large = jnp.tile(x, 300_000)

def at_once(x):
    # XLA computes for a second, in the calling thread, before it comes to torch.
    n = N_FEW
    if armed:
        n = N_MANY
        interrupt_soon()
    return computed(x, n)

@jax.jit
def computed(x, n):
    zero = jax.lax.fori_loop(0, n, lambda i, a: jnp.cos(a), jnp.zeros(()))
    return f(x + 0 * zero)

N_FEW, N_MANY = 2, 30_000_000

calls = {
    "eager": lambda x: f(x),
    "eager, large": lambda x: f(large)[:4],
    "jit": jax.jit(f),
    "gradient, forward": jax.jit(lambda x: jax.grad(lambda x: f(x).sum())(x) * x),
    "gradient, backward": jax.jit(lambda x: jax.grad(lambda x: g(x).sum())(x) * x),
    "eager gradient": lambda x: jax.grad(lambda x: g(x).sum())(x) * x,
    "large eager gradient": lambda x: jax.grad(lambda x: g(x).sum())(large)[:4] * x,
    "scan": jax.jit(lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=2)[0] / 2),
    "while_loop": jax.jit(lambda x: jax.lax.while_loop(lambda c: f(c).sum() < 40, f, x) / 2),
    "a loop that torch's result ends": jax.jit(lambda x: x + jax.lax.while_loop(lambda c: c.sum() < 6, f, x / 2)),
    "inside of two calls": jax.jit(lambda x: f(f(x)) / 2),
    "before torch is called": at_once,
}

def attempt(call, first):
    global armed
    if not first:
        np.testing.assert_allclose(call(x), 2 * x)
    armed, begin = True, time.monotonic()
    try:
        jax.block_until_ready(call(x))
        return "no interrupt"
    except KeyboardInterrupt:
        pass
    armed = False
    seconds = time.monotonic() - begin
    for _ in range(3):
        np.testing.assert_allclose(call(x), 2 * x)
    return "interrupted" if seconds < 30 else f"interrupted after {seconds} s"

results = {}
for name, call in calls.items():
    for first in (True, False):
        try:
            results[f"{name}, {'first' if first else 'later'} call"] = attempt(call, first)
        except BaseException as error:
            results[f"{name}, {'first' if first else 'later'} call"] = f"{type(error).__name__}: {error}"
            armed = False
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def interrupted():
    return json.loads(run(INTERRUPTED))


@pytest.mark.exhaustive
@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize("where", re.findall(r'^    "(.*)": ', INTERRUPTED, re.MULTILINE))
def test_ctrl_c_while_torch_runs_is_a_keyboard_interrupt(interrupted, where, when):
    """In bounded time, from whatever it is that calls torch, and the next call is right."""
    assert interrupted[f"{where}, {when} call"] == "interrupted"


BACKGROUND = """
import os, signal, threading, time
import jax, jax.numpy as jnp, numpy as np, torch
from pytorch2jax import torch2jax

begun = threading.Event()

def slow(x):
    if not isinstance(x, torch._subclasses.FakeTensor):
        begun.set()
        time.sleep(2)
    return 2 * x

def interrupt():
    begun.wait()
    os.kill(os.getpid(), signal.SIGINT)

@jax.jit
def not_yet(a):
    return jax.lax.fori_loop(0, 50, lambda i, a: jnp.cos(a @ a), a)

f, big = jax.jit(torch2jax(slow)), jnp.ones((300, 300))
threading.Thread(target=interrupt, daemon=True).start()
begin = time.monotonic()
try:
    f(not_yet(big)).block_until_ready()
except KeyboardInterrupt:
    assert time.monotonic() - begin < 30
    np.testing.assert_allclose(f(jnp.ones(3)), 2.0)
    np.testing.assert_allclose(f(big), 2.0)
    print("done")
"""


@pytest.mark.exhaustive
def test_ctrl_c_while_xlas_thread_runs_torch():
    assert run(BACKGROUND) == "done\n"


RAISED = """
import jax, jax.numpy as jnp, torch
from pytorch2jax import torch2jax
import pytest

raised = None

def fn(x):
    if raised and not isinstance(x, torch._subclasses.FakeTensor):
        raise raised
    return 2 * x

f = torch2jax(fn)
for x in (jnp.ones(3), jnp.ones(2_000_000)):
    raised = SystemExit(3)
    with pytest.raises(SystemExit, match="3"):
        f(x)
    raised = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        f(x)
    raised = None
    assert f(x)[0] == 2
raised = SystemExit(3)
for call in (jax.jit(f), jax.jit(jax.grad(lambda x: f(x).sum()))):
    for _ in range(2):
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="raised SystemExit: 3"):
            call(jnp.ones(3)).block_until_ready()
print("done")
"""


def test_exits_that_torch_raises():
    assert run(RAISED) == "done\n"


IN_FLIGHT = """
import sys, threading, time
import jax, jax.numpy as jnp, torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pytorch2jax import torch2jax

begun = threading.Event()

def slow(x):
    if not isinstance(x, torch._subclasses.FakeTensor):
        begun.set()
        time.sleep(0.3)
    return torch.sin(x)

f = jax.jit(torch2jax(slow))
gradient = jax.jit(jax.grad(lambda x: f(x).sum()))
big = jnp.ones((300, 300))

@jax.jit
def not_yet(a):
    return jax.lax.fori_loop(0, 50, lambda i, a: jnp.cos(a @ a), a)

def endless():
    while True:
        gradient(big)

def on_devices(x):
    mesh = jax.make_mesh((jax.device_count(),), ("i",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((8 * 64, 64)), NamedSharding(mesh, P("i")))
    local = lambda x: f(f(x) + jax.lax.psum(x, "i"))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("i"), out_specs=P("i")))(x)

match sys.argv[1]:
    case "not waited for":
        f(big), gradient(big)
        kept = [f(not_yet(big + i)) for i in range(4)]
    case "dropped":
        f(big), gradient(big)
        for i in range(4):
            gradient(not_yet(big + i))
    case "begun":
        f(big)
        begun.clear()
        f(not_yet(big))
        begun.wait()
    case "daemons":
        for _ in range(4):
            threading.Thread(target=endless, daemon=True).start()
        begun.wait()
    case "devices":
        on_devices(big)
        on_devices(big)
print("done")
"""


@pytest.mark.parametrize("calls", some(re.findall(r'^    case "(.*)":', IN_FLIGHT, re.MULTILINE), ["begun"]))
def test_the_interpreter_exits_with_calls_in_flight(calls):
    assert run(IN_FLIGHT, calls, devices=N if calls == "devices" else 1) == "done\n"


# -- eight devices --------------------------------------------------------------------------------------------

SQUARE = jnp.linspace(-1.0, 1.0, 16).reshape(4, 4)
ROWS = jnp.linspace(-1.0, 1.0, 2 * N * 4).reshape(2 * N, 4)
NEXT = [(i, (i + 1) % N) for i in range(N)]


def layer(x, w):
    return torch.tanh(x @ w)


def other(x, w):
    return torch.sin(x) @ w.T


def jax_layer(x, w):
    return jnp.tanh(x @ w)


def jax_other(x, w):
    return jnp.sin(x) @ w.T


def reduced(f, g, x, w):
    y = f(x, w)
    return g(y - jax.lax.psum(y, "i") / N, w) + jax.lax.psum(f(y, w).sum(), "i")


def gathered(f, g, x, w):
    everyone = jax.lax.all_gather(f(x, w), "i", tiled=True)
    return g(everyone, w)[:2] * jax.lax.psum(x, "i")


def permuted(f, g, x, w):
    for _ in range(3):
        x = g(jax.lax.ppermute(f(x, w), "i", NEXT), w)
    return x


def scanned(f, g, x, w):
    def step(c, _):
        c = f(c, w) + jax.lax.ppermute(g(c, w), "i", NEXT)
        return c, jax.lax.psum(c.sum(), "i")

    c, sums = jax.lax.scan(step, x, length=4)
    return c * sums.sum()


def branched(f, g, x, w):
    """Some devices take one branch while the others take the other one.

    What all devices share varies before that: else JAX sums its gradient inside of the branches, and waits for ever.
    """
    w = jax.lax.pcast(w, "i", to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(w, "i")
    y = jax.lax.cond(jax.lax.axis_index("i") % 2 == 0, lambda x: f(x, w), lambda x: g(g(x, w), w), x)
    return y + jax.lax.psum(y, "i")


def looped(f, g, x, w):
    """As many steps as all devices together want, by a collective in the condition."""

    def goes_on(state):
        x, n = state
        return (jax.lax.pmax(jnp.abs(f(x, w)).max(), "i") > 1e-3) & (n < 20)

    def step(state):
        x, n = state
        return f(x, w) / 2 + jax.lax.ppermute(g(x, w), "i", NEXT) / 8, n + 1

    x, n = jax.lax.while_loop(goes_on, step, (x, 0))
    return x + n


MESH = jax.make_mesh((N,), ("i",), axis_types=(AxisType.Auto,), devices=DEVICES)


def on_devices(body, f, g):
    return jax.shard_map(lambda x, w: body(f, g, x, w), mesh=MESH, in_specs=(P("i"), P()), out_specs=P("i"))


def value(body, f, g):
    return jax.jit(on_devices(body, f, g))


def gradients(body, f, g):
    mapped = on_devices(body, f, g)
    return jax.jit(jax.value_and_grad(lambda x, w: (mapped(x, w) ** 2).sum(), argnums=(0, 1)))


@pytest.mark.parametrize("tape", [True, False])
@pytest.mark.parametrize("body", [reduced, gathered, permuted, scanned, branched])
def test_gradients_with_collectives_around_torch_on_devices(body, tape):
    expected = gradients(body, jax_layer, jax_other)(ROWS, SQUARE)
    with use_tape(tape):
        call = gradients(body, torch2jax(layer), torch2jax(other))
        for _ in range(3):
            same(call(ROWS, SQUARE), expected)
    assert len(TAPE) == 0


def test_a_while_loop_with_collectives_on_devices():
    expected = value(looped, jax_layer, jax_other)(ROWS, SQUARE)
    call = value(looped, torch2jax(layer), torch2jax(other))
    for _ in range(3):
        same(call(ROWS, SQUARE), expected)


@pytest.mark.parametrize("rows", [2, 256])
def test_two_threads_run_a_program_each_on_devices(rows):
    """Small calls run in XLA's threads, large ones in the worker; both wait for each other's collectives."""
    x, w = jnp.tile(ROWS, (rows // 2, 8)), jnp.tile(SQUARE, (8, 8)) / 8
    x = jax.device_put(x, NamedSharding(MESH, P("i")))
    bodies = (reduced, permuted)
    calls = [gradients(body, torch2jax(layer), torch2jax(other)) for body in bodies]
    expected = [jax.block_until_ready(call(x, w)) for call in calls]  # in sequence

    def work(call):
        return [jax.block_until_ready(call(x, w)) for _ in range(10)]

    for results, right in zip(in_threads(*[lambda c=c: work(c) for c in calls]), expected, strict=True):
        for result in results:
            same(result, right)


def test_the_number_of_threads_of_a_training_step_on_devices():
    """Twice the cores for torch (its own team and the worker's), and no more with more steps or callers."""
    net = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Tanh(), torch.nn.Linear(256, 256)).double()
    apply, params = convert_pytnn_to_jax(net)
    x = jax.device_put(jnp.ones((N * 64, 256)), NamedSharding(MESH, P("i")))
    params = jax.device_put(params, NamedSharding(MESH, P()))

    def training_step(apply):
        def local(params, x):
            gradients = jax.grad(lambda p: (apply(p, x) ** 2).mean())(params)
            return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients)

        return jax.jit(jax.shard_map(local, mesh=MESH, in_specs=(P(), P("i")), out_specs=P()))

    def train(step):
        p = params
        for _ in range(10):  # JAX itself hangs where several threads dispatch collectives without waiting
            p = jax.block_until_ready(step(p, x))
        return p

    def threads():
        return len(os.listdir("/proc/self/task"))

    def in_jax(params, x):
        for layer in (params["0"], params["2"]):
            x = jnp.tanh(x @ layer["weight"].T + layer["bias"])
        return x

    train(training_step(in_jax))
    before, step, counts = threads(), training_step(apply), []
    for _ in range(3):
        train(step)
        counts.append(threads())
    in_threads(*[lambda: counts.append(train(step) and threads())] * 4)
    counts.append(threads())
    assert max(counts) - before <= 2 * os.cpu_count() + 4 + 4  # XLA starts some late; four that call


# -- found in use -----------------------------------------------------------------------------------------------


def test_forward_mode_in_several_threads():
    """Torch counts the levels of forward mode in a global variable; a thread lost its tangents to another one."""

    def fn(x):
        for _ in range(20):
            x = torch.tanh(x @ x)
        return x.sum()

    f = torch2jax(fn)
    push = jax.jit(lambda x: jax.jvp(f, (x,), (x,))[1])
    arrays = [jnp.linspace(0.1, 0.2 * i, 100).reshape(10, 10) for i in range(1, 5)]
    expected = [float(push(x)) for x in arrays]
    wrong = []

    def work(i):
        for _ in range(50):
            if abs(float(push(arrays[i])) - expected[i]) > 1e-9 * abs(expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


FAILING_ON_ONE_DEVICE = """
import jax, jax.numpy as jnp
from pytorch2jax import torch2jax
from jax.sharding import AxisType, PartitionSpec as P

def fn(x):
    if float(x.sum()) > 2:
        raise ValueError("on one of them")
    return x * 2

f = torch2jax(fn, output_shapes=jax.ShapeDtypeStruct((2,), jnp.float32))
mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
x = jnp.array([0, 0, 0, 0, 0, 0, 9, 9], jnp.float32)
g = jax.jit(jax.shard_map(lambda x: jax.lax.psum(f(x), "i"), mesh=mesh, in_specs=P("i"), out_specs=P()))
g(x).block_until_ready()
"""


@pytest.mark.exhaustive
def test_an_error_on_one_of_several_devices_is_told_before_xla_ends_the_process():
    """XLA lets the others wait for the one that is missing, and then aborts."""
    flags = "--xla_force_host_platform_device_count=4 --xla_cpu_collective_call_terminate_timeout_seconds=1"
    flags += " --xla_cpu_collective_call_warn_stuck_timeout_seconds=1"
    done = subprocess.run(
        [sys.executable, "-c", FAILING_ON_ONE_DEVICE],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "ValueError: on one of them" in done.stderr
    assert "This was on one of 4 devices" in done.stderr


ENDLESS_ON_DEVICES = """
import os, signal, threading
import jax, jax.numpy as jnp, torch
from pytorch2jax import torch2jax
from jax.sharding import AxisType, PartitionSpec as P

signal.signal(signal.SIGINT, signal.default_int_handler)

def fn(x):
    if not isinstance(x, torch._subclasses.FakeTensor) and not armed:
        armed.append(threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)))
        armed[0].start()
    return x * 0.5

armed, f = [], torch2jax(fn)
mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))

def loop(x):
    return jax.lax.while_loop(lambda c: jax.lax.psum(c.sum(), "i") > -1, f, x)

g = jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=False))
jax.block_until_ready(g(jnp.ones(8)))
"""


@pytest.mark.exhaustive
def test_an_interrupted_program_with_collectives_ends():
    done = subprocess.run(
        [sys.executable, "-c", ENDLESS_ON_DEVICES],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode in (130, -2), (done.returncode, done.stderr[-2000:])
    assert "KeyboardInterrupt" in done.stderr
    assert "Fatal Python error" not in done.stderr
