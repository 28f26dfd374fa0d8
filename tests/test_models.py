"""Every converter × every model, against torch: outputs, gradients, train-mode state and masks."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from models import CONVERTERS, MODELS, assert_close, copied, loss, output_leaves, to_jax

from pytorch2jax import use_tape
from pytorch2jax._rng import seeded

pytestmark = [
    pytest.mark.usefixtures("x32"),
    pytest.mark.filterwarnings("ignore"),
]
KEY = jax.random.key(7)


DRESSED = ("residual", "dropout", "tied")
"""Models that `make test` tries in all converters; the others in `convert_pytnn_to_jax`, which all converters use."""
SLOW = ("clip", "mamba", "mixture of experts", "t5", "transformer", "whisper", "gpt2", "vit")


def cases(rows, backend, slow=SLOW):
    """Each model in each converter and, in the first of them, without the tape; all that is slow is exhaustive."""
    for row in rows:
        for number, converter in enumerate(CONVERTERS):
            kind = type(converter.__name__, (converter,), {"backend": backend})
            name = f"{row}-{converter.__name__.removesuffix('Converter')}"
            dressed = row.name in DRESSED if number else row.name not in slow
            yield pytest.param(row, kind, True, id=name, marks=() if dressed else pytest.mark.exhaustive)
            if number == 0 and backend == "torch":
                yield pytest.param(row, kind, False, id=f"{name}-recomputed", marks=pytest.mark.exhaustive)


def torch_gradients(model, args, kwargs):
    """Output, state, and gradients with respect to parameters and inputs; run on copies."""
    live = [
        t.requires_grad_()
        for t in jax.tree.leaves((args, kwargs))
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]
    through = jax.tree.map(lambda t: t * 1 if isinstance(t, torch.Tensor) and t.requires_grad else t, (args, kwargs))
    out = model(*through[0], **through[1])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = loss(out)
    found = torch.autograd.grad(total, [*parameters.values(), *live], allow_unused=True)
    filled = [
        torch.zeros_like(t) if g is None else g for g, t in zip(found, [*parameters.values(), *live], strict=True)
    ]
    return out, dict(zip(parameters, filled, strict=False)), filled[len(parameters) :]


def names(tree):
    return {".".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def jax_gradients(converted, row, key, train):
    args, kwargs = to_jax((row.args, row.kwargs))
    static = jax.tree.map(lambda x: None if isinstance(x, jax.Array) else x, (args, kwargs))
    arrays = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else None, (args, kwargs))
    floats = jax.tree.map(lambda x: x if x.dtype.kind == "f" else None, arrays)
    others = jax.tree.map(lambda x: None if x.dtype.kind == "f" else x, arrays)

    def total(params, floats, others):
        def pick(f, o, s):
            return f if f is not None else o if o is not None else s

        args, kwargs = jax.tree.map(pick, floats, others, static, is_leaf=lambda x: x is None)
        out, state = converted.call(params, args, kwargs, key=key, train=train)
        return loss(out), (out, state)

    gradient, (out, state) = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(converted.params, floats, others)
    return out, state, names(gradient[0]), jax.tree.leaves(gradient[1])


def check(row, converter, train):
    model = row.build()
    model.train(train)
    oracle = row.build().train(train)
    args, kwargs = to_jax((row.args, row.kwargs))
    converted = converter(model, args, kwargs)
    out, state, in_params, in_inputs = jax_gradients(converted, row, KEY if train else None, train)
    oracle = getattr(oracle, "_orig_mod", oracle)
    oracle = oracle.module if isinstance(oracle, torch.nn.DataParallel) else oracle
    words = np.asarray(jax.random.key_data(converted.key_for_torch(KEY))).astype(np.int64)
    with seeded(torch.from_numpy(words)):
        expected, torch_params, torch_inputs = torch_gradients(oracle, *copied((row.args, row.kwargs)))
    ours, theirs = output_leaves(out), output_leaves(expected)
    assert len(ours) == len(theirs)
    for index, (a, e) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(a, e, row.rtol, f"output {index}")
    assert in_params.keys() == dict(oracle.named_parameters()).keys()
    floor = 0.05 * max(
        (float(e.abs().max()) for e in torch_params.values()), default=1.0
    )  # some are zero but for noise
    for name, e in torch_params.items():
        assert_close(in_params[name], e, 5 * row.rtol, f"gradient of {name}", floor)
    for a, e in zip(in_inputs, torch_inputs, strict=True):
        assert_close(a, e, 5 * row.rtol, "gradient of an input")
    buffers = dict(oracle.named_buffers())
    assert names(state).keys() == buffers.keys()
    for name, e in buffers.items():
        assert_close(names(state)[name], e, row.rtol, f"buffer {name}")


@pytest.mark.parametrize(("row", "converter", "tape"), [*cases(MODELS, "torch")])
def test_eval_mode(row, converter, tape):
    with use_tape(tape):
        check(row, converter, train=False)


@pytest.mark.parametrize(("row", "converter", "tape"), [*cases(MODELS, "torch")])
def test_train_mode(row, converter, tape):
    with use_tape(tape):
        check(row, converter, train=True)
