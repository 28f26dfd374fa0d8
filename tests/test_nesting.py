"""Torch inside of JAX inside of torch works; JAX inside of torch inside of JAX is an error and never hangs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import DEVICES
from jax.sharding import AxisType, PartitionSpec as P

from pytorch2jax import NestingError, convert_pytnn_to_jax, jax2torch, torch2jax

F64 = torch.float64

# -- torch inside of JAX inside of torch ---------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["traced", "jitted"])
def nested(request):
    inner = torch2jax(lambda x, y: torch.sin(x) * y**2)
    inner = jax.jit(inner) if request.param else inner
    return jax2torch(lambda x, y: jnp.exp(inner(x, y)) + x)


def oracle(x, y):
    return torch.exp(torch.sin(x) * y**2) + x


@pytest.fixture
def args():
    return [torch.rand(3, dtype=F64, requires_grad=True), torch.rand(3, dtype=F64, requires_grad=True)]


def test_torch_in_jax_in_torch(nested, args):
    torch.testing.assert_close(nested(*args), oracle(*args))
    expected = torch.autograd.grad(oracle(*args).sum(), args)
    torch.testing.assert_close(torch.autograd.grad(nested(*args).sum(), args), expected)
    out = nested(*args).sum()
    out.backward(retain_graph=True)
    out.backward()
    torch.testing.assert_close(args[0].grad, 2 * expected[0])


def test_its_higher_derivatives_and_batches(nested, args):
    assert torch.autograd.gradcheck(nested, args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(nested, args)
    x, y = (torch.stack([a.detach(), 2 * a.detach()]) for a in args)
    close = torch.testing.assert_close
    close(torch.func.vmap(nested)(x, y), torch.func.vmap(oracle)(x, y))

    def per_example(fn):
        return torch.func.vmap(torch.func.grad(lambda x, y: fn(x, y).sum(), (0, 1)))(x, y)

    close(per_example(nested), per_example(oracle))


# -- JAX inside of torch inside of JAX -----------------------------------------------------------------------------


def bridged(x):
    return jax2torch(lambda x: jnp.sin(x))(x)


def plain(x):
    return x * float(jnp.ones(()) + 1)


def compiled(x):
    return x * float(COMPILED(np.ones(())))


def converted(x):
    return x * float(CONVERTED(jnp.ones(())))


def random(x):
    return x * jax.random.uniform(jax.random.key(0)).item()


COMPILED = jax.jit(lambda x: x + 1)
COMPILED(np.ones(()))  # so that JAX's fast way of calling what is compiled already is open
CONVERTED = torch2jax(torch.sin)
CONVERTED(jnp.ones(()))
X = jnp.ones(3)


@pytest.mark.parametrize("fn", [bridged, plain, compiled, converted, random], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "use",
    [
        lambda f: f(X),
        lambda f: jax.jit(f)(X),
        lambda f: jax.grad(lambda x: f(x).sum())(X),
        lambda f: jax.vmap(f)(X),
        lambda f: jax.eval_shape(f, X),
    ],
    ids=["eager", "jit", "grad", "vmap", "eval_shape"],
)
def test_refused_when_it_is_traced(fn, use):
    with pytest.raises(NestingError, match=rf"{fn.__name__}: expected a torch function that does not call JAX, .*`"):
        use(torch2jax(fn))
    assert (jnp.ones(1) + 1).item() == 2.0  # JAX works again


@pytest.mark.parametrize("size", [3, 1_000_000], ids=["through XLA", "over DLPack"])
@pytest.mark.parametrize("fn", [bridged, plain, compiled, converted, random], ids=lambda f: f.__name__)
def test_refused_when_it_runs(fn, size):
    x = jnp.ones(size)
    f = torch2jax(fn, output_shapes=x)  # which is not run to be traced
    with pytest.raises(NestingError, match="does not call JAX"):
        f(x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="NestingError"):
        jax.block_until_ready(jax.jit(lambda x: f(x) + 1)(x))
    assert (jnp.ones(1) + 1).item() == 2.0


def test_refused_in_modules():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)
            self.activation = jax2torch(jnp.tanh)

        def forward(self, x):
            return self.activation(self.layer(x))

    net = Net()
    assert net(torch.ones(3)).shape == (3,)
    apply, params = convert_pytnn_to_jax(net)
    with pytest.raises(NestingError, match=r"Net: .*called `tanh`.* turn the parts into JAX functions"):
        apply(params, jnp.ones(3, jnp.float32))


def test_what_needs_no_operation_of_jax_is_allowed():
    constant = jnp.arange(3.0)
    f = torch2jax(lambda x: x + torch.from_numpy(np.array(constant)) + float(constant.shape[0]))
    np.testing.assert_allclose(jax.jit(f)(X), np.arange(3.0) + 4)


def test_a_wrapped_function_that_is_both():
    g = jax2torch(jnp.sin)
    np.testing.assert_allclose(torch2jax(g)(X), np.sin(1.0))
    with pytest.raises(NestingError, match=r"called `sin`"):
        torch2jax(lambda x: g(x))(X)


def test_nesting_on_several_devices():
    mesh = jax.make_mesh((len(DEVICES),), ("i",), axis_types=(AxisType.Auto,), devices=DEVICES)
    sharded = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
    x = jnp.ones((8, 4))
    for fn in (lambda t: jax2torch(jnp.sin)(t), lambda t: t * float(jnp.ones(()) + 1)):
        with pytest.raises(NestingError):
            jax.jit(sharded(torch2jax(fn)))(x)
        declared = torch2jax(fn, output_shapes=jax.ShapeDtypeStruct((1, 4), x.dtype))
        with pytest.raises(jax.errors.JaxRuntimeError, match="NestingError"):
            jax.block_until_ready(jax.jit(sharded(declared))(x))
    inner = torch2jax(torch.sin)
    outer = jax2torch(lambda x: jax.jit(inner)(x).sum())
    t = torch.ones(8, 4, requires_grad=True)
    outer(t).backward()
    torch.testing.assert_close(t.grad, torch.cos(t).detach())
