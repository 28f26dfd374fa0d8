"""Random programs, with the tape and without it: the same numbers but for rounding.

A program is a tree of JAX transformations with torch functions as its leaves, from a vector and a matrix to a vector.
Its value and gradients are taken with the tape, then by recomputation. Not to the bit: MKL's results depend on the
alignment of memory (on Intel's processors), and tensors have other memory in the two cases. The number of programs is
set by `PYTORCH2JAX_STRESS_PROGRAMS`; `make stress` runs thousands.
"""

from __future__ import annotations

import os

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
import torch
from cases import assert_same_numbers
from jax.sharding import AxisType, PartitionSpec

from pytorch2jax import torch2jax, use_tape
from pytorch2jax._tape import TAPE

PROGRAMS = int(os.environ.get("PYTORCH2JAX_STRESS_PROGRAMS", "60"))
N = 3
KEY = jax.random.key(0)


class _KeepsTensors(torch.autograd.Function):
    """Keeps its inputs where no hook of autograd's sees them."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.tensors = x, w
        return w @ x

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.tensors
        return w.T @ grad, torch.outer(grad, x)


def linear(x, w):
    return torch.tanh(w @ x)


def saves_outputs(x, w):
    return torch.sigmoid(w @ x) * torch.exp(-x.abs())


def views(x, w):
    return w[0] * x.flip(0) + w.T[1] - w.diagonal() * x[0]


def writes(x, w):
    y = x * 1
    y[1:] += w[0, 1:] * x[:-1].clone()
    x.mul_(0.5)
    return y.cos() + x


def returns_its_input(x, w):
    return x


def keeps_tensors(x, w):
    return _KeepsTensors.apply(x, w)


def normalises(x, w):
    return torch.nn.functional.layer_norm(w @ x, (N,), weight=x, bias=w[1])


def ignores(x, w):
    return w.detach().sum(0) * 0.1


def checkpointed(x, w):
    return torch.utils.checkpoint.checkpoint(linear, x, w, use_reentrant=False)


def drops(x, w):
    return torch.nn.functional.dropout(w @ x, 0.4)


def differentiates(x, w):
    return torch.func.grad(lambda x: torch.sin(w @ x).sum())(x)


LEAVES = {
    fn.__name__: torch2jax(fn)
    for fn in (
        linear,
        saves_outputs,
        views,
        writes,
        returns_its_input,
        keeps_tensors,
        normalises,
        ignores,
        checkpointed,
        differentiates,
    )
}
DROPS = torch2jax(drops)
LEAVES["drops"] = lambda x, w: DROPS(x, w, rng=KEY)
LEAVES["of jax"] = lambda x, w: jnp.tanh(x) + w[0]

MESH = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))


def then(f, g):
    return lambda x, w: g(f(x, w), w)


def plus(f, g):
    return lambda x, w: f(x, w) + g(2 * x, w)


def scan(f):
    return lambda x, w: jax.lax.scan(lambda c, s: (jnp.tanh(f(c, w)) + s, c), x, jnp.arange(3.0))[0]


def scan_over_weights(f):
    def over(x, w):
        out, ys = jax.lax.scan(lambda c, v: (c * 0.5, f(c, v)), x, jnp.stack([w, 2 * w]))
        return out + ys.sum(0)

    return over


def fori(f):
    return lambda x, w: jax.lax.fori_loop(0, 2, lambda i, c: jnp.sin(f(c, w)), x)


def vmap(f):
    return lambda x, w: jax.vmap(f, in_axes=(0, None))(jnp.stack([x, x + 1]), w).sum(0)


def vmap_all(f):
    return lambda x, w: jax.vmap(f)(jnp.stack([x, x + 1]), jnp.stack([w, w * 2])).sum(0)


def vmap_gradients(f):
    def examples(x, w):
        return jax.vmap(jax.grad(lambda x: f(x, w).sum()))(jnp.stack([x, x + 1])).sum(0)

    return lambda x, w: jax.lax.stop_gradient(examples(x, w)) + x


def checkpoint(f):
    return jax.checkpoint(f)


def jit(f):
    return jax.jit(f)


def cond(f, g):
    return lambda x, w: jax.lax.cond(x[0] > 0.2, f, g, x, w)


def shard_map(f):
    spec = PartitionSpec()
    mapped = jax.shard_map(f, mesh=MESH, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    # JAX takes no map over the same axis inside of one.
    return lambda x, w: f(x, w) if jax.sharding.get_abstract_mesh().axis_names else mapped(x, w)


def jvp(f):
    return lambda x, w: jax.lax.stop_gradient(jax.jvp(lambda x: f(x, w), (x,), (x,))[1]) + x


def called_twice(f):
    """A pullback that is called twice, inside of what is differentiated."""

    def twice(x, w):
        out, pull = jax.vjp(f, x, w)
        return out + jax.lax.stop_gradient(pull(out)[0] + pull(2 * out)[0])

    return twice


UNARY = (
    scan,
    scan_over_weights,
    fori,
    vmap,
    vmap_all,
    vmap_gradients,
    checkpoint,
    jit,
    shard_map,
    jvp,
    called_twice,
)
BINARY = (then, plus, cond)


def extend(children):
    unary = st.tuples(st.sampled_from(UNARY), children)
    return unary | st.tuples(st.sampled_from(BINARY), children, children)


def build(tree):
    return LEAVES[tree] if isinstance(tree, str) else tree[0](*map(build, tree[1:]))


X = jnp.linspace(-0.5, 0.7, N)
W = jnp.linspace(-0.4, 0.8, N * N).reshape(N, N)


def same(left, right):
    jax.tree.map(assert_same_numbers, left, right)


pytestmark = pytest.mark.filterwarnings(
    "ignore::pytorch2jax.LoopWarning", "ignore:None of the inputs have requires_grad"
)


def programs(n):
    """Random programs as the arguments of a test, always the same."""
    return lambda test: hypothesis.settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )(hypothesis.given(st.recursive(st.sampled_from(sorted(LEAVES)), extend, max_leaves=4), st.booleans())(test))


@programs(5)
def test_the_tape_changes_nothing_in_a_few_programs(tree, jitted):
    check(tree, jitted)


@pytest.mark.exhaustive
@programs(PROGRAMS)
def test_the_tape_changes_nothing(tree, jitted):
    check(tree, jitted)


def check(tree, jitted):
    f = build(tree)
    call = jax.value_and_grad(lambda x, w: jnp.sin(f(x, w)).sum(), argnums=(0, 1))
    with use_tape(True):
        call_taped = jax.jit(call) if jitted else call
        first = jax.block_until_ready(call_taped(X, W))
        assert len(TAPE) == 0, (tree, jitted)
        same(call_taped(X, W), first)  # inputs that were found to move are found now
        same(call_taped(X + 0.1, W), call_taped(X + 0.1, W))
    with use_tape(False):
        same(call_taped(X, W), first)  # traced with the tape, run without
        same((jax.jit(call) if jitted else call)(X, W), first)
    assert len(TAPE) == 0
