"""What a function keeps from one call to the next, outside of its module: nothing of the trial runs, and no values."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from pytorch2jax import CaptureError, InferenceError, StateError, convert_pytnn_to_jax, t2j, torch2jax

BACKENDS = pytest.mark.parametrize("backend", ["torch", "xla"])


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)


class CachedMethod(Base):
    @functools.lru_cache  # noqa: B019
    def transposed(self):
        return self.linear.weight.t()

    def forward(self, x):
        return x @ self.transposed()


class CachedInClass(Base):
    cache: dict = {}  # noqa: RUF012

    def forward(self, x):
        if "w" not in CachedInClass.cache:
            CachedInClass.cache["w"] = self.linear.weight * 1
        return x @ CachedInClass.cache["w"]


@BACKENDS
@pytest.mark.parametrize("module", [CachedMethod, CachedInClass])
def test_values_of_parameters_that_are_kept_are_refused(module, backend):
    apply, params = convert_pytnn_to_jax(module(), backend=backend)
    holder = "the cache of `CachedMethod.transposed`" if module is CachedMethod else "a dict, under 'w'"
    for call in (apply, jax.jit(apply), apply):
        with pytest.raises(StateError, match=f"in {holder}, and uses it in the next call"):
            call(params, jnp.ones((2, 3), jnp.float32))
    assert CachedInClass.cache == {}


def memo(fn):
    """A function of an argument and a dict, as one of the argument."""
    cache = {}
    return lambda x: fn(x, cache), cache


def _by_default(x, cache):
    return cache.setdefault("x", x) * 1


def _once(x, cache):
    if "y" not in cache:
        cache["y"] = x * 2
    return x + cache["y"]


def _running(x, cache):
    cache["mean"] = 0.9 * cache.get("mean", torch.zeros(3)) + 0.1 * x
    return x - cache["mean"]


def _returned(x, cache):
    before = cache.get("last", x)
    cache["last"] = x
    return before


@BACKENDS
@pytest.mark.parametrize("fn", [_by_default, _once, _running, _returned])
def test_values_of_arguments_that_are_kept_are_refused(fn, backend):
    function, cache = memo(fn)
    with pytest.raises(StateError, match="a dict, under '"):
        torch2jax(function, backend=backend)(jnp.ones(3, jnp.float32))
    assert cache == {}


@BACKENDS
def test_tables_that_depend_on_sizes_alone_may_be_kept(backend):
    tables = {}

    @functools.lru_cache
    def angles(n):
        return torch.arange(n) * 0.5

    def fn(x):
        n = x.shape[0]
        if n not in tables:
            tables[n] = torch.arange(n).to(x.dtype)
        return x * tables[n] + angles(n).type_as(x)

    f = torch2jax(fn, backend=backend)
    for call in (f, jax.jit(f), f):
        for scale in (1.0, 2.0):
            np.testing.assert_allclose(call(jnp.full(3, scale)), scale * np.arange(3) + 0.5 * np.arange(3))
    assert not isinstance(tables[3], torch._subclasses.FakeTensor)
    np.testing.assert_array_equal(tables[3], [0, 1, 2])
    np.testing.assert_array_equal(angles(3), [0, 0.5, 1])


@BACKENDS
@pytest.mark.parametrize("maxsize", [None, 128, 3])
@pytest.mark.parametrize("typed", [False, True])
def test_other_entries_of_an_lru_cache_stay(backend, maxsize, typed):
    computed = []

    @functools.lru_cache(maxsize=maxsize, typed=typed)
    def table(n, name="a", *, scale=1.0):
        computed.append((n, name, scale))
        return {"table": (torch.arange(n) * scale, name)}

    mine = [table(7), table(7, "b"), table(8, scale=2.0)]
    f = torch2jax(lambda x: x + table(x.shape[0], scale=0.5)["table"][0].to(x.dtype), backend=backend)
    for call in (f, jax.jit(f)):
        np.testing.assert_allclose(call(jnp.zeros(3)), 0.5 * np.arange(3))
    if maxsize == 3:  # the first one had to go
        mine = mine[1:]
    else:
        assert table(7) is mine.pop(0)
    assert table(7, "b") is mine[0]
    assert table(8, scale=2.0) is mine[1]
    assert computed.count((7, "b", 1.0)) == computed.count((8, "a", 2.0)) == 1
    assert not isinstance(table(3, scale=0.5)["table"][0], torch._subclasses.FakeTensor)
    np.testing.assert_array_equal(table(3, scale=0.5)["table"][0], [0, 0.5, 1])


def into_a_slot(kept, x):
    kept["slot"][0] = x.detach()


def into_a_dict(kept, x):
    kept["dict"]["last"] = x * 2


def to_a_list(kept, x):
    kept["list"].append(x * 1)


def to_a_deque(kept, x):
    kept["deque"].append(x)


@BACKENDS
@pytest.mark.parametrize("keep", [into_a_slot, into_a_dict, to_a_list, to_a_deque])
def test_what_else_is_in_a_container_stays_there(keep, backend):
    """With torch's kernels, one call leaves what it leaves in torch; a translated function does not run in a call."""
    kept = {"slot": [None, "keep"], "dict": {"a": 1}, "list": [7], "deque": collections.deque([7])}
    expected = {"slot": [None, "keep"], "dict": {"a": 1}, "list": [7], "deque": collections.deque([7])}

    def fn(x):
        keep(kept, x)
        return x * 2

    f = torch2jax(fn, backend=backend)
    np.testing.assert_array_equal(f(jnp.ones(3)), [2.0, 2.0, 2.0])
    if backend == "torch":
        keep(expected, torch.ones(3))
    assert kept.keys() == expected.keys()
    for name, container in kept.items():
        items = container.items() if isinstance(container, dict) else enumerate(container)
        items = {k: v for k, v in items if not (backend == "xla" and v is None and name in ("list", "deque"))}
        assert not any(isinstance(v, torch._subclasses.FakeTensor) for v in items.values())
    assert kept["slot"][1] == "keep"
    assert kept["dict"]["a"] == 1
    assert kept["list"][0] == kept["deque"][0] == 7
    if backend == "torch":
        assert len(kept["slot"]) == 2
        assert sum(isinstance(v, torch.Tensor) for v in (*kept["slot"], *kept["dict"].values())) == (
            keep in (into_a_slot, into_a_dict)
        )


class Accumulates(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.state = torch.zeros(2, 3)

    def forward(self, x):
        self.state = self.linear(x) + self.state
        if float(x.sum()) > 100:
            return x
        return self.state * 2


class Overwrites(Accumulates):
    def forward(self, x):
        self.state = self.linear(x) * 2
        if float(x.sum()) > 100:
            return x
        return self.state * 2


def test_tensors_in_attributes_of_scripted_modules():
    torch.manual_seed(0)
    x = torch.ones(2, 3)
    apply, params = convert_pytnn_to_jax(torch.jit.script(Accumulates()))
    for call in (apply, jax.jit(apply)):
        with pytest.raises(StateError, match="uses it in the next call"):
            call(params, t2j(x))
    model = Overwrites()
    apply, params = convert_pytnn_to_jax(torch.jit.script(model))
    for _ in range(3):
        np.testing.assert_allclose(apply(params, t2j(x)), model(x).detach(), rtol=1e-6)
        other = jax.tree.map(lambda p: 2 * p, params)
        np.testing.assert_allclose(apply(other, t2j(x)), 2 * model(x).detach(), rtol=1e-6)
    gradient = jax.grad(lambda p: apply(p, t2j(x)).sum())(params)
    np.testing.assert_allclose(gradient["linear"]["bias"], [8.0, 8.0, 8.0])


# -- places from which nothing can be taken away -----------------------------------------------------------------


class Keeper:
    last = None


def in_a_class(x):
    if Keeper.last is None:
        Keeper.last = x * 1
    return x + Keeper.last


def in_an_object(x, keeper=Keeper()):  # noqa: B008
    if keeper.last is None:
        keeper.last = x * 1
    return x + keeper.last


VARIABLE = contextvars.ContextVar("VARIABLE", default=None)


def in_a_context(x):
    if VARIABLE.get() is None:
        VARIABLE.set(x * 1)
    return x + VARIABLE.get()


def in_a_cell():
    last = None

    def fn(x):
        nonlocal last
        if last is None:
            last = x * 1
        return x + last

    return fn


@BACKENDS
@pytest.mark.parametrize("make", [lambda: in_a_class, lambda: in_an_object, lambda: in_a_context, in_a_cell])
def test_what_stays_of_a_trial_run_is_never_computed_with(make, backend):
    """A fake tensor has no memory: an operator that takes it for a real one reads somebody else's, or crashes."""
    f, x = torch2jax(make(), backend=backend), jnp.ones(3)
    first_token = VARIABLE.set(None)
    try:
        with pytest.raises(InferenceError, match="keeps tensors from one call to the next"):
            f(x)
        for call in (f, jax.jit(f), jax.grad(lambda x: f(x).sum()), torch2jax(f.__wrapped__)):
            with pytest.raises(InferenceError, match=r"left somewhere \(a global object.*delete it from there"):
                call(x)
    finally:
        VARIABLE.reset(first_token)
        Keeper.last = None
        in_an_object.__defaults__[0].__dict__.clear()


@BACKENDS
def test_a_trial_run_that_fails_half_way_leaves_nothing(backend):
    kept, recent = {}, collections.deque(maxlen=4)

    def fn(x):
        if "table" not in kept:
            kept["table"] = torch.arange(x.shape[0]).to(x.dtype)
        recent.append(x * 2)
        return x * kept["table"] + float(x.sum())  # which fake tensors do not have

    f = torch2jax(fn, backend="torch")
    with pytest.raises(CaptureError) if backend == "xla" else contextlib.nullcontext():
        torch2jax(fn, backend=backend)(jnp.ones(3))
    for x in (jnp.ones(3), 2 * jnp.ones(3)):
        for call in (f, jax.jit(f)):
            np.testing.assert_allclose(call(x), x * np.arange(3) + 3 * x[0])
    assert all(type(t) is torch.Tensor for t in [*kept.values(), *recent])


@BACKENDS
def test_a_declared_function_leaves_nothing_in_its_caches(backend):
    tables = {}

    def fn(x):
        if x.shape[0] not in tables:
            tables[x.shape[0]] = torch.arange(x.shape[0]).to(x.dtype)
        return x * tables[x.shape[0]]

    for wrapped in (torch2jax(fn, output_shapes=jax.ShapeDtypeStruct((3,), jnp.ones(3).dtype), backend=backend), fn):
        call = wrapped if wrapped is not fn else torch2jax(fn, backend="torch")
        for run in (jax.jit(call), call):
            np.testing.assert_allclose(run(jnp.ones(3)), np.arange(3))
        assert all(type(t) is torch.Tensor for t in tables.values())
