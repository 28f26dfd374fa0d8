"""`torch.autograd.Function` as `jax.custom_vjp`: the backward that its author wrote, not that of its forward."""

from __future__ import annotations

from typing import Any

import jax

from pytorch2jax.xla._graph import Equation, Var, variables
from pytorch2jax.xla._interpret import run


class CustomGradient:
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
        used_backward = dict.fromkeys([*_used(backward), *(g for g in gradients if g is not None)])
        known = {*primals, *made_forward, *cotangents, *made_backward}
        wanted = [*_used(forward), *outputs, *used_backward]
        self.free = tuple(dict.fromkeys(v for v in wanted if v not in known))
        # What the backward pass needs from the forward pass.
        self._kept = [v for v in used_backward if v not in made_backward and v not in cotangents]

    def __call__(self, *arrays: Any, key: Any = None) -> tuple[Any, ...]:
        n = len(self._primals)
        around = tuple(jax.lax.stop_gradient(a) for a in arrays[n:])

        @jax.custom_vjp
        def call(primals: Any, around: Any, key: Any) -> Any:
            return self._run(primals, around, key)[0]

        call.defvjp(self._run, self._pull)
        return call(arrays[:n], around, key)

    def _run(self, primals: Any, around: Any, key: Any) -> tuple[Any, Any]:
        env = dict(zip(self._primals, primals, strict=True)) | dict(zip(self.free, around, strict=True))
        run(self._forward, env, key)
        kept = [env[v] for v in self._kept]
        return tuple(env[v] for v in self._outputs), (kept, key)

    def _pull(self, residuals: Any, cotangents: Any) -> tuple[Any, None, None]:
        kept, key = residuals
        env = dict(zip(self._kept, kept, strict=True))
        env.update(zip(self._cotangents, (cotangents[i] for i in self._differentiable), strict=True))
        run(self._backward, env, key)
        pulled: list[Any] = [None] * len(self._primals)
        for index, gradient in zip(self._active, self._gradients, strict=True):
            pulled[index] = None if gradient is None else env[gradient]
        return tuple(pulled), None, None

    def __repr__(self) -> str:
        return self.name


def _used(equations: tuple[Equation, ...]) -> list[Var]:
    return [v for e in equations for v in (*variables(e.args), *variables(e.kwargs))]


