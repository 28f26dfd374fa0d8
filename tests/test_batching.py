"""How often torch runs under `jax.vmap`."""

from __future__ import annotations

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import some

from pytorch2jax import LoopWarning, convert_pytnn_to_jax, t2j, torch2jax

pytestmark = pytest.mark.usefixtures("tape")


class Counter:
    """A torch function that counts its runs on real tensors."""

    def __init__(self, fn):
        self.fn = fn
        self.runs = 0

    def __call__(self, *args):
        self.runs += not isinstance(args[0], torch._subclasses.FakeTensor)
        return self.fn(*args)


def test_a_batch_of_64_is_one_torch_call():
    counter = Counter(lambda x, w: torch.tanh(x @ w))
    f = torch2jax(counter)
    xs, w = jnp.ones((64, 3)), jnp.ones((3, 4))
    jax.vmap(f, in_axes=(0, None))(xs, w)
    assert counter.runs == 1
    jax.jit(jax.vmap(f, in_axes=(0, None)))(xs, w).block_until_ready()
    assert counter.runs == 2


def test_64_per_example_gradients_are_one_torch_call_each_way():
    counter = Counter(lambda x, w: torch.tanh(x @ w).sum())
    f = torch2jax(counter)
    gradient = jax.jit(jax.vmap(jax.grad(f, argnums=1), in_axes=(0, None)))
    assert gradient(jnp.ones((64, 3)), jnp.ones((3, 4))).shape == (64, 3, 4)
    assert counter.runs <= 2


def test_a_loop_runs_once_for_each_example_and_says_so():
    counter = Counter(lambda x: x * 2 if torch.equal(x, x) else x)
    f = torch2jax(counter)
    with pytest.warns(LoopWarning, match=r"torch.vmap cannot batch it \(RuntimeError: .*equal.*a loop over the whole"):
        jax.vmap(f)(jnp.ones((5, 2, 3)))
    counter.runs = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.vmap(f)(jnp.ones((5, 2, 3)))
    assert counter.runs == 5


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_batch_of_recurrent_layers_is_one_call_of_plain_ones(kind):
    layer = getattr(torch.nn, kind)(3, 4, batch_first=True).double()
    counter = Counter(lambda x: layer(x)[0])
    f, x = torch2jax(counter), jnp.cos(jnp.arange(5 * 2 * 7 * 3.0)).reshape(5, 2, 7, 3)
    jax.vmap(f)(x)
    counter.runs = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batched = jax.vmap(f)(x)
    assert counter.runs == 1
    np.testing.assert_allclose(batched, jnp.stack([f(example) for example in x]), rtol=1e-10)


def test_fused_attention_is_batched_by_rules_not_by_torchs_own_loop():
    f = torch2jax(lambda x: F.scaled_dot_product_attention(x, x, x))
    x = jnp.cos(jnp.arange(4 * 2 * 3 * 5.0)).reshape(4, 2, 3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it loops
        batched = jax.vmap(f)(x)
    np.testing.assert_allclose(batched, f(x), rtol=1e-10)


def test_an_operator_without_a_batching_rule_is_looped_over_inside_torch():
    f = torch2jax(lambda x: torch.cdist(x, x * 2).sum() + torch.special.i1e(x).sum() + torch.histc(x, 3).sum())
    x = jnp.arange(12.0).reshape(2, 3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batched = jax.vmap(f)(x)
    np.testing.assert_allclose(batched, [f(x[0]), f(x[1])], rtol=1e-10)


def test_an_in_place_write_of_a_batched_value_into_an_unbatched_tensor():
    def accumulate(x):
        total = torch.zeros(3, dtype=x.dtype)
        total += x
        return total

    with pytest.warns(LoopWarning):
        result = jax.vmap(torch2jax(accumulate))(jnp.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(result, jnp.arange(6.0).reshape(2, 3))


def test_an_empty_batch():
    f = torch2jax(lambda x: (x.sum(), x * 2))
    total, double = jax.vmap(f)(jnp.ones((0, 3)))
    assert total.shape == (0,)
    assert double.shape == (0, 3)
    assert jax.vmap(jax.grad(lambda x: f(x)[0]))(jnp.ones((0, 3))).shape == (0, 3)


def test_vmap_over_stacked_parameters_is_an_ensemble():
    models = [torch.nn.Linear(3, 2).double() for _ in range(4)]
    apply, _ = convert_pytnn_to_jax(models[0])
    params = jax.tree.map(lambda *p: jnp.stack(p), *(convert_pytnn_to_jax(m)[1] for m in models))
    x = jnp.arange(3.0)
    out = jax.vmap(apply, in_axes=(0, None))(params, x)
    expected = [m(torch.arange(3.0, dtype=torch.float64)).detach().numpy() for m in models]
    np.testing.assert_allclose(out, expected)


def test_vmap_with_an_axis_name_and_a_collective():
    f = torch2jax(lambda x: x * 2)
    out = jax.vmap(lambda x: jax.lax.psum(f(x), "batch"), axis_name="batch")(jnp.arange(4.0))
    np.testing.assert_array_equal(out, [12.0] * 4)


def _asks(x):
    """As functions do that compute a gradient of their own ahead of time, or save memory."""
    return (x**3).sum() if x.requires_grad else (x.detach() ** 3).sum()


def test_a_function_that_asks_for_requires_grad_has_all_its_derivatives():
    """`torch.vmap` and torch's forward mode say no."""
    counter = Counter(_asks)
    f, x = torch2jax(counter), jnp.arange(1.0, 7.0).reshape(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoopWarning)
        np.testing.assert_allclose(jax.vmap(f)(x), (x**3).sum(1))  # no derivative, no loop
        np.testing.assert_allclose(jax.jvp(f, (x[0],), (x[0],))[1], 3 * (x[0] ** 3).sum())
    assert counter.runs <= 3
    with pytest.warns(LoopWarning, match="asks whether a tensor requires a gradient, which torch.vmap denies"):
        np.testing.assert_allclose(jax.vmap(jax.grad(f))(x), 3 * x**2)
    for way in (lambda g: g, jax.jit):
        np.testing.assert_allclose(way(jax.vmap(jax.grad(f)))(x), 3 * x**2)
        np.testing.assert_allclose(way(jax.grad(lambda x: jax.vmap(f)(x).sum()))(x), 3 * x**2)
        np.testing.assert_allclose(way(jax.vmap(jax.jacfwd(f)))(x), 3 * x**2)
        np.testing.assert_allclose(way(jax.vmap(jax.hessian(f)))(x), [jnp.diag(6 * row) for row in x])


def test_a_module_that_asks_for_requires_grad_has_gradients_for_each_example():
    class Asks(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) if self.weight.requires_grad else super().forward(x).detach()

    apply, params = convert_pytnn_to_jax(Asks(3, 2).double())
    x = jnp.arange(12.0).reshape(4, 3)
    with pytest.warns(LoopWarning):
        gradient = jax.vmap(jax.grad(lambda p, x: apply(p, x).sum()), in_axes=(None, 0))(params, x)
    np.testing.assert_allclose(gradient["weight"], jnp.stack([x, x], 1))


def test_modules_of_torchs_own_that_ask_for_a_fast_path_are_batched():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    apply, params = convert_pytnn_to_jax(layer)
    x = jnp.cos(jnp.arange(96.0)).reshape(3, 1, 4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoopWarning)
        batched = jax.vmap(jax.grad(lambda x: (apply(params, x) ** 2).sum()))(x)
    np.testing.assert_allclose(batched[1], jax.grad(lambda x: (apply(params, x) ** 2).sum())(x[1]), rtol=1e-7)


def test_a_declared_way_to_batch_stays():
    f, x = torch2jax(_asks, vmap_method="sequential"), jnp.arange(1.0, 7.0).reshape(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoopWarning)
        np.testing.assert_allclose(jax.vmap(jax.grad(f))(x), 3 * x**2)


# -- found in use -----------------------------------------------------------------------------------------------

KEY = jax.random.key(0)


@pytest.mark.parametrize("index", [0, 2, -1])
def test_gradients_of_a_batch_of_select_scatter(index):
    """Torch's, through its own `vmap`, are too large by the length of the axis."""
    f = torch2jax(lambda x, y: torch.select_scatter(x, y, 1, index) * x)
    x, y = jax.random.normal(KEY, (3, 2, 4)), jax.random.normal(KEY, (3, 2))

    def gradient(x, y):
        return jax.grad(lambda x, y: (f(x, y) ** 3).sum(), argnums=(0, 1))(x, y)

    expected = jax.tree.map(lambda *rows: jnp.stack(rows), *map(gradient, x, y))
    np.testing.assert_allclose(jax.vmap(gradient)(x, y)[0], expected[0])
    np.testing.assert_allclose(jax.vmap(gradient)(x, y)[1], expected[1])


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize("axis", [0, 1])
def test_examples_of_a_loop_have_memory_of_their_own(axis):
    """They were views of the batch, of which `as_strided` with an offset saw the first example."""

    def scatter(x, y):
        return torch.as_strided_scatter(x, y, (2,), (1,), 1)

    x, y = jnp.arange(12.0).reshape(3, 4), jnp.array([-1.0, -2.0])
    batch = x if axis == 0 else x.T
    out = jax.vmap(torch2jax(scatter), in_axes=(axis, None))(batch, y)
    expected = np.stack([scatter(torch.tensor(row), torch.tensor(np.array(y))) for row in np.array(x)])
    np.testing.assert_array_equal(out, expected)


def _ambient(layer, x):
    return layer(x).float() ** 2


def _inside(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return _ambient(layer, x)


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize("fn", [_ambient, _inside])
def test_autocast_acts_on_batches_and_tangents(fn):
    """`torch.vmap` and `torch.func.jvp` ignore it."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8)
    f = torch2jax(lambda x: fn(layer, x))
    xs = t2j(torch.randn(4, 8))
    with torch.autocast("cpu", torch.bfloat16, enabled=fn is _ambient):
        np.testing.assert_array_equal(jax.vmap(f)(xs), jnp.stack([f(x) for x in xs]))
        gradient = jax.grad(lambda x: f(x).sum())
        np.testing.assert_array_equal(jax.vmap(gradient)(xs), jnp.stack([gradient(x) for x in xs]))
        pushed = jax.jvp(lambda x: f(x).sum(), (xs[0],), (jnp.eye(8, dtype=jnp.float32)[0],))[1]
        np.testing.assert_allclose(pushed, gradient(xs[0])[0], rtol=1e-2)


def _ones(a):
    return torch.ones(a.shape[-1], dtype=a.dtype)


SOLVERS = {
    "solve": (lambda a: torch.linalg.solve(a, _ones(a)), lambda a: jnp.linalg.solve(a, jnp.ones(2))),
    "solve_ex": (lambda a: torch.linalg.solve_ex(a, _ones(a))[0], lambda a: jnp.linalg.solve(a, jnp.ones(2))),
    "tensorsolve": (lambda a: torch.linalg.tensorsolve(a, _ones(a)), lambda a: jnp.linalg.solve(a, jnp.ones(2))),
    "lu_solve": (
        lambda a: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), _ones(a)[:, None]),
        lambda a: jnp.linalg.solve(a, jnp.ones((2, 1))),
    ),
    "inv": (torch.linalg.inv, jnp.linalg.inv),
    "det": (torch.linalg.det, jnp.linalg.det),
    "slogdet": (lambda a: torch.linalg.slogdet(a)[1], lambda a: jnp.linalg.slogdet(a)[1]),
    "logdet": (torch.logdet, lambda a: jnp.linalg.slogdet(a)[1]),
}
JACOBIANS = {
    "jacrev": jax.jacrev,
    "jacfwd": jax.jacfwd,
    "hessian": jax.hessian,
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f)),
    "jacfwd of a batch": lambda f: jax.jacfwd(lambda a: jax.vmap(f)(jnp.stack([a, 2 * a]))),
}


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize("jacobian", some(JACOBIANS, ["jacrev", "hessian"]))
@pytest.mark.parametrize("solver", some(SOLVERS, ["solve", "slogdet"]))
def test_batches_of_jacobians_of_solvers(solver, jacobian):
    """`torch.vmap` in `torch.vmap` is wrong for them. The oracle is JAX."""
    ours, theirs = torch2jax(SOLVERS[solver][0]), SOLVERS[solver][1]
    a = jnp.array([[[3.0, 1.0], [0.5, 2.0]], [[4.0, 1.0], [1.0, 3.0]]])
    once = [jax.vmap(JACOBIANS[jacobian](f)) for f in (ours, theirs)]
    np.testing.assert_allclose(once[0](a), once[1](a), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(jax.jit(once[0])(a), once[1](a), rtol=1e-9, atol=1e-11)
    several = jnp.stack([a, 2 * a, a + jnp.eye(2)])
    np.testing.assert_allclose(jax.vmap(once[0])(several), jax.vmap(once[1])(several), rtol=1e-9, atol=1e-11)


def test_batches_of_jacobians_of_solvers_are_one_batch():
    calls = Counter(lambda a: torch.linalg.solve(a, _ones(a)))
    f = torch2jax(calls)
    a = jnp.array([[[3.0, 1.0], [0.5, 2.0]], [[4.0, 1.0], [1.0, 3.0]]])
    jax.vmap(jax.jacrev(f))(a)
    calls.runs = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.vmap(jax.jacrev(f))(a)
    assert calls.runs <= 2  # with the tape, a forward pass and a backward pass


TWICE = {
    "as_strided": lambda x, y: torch.as_strided(x, (2, 2), (1, 2), 1) * y.sum(),
    "as_strided_copy": lambda x, y: torch.as_strided_copy(x, (2, 2), (1, 2), 1) * y.sum(),
    "as_strided_scatter": lambda x, y: torch.as_strided_scatter(x, y[:2, :2], (2, 2), (1, 2), 1),
    "index_fill": lambda x, y: x.index_fill(0, torch.tensor([1]), y[0, 0]),
    "index_fill in place": lambda x, y: x.clone().index_fill_(1, torch.tensor([2]), y[0, 0]),
    "lu_solve": lambda x, y: torch.linalg.lu_solve(*torch.linalg.lu_factor(x + 4 * torch.eye(3, dtype=x.dtype)), y),
}


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize("name", some(TWICE, ["as_strided", "index_fill", "lu_solve"]))
def test_batches_of_batches(name):
    """Every mix of operands that are batched by the inner level, the outer one, both, or none. The oracle is a loop."""
    f = torch2jax(TWICE[name])
    derivatives = [f, jax.grad(lambda x, y: (f(x, y) ** 2).sum(), (0, 1))]
    for inner_x, outer_x, inner_y, outer_y in itertools.product((0, 1), repeat=4):
        if not (inner_x or inner_y) or not (outer_x or outer_y):
            continue
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.uniform(keys[0], (*(2,) * outer_x, *(4,) * inner_x, 3, 3))
        y = jax.random.uniform(keys[1], (*(2,) * outer_y, *(4,) * inner_y, 3, 3))
        axes = [tuple(0 if batched else None for batched in pair) for pair in ((inner_x, inner_y), (outer_x, outer_y))]
        for fn in derivatives:
            found = jax.vmap(jax.vmap(fn, axes[0]), axes[1])(x, y)
            for i, j in itertools.product(range(2), range(4)):
                one = x[(*(i,) * outer_x, *(j,) * inner_x)], y[(*(i,) * outer_y, *(j,) * inner_y)]
                for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(fn(*one)), strict=True):
                    np.testing.assert_allclose(a[i, j], e, rtol=1e-9, atol=1e-12)
