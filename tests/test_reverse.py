"""`jax2torch`: JAX functions in torch, with torch's autograd; torch and finite differences are the oracle."""

from __future__ import annotations

import collections
import copy
import gc
import pickle
import threading
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from pytorch2jax import (
    DtypeError,
    LeafTypeError,
    NarrowingError,
    NarrowingWarning,
    jax2torch,
    py_to_jax_wrapper,
    torch2jax,
)

F64 = torch.float64


def leaf(*shape, dtype=F64, scale=1.0):
    return (torch.rand(*shape, dtype=dtype) * scale + 0.2).requires_grad_()


# Each row: a JAX function, the same in torch, and the shapes of its arguments.
CASES = {
    "sin": (lambda x: jnp.sin(x), torch.sin, [(3,)]),
    "matmul": (lambda x, y: jnp.tanh(x @ y), lambda x, y: torch.tanh(x @ y), [(2, 3), (3, 4)]),
    "scalar": (lambda x: jnp.prod(x), torch.prod, [(3,)]),
    "jitted": (jax.jit(lambda x, y: x * jnp.exp(y)), lambda x, y: x * torch.exp(y), [(3,), (3,)]),
    "pair": (
        lambda x, y: (x * y, {"sum": jnp.sum(x**3)}),
        lambda x, y: (x * y, {"sum": (x**3).sum()}),
        [(2, 2), (2, 2)],
    ),
    "scan": (
        lambda x, y: jax.lax.scan(lambda c, a: (c * a, c + a), x, y)[1],
        lambda x, y: torch.stack([x * y[:i].prod(0) + y[i] for i in range(3)]),
        [(2,), (3, 2)],
    ),
}


def double(x):
    return x * 2


def flat(out):
    return torch.utils._pytree.tree_leaves(out)


def total(fn):
    """A scalar function in which every output counts, and not linearly."""
    return lambda *args: sum((o**2).sum() for o in flat(fn(*args)))


@pytest.fixture(params=CASES)
def case(request):
    fn, oracle, shapes = CASES[request.param]
    return jax2torch(fn), oracle, [leaf(*shape) for shape in shapes]


# -- values and derivatives ----------------------------------------------------------------------------------


def test_forward_and_backward(case):
    f, oracle, args = case
    torch.testing.assert_close(f(*args), oracle(*args))
    expected = torch.autograd.grad(total(oracle)(*args), args)
    torch.testing.assert_close(torch.autograd.grad(total(f)(*args), args), expected)


def test_gradcheck_of_both_orders(case):
    f, _, args = case
    assert torch.autograd.gradcheck(lambda *a: tuple(flat(f(*a))), args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *a: tuple(flat(f(*a))), args)


def test_torch_func(case):
    f, oracle, args = case
    args = [a.detach() for a in args]
    tangents = [torch.rand_like(a) for a in args]
    numbers = tuple(range(len(args)))
    close = torch.testing.assert_close
    close(torch.func.grad(total(f), numbers)(*args), torch.func.grad(total(oracle), numbers)(*args))
    out, pull = torch.func.vjp(total(f), *args)
    close(pull(torch.ones_like(out)), torch.func.vjp(total(oracle), *args)[1](torch.ones_like(out)))
    close(
        torch.func.jvp(f, tuple(args), tuple(tangents)),
        torch.func.jvp(oracle, tuple(args), tuple(tangents)),
    )
    close(torch.func.hessian(total(f))(*args), torch.func.hessian(total(oracle))(*args))
    close(torch.func.jacfwd(torch.func.jacfwd(total(f)))(*args), torch.func.hessian(total(oracle))(*args))
    third = torch.func.jacrev(torch.func.hessian(total(f)))(*args)
    close(third, torch.func.jacrev(torch.func.hessian(total(oracle)))(*args))


def test_vmap(case):
    f, oracle, args = case
    close = torch.testing.assert_close
    batch = [torch.stack([a.detach(), a.detach() + 0.5, a.detach() * 2]) for a in args]
    numbers = tuple(range(len(args)))
    close(torch.func.vmap(f)(*batch), torch.func.vmap(oracle)(*batch))
    shared = (0, *(None for _ in args[1:]))
    mixed = [batch[0], *(a.detach() for a in args[1:])]
    close(torch.func.vmap(f, shared)(*mixed), torch.func.vmap(oracle, shared)(*mixed))
    for in_dims, given in ((0, batch), (shared, mixed)):
        of_grad = torch.func.vmap(torch.func.grad(total(f), numbers), in_dims)(*given)
        close(of_grad, torch.func.vmap(torch.func.grad(total(oracle), numbers), in_dims)(*given))
    moved = [b.movedim(0, -1) for b in batch]
    of_grad = torch.func.vmap(torch.func.grad(total(f), numbers), -1, -1)(*moved)
    close(of_grad, torch.func.vmap(torch.func.grad(total(oracle), numbers), -1, -1)(*moved))

    def grad_of_vmap(fn):
        return torch.func.grad(lambda *a: sum((o**2).sum() for o in flat(torch.func.vmap(fn)(*a))), numbers)(*batch)

    close(grad_of_vmap(f), grad_of_vmap(oracle))
    twice = [torch.stack([b, 2 * b]) for b in batch]
    close(torch.func.vmap(torch.func.vmap(f))(*twice), torch.func.vmap(torch.func.vmap(oracle))(*twice))


def test_autograd_around_torch_func():
    f, x, y = jax2torch(lambda x, y: jnp.sin(x) * y**2), leaf(3), leaf(3)

    def penalty(fn):
        gradient = torch.func.grad(lambda x: fn(x, y).sum())(x)
        return torch.autograd.grad((gradient**2).sum(), [x, y])

    torch.testing.assert_close(penalty(f), penalty(lambda x, y: torch.sin(x) * y**2))


def test_nested_levels_that_differentiate_different_arguments():
    f = jax2torch(lambda x, y: jnp.sin(x) * y**3)
    x, y = torch.rand(3, dtype=F64), torch.rand(3, dtype=F64)

    def mixed(fn):
        return torch.func.grad(lambda y: torch.func.grad(lambda x: fn(x, y).sum())(x).sum())(y)

    torch.testing.assert_close(mixed(f), mixed(lambda x, y: torch.sin(x) * y**3))


def test_forward_mode_of_torch_autograd():
    f, x = jax2torch(lambda x, n: (x**3, n + 1)), leaf(3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        out, integers = f(dual, torch.arange(3))
        tangent = forward_ad.unpack_dual(out).tangent
        assert integers.tolist() == [1, 2, 3]
    torch.testing.assert_close(tangent, 3 * x**2)
    (second,) = torch.autograd.grad(tangent.sum(), x)  # reverse over forward
    torch.testing.assert_close(second, 6 * x)


def test_retain_graph_and_a_second_backward():
    f, x = jax2torch(jnp.sin), leaf(3)
    out = f(x).sum()
    out.backward(retain_graph=True)
    out.backward()
    torch.testing.assert_close(x.grad, 2 * torch.cos(x).detach())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


def test_some_outputs_and_some_inputs_only():
    f = jax2torch(lambda x, y, z: (x * y, y * z, x))
    x, y, z = leaf(2), leaf(2).detach(), leaf(2)
    first, second, third = f(x, y, z)
    assert torch.autograd.grad(first.sum(), [x, z], retain_graph=True, allow_unused=True)[0].tolist() == y.tolist()
    (second.sum() + 0 * third.sum()).backward()
    assert z.grad.tolist() == y.tolist()
    assert y.grad is None
    assert not f(x.detach(), y, z.detach())[0].requires_grad
    with torch.no_grad():
        assert not f(x, y, z)[0].requires_grad


def test_custom_derivatives_of_jax():
    @jax.custom_vjp
    def clipped(x):
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, c: (jnp.clip(c, -1, 1),))
    x = leaf(2)
    (jax2torch(clipped)(x) * torch.tensor([5.0, 0.5], dtype=F64)).sum().backward()
    assert x.grad.tolist() == [1.0, 0.5]


def test_complex_numbers():
    def oracle(z, x):
        return z**2 * x, (z.abs() ** 2).sum()

    f = jax2torch(lambda z, x: (z**2 * x, (jnp.abs(z) ** 2).sum()))
    z = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    x = leaf(3)
    torch.testing.assert_close(f(z, x), oracle(z, x))
    weight = torch.randn(3, dtype=torch.complex128)

    def gradient(fn):
        out, norm = fn(z, x)
        return torch.autograd.grad((out * weight).real.sum() + norm, [z, x])

    torch.testing.assert_close(gradient(f), gradient(oracle))
    assert torch.autograd.gradcheck(f, (z, x), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (z, x))
    conjugated = z.detach().conj()
    torch.testing.assert_close(f(conjugated, x), oracle(conjugated, x))


# -- what goes in and comes out --------------------------------------------------------------------------------


def test_pytrees_keywords_and_static_values():
    Point = collections.namedtuple("Point", "x y")

    def fn(batch, *, scale, mode, dtype):
        assert mode in ("add", "times")
        x, y = batch["p"].x, batch["p"].y
        out = x + y if mode == "add" else x * y
        return Point(out * scale, [out.astype(dtype), None])

    f = jax2torch(fn)
    batch = {"p": Point(leaf(2), leaf(2))}
    out = f(batch, scale=3, mode="times", dtype=torch.float32)
    assert isinstance(out, Point)
    assert out.y[1] is None
    assert out.y[0].dtype == torch.float32
    torch.testing.assert_close(out.x, 3 * batch["p"].x * batch["p"].y)
    torch.testing.assert_close(f(batch, scale=1, mode="add", dtype=torch.float32).x, batch["p"].x + batch["p"].y)


def test_containers_that_only_torch_knows():
    from transformers.modeling_outputs import BaseModelOutput

    f = jax2torch(lambda out: out.last_hidden_state * 2)
    x = leaf(2)
    torch.testing.assert_close(f(BaseModelOutput(last_hidden_state=x)), x * 2)


def test_integers_bools_arrays_and_keys():
    f = jax2torch(lambda x, i, mask, key: (jnp.where(mask, x[i], 0.0), i + 1, jax.random.uniform(key)))
    x, i = leaf(3), torch.tensor([2, 0])
    out, integers, number = f(x, i, np.array([True, False]), jax.random.key(0))
    assert out.tolist() == [x[2].item(), 0.0]
    assert integers.tolist() == [3, 1]
    assert integers.dtype == torch.int64
    assert not integers.requires_grad
    assert number.item() == jax.random.uniform(jax.random.key(0)).item()
    out.sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 1.0]
    batched = torch.func.vmap(lambda x: f(x, i, np.array([True, False]), jax.random.key(0))[0])(torch.stack([x, 2 * x]))
    assert batched[1].tolist() == [2 * x[2].item(), 0.0]


def test_without_arguments_and_with_python_numbers_for_outputs():
    assert jax2torch(lambda: (1.5, jnp.arange(2)))()[1].tolist() == [0, 1]
    assert jax2torch(lambda n: n + 1)(2).item() == 3


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(6.0).reshape(2, 3).T, torch.arange(9.0)[1:], torch.ones(2).expand(3, 2), torch.zeros(0, 3)],
    ids=["transposed", "unaligned", "expanded", "empty"],
)
def test_layouts(tensor):
    x = tensor.requires_grad_()
    out = jax2torch(lambda x: x * 2)(x)
    torch.testing.assert_close(out, x * 2)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))


def test_dtypes():
    f = jax2torch(lambda x: x * 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.complex64):
        assert f(torch.ones(2, dtype=dtype)).dtype == dtype
    assert jax2torch(jnp.logical_not)(torch.tensor([True])).tolist() == [False]


def test_without_x64(x32):
    f = jax2torch(lambda x, i: x * i)
    x = torch.ones(2, dtype=F64, requires_grad=True)
    with pytest.warns(NarrowingWarning):
        out = f(x, torch.tensor([2, 3]))
    assert out.dtype == torch.float32
    out.sum().backward()
    assert x.grad.dtype == F64
    assert x.grad.tolist() == [2.0, 3.0]
    with pytest.raises(NarrowingError, match=r"args\.1: t2j: expected int64 values that fit into 32 bits"):
        f(x, torch.tensor([2**40, 1]))


def test_the_backward_pass_has_the_precision_of_the_forward_pass(x32):
    x = leaf(3)
    with jax.enable_x64(True):
        out = jax2torch(jnp.sin)(x).sum()
    out.backward()
    torch.testing.assert_close(x.grad, torch.cos(x).detach(), rtol=1e-14, atol=0)


# -- memory ------------------------------------------------------------------------------------------------------


def test_inputs_are_not_copied():
    x, y = leaf(1000), leaf(1000)
    out = jax2torch(lambda x, y: x * y)(x, y)
    residuals = jax.tree.leaves(out.grad_fn.call.residuals.vjp)  # JAX's derivative reads the inputs
    assert {a.unsafe_buffer_pointer() for a in residuals} == {x.data_ptr(), y.data_ptr()}


def test_outputs_are_not_copied():
    x = torch.ones(1000)
    out = jax2torch(lambda x: x * 2)(x)
    assert out.data_ptr() != x.data_ptr()
    assert not out.untyped_storage().resizable()  # XLA's memory


@pytest.mark.parametrize("fn", [lambda x: x, lambda x: (x, x), lambda x: jax.jit(lambda x: [x])(x)])
def test_outputs_may_be_written_to(fn):
    x = torch.ones(1000)
    outputs = flat(jax2torch(fn)(x))
    for number, out in enumerate(outputs):
        out.fill_(number + 5.0)
    assert [out[0].item() for out in outputs] == [5.0 + n for n in range(len(outputs))]
    assert x[0].item() == 1.0


def test_constants_and_residuals_are_not_given_away():
    constant = jnp.ones(1000)
    f = jax2torch(lambda x: (constant, jnp.exp(x)))
    x = torch.zeros(1000, dtype=F64, requires_grad=True)
    given, y = f(x)
    given.fill_(7.0)
    with torch.no_grad():
        y.mul_(100.0)  # JAX's derivative of exp reads its result
    y.sum().backward()
    assert constant[0] == 1.0
    assert f(x)[0][0].item() == 1.0
    assert x.grad[0].item() == 1.0


def test_writing_to_an_input_before_the_backward_pass_is_an_error():
    x = leaf(3)
    y = x * 1
    out = jax2torch(jnp.sin)(y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_writing_to_an_input_right_after_the_call():
    f = jax2torch(lambda x: jnp.linalg.matrix_power(x, 9))
    for _ in range(20):
        x = torch.eye(200)
        out = f(x)
        x.zero_()
        assert out.diagonal().sum().item() == 200.0


def test_residuals_are_freed_with_the_graph():
    held = []

    @jax.custom_vjp
    def fn(x):
        return x * 2

    fn.defvjp(lambda x: (x * 2, x + 1), lambda _, c: (c * 2,))
    x = leaf(3)
    out = jax2torch(fn)(x).sum()
    call = out.grad_fn.next_functions[0][0].call
    held.append(call.residuals)
    assert held[0] is not None
    out.backward()
    assert call.residuals is None


def test_functions_are_freed():
    class Function:
        def __call__(self, x):
            return jnp.sin(x)

    def use():
        function = Function()
        f, x = jax2torch(function), leaf(3)
        f(x).sum().backward()
        torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.ones(2, 3, dtype=F64))
        return weakref.ref(function)

    alive = use()
    gc.collect()
    jax.clear_caches()
    gc.collect()
    assert alive() is None


# -- compilation -------------------------------------------------------------------------------------------------


def test_traces_are_reused():
    traces = []

    def fn(x, n):
        traces.append(x.shape)
        return jnp.sin(x) * n

    f = jax2torch(fn)

    def step(n=2, size=3):
        x = leaf(size)
        f(x, n).sum().backward()
        f(x.detach(), n)
        torch.func.grad(lambda x: f(x, n).sum())(x.detach())
        torch.func.vmap(torch.func.grad(lambda x: f(x, n).sum()))(torch.stack([x, x]))

    step()
    first = len(traces)
    assert first <= 3  # without and with residuals, and a batch with them; backward passes trace nothing
    for _ in range(3):
        step()
    assert len(traces) == first
    step(n=3)
    assert len(traces) == 2 * first
    step(size=4)
    assert len(traces) == 3 * first


def test_the_forward_pass_runs_once():
    runs = []

    @jax.custom_jvp
    def fn(x):
        jax.debug.callback(lambda: runs.append("forward"))
        return x**2

    @fn.defjvp
    def _(primals, tangents):
        return fn(*primals), 2 * primals[0] * tangents[0]

    f = jax2torch(fn)
    f(leaf(3)).sum().backward()
    torch.func.grad(lambda x: f(x).sum())(torch.ones(3, dtype=F64))
    jax.effects_barrier()
    assert runs == ["forward", "forward"]


@pytest.mark.exhaustive
def test_static_values_that_change_all_the_time():
    f = jax2torch(lambda x, n: x * n)
    for n in range(300):
        f(torch.ones(0), n)
    assert len(f._programs) == 256


# -- use in torch ------------------------------------------------------------------------------------------------


def test_in_a_module_and_a_training_loop():
    class Net(torch.nn.Module):
        def __init__(self, activation):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(3, 8), torch.nn.Linear(8, 1)
            self.activation = activation

        def forward(self, x):
            return self.second(self.activation(self.first(x)))

    x = torch.randn(16, 3)

    def train(net):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            loss = ((net(x) - x.sum(1, keepdim=True)) ** 2).mean()
            loss.backward()
            optimizer.step()
        return loss

    trained = train(Net(jax2torch(lambda x: x * jax.nn.sigmoid(x))))
    torch.testing.assert_close(trained, train(Net(torch.nn.functional.silu)), rtol=1e-4, atol=1e-5)


def test_as_a_decorator_of_a_method():
    class Scale:
        factor = 3.0

        @jax2torch
        def __call__(self, x):
            """Scale."""
            return x * self.factor

    assert Scale()(torch.ones(1)).item() == 3.0
    assert Scale.__call__.__doc__ == "Scale."


def test_threads():
    f = jax2torch(lambda x, n: jnp.sin(x) * n)
    wrong = []

    def work(n):
        for _ in range(20):
            x = leaf(50)
            f(x, n % 3).sum().backward()
            if not torch.allclose(x.grad, torch.cos(x) * (n % 3)):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_called_while_jax_traces_something_else():
    f = jax2torch(lambda x: x * 2)
    out = jax.jit(lambda y: y + f(torch.ones(1)).item())(jnp.ones(1))
    assert out.item() == 3.0


def test_copies_and_pickles():
    f = jax2torch(jnp.sin)
    assert copy.deepcopy(f) is f
    assert copy.copy(f) is f
    assert pickle.loads(pickle.dumps(jax2torch(double)))(torch.ones(1)).item() == 2.0
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(jax2torch(lambda x: x))
    assert repr(f) == "jax2torch(sin)"


# -- round trips -------------------------------------------------------------------------------------------------


def test_nothing_is_bridged_twice():
    def fn(x):
        return x * 2

    assert jax2torch(torch2jax(fn)) is fn
    assert jax2torch(py_to_jax_wrapper(fn)) is fn
    assert torch2jax(jax2torch(fn)) is fn
    f = jax2torch(fn)
    assert jax2torch(f) is f
    with_options = torch2jax(fn, widen_ints=False)
    assert jax2torch(with_options) is not fn
    torch.testing.assert_close(jax2torch(with_options)(torch.ones(2)), 2 * torch.ones(2))


def test_what_copies_the_attributes_of_a_bridged_function_is_another_function():
    import functools

    wrapped = torch2jax(lambda x: x * 2)

    @functools.wraps(wrapped)
    def other(x):
        return wrapped(x) + 1

    assert jax2torch(other)(torch.ones(1)).item() == 3.0


# -- errors ------------------------------------------------------------------------------------------------------


def test_errors_of_arguments():
    def fn(x, y=None):
        return x * 2

    f = jax2torch(fn)
    with pytest.raises(LeafTypeError, match="jax2torch: expected a JAX callable, got int"):
        jax2torch(3)
    with pytest.raises(LeafTypeError, match=r"fn: expected tensors, arrays and hashable.* got set"):
        f(torch.ones(1), {1})
    with pytest.raises(LeafTypeError, match=r"fn: args\.0: expected a tensor or an array with a value, got a tracer"):
        jax.jit(f)(jnp.ones(1))
    with pytest.raises(LeafTypeError, match=r"fn: kwargs\.y: t2j: expected a dense tensor"):
        f(torch.ones(1), y=torch.eye(2).to_sparse())
    with pytest.raises(LeafTypeError, match=r"fn: args\.0: t2j: expected a tensor with data, got a Tensor on meta"):
        f(torch.ones(1, device="meta"))
    with torch._subclasses.FakeTensorMode():
        fake = torch.ones(2)
    with pytest.raises(LeafTypeError, match=r"args\.0: expected a tensor with data, got a FakeTensor.*torch.compile"):
        f(fake)
    with pytest.raises(DtypeError, match=r"fn: args\.0: dtype_t2j: expected a torch dtype that JAX has"):
        f(torch.empty(2, dtype=torch.bits8))
    with pytest.raises(TypeError, match="unexpected keyword"):
        f(torch.ones(1), z=1)


def test_errors_of_outputs():
    with pytest.raises(LeafTypeError, match=r"0\.word: expected arrays and numbers .* got str.* tuple or dict"):
        jax2torch(lambda x: [{"word": "text"}])(torch.ones(1))
    with pytest.raises(DtypeError, match=r"output 0: dtype_j2t: expected a dtype that torch has"):
        jax2torch(lambda x: jax.random.key(0))(torch.ones(1))


def test_an_error_leaves_the_function_usable():
    f = jax2torch(lambda x, y: x @ y)
    with pytest.raises(TypeError, match="dot_general"):
        f(torch.ones(2, 3), torch.ones(2, 3))
    assert f(torch.ones(2, 3), torch.ones(3, 1)).tolist() == [[3.0], [3.0]]


# -- torch.compile ----------------------------------------------------------------------------------------------


_sine = jax2torch(lambda x, y: {"out": jnp.sin(x) * y})


class _BetweenLayers(nn.Module):
    """A JAX function between layers of torch's."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, x):
        return (_sine(torch.tanh(self.first(x)), x)["out"] + x).sum()


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_breaks_its_graph_at_a_jax_function(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = _BetweenLayers(), torch.linspace(-1.0, 1.0, 6).reshape(2, 3)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.registry.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(model, backend=counting)
    found = []
    for call in (compiled, compiled, model):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        out.backward()
        found.append([out.detach(), leaf.grad, *(p.grad for p in model.parameters())])
    assert len(graphs) == 2  # before and after; nothing of this library's is traced
    for ours in found[:2]:
        torch.testing.assert_close(ours, found[2])


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_torch_compile_of_a_whole_graph_says_that_jax_compiles_itself():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="JAX compiles this function itself"):
        torch.compile(_BetweenLayers(), backend="eager", fullgraph=True)(torch.ones(2, 3))
    with pytest.raises(LeafTypeError, match="JAX functions run outside of `torch.compile` and `torch.export`"):
        torch.export.export(_BetweenLayers(), (torch.ones(2, 3),))


def test_narrowed_tensors_are_told_of_once():
    f = jax2torch(lambda x: jnp.sin(x))
    wide = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.autograd.gradcheck(f, wide)
        with jax.enable_x64(False):
            assert f(wide.float()).dtype == torch.float32
    with jax.enable_x64(False):
        with pytest.warns(NarrowingWarning, match=r"gradcheck.*jax_enable_x64.*x\.float\(\)"):
            assert f(wide).dtype == torch.float32
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            f(wide)
