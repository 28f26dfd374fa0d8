"""`torch.autograd.Function`: backward passes that run a module again, and derivatives of backward passes."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import arrays, one_in
from torch import nn

from pytorch2jax import (
    CaptureError,
    UnsupportedTransformError,
    convert_pytnn_to_jax,
    t2j,
    torch2jax,
    use_tape,
)

# -- a backward that runs a module again --------------------------------------------------------------------------


class Adjoint(torch.autograd.Function):
    """As solvers of differential equations have it: the parameters are arguments, and their gradients results."""

    @staticmethod
    def forward(ctx, net, x, *params):
        ctx.net = net
        ctx.save_for_backward(x, *params)
        with torch.no_grad():
            return net(x)

    @staticmethod
    def backward(ctx, grad):
        x, *params = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            y = ctx.net(x)
            return (None, *torch.autograd.grad(y, [x, *params], grad, allow_unused=True))


class Rerun(torch.autograd.Function):
    """As reversible networks have it: the parameters get their gradients from a backward pass inside."""

    @staticmethod
    def forward(ctx, x, net):
        ctx.net, ctx.x = net, x.detach()
        return net(ctx.x).detach()

    @staticmethod
    def backward(ctx, grad):
        x = ctx.x.requires_grad_(True)
        with torch.enable_grad():
            y = ctx.net(x)
        torch.autograd.backward(y, grad)
        return x.grad, None


class TakesGrad(torch.autograd.Function):
    """The same, for which the parameters are arguments, and which takes the gradients out of `grad`."""

    @staticmethod
    def forward(ctx, net, x, *params):
        ctx.net, ctx.x = net, x.detach()
        return net(ctx.x).detach()

    @staticmethod
    def backward(ctx, grad):
        x = ctx.x.requires_grad_(True)
        with torch.enable_grad():
            y = ctx.net(x)
        torch.autograd.backward(y, grad)
        found = [p.grad for p in ctx.net.parameters()]
        for param in ctx.net.parameters():
            param.grad = None
        return None, x.grad, *found


class Noisy(torch.autograd.Function):
    """The same as `Rerun`, for a module that draws random numbers: it draws them again."""

    @staticmethod
    def forward(ctx, x, net):
        ctx.net, ctx.x, ctx.state = net, x.detach(), torch.get_rng_state()
        return net(ctx.x).detach()

    @staticmethod
    def backward(ctx, grad):
        x = ctx.x.requires_grad_(True)
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            y = ctx.net(x)
        torch.set_rng_state(now)
        torch.autograd.backward(y, grad)
        return x.grad, None


RUNS = {
    "adjoint": lambda net, x: Adjoint.apply(net, x, *(p for p in net.parameters() if p.requires_grad)),
    "adjoint that asks nothing": lambda net, x: Adjoint.apply(net, x, *net.parameters()),
    "rerun": lambda net, x: Rerun.apply(x, net),
    "rerun, and the module itself": lambda net, x: Rerun.apply(net(x), net) * net(x),
    "takes grad": lambda net, x: TakesGrad.apply(net, x, *net.parameters()),
}


class Runs(nn.Module):
    def __init__(self, run, size=3):
        super().__init__()
        torch.manual_seed(0)
        self.run, self.net = run, nn.Sequential(nn.Linear(size, size), nn.Tanh()).double()

    def forward(self, x):
        return self.run(self.net, x)


def gradients(model, x):
    """Torch's own, of the sum of squares: by parameters, and by input."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    (model(x) ** 2).sum().backward()
    return [p.grad.numpy().copy() for p in model.parameters()], x.grad.numpy()


def gradient_by_params(apply, params, x):
    return jax.grad(lambda params: (apply(params, x) ** 2).sum())(params)


CALLS = {
    "eager": lambda apply, loss, params, x: apply(params, x),
    "jit": lambda apply, loss, params, x: jax.jit(apply)(params, x),
    "grad": lambda apply, loss, params, x: jax.grad(loss, (0, 1))(params, x),
    "jit of grad": lambda apply, loss, params, x: jax.jit(jax.grad(loss, (0, 1)))(params, x),
}


@pytest.mark.parametrize("order", one_in(5, list(itertools.permutations(CALLS))), ids=" ".join)
@pytest.mark.parametrize("tape", [True, False])
@pytest.mark.parametrize("run", RUNS)
def test_gradients_of_what_a_backward_runs_again(run, tape, order):
    model = Runs(RUNS[run])
    x = torch.randn(2, 3, dtype=torch.float64)
    by_params, by_x = gradients(model, x)
    with use_tape(tape):
        apply, params = convert_pytnn_to_jax(model)

        def loss(params, x):
            return (apply(params, x) ** 2).sum()

        for call in (*order, *order):
            out = CALLS[call](apply, loss, params, t2j(x))
            if "grad" in call:
                np.testing.assert_allclose(out[0]["net"]["0"]["weight"], by_params[0], rtol=1e-12)
                np.testing.assert_allclose(out[0]["net"]["0"]["bias"], by_params[1], rtol=1e-12)
                np.testing.assert_allclose(out[1], by_x, rtol=1e-12)


@pytest.mark.parametrize("run", ["adjoint", "rerun", "takes grad"])
def test_large_gradients_and_steps_of_a_scan(run):
    """Whose way out of torch is another one, and whose inputs lie elsewhere in the backward pass."""
    model = Runs(RUNS[run], size=192)
    x = torch.randn(2, 192, dtype=torch.float64)
    apply, params = convert_pytnn_to_jax(model)
    for _ in range(3):
        by_params, _ = gradients(model, x)
        found = jax.jit(jax.grad(lambda p: (apply(p, t2j(x)) ** 2).sum()))(params)
        np.testing.assert_allclose(found["net"]["0"]["weight"], by_params[0], rtol=1e-10, atol=1e-12)

    def loss(params):
        def step(x, _):
            return apply(params, x), None

        return (jax.lax.scan(step, t2j(x), None, length=3)[0] ** 2).sum()

    live = x.clone()
    model.zero_grad()
    (model(model(model(live.requires_grad_()))) ** 2).sum().backward()
    found = jax.jit(jax.grad(loss))(params)
    np.testing.assert_allclose(found["net"]["0"]["weight"], model.net[0].weight.grad, rtol=1e-10, atol=1e-12)


def test_what_forward_leaves_in_grad_is_no_gradient():
    def fn(x):
        x.requires_grad_()
        (x**3).sum().backward()
        return x * 2

    for tape in (True, False):
        with use_tape(tape):
            np.testing.assert_array_equal(jax.grad(lambda x: torch2jax(fn)(x).sum())(jnp.ones(3)), 2 * jnp.ones(3))


def test_numbers_that_a_backward_draws_again():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double()

        def forward(self, x):
            return Noisy.apply(x, self.net)

    apply, params = convert_pytnn_to_jax(Drops())
    x, key = jnp.ones((2, 3)), jax.random.key(3)

    def loss(params):
        return (apply(params, x, train=True, rng=key) ** 2).sum()

    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss))):
        found = gradient(params)["net"]["0"]["bias"]
        for index in range(3):
            step = 1e-6 * jnp.eye(3)[index]
            ends = [
                loss({"net": {"0": {**params["net"]["0"], "bias": params["net"]["0"]["bias"] + s}}})
                for s in (step, -step)
            ]
            np.testing.assert_allclose(found[index], (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize("run", RUNS)
def test_derivatives_that_such_a_backward_does_not_have_are_refused(run):
    apply, params = convert_pytnn_to_jax(Runs(RUNS[run]))
    x = jnp.ones((2, 3))

    def loss(x):
        return (apply(params, x) ** 2).sum()

    for derivative in (
        lambda: jax.jvp(loss, (x,), (x,)),
        lambda: jax.jvp(lambda p: (apply(p, x) ** 2).sum(), (params,), (params,)),
        lambda: jax.hessian(loss)(x),
        lambda: jax.grad(lambda x: jax.grad(loss)(x).sum())(x),
    ):
        with pytest.raises(UnsupportedTransformError, match=r"autograd\.Function|autograd\.backward"):
            derivative()


def test_the_second_engine_computes_or_refuses_them():
    x = torch.randn(2, 3, dtype=torch.float64)
    for run in ("adjoint that asks nothing", "takes grad"):
        model = Runs(RUNS[run])
        apply, params = convert_pytnn_to_jax(model, backend="xla")
        found = gradient_by_params(apply, params, t2j(x))
        np.testing.assert_allclose(found["net"]["0"]["weight"], gradients(model, x)[0][0], rtol=1e-12)
    for run in ("adjoint", "rerun", "rerun, and the module itself"):
        apply, params = convert_pytnn_to_jax(Runs(RUNS[run]), backend="xla")
        with pytest.raises(CaptureError, match='backend="torch"'):
            apply(params, t2j(x))


def test_the_second_engine_leaves_global_parameters_alone():
    net = nn.Linear(3, 3)
    with pytest.raises(CaptureError, match=r"leaves those of parameters in `\.grad`"):
        torch2jax(lambda x: Rerun.apply(x, net), backend="xla")(jnp.ones(3, jnp.float32))
    assert net.weight.grad is None


def test_a_tensor_that_is_passed_twice():
    def fn(net, x, w):
        return Adjoint.apply(lambda x: x @ w, x, w, w)

    x, w = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad((fn(None, x, w) ** 2).sum(), w)
    for backend in ("torch", "xla"):
        f = torch2jax(lambda x, w: fn(None, x, w), backend=backend)
        found = jax.grad(lambda w, f=f: (f(t2j(x), w) ** 2).sum())(t2j(w.detach()))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


# -- derivatives of a backward --------------------------------------------------------------------------------------


def cube(keep, scale):
    """`x**3` by hand: `keep(ctx, x, y)` in its forward, and `scale(ctx)` as its derivative."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x**3
            keep(ctx, x, y)
            return y

        @staticmethod
        def backward(ctx, grad):
            return grad * scale(ctx)

    return Cube.apply


def with_setup(keep, scale):
    """The same in the newer style, with rules for `torch.func`."""

    class Cube(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x**3, 3 * x**2

        @staticmethod
        def setup_context(ctx, inputs, output):
            keep(ctx, inputs[0], output[0])

        @staticmethod
        def backward(ctx, grad, _):
            return grad * scale(ctx)

    return lambda x: Cube.apply(x)[0]


def keeps(name):
    return lambda ctx, x, y: setattr(ctx, "kept", name(x))


def saves(name):
    return lambda ctx, x, y: ctx.save_for_backward(name(x))


def in_no_grad(x):
    with torch.no_grad():
        return 3 * x**2


KEPT = {
    "the input": (saves(lambda x: x), lambda ctx: 3 * ctx.saved_tensors[0] ** 2),
    "an intermediate value": (saves(lambda x: 3 * x**2), lambda ctx: ctx.saved_tensors[0]),
    "an intermediate value in an attribute": (keeps(lambda x: 3 * x**2), lambda ctx: ctx.kept),
    "one in a list": (keeps(lambda x: [3 * x**2]), lambda ctx: ctx.kept[0]),
    "one without a graph": (keeps(in_no_grad), lambda ctx: ctx.kept),
    "the detached input": (saves(torch.detach), lambda ctx: 3 * ctx.saved_tensors[0] ** 2),
    "the data of the input": (keeps(lambda x: x.data), lambda ctx: 3 * ctx.kept**2),
    "the input, detached later": (saves(lambda x: x), lambda ctx: 3 * ctx.saved_tensors[0].detach() ** 2),
    "a mask": (keeps(lambda x: (x, torch.ones_like(x))), lambda ctx: 3 * ctx.kept[0] ** 2 * ctx.kept[1]),
}

DERIVATIVES = {
    "jvp": (lambda f: lambda x: jax.jvp(f, (x,), (1.0,))[1], 32.0),
    "reverse over reverse": (lambda f: jax.grad(jax.grad(f)), 48.0),
    "forward over reverse": (lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (1.0,))[1], 48.0),
    "reverse over forward": (lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (1.0,))[1]), 48.0),
    "batched": (lambda f: lambda x: jax.vmap(jax.hessian(f))(jnp.stack([x, 2 * x]))[0], 48.0),
    "third": (lambda f: jax.grad(jax.grad(jax.grad(f))), 48.0),
}


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_derivatives_of_a_backward_with_what_its_forward_kept(backend, kept, derivative):
    """Torch takes what `forward` computed for a constant, and gives 24 and 0 for the second and the third."""
    make, expected = DERIVATIVES[derivative]
    for style in (cube, with_setup):
        fn = style(*KEPT[kept])
        f = torch2jax(lambda x, fn=fn: fn(x) * x, backend=backend)  # x**4
        for call in (make(f), jax.jit(make(f))):
            np.testing.assert_allclose(call(2.0), expected)


@pytest.mark.parametrize(
    ("keep", "scale"),
    [
        (lambda ctx, x, y: ctx.save_for_backward(y), lambda ctx: 2 * ctx.saved_tensors[0]),
        (lambda ctx, x, y: setattr(ctx, "y", y), lambda ctx: 2 * ctx.y),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_an_output_that_is_kept_has_the_derivative_that_was_written_for_it(backend, keep, scale):
    """Here, that is twice its value, whatever its forward is."""
    fn = cube(keep, scale)
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(fn(x) * x, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    f = torch2jax(lambda x: fn(x) * x, backend=backend)
    np.testing.assert_allclose(jax.grad(f)(2.0), first.item())
    np.testing.assert_allclose(jax.grad(jax.grad(f))(2.0), second.item())
    np.testing.assert_allclose(jax.jvp(jax.grad(f), (2.0,), (1.0,))[1], second.item())


def numpy_kept(ctx, x, y):
    ctx.kept = torch.from_numpy(3 * x.detach().numpy() ** 2)


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
def test_a_forward_that_cannot_run_with_a_graph_is_refused():
    fn = cube(numpy_kept, lambda ctx: ctx.kept)
    f = torch2jax(lambda x: (fn(x) * x).sum())
    x = jnp.array([2.0])
    np.testing.assert_allclose(jax.grad(f)(x), [32.0])
    with pytest.raises(UnsupportedTransformError, match="whose forward can run once more"):
        jax.hessian(f)(x)


@pytest.mark.parametrize("share", [1.0, 0.1, 1e-3])
def test_a_small_part_of_a_backward_without_a_graph_is_found_out(share):
    def scale(ctx):
        return 3 * ctx.saved_tensors[0] ** 2

    class Partly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            outside = torch.from_numpy(grad.detach().numpy() * 1.0)
            return ((1 - share) * grad + share * outside) * scale(ctx)

    f = torch2jax(lambda x: Partly.apply(x).sum())
    x = jnp.array([2.0])
    np.testing.assert_allclose(jax.grad(f)(x), [12.0])
    with pytest.raises(UnsupportedTransformError, match="cannot be differentiated"):
        jax.jvp(f, (x,), (x,))


@pytest.mark.parametrize(
    "sample",
    [
        lambda a: torch.distributions.Beta(a[0], a[1], validate_args=False).rsample((3,)).log().sum(),
        lambda a: (torch.distributions.Dirichlet(a, validate_args=False).rsample((3,)) * a).sum(),
    ],
)
def test_distributions_that_torch_differentiates_once(sample):
    a, t = arrays([torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.5])])
    key = jax.random.key(0)
    f = torch2jax(sample)
    assert np.isfinite(jax.grad(lambda a: f(a, rng=key))(a)).all()
    with pytest.raises(UnsupportedTransformError, match="_Dirichlet"):
        jax.jvp(lambda a: f(a, rng=key), (a,), (t,))
    g = torch2jax(sample, backend="xla")
    pushed = jax.jvp(lambda a: g(a, rng=key), (a,), (t,))[1]
    np.testing.assert_allclose(pushed, jax.grad(lambda a: g(a, rng=key))(a) @ t, rtol=1e-5)


# -- what comes out of a Function, in higher orders ------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.sign(x)

    @staticmethod
    def backward(ctx, g):
        return g


class Clipped(torch.autograd.Function):
    """Its backward is not linear in the cotangent, and so has no forward mode."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-3, 3) * 2


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.floor(x), torch.sign(x)

    @staticmethod
    def backward(ctx, g, h):
        (x,) = ctx.saved_tensors
        return g + h * x


@pytest.mark.parametrize("backend", ["torch", "xla"])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: (StraightThrough.apply(x) ** 2 * x).sum(),
        lambda x: (StraightThrough.apply(StraightThrough.apply(x) * x) ** 3).sum(),
        lambda x: (Clipped.apply(x) ** 2 * x).sum(),
        lambda x: sum((a * b).sum() for a, b in zip(TwoOutputs.apply(x), TwoOutputs.apply(x * 2), strict=True)),
    ],
    ids=["straight through", "nested", "clipped", "two outputs"],
)
def test_outputs_have_the_written_derivative_in_all_orders(function, backend, request):
    values = [0.5, -2.25, 3.5]
    if request.node.callspec.id == "clipped-torch":
        with pytest.raises(UnsupportedTransformError, match="Clipped: .*is not linear in what it gets"):
            jax.grad(lambda x: jax.grad(torch2jax(function))(x).sum())(jnp.array(values))
        return
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    expected, value = [], function(x)
    f = torch2jax(function, backend=backend)
    found = [f]
    for _ in range(3):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        expected.append(value.detach())
        if not value.requires_grad:
            break
        found.append(jax.grad(lambda x, f=found[-1]: f(x).sum()))
    for derivative, wanted in zip(found[1:], expected, strict=False):
        np.testing.assert_allclose(derivative(jnp.array(values)), wanted, rtol=1e-12)
        np.testing.assert_allclose(jax.jit(derivative)(jnp.array(values)), wanted, rtol=1e-12)
