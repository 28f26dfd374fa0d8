"""Derivatives where functions have a say in them: `detach`, `no_grad`, writes, hooks, hand-written gradients."""

from __future__ import annotations

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import arrays, assert_same
from torch import nn

import pytorch2jax
from pytorch2jax import CaptureError, convert_pytnn_to_jax


def torch2jax(fn, **options):
    return pytorch2jax.torch2jax(fn, backend="xla", **options)


X = torch.linspace(-1.0, 2.0, 24, dtype=torch.float64).reshape(2, 3, 4)


def check(fn):
    """Same output and gradient as torch."""
    x = X.clone().requires_grad_()
    out = fn(x)
    out.sum().backward()
    expected = x.grad
    f = torch2jax(fn)
    assert_same(f(arrays([X])[0]), out)
    assert_same(jax.grad(lambda x: f(x).sum())(arrays([X])[0]), expected)


# -- what has no derivative -------------------------------------------------------------------------------------


def _no_grad(x):
    with torch.no_grad():
        scale = x.abs().max()
    return x / scale


def _writes_under_no_grad(x):
    y = x * 2
    with torch.no_grad():
        y.mul_(3)
    return y


def _writes_to_a_view_under_no_grad(x):
    y = x * 2
    with torch.no_grad():
        y[0] = 5.0
        y[1, 0].mul_(3)
    return y * x


def _writes_to_data(x):
    y = x * 2
    y.data.clamp_(max=1.0)
    y.detach()[1].add_(x[1])
    return y * x


def _views_of_detached(x):
    y = x * 2
    return y * x + y.detach()[0] * y.data.transpose(0, 1).select(1, 0)[0]


def _chunks_of_data(x):
    y = x.clone()
    first, second = y.data.chunk(2, dim=1)
    first.zero_()
    return y * 2 + second.sum()


def _detached_before_a_write(x):
    y = x * 1
    z = y.detach()
    y.mul_(2)
    return z * y


def _detached_in_place(x):
    y = x * 2
    y.detach_()
    return y * x


def _exchanges_its_data(x):
    y = x * 3
    y.data[1] = y.data[0]
    y.data = y.data * 2
    return y * x


def _normalises_under_no_grad(x):
    y = x * 3
    with torch.no_grad():
        y.div_(y.norm(dim=1, keepdim=True))
    return y * x


def _asks(x):
    y = x if x.requires_grad else x.detach().requires_grad_()
    return y**2


def _jacobian(x):
    return torch.autograd.functional.jacobian(lambda y: (y**3).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "fn",
    [
        _no_grad,
        _writes_under_no_grad,
        _writes_to_a_view_under_no_grad,
        _writes_to_data,
        _views_of_detached,
        _chunks_of_data,
        _detached_before_a_write,
        _detached_in_place,
        _exchanges_its_data,
        _normalises_under_no_grad,
        _asks,
        _jacobian,
        lambda x: x * x.detach(),
        lambda x: x * x.data,
        lambda x: torch.where(x > 0, x, x.detach()),
    ],
)
def test_gradients_are_torchs(fn):
    check(fn)


class Twice(torch.autograd.Function):
    """`x * k` with a backward that is not that of its forward."""

    @staticmethod
    def forward(ctx, x, k, y):
        ctx.save_for_backward(x, y)
        ctx.k = k
        return x * k, y.clone()

    @staticmethod
    def backward(ctx, dx, dy):
        x, y = ctx.saved_tensors
        return 100 * dx * x * ctx.k, None, dy * y


class Clips(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1, 1)


def _custom(x):
    return Twice.apply(x, 3.0, x.sin())[0].cos() + Clips.apply(5 * x)


def test_hand_written_gradients():
    x = X.clone().requires_grad_()
    out = _custom(x)
    (expected,) = torch.autograd.grad((out**2).sum(), x)
    f = torch2jax(_custom)
    a = arrays([X])[0]
    assert_same(f(a), out)
    gradient = jax.grad(lambda x: (f(x) ** 2).sum())
    assert_same(gradient(a), expected)
    assert_same(jax.jit(gradient)(a), expected)
    assert_same(jax.vmap(gradient)(a), expected)
    assert_same(jax.jit(jax.grad(lambda x: (jax.checkpoint(f)(x) ** 2).sum()))(a), expected)


class Cube(torch.autograd.Function):
    """`x ** n` with twice its gradient, in the style of `setup_context`."""

    @staticmethod
    def forward(x, n=3):
        return x**n

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.n = inputs
        ctx.mark_non_differentiable()
        ctx.save_for_backward(x, x * 2)

    @staticmethod
    def backward(ctx, grad):
        x, double = ctx.saved_tensors
        return grad * ctx.n * double * x ** (ctx.n - 2), None


def _hand_written_in_a_gradient_inside(x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad((Clips.apply(5 * x) + x).sum(), x)[0]


def test_hand_written_gradients_that_autograd_inside_follows_are_refused():
    with pytest.raises(CaptureError, match="a function that takes derivatives itself"):
        torch2jax(_hand_written_in_a_gradient_inside)(arrays([X])[0])


def test_hand_written_gradients_of_a_global_module_are_constants():
    layer = nn.Linear(4, 4).double()

    def fn(x):
        return x * Clips.apply(layer(torch.ones(4, dtype=torch.float64)))

    check(fn)


NEEDS_KEYWORDS = pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch takes keywords since 2.13")
cube, clips = Cube.apply, Clips.apply  # as most people call them


def _defined_inside(x):
    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return -5 * grad

    return Inside.apply(x) * x


class Reverses(torch.autograd.Function):
    """What a domain-adversarial network is made of: the input itself, with another gradient."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


def _in_a_checkpoint(x):
    return torch.utils.checkpoint.checkpoint(lambda y: y.sin() * y, x, use_reentrant=True)


def _without_gradients(x):
    with torch.no_grad():
        scale = Reverses.apply(x.abs()).max()
    return x * scale + Reverses.apply(torch.arange(4))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own, of checkpoints
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: cube(x) + clips(x),
        pytest.param(lambda x: cube(x, n=4), marks=NEEDS_KEYWORDS),
        lambda x: Cube.apply(x, 2),
        lambda x: torch._C._FunctionBase.__dict__["apply"].__get__(None, Cube)(x, 3),
        lambda x: Reverses.apply(x) * x,
        _defined_inside,
        _in_a_checkpoint,
        _without_gradients,
    ],
)
def test_hand_written_gradients_are_seen_however_they_are_called(fn):
    check(fn)


def test_hand_written_gradients_in_threads_of_their_own():
    """While one thread captures, another one's calls are torch's own."""
    seen = []

    def fn(x):
        def other():
            y = torch.ones(3, requires_grad=True)
            cube(y).sum().backward()
            seen.append(y.grad)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return cube(x)

    check(fn)
    assert seen
    assert all(torch.equal(gradient, torch.full((3,), 6.0)) for gradient in seen)
    assert "__getattribute__" not in vars(type(Cube))  # torch is as it was


@pytest.mark.parametrize("fn", [lambda x: cube(x), lambda x: 2 * Reverses.apply(x), _defined_inside])
def test_a_hand_written_gradient_that_goes_unseen_is_an_error(fn, monkeypatch):
    """As with a version of torch that goes around the hook: never a gradient of zero."""
    monkeypatch.setattr("pytorch2jax.xla._capture.custom_functions", lambda hook: contextlib.nullcontext())
    with pytest.raises(CaptureError, match="unseen"):
        torch2jax(lambda x: fn(x))(arrays([X])[0])  # a function of its own: nothing has captured it before
    unused = torch2jax(lambda x: (fn(x), x.sin())[1])
    assert_same(unused(arrays([X])[0]), X.sin())


def test_linear_backward_passes_have_forward_mode_and_higher_orders():
    f = torch2jax(lambda x: Twice.apply(x, 3.0, x.sin())[0])
    a = arrays([X])[0].ravel()
    np.testing.assert_allclose(jax.jvp(f, (a,), (jnp.ones_like(a),))[1], 300 * a)
    np.testing.assert_allclose(jnp.diagonal(jax.hessian(lambda x: f(x).sum())(a)), jnp.full(24, 300.0))


def test_a_hand_written_gradient_that_writes_to_its_input_is_refused():
    class Writes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            return x.mul_(2)

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    with pytest.raises(CaptureError, match=r"Writes: .*backend=\"torch\""):
        torch2jax(lambda x: Writes.apply(x * 1))(arrays([X])[0])


class Rerun(torch.autograd.Function):
    """A checkpoint written by hand, as in diffusion models: its backward runs a module once more."""

    @staticmethod
    def forward(ctx, run, n_inputs, *tensors):
        ctx.run, ctx.inputs, ctx.params = run, tensors[:n_inputs], tensors[n_inputs:]
        with torch.no_grad():
            return run(*ctx.inputs)

    @staticmethod
    def backward(ctx, *grads):
        inputs = [t.detach().requires_grad_() for t in ctx.inputs]
        with torch.enable_grad():
            outputs = ctx.run(*(t.view_as(t) for t in inputs))
        return None, None, *torch.autograd.grad(outputs, [*inputs, *ctx.params], grads, allow_unused=True)


class Reruns(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()

    def forward(self, x):
        return Rerun.apply(self.inner, 1, x, *self.inner.parameters())


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_a_backward_that_runs_its_module_again(backend):
    torch.manual_seed(0)
    model = Reruns()
    apply, params = convert_pytnn_to_jax(model, backend=backend)
    model(X).pow(2).sum().backward()
    gradients = jax.grad(lambda params: (apply(params, arrays([X])[0]) ** 2).sum())(params)
    for name, parameter in model.inner.named_parameters():
        index, kind = name.split(".")
        assert_same(gradients["inner"][index][kind], parameter.grad)


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class RoundTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return Round.apply(2 * x)

    @staticmethod
    def backward(ctx, grad):
        return 7 * grad


def test_a_hand_written_gradient_of_constants_and_one_inside_of_another():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))

    def fn(x):
        return RoundTwice.apply(F.linear(x, Round.apply(3 * weight))).sin()

    check(fn)


def test_what_is_seen_inside_of_a_hand_written_gradient_stays_there():
    """A view of an input that is made in its forward, and again outside."""

    class First(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x[0] * 2

        @staticmethod
        def backward(ctx, grad):
            return torch.stack([2 * grad, torch.zeros_like(grad)])

    def fn(x):
        return First.apply(x) + x[0].t().t() * x[0]

    check(fn)


def test_constants_of_a_hand_written_gradient():
    table = torch.tensor([2.0, 3.0], dtype=torch.float64)

    class Scales(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * torch.tensor([[5.0], [7.0], [11.0]], dtype=x.dtype) * table[1]

        @staticmethod
        def backward(ctx, grad):
            return grad * table[0] * torch.tensor(13.0, dtype=grad.dtype)

    def fn(x):
        return Scales.apply(x) * table[0]

    check(fn)


def test_a_tensor_that_gets_the_memory_of_another():
    def fn(x):
        y = x[0, :, :3].clone()
        y.data = y.data.t()
        return y * 1

    assert_same(torch2jax(fn)(arrays([X])[0]), fn(X))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of fake tensors
def test_second_derivatives_for_each_example():
    def laplacian(x):
        return torch.vmap(torch.func.hessian(lambda q: (q**3).sum()))(x).diagonal(dim1=1, dim2=2).sum(-1)

    assert_same(torch2jax(laplacian)(arrays([X[0]])[0]), laplacian(X[0]))


def _jacobian_of_what_is_made_inside(x):
    return torch.vmap(
        torch.func.jacfwd(lambda r: (r * torch.arange(4.0, dtype=r.dtype)).sin() + torch.tensor([1.0] * 4))
    )(x)


def _jacobian_of_a_table(x):
    return torch.vmap(torch.func.jacfwd(lambda r: (r * TABLE).sum() * torch.ones(3, dtype=r.dtype)))(x)


TABLE = torch.linspace(1.0, 2.0, 4, dtype=torch.float64)


@pytest.mark.parametrize("fn", [_jacobian_of_what_is_made_inside, _jacobian_of_a_table])
def test_jacobians_for_each_example(fn):
    assert_same(torch2jax(fn)(arrays([X[0]])[0]), fn(X[0]))


# -- what is refused -------------------------------------------------------------------------------------------


def _hook_on_a_tensor(x):
    y = x * 2
    if y.requires_grad:
        y.register_hook(lambda grad: -grad)
    return y


def _hook_on_a_module(x):
    net = nn.Linear(4, 4, dtype=x.dtype)
    net.register_full_backward_hook(lambda module, inputs, outputs: tuple(-g for g in inputs))
    return net(x)


def _linearizes(x):
    return torch.func.linearize(torch.sin, x)[1](x)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # torch's own, of `linearize`
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (_hook_on_a_tensor, "register_hook: expected gradients without hooks"),
        (_hook_on_a_module, "Linear: expected gradients without hooks"),
        (_linearizes, "traces its operators itself"),
    ],
)
def test_what_would_be_ignored_is_refused(fn, message):
    with pytest.raises(CaptureError, match=message):
        torch2jax(fn)(arrays([X])[0])
