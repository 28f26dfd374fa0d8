"""What a first call keeps for later ones: each use of a converted model may be the first, whatever comes after it."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import (
    CONVERTERS,
    MODELS,
    Converter,
    EquinoxConverter,
    JaxConverter,
    assert_close,
    copied,
    loss,
    output_leaves,
    to_jax,
)
from test_xla_models import SLOW

import pytorch2jax

pytestmark = [pytest.mark.usefixtures("x32"), pytest.mark.filterwarnings("ignore")]


class StatelessJax(JaxConverter):
    """`convert_pytnn_to_jax` with the buffers inside of the function."""

    def __init__(self, model, args, kwargs):
        self.apply, self.params = pytorch2jax.convert_pytnn_to_jax(model, backend=self.backend)

    def call(self, params, args, kwargs):
        return self.apply(params, *args, **kwargs), None


class StatelessEquinox(EquinoxConverter):
    """`convert_pytnn_to_equinox` with the buffers inside of the module."""

    def __init__(self, model, args, kwargs):
        self.module = pytorch2jax.convert_pytnn_to_equinox(model, backend=self.backend)
        self.params = self.module.params

    def call(self, params, args, kwargs):
        return eqx.tree_at(lambda m: m.params, self.module, params)(*args, **kwargs), None


USES = {
    "jit": lambda call, params: jax.jit(call)(params),
    "eager": lambda call, params: call(params),
    "another jit": lambda call, params: jax.jit(lambda params: [x * 1 for x in call(params)])(params),
    "scan": lambda call, params: [x[1] for x in jax.lax.scan(lambda c, _: (c, call(params)), 0, None, length=2)[1]],
    "eval_shape": lambda call, params: jax.eval_shape(call, params),
    "grad": lambda call, params: jax.grad(lambda params: loss(call(params)))(params),
    "cond": lambda call, params: jax.lax.cond(jnp.zeros(()) < 1, call, call, params),
    "vmap": lambda call, params: [x[1] for x in jax.vmap(lambda _: call(params))(jnp.zeros(2))],
}
NAMES = list(USES)
ORDERS = [NAMES[i:] + NAMES[:i] for i in range(len(NAMES))]
"""Each use comes first in one of them."""

HOLD_BUFFERS = ("residual", "moving average", "llama")
REFUSED = {("branches", "xla")}


def cases():
    """Models without state, in the two engines; the other converters, and more orders, on a few. The order goes round.

    What is kept depends on the converter and the engine. Large models add little but the time to compile them, so that
    the engine that compiles gets one of them.
    """
    for number, row in enumerate(MODELS):
        for backend in ("torch", "xla"):
            quick = row.name in HOLD_BUFFERS
            if (row.name, backend) in REFUSED or (backend == "xla" and row.name in SLOW and not quick):
                continue
            for turn, converter in enumerate([StatelessJax, StatelessEquinox, *CONVERTERS]):
                if turn and not quick:
                    continue
                several = turn < 2 and quick
                for first in {(number + i) % len(ORDERS) for i in ((0, 3) if several else (0,))}:
                    marks = () if row.name == "residual" and turn == 0 else pytest.mark.exhaustive
                    kind = converter.__name__.removesuffix("Converter")
                    order = ORDERS[(first + turn) % len(ORDERS)]
                    yield pytest.param(
                        row, backend, converter, order, id=f"{row}-{backend}-{kind}-{order[0]}", marks=marks
                    )


def expected_of(row):
    model = row.build().eval()
    args, kwargs = copied((row.args, row.kwargs))
    return [x.detach() for x in output_leaves(model(*args, **kwargs))]  # some differentiate inside


@pytest.mark.parametrize(("row", "backend", "converter", "order"), [*cases()])
def test_each_use_may_be_the_first(row, backend, converter, order):
    expected = expected_of(row)
    args, kwargs = to_jax((row.args, row.kwargs))
    kind: type[Converter] = type(converter.__name__, (converter,), {"backend": backend})
    with jax.checking_leaks():
        converted = kind(row.build().eval(), args, kwargs)

        def call(params):
            return output_leaves(converted.call(params, args, kwargs)[0])

        gradients = []
        for use in [*order, "grad"]:
            found = USES[use](call, converted.params)
            if use == "grad":
                gradients.append(found)
                continue
            for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
                assert ours.shape == theirs.shape
                if use != "eval_shape":
                    assert_close(ours, theirs, row.rtol, f"{use}, output {index}")
    for first, second in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert_close(first, np.asarray(second), row.rtol, "the same gradient, first and last")


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_a_conversion_may_happen_where_jax_traces(backend):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval()
    x = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
    kept = []

    @jax.jit
    def first(x):
        kept.append(pytorch2jax.convert_pytnn_to_jax(model, backend=backend))
        apply, params = kept[0]
        return apply(params, x)

    with jax.checking_leaks():
        inside = first(x)
        apply, params = kept[0]
        outside = apply(params, x)
    expected = model(torch.from_numpy(np.array(x))).detach()
    np.testing.assert_allclose(inside, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outside, expected, rtol=1e-5, atol=1e-6)
