"""Nothing grows: memory, functions that XLA can call, graphs on the tape; and what a fork, a copy and a pickle get.

`PYTORCH2JAX_ENDURANCE` multiplies the number of calls; `make endurance` runs ten times as many.
"""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import some
from flax import nnx

from pytorch2jax import (
    ConversionError,
    _ffi,
    convert_pytnn_to_equinox,
    convert_pytnn_to_flax,
    convert_pytnn_to_jax,
    convert_pytnn_to_nnx,
    torch2jax,
)
from pytorch2jax._program import Program
from pytorch2jax._tape import TAPE

TIMES = int(os.environ.get("PYTORCH2JAX_ENDURANCE", "1"))
X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


def resident_bytes():
    """Memory of this process that is in use."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles():
    for _ in range(3):
        gc.collect()
    programs = sum(issubclass(type(o), Program) for o in gc.get_objects())
    return {
        "functions for XLA": _ffi.native().number_of_calls(),
        "graphs": len(TAPE),
        "programs": programs,
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
    }


def growth(run, times, *, warm):
    """Bytes by which a call grows the process, and what it leaves behind.

    Of four quarters of so many calls the one that grew least: what is kept for each call grows in all of them, what the
    allocator of a process with a past does now and then does not.
    """
    for _ in range(warm):
        run()
    before, resident = handles(), [resident_bytes()]
    for _ in range(4):
        for _ in range(times // 4):
            run()
        resident.append(resident_bytes())
    after = handles()
    grown = min(end - start for start, end in itertools.pairwise(resident))
    return grown / (times // 4), {k: (before[k], after[k]) for k in before if after[k] > before[k]}


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()


def call_of(name):
    apply, params = convert_pytnn_to_jax(model())
    f = torch2jax(lambda x: torch.sin(x).exp())
    loss = lambda p, x: (apply(p, x) ** 2).sum()  # noqa: E731
    calls = {
        "jitted": (jax.jit(f), X),
        "eager": (f, X),
        "large eager": (f, jnp.ones(300_000)),
        "jitted gradient": (jax.jit(jax.grad(loss)), params, X),
        "eager gradient": (jax.grad(loss), params, X),
        "value and gradient": (jax.jit(jax.value_and_grad(loss)), params, X),
        "forward mode": (jax.jit(lambda x: jax.jvp(f, (x,), (x,))), X),
        "vmap": (jax.jit(jax.vmap(f)), X),
        "pullback that is dropped": (lambda x: jax.vjp(f, x)[0], X),
        "jitted pullback that is dropped": (jax.jit(lambda x: jax.vjp(f, x)), X),
    }
    fn, *arguments = calls[name]
    return lambda: jax.block_until_ready(fn(*arguments))


CALLS = {
    "jitted": 20_000,
    "eager": 10_000,
    "large eager": 300,
    "jitted gradient": 10_000,
    "eager gradient": 300,
    "value and gradient": 5_000,
    "forward mode": 2_000,
    "vmap": 5_000,
    "pullback that is dropped": 300,
    "jitted pullback that is dropped": 2_000,
}


@pytest.mark.parametrize("name", some(CALLS, ["jitted"]))
def test_calls(name):
    times = CALLS[name] * TIMES
    grown, left = growth(call_of(name), times, warm=times // 4)
    assert left == {}
    # A few pages that the allocator keeps, and less than anything that could be kept for a call.
    assert grown * times // 2 < 4_000_000 + 20 * times


@pytest.mark.exhaustive
def test_calls_that_fail():
    def fails(x):
        if x.sum() > 0:
            raise KeyError("always")
        return x

    f = torch2jax(fails, -X - 2)
    calls = [f, jax.jit(f), jax.grad(lambda x: f(x).sum()), jax.jit(jax.grad(lambda x: f(x).sum()))]

    def run():
        for call in calls:
            with pytest.raises(Exception, match="always"):
                jax.block_until_ready(call(X + 2))

    grown, left = growth(run, 100 * TIMES, warm=50)
    assert left == {}
    assert grown * 50 * TIMES < 4_000_000


@pytest.mark.exhaustive
def test_conversions():
    def run():
        apply, params = convert_pytnn_to_jax(model())
        apply(params, X)

    grown, left = growth(run, 100 * TIMES, warm=20)
    assert left == {}
    assert grown < 40_000


@pytest.mark.exhaustive
def test_traces():
    """The same function, traced and compiled anew: by new shapes, and by new static values."""
    f = torch2jax(lambda x, k: torch.sin(x) * k)
    state = {"n": 0}

    def run():
        state["n"] += 1
        jax.jit(lambda x: f(x, state["n"]))(jnp.ones(state["n"] % 40 + 1))
        if state["n"] % 25 == 0:
            jax.clear_caches()

    grown, left = growth(run, 100 * TIMES, warm=260)  # a function keeps its last 256 programs
    assert left == {}
    assert grown < 60_000


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("differentiate", [True, False])
def test_functions_are_freed(jit, differentiate):
    class Function:
        def __call__(self, x):
            return torch.sin(x)

    function = Function()
    wrapped = torch2jax(function)
    call = jax.grad(lambda x, f=wrapped: f(x).sum()) if differentiate else wrapped
    del wrapped
    if jit:
        call = jax.jit(call)
    jax.block_until_ready(call(X))
    gone = weakref.ref(function)
    del function, call
    jax.clear_caches()
    for _ in range(3):
        gc.collect()
    assert gone() is None


@pytest.mark.parametrize("convert", [convert_pytnn_to_jax, convert_pytnn_to_flax])
def test_modules_are_freed(convert):
    net = model()
    converted, params = convert(net)
    kept = weakref.ref(net)
    if convert is convert_pytnn_to_jax:
        call = jax.jit(converted)
    else:
        call = jax.jit(lambda p, x, c=converted: c().apply({"params": p}, x))
    jax.block_until_ready(call(params, X))
    del net, converted, params, call
    jax.clear_caches()
    for _ in range(3):
        gc.collect()
    assert kept() is None


# -- copies, pickles, forks --------------------------------------------------------------------------------------


def converted():
    apply, params = convert_pytnn_to_jax(model())
    linen, _ = convert_pytnn_to_flax(model())
    m, e = convert_pytnn_to_nnx(model()), convert_pytnn_to_equinox(model())
    return {
        "jax": (apply, lambda f: f(params, X)),
        "linen class": (linen, lambda c: c().apply({"params": params}, X)),
        "linen instance": (linen(), lambda c: c.apply({"params": params}, X)),
        "nnx": (m, lambda m: m(X)),
        "equinox": (e, lambda e: e(X)),
        "torch2jax": (torch2jax(torch.sin), lambda f: f(X)),
    }


@pytest.mark.parametrize("name", ["jax", "linen class", "linen instance", "nnx", "equinox", "torch2jax"])
def test_copies_and_pickles(name):
    thing, use = converted()[name]
    expected = use(thing)
    for duplicate in (copy.deepcopy(thing), copy.copy(thing)):
        np.testing.assert_array_equal(use(duplicate), expected)
    with pytest.raises((ConversionError, pickle.PicklingError, AttributeError, TypeError), match=r"pickle|Can't"):
        pickle.dumps(thing)
    np.testing.assert_array_equal(use(thing), expected)


def test_a_copy_is_independent():
    m = convert_pytnn_to_nnx(model())
    duplicate = copy.deepcopy(m)
    nnx.update(duplicate, jax.tree.map(jnp.zeros_like, nnx.state(duplicate)))
    assert float(jnp.abs(m(X)).sum()) > 0
    assert float(jnp.abs(duplicate(X)).sum()) == 0
    e = convert_pytnn_to_equinox(model())
    zeros = jax.tree.map(lambda a: a * 0 if eqx.is_array(a) else a, copy.deepcopy(e))
    assert float(jnp.abs(e(X)).sum()) > 0
    assert float(jnp.abs(zeros(X)).sum()) == 0


FORK = """
import os, sys, warnings
warnings.simplefilter("ignore")
import jax, jax.numpy as jnp, torch
from pytorch2jax import ForkError, torch2jax
f = torch2jax(torch.sin)
if sys.argv[1] == "late":
    f(jnp.ones(3))
    x = jnp.ones(3)
pid = os.fork()
if pid == 0:
    torch.sin(torch.ones(3))
    if sys.argv[1] == "late":
        try:
            f(x)
        except ForkError as error:
            os.write(1, str(error).encode())
    else:
        os.write(1, str(f(jnp.ones(3))).encode())
    os._exit(0)
os.waitpid(pid, 0)
print(f(jnp.ones(3)))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("when", ["early", "late"])
def test_forks(when):
    result = subprocess.run(
        [sys.executable, "-c", FORK, when], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    if when == "late":
        assert "Start processes with the method 'spawn'" in result.stdout
    else:
        assert result.stdout.count("0.841") == 6
