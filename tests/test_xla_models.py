"""Every converter × every model for the engine that translates: outputs, gradients, state, masks by key."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import test_models
from models import CONVERTERS, MODELS, output_leaves, to_jax
from test_models import cases

from pytorch2jax import CaptureError

pytestmark = [pytest.mark.usefixtures("x32"), pytest.mark.filterwarnings("ignore")]

REFUSED = {"branches": "reads a value"}
DRAWS = {
    "dropout",
    "rrelu",
    "lstm",
    "attention",
    "encoder",
    "transformer",
    "stochastic depth",
    "bert",
    "gpt2",
    "t5",
}
"""Models that draw random numbers in train mode, with `backend="xla"` other ones than torch."""


SLOW = (*test_models.SLOW, "resnet", "encoder", "llama", "orthogonal", "lstm")

TRACEABLE = [row for row in MODELS if row.name not in REFUSED]
DRAWING, CALM = ([row for row in TRACEABLE if (row.name in DRAWS) == draws] for draws in (True, False))


@pytest.mark.parametrize(("row", "converter", "tape"), [*cases(TRACEABLE, "xla", SLOW)])
def test_eval_mode(row, converter, tape):
    test_models.check(row, converter, train=False)


@pytest.mark.parametrize(("row", "converter", "tape"), [*cases(CALM, "xla", SLOW)])
def test_train_mode(row, converter, tape):
    test_models.check(row, converter, train=True)


LARGE = ("t5", "transformer", "gpt2", "bert")  # in one converter: what a key does differs by converter, not by size
SMALL = [row for row in DRAWING if row.name not in LARGE]


@pytest.mark.parametrize(
    ("row", "converter", "tape"),
    [
        *cases(SMALL, "xla", (*SLOW, "attention")),
        *list(cases([row for row in DRAWING if row.name in LARGE], "xla", LARGE))[:: len(CONVERTERS)],
    ],
)
def test_masks_by_key(row, converter, tape):
    model = row.build().train()
    args, kwargs = to_jax((row.args, row.kwargs))
    converted = converter(model, args, kwargs)

    def call(key):
        return output_leaves(converted.call(converted.params, args, kwargs, key=key, train=True)[0])[0]

    first, second = jax.random.key(1), jax.random.key(2)
    jitted = jax.jit(call)
    np.testing.assert_allclose(call(first), jitted(first), rtol=1e-4, atol=1e-6)  # the same mask
    assert not all(np.allclose(jitted(first), jitted(jax.random.key(i))) for i in range(2, 6))  # some masks are small
    if row.name in ("dropout", "attention"):
        rows = jax.vmap(call)(jax.numpy.stack([first, second]))
        np.testing.assert_allclose(rows, [call(first), call(second)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", [row for row in MODELS if row.name in REFUSED], ids=str)
def test_what_cannot_be_written_down_is_refused(row):
    converter = type("Xla", (CONVERTERS[0],), {"backend": "xla"})
    with pytest.raises(CaptureError, match=r"backend=\"torch\""):
        test_models.check(row, converter, train=False)
