"""The primitive `torch_call` and its rules: impl, abstract eval, lowering, jvp, transpose, batching.

One primitive serves all orders and modes. Its only parameter is a program; each rule binds the primitive
again, with a program derived from that one:

    jvp        f  ->  f,  Jvp(f, active inputs)
    transpose  Jvp(f, A)  ->  Vjp(f, A, outputs with a cotangent),  and back
    batching   f  ->  Vmap(f, batch axes)

so that, for example, a Hessian by forward over reverse is `Jvp(Vjp(f))`, and per-example gradients are
`Vmap(Vjp(f))`, one torch call each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pytorch2jax._bridge import call_in_xla, original_error
from pytorch2jax._internals import DRAWS_FROM_TORCH, Primitive, ShapedArray, ad, batching, jit_disabled, mlir
from pytorch2jax._program import Program
from pytorch2jax._transfer import check_one_device, torch_device
from pytorch2jax._transforms import Jvp, Vjp, Vmap, inexact_outputs, transposed

torch_call_p = Primitive("torch_call")
torch_call_p.multiple_results = True


def torch_call(program: Program, *arrays: Any) -> list[Any]:
    """Call a program on arrays: the one way into the primitive."""
    return torch_call_p.bind(*arrays, program=program)


# -- impl -----------------------------------------------------------------------------------------------


def _impl(*arrays: Any, program: Program) -> list[Any]:
    for index, array in enumerate(arrays):
        if isinstance(array, jax.Array):
            check_one_device(program.describe(), f"input {index}", array)
    if program.draws_from_torch:
        return [
            jnp.asarray(t.numpy().astype(s.dtype)) for t, s in zip(program.execute([]), program.out_specs, strict=True)
        ]
    compiled_calls = program.root.compiled_calls()
    if program not in compiled_calls:
        compiled_calls[program] = jax.jit(lambda *inputs: torch_call(program, *inputs))
    # With jit disabled the call would come back here: this is the implementation, there is nothing below it.
    enabled = jax.disable_jit(False) if jit_disabled() else contextlib.nullcontext()
    try:
        with enabled:
            outputs: list[Any] = compiled_calls[program](*arrays)
        if outputs and not isinstance(outputs[0], jax.core.Tracer) and torch_device(outputs[0]).type == "cpu":
            # Waiting costs nothing where torch has done its work by then, and shows errors here.
            jax.block_until_ready(outputs)
        return outputs
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # which of them depends on jax's dispatch path
        original = original_error(error)
        if original is None:
            raise
    raise original


torch_call_p.def_impl(_impl)


# -- abstract eval --------------------------------------------------------------------------------------


def _abstract_eval(*avals: Any, program: Program) -> tuple[list[ShapedArray], set[Any]]:
    effects = {DRAWS_FROM_TORCH} if program.draws_from_torch else set()
    return [ShapedArray(spec.shape, spec.dtype) for spec in program.out_specs], effects


torch_call_p.def_effectful_abstract_eval(_abstract_eval)


# -- lowering -------------------------------------------------------------------------------------------


def _staged(*arrays: Any, program: Program) -> tuple[Any, ...]:
    return call_in_xla(program, *arrays)


for _platform in ("cpu", "cuda"):
    mlir.register_lowering(torch_call_p, mlir.lower_fun(_staged, multiple_results=True), platform=_platform)


# -- jvp ------------------------------------------------------------------------------------------------


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, program: Program) -> tuple[list[Any], list[Any]]:
    outputs = torch_call(program, *primals)
    active = tuple(i for i, t in enumerate(tangents) if type(t) is not ad.Zero)
    result = [ad.Zero(jax.typeof(o).to_tangent_aval()) for o in outputs]
    inexact = inexact_outputs(program)
    if not active or not inexact:
        return outputs, result
    first_linear = len(primals) - program.n_linear
    if active[0] >= first_linear:
        # f(x, t) linear in t and x constant: the tangent is f(x, dt).
        linear = [ad.instantiate_zeros(t) for t in tangents[first_linear:]]
        tangents_out = torch_call(program, *primals[:first_linear], *linear)
    else:
        # The tangent is f'(x) dx, over the inputs that have a dx.
        tangents_out = torch_call(program.derive(Jvp, active), *primals, *(tangents[i] for i in active))
    for index, tangent in zip(inexact, tangents_out, strict=True):
        result[index] = tangent
    return outputs, result


ad.primitive_jvps[torch_call_p] = _jvp


# -- transpose ------------------------------------------------------------------------------------------


def _transpose(cotangents: Sequence[Any], *inputs: Any, program: Program) -> list[Any]:
    wanted = tuple(i for i, x in enumerate(inputs) if ad.is_undefined_primal(x))
    given = tuple(i for i, c in enumerate(cotangents) if type(c) is not ad.Zero)
    result: list[Any] = [None] * len(inputs)
    if not given:
        for index in wanted:
            result[index] = ad.Zero(inputs[index].aval.to_tangent_aval())
        return result
    first_linear = len(inputs) - program.n_linear
    given_cotangents = [cotangents[i] for i in given]
    if wanted[0] < first_linear:
        # The user says that f is linear in these: then its vjp is the same everywhere, also at zero.
        zeros = [ad.zeros_like_aval(x.aval) if ad.is_undefined_primal(x) else x for x in inputs]
        pulled = torch_call(program.derive(Vjp, wanted, given), *zeros, *given_cotangents)
    else:
        # c f'(x), over the outputs that have a c.
        pulled = torch_call(transposed(program, wanted, given), *inputs[:first_linear], *given_cotangents)
    for index, cotangent in zip(wanted, pulled, strict=True):
        result[index] = cotangent
    return result


ad.primitive_transposes[torch_call_p] = _transpose


# -- batching -------------------------------------------------------------------------------------------


def _batch(inputs: Sequence[Any], dims: Sequence[Any], *, program: Program) -> tuple[list[Any], list[int]]:
    in_dims = tuple(dims)  # None: not batched
    size = next(x.shape[d] for x, d in zip(inputs, in_dims, strict=True) if d is not None)
    out_dims = (0,) * len(program.out_specs)
    return torch_call(program.derive(Vmap, in_dims, out_dims, size), *inputs), list(out_dims)


batching.primitive_batchers[torch_call_p] = _batch
