"""The tape: torch's forward pass runs once for a gradient, and nothing is wrong or left over for it."""

from __future__ import annotations

import collections
import gc
import os
import subprocess
import sys
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import assert_same_numbers, one_in
from torch import nn
from torch.utils.checkpoint import checkpoint

from pytorch2jax import Pytorch2JaxError, _bound, _tape, convert_pytnn_to_jax, t2j, torch2jax, use_tape
from pytorch2jax._tape import TAPE, Tape

FAILED = (ValueError, jax.errors.JaxRuntimeError)  # which of them depends on how JAX dispatches a call
X, W = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), jnp.linspace(0.1, 1.0, 8).reshape(4, 2)


@pytest.fixture(autouse=True)
def _tape_is_on():
    gc.collect()
    with use_tape(True):
        yield


@pytest.fixture
def kept(monkeypatch):
    """Counts the graphs that are kept."""
    counts = collections.Counter()
    keep = TAPE.keep

    def counting(entry):
        counts["kept"] += 1
        return keep(entry)

    monkeypatch.setattr(TAPE, "keep", counting)
    return counts


class Counted:
    """A torch function that counts its runs."""

    def __init__(self, fn):
        self.fn = fn
        self.runs = 0

    def __call__(self, *tensors):
        self.runs += 1
        return self.fn(*tensors)

    def runs_in(self, call, *args):
        before = self.runs
        jax.block_until_ready(call(*args))
        return self.runs - before


def layer(x, w):
    return torch.tanh(x @ w).exp()


def jax_layer(x, w):
    return jnp.exp(jnp.tanh(x @ w))


def same(left, right):
    jax.tree.map(assert_same_numbers, left, right)


def loss_of(f):
    return lambda x, w: (f(x, w) ** 2).sum()


def through_scan(f):
    def loss(x, w):
        return jax.lax.scan(lambda c, _: (c + f(c, w).sum(), None), x, None, length=12)[0].sum()

    return loss


REVERSE = {
    "value and gradient": (lambda f: jax.value_and_grad(loss_of(f), argnums=(0, 1)), 1),
    "gradient": (lambda f: jax.grad(loss_of(f)), 1),
    "scan": (lambda f: jax.value_and_grad(through_scan(f), argnums=(0, 1)), 12),
    "gradient of vmap": (
        lambda f: jax.value_and_grad(lambda x, w: jax.vmap(f, in_axes=(0, None))(x, w).sum(), argnums=(0, 1)),
        1,
    ),
    "vmap of gradient": (lambda f: jax.vmap(jax.value_and_grad(loss_of(f)), in_axes=(0, None)), 1),
    "twice": (lambda f: jax.value_and_grad(lambda x, w: (f(x, w) * f(2 * x, w)).sum()), 2),
    "cond": (
        lambda f: jax.value_and_grad(lambda x, w: jax.lax.cond(x[0, 0] < 0, f, lambda x, w: f(-x, w), x, w).sum()),
        1,
    ),
    "inner jit": (lambda f: jax.value_and_grad(loss_of(jax.jit(f))), 1),
    "checkpoint": (lambda f: jax.value_and_grad(loss_of(jax.checkpoint(f))), 2),
}


@pytest.mark.parametrize("jit", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["jitted", "eager"])
@pytest.mark.parametrize("name", REVERSE)
def test_the_forward_pass_runs_once(name, jit):
    transform, runs = REVERSE[name]
    counted = Counted(layer)
    call = transform(torch2jax(counted))
    call = jax.jit(call) if jit else call
    for _ in range(3):  # traced; inputs of a scan found to move; more room made
        result = call(X, W)
    assert counted.runs_in(call, X, W) == runs
    assert len(TAPE) == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), result, transform(jax_layer)(X, W))
    with use_tape(False):
        same(call(X, W), result)
        if name != "checkpoint":
            assert counted.runs_in(call, X, W) == 2 * runs
    assert len(TAPE) == 0


def test_a_module_runs_once_for_a_gradient():
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)).double()
    runs = []
    net.register_forward_hook(lambda *_: runs.append(1))
    apply, params, state = convert_pytnn_to_jax(net, with_state=True)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            out, new = apply(params, state, X, rng=key, train=True)
            return (out**2).sum(), new

        return jax.value_and_grad(loss, has_aux=True)(params)

    step(params, state, jax.random.key(0))
    runs.clear()
    taped = step(params, state, jax.random.key(0))
    assert len(runs) == 1
    with use_tape(False):
        same(step(params, state, jax.random.key(0)), taped)


def test_a_vjp_that_is_called_twice_computes_the_second_time():
    counted = Counted(layer)
    out, pull = jax.vjp(torch2jax(counted), X, W)
    first = counted.runs
    one = pull(out)
    assert counted.runs == first
    same(pull(out), one)
    assert counted.runs == first + 1


class HoldsToken(torch.autograd.Function):
    """Its node holds an object for as long as it is there."""

    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2, None


def holding_tokens():
    """A function whose graphs each hold a token, and weak references to the tokens."""

    class Token:
        pass

    saved = []

    def fn(x):
        token = Token()
        saved.append(weakref.ref(token))
        return HoldsToken.apply(x, token)

    return fn, saved


def test_a_vjp_that_is_never_called_keeps_nothing():
    fn, saved = holding_tokens()
    _, pull = jax.vjp(torch2jax(fn), X)
    assert len(TAPE) == 1
    assert saved[-1]() is not None
    del pull
    gc.collect()
    assert len(TAPE) == 0
    assert saved[-1]() is None


def test_a_result_does_not_keep_the_graph():
    """A large result of an eager call is torch's own memory, without torch's graph."""
    fn, saved = holding_tokens()
    out, pull = jax.vjp(torch2jax(fn), jnp.ones((800, 800)))
    assert saved[-1]() is not None
    del pull
    gc.collect()
    assert saved[-1]() is None
    assert out[0, 0] == 2


def test_a_handle_that_the_garbage_collector_releases_while_the_tape_is_in_use():
    _, pull = jax.vjp(torch2jax(layer), X, W)
    with TAPE._lock:  # as in the middle of `keep`
        del pull
        gc.collect()
    assert len(TAPE) == 0


def test_pullbacks_out_of_jit_that_are_never_called_are_bounded():
    forward = jax.jit(lambda x: jax.vjp(torch2jax(layer), x, W))
    for _ in range(50):
        forward(X)
    assert len(TAPE) <= 8
    pulls = [forward(X + i / 20)[1] for i in range(20)]  # more than are kept
    ones = jnp.ones((3, 2))
    for i, pull in enumerate(pulls):
        expected = jax.vjp(jax_layer, X + i / 20, W)[1](ones)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), pull(ones), expected)


def test_forward_mode_leaves_nothing():
    f = torch2jax(layer)
    jax.jvp(f, (X, W), (X, W))
    jax.jit(lambda x: jax.jvp(f, (x, W), (x, W)))(X)
    jax.jit(jax.jacfwd(f))(X, W)
    _, push = jax.linearize(f, X, W)
    push(X, W)
    jax.jit(jax.hessian(lambda x: f(x, W).sum()))(X)
    assert len(TAPE) == 0


def test_the_forward_pass_of_a_checkpoint_keeps_no_graph(kept):
    f = torch2jax(layer)
    call = jax.jit(jax.grad(lambda x, w: jax.checkpoint(f)(jax.checkpoint(lambda x: f(x, w) @ w.T)(x), w).sum()))
    call(X, W)
    kept.clear()
    call(X, W)
    assert kept["kept"] == 2  # when it runs again, in the backward pass
    assert len(TAPE) == 0


def test_values_only_keep_no_graph(kept):
    f = torch2jax(layer)
    jax.jit(f)(X, W)
    jax.jit(lambda x: jax.vjp(f, x, W)[0])(X)  # the pullback is dead code
    assert kept["kept"] == 0


class Raises(torch.autograd.Function):
    """Its backward raises."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("not today")


def test_errors_leave_nothing():
    with pytest.raises(Pytorch2JaxError, match="not today"):
        jax.grad(lambda x: torch2jax(Raises.apply)(x).sum())(X)
    with pytest.raises(jax.errors.JaxRuntimeError, match="not today"):
        jax.jit(jax.grad(lambda x: torch2jax(Raises.apply)(x).sum()))(X)

    def wide(x):
        return x.sum(), torch.tensor(2**40)

    with jax.enable_x64(False), pytest.raises(Pytorch2JaxError, match="fit into"):
        jax.grad(lambda x: torch2jax(wide)(x)[0])(X.astype("float32"))
    assert len(TAPE) == 0


def test_what_torch_refuses_is_refused():
    def invalid(x):
        y = x.exp()
        z = y * y
        y.add_(1)
        return z

    for _ in range(2):  # with hooks and without
        with pytest.raises(Pytorch2JaxError, match="modified by an inplace operation"):
            jax.grad(lambda x: torch2jax(invalid)(x).sum())(X)
    assert len(TAPE) == 0


def sometimes(errors):
    """A function whose backward raises as many errors as there are in the list, one for each call."""

    class Sometimes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            if errors:
                raise errors.pop()
            return grad * 2

    return Sometimes.apply


def test_an_error_in_a_backward_pass_is_no_reason_to_give_the_tape_up():
    """Only what goes away without the tape is."""
    runs = []

    def fn(x):
        if not isinstance(x, torch._subclasses.FakeTensor):
            runs.append(1)
        return apply(x)

    errors = []
    apply, f = sometimes(errors), torch2jax(fn)
    gradient = jax.jit(jax.grad(lambda x: f(x).sum()))
    gradient(X).block_until_ready()
    errors += [ValueError("first"), ValueError("second")]  # with the tape, and without it
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="first"):
        gradient(X).block_until_ready()
    runs.clear()
    gradient(X).block_until_ready()
    assert len(runs) == 1
    errors.append(RuntimeError("with the tape only"))
    with pytest.warns(RuntimeWarning, match="could not use the graph of its forward pass .*with the tape only"):
        np.testing.assert_array_equal(gradient(X), 2 * np.ones_like(X))
    runs.clear()
    gradient(X).block_until_ready()
    assert len(runs) == 2


class KeepsTensors(torch.autograd.Function):
    """Keeps its input where no hook of autograd's sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.x**2 * grad


def keeps_tensors(x, w):
    return KeepsTensors.apply(x) @ w


def checkpointed(x, w):
    return checkpoint(layer, x, w, use_reentrant=False)


def reentrant(x, w):
    if not x.requires_grad:  # torch warns that there is nothing to do
        return layer(x, w)
    return checkpoint(layer, x, w, use_reentrant=True)


def functional_inside(x, w):
    return torch.func.grad(lambda x: (x @ w).sin().sum())(x)


def returns_inputs(x, w):
    return x, w.T, x[0], x @ w


@pytest.mark.parametrize("fn", [keeps_tensors, checkpointed, reentrant, functional_inside, returns_inputs])
def test_buffers_that_move(fn):
    """In a scan, XLA copies what the backward pass needs, and uses the memory for something else."""
    f = torch2jax(fn)

    def loss(x, w):
        def body(c, _):
            return c * 0.5 + sum(leaf.sum() for leaf in jax.tree.leaves(f(c, w))) / 100, c.sum()

        return jax.lax.scan(body, x, None, length=6)[0].sum()

    call = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    with use_tape(False):
        expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(X, W)
    for _ in range(4):
        same(call(X, W), expected)
    assert len(TAPE) == 0


def test_buffers_that_move_and_are_used_again():
    """As `test_buffers_that_move`, with the weights in the moving part, whose old memory XLA then writes to."""
    f = torch2jax(keeps_tensors)

    def loss(x, w):
        return jax.lax.scan(lambda w, s: (jnp.tanh(f(w, w) + s), w), w, jnp.arange(3.0))[0].sum()

    square = jnp.linspace(-0.4, 0.8, 9).reshape(3, 3)
    call = jax.jit(jax.grad(loss, argnums=1))
    with use_tape(False):
        expected = jax.jit(jax.grad(loss, argnums=1))(X, square)
    for _ in range(4):
        same(call(X, square), expected)


def test_a_checkpointed_module_runs_again_in_the_backward_pass_only():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4).double()
            self.runs = []

        def segment(self, x):
            self.runs.append(1)
            return self.linear(x).tanh()

        def forward(self, x):
            return checkpoint(self.segment, x, use_reentrant=False)

    net = Net()
    apply, params = convert_pytnn_to_jax(net)
    call = jax.jit(jax.grad(lambda p: (apply(p, X) ** 2).sum()))
    call(params)
    torch_x = torch.from_numpy(np.array(X))
    (net(torch_x) ** 2).sum().backward()
    np.testing.assert_allclose(call(params)["linear"]["weight"], net.linear.weight.grad, rtol=1e-10)


def test_few_graphs_are_kept_where_memory_is_short(monkeypatch):
    counted = Counted(layer)
    call = jax.jit(jax.grad(through_scan(torch2jax(counted))))
    for _ in range(3):
        expected = call(X, W)
    monkeypatch.setattr(_tape, "_memory_limit", lambda entry: 3 * entry.size)
    assert 12 < counted.runs_in(call, X, W) < 24
    same(call(X, W), expected)
    assert len(TAPE) == 0


def test_two_threads_in_flight():
    call = jax.jit(jax.grad(through_scan(torch2jax(layer))))
    expected = [call(X + i, W) for i in range(4)]
    wrong = []

    def work(i):
        for _ in range(50):
            if not np.array_equal(call(X + i, W), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert len(TAPE) == 0


def test_donated_parameters():
    net = torch.nn.Linear(4, 2).double()
    apply, params = convert_pytnn_to_jax(net)

    def step(params):
        grads = jax.grad(lambda p: (apply(p, X) ** 2).sum())(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    donating, plain = jax.jit(step, donate_argnums=0), jax.jit(step)
    donated, kept = jax.tree.map(jnp.copy, params), params
    for _ in range(20):
        donated, kept = donating(donated), plain(kept)
    same(donated, kept)


def test_a_donated_argument_of_an_eager_vjp():
    """The graph of an eager call shares memory with the arguments: donating one of them does not change it."""
    x = jnp.copy(X)
    expected = jax.vjp(jax_layer, X, W)[1](jnp.ones((3, 2)))
    _, pull = jax.vjp(torch2jax(layer), x, W)
    jnp.copy(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), pull(jnp.ones((3, 2))), expected)


def _wide(x, w):
    return torch.relu(x @ w.repeat(1, 40_000)).mean(1)  # its gradients are large


def _large(x, w):
    return torch.tanh(x.repeat(40_000, 1) @ w)


STRAIGHT = {
    "function": layer,
    "two outputs": lambda x, w: (torch.sin(x), x @ w),
    "an output without a graph": lambda x, w: (x @ w).detach() + w.sum() * 0,
    "depends on one": lambda x, w: x.exp(),
    "an input": lambda x, w: x,
    "wide": _wide,
    "large": _large,
    "checkpoint": lambda x, w: checkpoint(layer, x, w, use_reentrant=False),
}


@pytest.mark.parametrize("name", STRAIGHT)
def test_calls_after_the_first_one(name):
    """They take a shorter way."""
    fn = STRAIGHT[name]

    def total(out):
        return sum((o**2).sum() for o in (out if isinstance(out, tuple) else (out,)))

    step = jax.jit(jax.value_and_grad(lambda x, w: total(torch2jax(fn)(x, w)), argnums=(0, 1)))
    for scale in (1.0, 0.5, 2.0, -1.0):
        x, w = (torch.from_numpy(np.array(a * scale)).requires_grad_() for a in (X, W))
        value = total(fn(x, w))
        expected = torch.autograd.grad(value, (x, w), allow_unused=True, materialize_grads=True)
        got, grads = step(X * scale, W * scale)
        np.testing.assert_allclose(got, value.detach(), rtol=1e-12)
        for g, e in zip(grads, expected, strict=True):
            np.testing.assert_allclose(g, e, rtol=1e-12)


@pytest.mark.parametrize("width", [4, 600])
def test_calls_of_a_module_after_the_first_one(width, monkeypatch):
    straight = []
    call_straight = _bound.BoundFunction.call_straight
    monkeypatch.setattr(
        _bound.BoundFunction, "call_straight", lambda *args: straight.append(args) or call_straight(*args)
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, width)).double()
    apply, params = convert_pytnn_to_jax(model)
    step = jax.jit(jax.value_and_grad(lambda p, x: (apply(p, x) ** 2).sum()))
    for scale in (1.0, 0.5, 2.0):
        value = (model(torch.from_numpy(np.array(X * scale))) ** 2).sum()
        expected = torch.autograd.grad(value, list(model.parameters()))
        got, grads = step(params, X * scale)
        np.testing.assert_allclose(got, value.detach(), rtol=1e-12)
        for (path, _), e in zip(model.named_parameters(), expected, strict=True):
            module, name = path.split(".")
            np.testing.assert_allclose(grads[module][name], e, rtol=1e-10, atol=1e-12)
    assert len(straight) == 2


@pytest.mark.parametrize("differentiate", [False, True])
def test_a_module_that_changes_its_state_in_a_later_call(differentiate):
    calls = []

    class Sometimes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4, 2, dtype=torch.float64))
            self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))

        def forward(self, x):
            calls.append(1)
            if len(calls) == 4:
                self.seen = x.sum(0)[:2]
            return x @ self.weight

    apply, params, state = convert_pytnn_to_jax(Sometimes(), with_state=True)
    loss = lambda p, x: apply(p, state, x)[0].sum()  # noqa: E731
    step = jax.jit(jax.grad(loss) if differentiate else loss)
    step(params, X), step(params, X)
    assert len(calls) == 3  # one of them to infer
    with pytest.raises(FAILED, match="state.seen: changed by this call"):
        jax.block_until_ready(step(params, X))
    jax.block_until_ready(step(params, X))


def test_a_function_that_returns_something_else_in_a_later_call():
    calls = []

    def fn(x):
        calls.append(1)
        return x.sin() if len(calls) < 4 else x.sin().sum()

    step = jax.jit(jax.grad(lambda x: torch2jax(fn)(x).sum()))
    step(X), step(X)
    with pytest.raises(FAILED, match="expected torch.float64"):
        jax.block_until_ready(step(X))
    assert len(TAPE) == 0


@pytest.mark.parametrize(
    ("value", "on"),
    [("0", False), ("false", False), ("OFF", False), ("No", False), ("", True), ("1", True), (" on ", True)],
)
def test_the_environment_variable(value, on, monkeypatch):
    monkeypatch.setenv("PYTORCH2JAX_TAPE", value)
    assert Tape().enabled is on


def test_a_misspelt_environment_variable_is_an_error_at_import():
    environment = {**os.environ, "PYTORCH2JAX_TAPE": "flase"}
    command = [sys.executable, "-c", "import pytorch2jax"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "OptionError: PYTORCH2JAX_TAPE: expected 1, true, yes, on or 0, false, no, off" in done.stderr
    assert "'flase'" in done.stderr


# -- where tensors lie in memory ----------------------------------------------------------------------------------


def shifted(tensor, n_bytes):
    """A copy of a tensor that begins so many bytes behind a multiple of 64."""
    size = tensor.element_size()
    memory = torch.empty(tensor.numel() + 128 // size, dtype=tensor.dtype)
    start = (-memory.data_ptr() % 64 + n_bytes) // size
    copy = memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
    assert copy.data_ptr() % 64 == n_bytes
    return copy


@pytest.mark.parametrize("n_bytes", one_in(5, [4, 0, 8, 16, 32]))
@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: torch.tanh(x @ w),
        lambda x, w: torch.nn.functional.layer_norm(x @ w, (33,)).softmax(-1),
        lambda x, w: torch.nn.functional.conv1d(x.T[None], w.T[:, :, None]).relu().sum(-1),
        lambda x, w: torch.linalg.solve(x.mT @ x + torch.eye(17), w),
        lambda x, w: (x @ w).logsumexp(0).cumsum(0),
    ],
    ids=["matmul", "normalised", "convolution", "solve", "reductions"],
)
def test_results_do_not_depend_on_where_inputs_lie_but_for_rounding(fn, n_bytes):
    """On Intel, MKL's last bits depend on the alignment of memory, which the tape changes: so nobody promises bits."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator) for shape in ((29, 17), (17, 33)))
    live = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    expected = torch.autograd.grad(fn(*live).sin().sum(), live)
    arguments = [t2j(shifted(t, n_bytes)) for t in (x, w)]
    gradient = jax.grad(lambda x, w: jnp.sin(torch2jax(fn)(x, w)).sum(), argnums=(0, 1))
    for taped in (True, False):
        for call in (gradient, jax.jit(gradient)):
            with use_tape(taped):
                got = call(*arguments)
            for a, e in zip(got, expected, strict=True):
                scale = float(e.abs().max())
                np.testing.assert_allclose(a, e, rtol=0, atol=scale * 2e-5)
            assert_same_numbers(got, call(*[t2j(t, copy=True) for t in (x, w)]))
    assert len(TAPE) == 0


# -- found in use -----------------------------------------------------------------------------------------------

KEY = jax.random.key(0)


def test_a_batch_norm_that_is_called_twice_in_one_gradient():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    apply, params, state = convert_pytnn_to_jax(model, with_state=True)
    x = jax.random.normal(KEY, (8, 3))

    def two(params):
        first, middle = apply(params, state, x, train=True)
        second, _ = apply(params, middle, 2 * x)
        return (first**3).sum() + (second**2).sum()

    gradient = jax.jit(jax.grad(two))(params)
    tensor = torch.from_numpy(np.array(x))
    first = model.train()(tensor)
    ((first**3).sum() + (model.eval()(2 * tensor) ** 2).sum()).backward()
    np.testing.assert_allclose(gradient["0"]["weight"], model[0].weight.grad, rtol=1e-8)
    np.testing.assert_allclose(jax.jacfwd(two)(params)["0"]["weight"], model[0].weight.grad, rtol=1e-8)
    carried = jax.lax.scan(lambda s, x: apply(params, s, x, train=True)[::-1], state, jnp.stack([x, x]))[0]
    assert carried["1"]["num_batches_tracked"] == 2
