"""The rows of the report's table: what is done with a model in JAX, and what torch gives for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import torch

from pytorch2jax._check._modules import copied
from pytorch2jax._check._subject import Subject, along, as_real, jax_loss
from pytorch2jax._params import flat_name, leaf_in, nest
from pytorch2jax._transfer import t2j


class NotApplicableError(Exception):
    """There is no such thing for this model or engine."""


class Engine:
    """The model with one engine, as functions of its variables (see `Subject.variables`) and of its arguments."""

    def __init__(self, subject: Subject, backend: str) -> None:
        self.subject, self.backend = subject, backend
        self.module = subject.converted(backend)
        self.params, self.state = self.module.initial()
        self._own = [t2j(p.detach(), copy=True) for p in subject.parameters]
        self._trains = [leaf.trainable for leaf in self.module.layout.params]

    def variables(self, arrays: Sequence[Any]) -> list[Any]:
        """The trainable parameters, and the floating and complex ones among the arguments."""
        return self.subject.variables(arrays, self._own)

    def outputs(self, variables: list[Any], *arrays: Any) -> list[Any]:
        """The flat outputs in eval mode."""
        trained, given = iter(variables[: len(self._own)]), variables[len(self._own) :]
        leaves = self.module.layout.params
        old = {leaf.path: leaf_in(self.params, leaf) for leaf in leaves}
        tree = nest(leaves, [next(trained) if t else old[x.path] for x, t in zip(leaves, self._trains, strict=True)])
        varied = dict(zip(self.subject.inexact, given, strict=True))
        args, kwargs = self.subject.fill([varied.get(i, array) for i, array in enumerate(arrays)])
        out, _ = self.module.apply(tree, self.state, args, kwargs, rng=lambda: self.subject.key, train=False)
        return arrays_in(out)

    def loss(self, variables: list[Any], *arrays: Any) -> Any:
        """The number of which derivatives are taken."""
        return jax_loss(self.outputs(variables, *arrays))

    def draws(self, *, train: bool) -> bool:
        """Whether it draws random numbers."""
        try:
            call = self.subject.fill(self.subject.arrays())
            return self.module.inferred(*call, train=train).random
        except Exception:  # which a call meets, too
            return False

    def has_own_gradients(self) -> bool:
        """Whether gradients may be others than those of what `forward` computes."""
        try:
            inferred = self.module.inferred(*self.subject.fill(self.subject.arrays()), train=False)
        except Exception:
            return True
        return inferred.hand_written or inferred.hooks


def arrays_in(out: Any) -> list[Any]:
    """The arrays in what a converted module returns."""
    return [leaf for leaf in jax.tree.leaves(out) if hasattr(leaf, "dtype")]


class Comparison(NamedTuple):
    """What is compared.

    found: computes the arrays; the same ones in each call.
    expected: computes the tensors that torch has in their place.
    """

    found: Callable[[], Any]
    expected: Callable[[], list[torch.Tensor]]


def _conjugated(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of torch's as JAX has them; only complex ones are others."""
    return [g.conj().resolve_conj() for g in gradients]


def _eager(engine: Engine) -> Comparison:
    arrays = engine.subject.arrays()
    return Comparison(lambda: engine.outputs(engine.variables(arrays), *arrays), lambda: engine.subject.outputs)


def _jit(engine: Engine) -> Comparison:
    arrays, jitted = engine.subject.arrays(), jax.jit(engine.outputs)
    return Comparison(lambda: jitted(engine.variables(arrays), *arrays), lambda: engine.subject.outputs)


def _grad(engine: Engine) -> Comparison:
    subject, arrays, jitted = engine.subject, engine.subject.arrays(), jax.jit(jax.grad(engine.loss))
    return Comparison(
        lambda: jitted(engine.variables(arrays), *arrays), lambda: _conjugated(subject.gradients(subject.tensors))
    )


def _directions(engine: Engine) -> list[Any]:
    try:
        return [t2j(d, copy=True) for d in engine.subject.directions]
    except Exception as error:
        raise NotApplicableError(f"torch itself has no gradients here: {error}") from error


def _jvp(engine: Engine) -> Comparison:
    subject, arrays, tangents = engine.subject, engine.subject.arrays(), _directions(engine)
    slope_along = jax.jit(lambda p, t: jax.jvp(lambda p: engine.loss(p, *arrays), (p,), (t,))[1])
    gradients = subject.gradients(subject.tensors)
    # The sum may cancel: it is compared beside what such a sum is as a rule.
    norm = torch.stack([as_real(g).double().norm() for g in gradients]).norm()

    def found() -> Any:
        return jax.numpy.stack([slope_along(engine.variables(arrays), tangents), float(norm)]).astype(float)

    def expected() -> list[torch.Tensor]:
        return [torch.stack([along(gradients, subject.directions), norm])]

    return Comparison(found, expected)


def _second_order(engine: Engine) -> Comparison:
    """Of the derivative `J` of the gradient: `J d`, by forward over reverse mode.

    Gradients of somebody's own need not be those of any function; `J` is then not symmetric, and what torch has is
    `d J`, by reverse over reverse mode.
    """
    subject, arrays, directions = engine.subject, engine.subject.arrays(), _directions(engine)

    def gradients(variables: Any) -> Any:
        return jax.grad(lambda p: engine.loss(p, *arrays))(variables)

    def forward_over_reverse(variables: Any, directions: Any) -> Any:
        return jax.jvp(gradients, (variables,), (directions,))[1]

    def reverse_over_reverse(variables: Any, directions: Any) -> Any:
        return jax.vjp(gradients, variables)[1](directions)[0]

    product = jax.jit(reverse_over_reverse if engine.has_own_gradients() else forward_over_reverse)

    return Comparison(
        lambda: product(engine.variables(arrays), directions),
        lambda: _conjugated(subject.gradients(subject.tensors, second=True)),
    )


def _batch(engine: Engine) -> tuple[list[Any], list[list[torch.Tensor]]]:
    """A batch of arguments: as arrays with one more axis, and one by one."""
    subject = engine.subject
    if not subject.tensors:
        raise NotApplicableError("it has no arrays among its arguments")
    examples = subject.examples()
    return [jax.numpy.stack(column) for column in zip(*map(subject.arrays, examples), strict=True)], examples


def _stacked(rows: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _vmap(engine: Engine) -> Comparison:
    batch, examples = _batch(engine)
    jitted = jax.jit(jax.vmap(lambda *arrays: engine.outputs(engine.variables(arrays), *arrays)))
    return Comparison(lambda: jitted(*batch), lambda: _stacked([engine.subject.run(e) for e in examples]))


def _per_example(engine: Engine) -> Comparison:
    batch, examples = _batch(engine)
    jitted = jax.jit(jax.vmap(lambda *arrays: jax.grad(engine.loss)(engine.variables(arrays), *arrays)))
    return Comparison(
        lambda: jitted(*batch), lambda: _conjugated(_stacked([engine.subject.gradients(e) for e in examples]))
    )


def _train(engine: Engine) -> Comparison:
    """The outputs in train mode, and the new state."""
    subject, module = engine.subject, engine.module
    args, kwargs = subject.fill(subject.arrays())
    layout = module.layout.state

    @jax.jit
    def call(params: Any, state: Any, key: Any) -> Any:
        out, state = module.apply(params, state, args, kwargs, rng=key, train=True)
        return [*arrays_in(out), *(leaf_in(state, leaf) for leaf in layout)]

    def expected() -> list[torch.Tensor]:
        model = copied(subject.model).train()
        outputs = subject.run(subject.tensors, model, draws=engine.draws(train=True))
        buffers = dict(model.named_buffers())
        return [*outputs, *(buffers[flat_name(leaf.slots[0])] for leaf in layout)]

    return Comparison(lambda: call(engine.params, engine.state, subject.key), expected)


def _export(engine: Engine) -> Comparison:
    if engine.backend == "torch":
        raise NotApplicableError('a program that calls torch cannot be saved; `backend="xla"` makes one that can')
    arrays = engine.subject.arrays()
    exported = jax.export.export(jax.jit(engine.outputs))(engine.variables(arrays), *arrays)
    again = jax.export.deserialize(exported.serialize())
    return Comparison(lambda: again.call(engine.variables(arrays), *arrays), lambda: engine.subject.outputs)


ROWS: dict[str, Callable[[Engine], Comparison]] = {
    "eager": _eager,
    "jit": _jit,
    "grad": _grad,
    "jvp": _jvp,
    "second order": _second_order,
    "vmap": _vmap,
    "per-example gradients": _per_example,
    "train mode": _train,
    "export": _export,
}
DERIVATIVES = frozenset({"grad", "jvp", "second order", "per-example gradients"})
