"""`torch.autograd.Function` as `jax.custom_vjp`: the backward that its author wrote, not that of its forward."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pytorch2jax._dtypes import canonical_dtype_t2j
from pytorch2jax.xla._graph import Equation, Unifiable, Var, used
from pytorch2jax.xla._internals import aten
from pytorch2jax.xla._interpret import run
from pytorch2jax.xla._linearity import is_linear


class CustomGradient(Unifiable):
    """A function of arrays with a backward of its own.

    Args:
        name: of the class, for messages.
        primals: variables for its tensor arguments.
        active: those of them that it may have gradients for, by number.
        forward: computes `outputs`.
        outputs: its results.
        differentiable: those of them that have derivatives, by number.
        cotangents: variables for the cotangents of these.
        backward: computes `gradients`.
        gradients: one for each active primal; None for one that gets none.

    Attributes:
        free: variables from around it, which come after the primals when it is called.
    """

    takes_key = True

    def __init__(
        self,
        *,
        name: str,
        primals: tuple[Var, ...],
        active: tuple[int, ...],
        forward: tuple[Equation, ...],
        outputs: tuple[Var, ...],
        differentiable: tuple[int, ...],
        cotangents: tuple[Var, ...],
        backward: tuple[Equation, ...],
        gradients: tuple[Var | None, ...],
    ) -> None:
        self.name = name
        self._primals, self._active = primals, active
        self._forward, self._outputs = forward, outputs
        self._differentiable, self._cotangents = differentiable, cotangents
        self._backward, self._gradients = backward, gradients
        made_forward = {var for e in forward for var in e.outputs}
        made_backward = {var for e in backward for var in e.outputs}
        used_backward = dict.fromkeys([*used(backward), *(g for g in gradients if g is not None)])
        known = {*primals, *made_forward, *cotangents, *made_backward}
        wanted = [*used(forward), *outputs, *used_backward]
        self.free = tuple(dict.fromkeys(v for v in wanted if v not in known))
        self._linear: bool | None = None
        # What the backward pass needs from the forward pass.
        self._kept = [v for v in used_backward if v not in made_backward and v not in cotangents]
        # An output that is kept has the derivative of an output, by the backward, and not that of the forward.
        same = {e.outputs[0]: e.args[0] for e in forward if e.operator is aten.detach.default}  # as which it is saved
        origins = {k: _origin(v, same) for k, v in enumerate(self._kept)}
        self._kept_outputs = {k: outputs.index(v) for k, v in origins.items() if v in outputs and v not in primals}

    def __call__(self, *arrays: Any, key: Any = None) -> tuple[Any, ...]:
        n = len(self._primals)
        around = tuple(jax.lax.stop_gradient(a) for a in arrays[n:])
        if self._pulls_linearly(arrays[:n], around, key):
            return self._in_both_modes(arrays[:n], around, key)

        # A backward pass that is not linear in the cotangents (it clips them) has no forward mode.
        @jax.custom_vjp
        def call(primals: Any, around: Any, key: Any) -> Any:
            return self._run(primals, around, key)[0]

        call.defvjp(
            functools.partial(self._run_keeping, call),
            lambda kept, cotangents: (self._pull(kept, cotangents), None, None),
        )
        return call(arrays[:n], around, key)

    def _in_both_modes(self, primals: Any, around: Any, key: Any) -> tuple[Any, ...]:
        """With the transpose of the backward pass for forward mode; JAX transposes that again for reverse mode."""

        @jax.custom_jvp
        def call(primals: Any, around: Any, key: Any) -> Any:
            return self._run(primals, around, key)[0]

        @call.defjvp
        def _(arguments: Any, tangents: Any) -> tuple[Any, Any]:
            outputs, kept = self._run_keeping(call, *arguments)
            push = jax.linear_transpose(lambda *c: self._pull_active(kept, c), *self._cotangents_of(outputs))
            tangents_out = [jnp.zeros_like(o) for o in outputs]
            pushed = push(tuple(tangents[0][i] for i in self._active))
            for index, tangent in zip(self._differentiable, pushed, strict=True):
                tangents_out[index] = tangent
            return outputs, tuple(map(_as_tangent, tangents_out, outputs))

        return call(primals, around, key)

    def _pulls_linearly(self, primals: Any, around: Any, key: Any) -> bool:
        if self._linear is None:
            outputs, kept = jax.eval_shape(self._run, primals, around, key)
            self._linear = is_linear(self._pull_active, kept, self._cotangents_of(outputs))
        return self._linear

    def _cotangents_of(self, outputs: Any) -> list[Any]:
        return [jax.ShapeDtypeStruct(outputs[i].shape, outputs[i].dtype) for i in self._differentiable]

    def _run(self, primals: Any, around: Any, key: Any) -> tuple[Any, Any]:
        env = dict(zip(self._primals, primals, strict=True)) | dict(zip(self.free, around, strict=True))
        run(self._forward, env, key)
        kept = [env[v] for v in self._kept]
        return tuple(env[v] for v in self._outputs), (kept, key)

    def _run_keeping(self, call: Any, primals: Any, around: Any, key: Any) -> tuple[Any, Any]:
        """The outputs, with derivatives by the backward in all orders, and what the backward needs.

        JAX differentiates what a rule returns once more for second order. The outputs are therefore those of another
        call, and not of the bare forward, whose derivatives are others; XLA computes what both share once.
        """
        kept, key = self._run(primals, around, key)[1]
        outputs = call(primals, around, key)
        kept = [outputs[self._kept_outputs[k]] if k in self._kept_outputs else v for k, v in enumerate(kept)]
        return outputs, (kept, key)

    def _pull(self, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
        """A gradient or None for each primal, for a cotangent of each output."""
        pulled: list[Any] = [None] * len(self._primals)
        gradients = self._pull_active(residuals, [cotangents[i] for i in self._differentiable], zeros=False)
        for index, gradient in zip(self._active, gradients, strict=True):
            pulled[index] = gradient
        return tuple(pulled)

    def _pull_active(self, residuals: Any, cotangents: Any, *, zeros: bool = True) -> tuple[Any, ...]:
        kept, key = residuals
        env = dict(zip(self._kept, kept, strict=True)) | dict(zip(self._cotangents, cotangents, strict=True))
        run(self._backward, env, key)
        gradients = [None if g is None else env[g] for g in self._gradients]
        if zeros:
            like = [self._primals[i] for i in self._active]
            gradients = [
                jnp.zeros(p.shape, canonical_dtype_t2j(p.dtype)) if g is None else g
                for g, p in zip(gradients, like, strict=True)
            ]
        return tuple(gradients)

    def __repr__(self) -> str:
        return self.name


def _origin(var: Var, same: dict[Var | None, Any]) -> Var:
    while var in same:
        var = same[var]
    return var


def _as_tangent(tangent: Any, output: Any) -> Any:
    """Zeros without a dtype for outputs that have no derivatives."""
    if jnp.issubdtype(output.dtype, jnp.inexact):
        return tangent
    return np.zeros(output.shape, jax.dtypes.float0)
