"""The primitive `torch_call` and its rules: impl, abstract eval, lowering, jvp, transpose, batching, dead code.

One primitive serves all orders and modes. Its only parameter is a program; each rule binds the primitive
again, with a program derived from that one:

    jvp        f  ->  f,  Jvp(f, active inputs)
    transpose  Jvp(f, A)  ->  Vjp(f, A, outputs with a cotangent),  and back
    batching   f  ->  Vmap(f, batch axes)

so that, for example, a Hessian by forward over reverse is `Jvp(Vjp(f))`, and per-example gradients are
`Vmap(Vjp(f))`, one torch call each. At first order, the jvp rule puts the tape in between (`_tape.py`):

    jvp        f  ->  Taped(f, A),  FromTape(Jvp(f, A))
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pytorch2jax._bridge import call_in_xla, can_be_partitioned, lower_on_host
from pytorch2jax._eager import check_floats, evaluate
from pytorch2jax._errors import DeviceError, ExportError, ReplicationWarning
from pytorch2jax._internals import (
    DRAWS_FROM_TORCH,
    Primitive,
    ShapedArray,
    ad,
    batching,
    explicit_axes,
    io_callback,
    is_export,
    lower_with_devices,
    mlir,
    n_partitions,
    output_aval,
    register_dead_code_rule,
    register_float_check,
    register_name_in_jaxprs,
    trace_state_clean,
    vary_together,
)
from pytorch2jax._partition import partitioned
from pytorch2jax._program import Program
from pytorch2jax._tape import HANDLE, TAPE, FromTape, Taped
from pytorch2jax._transforms import Derived, Jvp, Vjp, Vmap, inexact_outputs

torch_call_p = Primitive("torch_call")
torch_call_p.multiple_results = True
register_name_in_jaxprs(torch_call_p, lambda program: str(program))


def torch_call(program: Program, *arrays: Any) -> list[Any]:
    """Call a program on arrays: the one way into the primitive."""
    if trace_state_clean() and not any(map(_is_tracer, arrays)):
        return _impl(*arrays, program=program)  # where JAX would come to after a while
    return torch_call_p.bind(*vary_together(arrays), program=program)


def _is_tracer(array: Any) -> bool:
    return isinstance(array, jax.core.Tracer)


# -- impl -----------------------------------------------------------------------------------------------


def _impl(*arrays: Any, program: Program) -> list[Any]:
    if program.draws_from_torch:
        return list(map(jnp.asarray, _draw(program)))
    outputs = evaluate(program, arrays, lambda *inputs: torch_call_p.bind(*inputs, program=program))
    if isinstance(program, Taped):
        program.release_with(outputs[-1])
    check_floats(program, outputs)
    return outputs


def _draw(program: Program) -> list[np.ndarray[Any, Any]]:
    return [t.numpy().astype(s.dtype) for t, s in zip(program.execute([]), program.out_specs, strict=True)]


torch_call_p.def_impl(_impl)


# -- abstract eval --------------------------------------------------------------------------------------


def _abstract_eval(*avals: Any, program: Program) -> tuple[list[ShapedArray], set[Any]]:
    axes = sorted({axis for aval in avals for axis in explicit_axes(aval)})
    if axes:
        raise DeviceError(
            f"{program.describe()}: expected arrays that are not sharded along explicit axes of a mesh, because XLA "
            "cannot see into a torch function and would have to gather them, got some that are sharded along "
            f"{', '.join(axes)}. Call it inside `jax.shard_map`, pass `out_specs` to `torch2jax` or to the converter, "
            "or gather them yourself with `jax.sharding.reshard(x, PartitionSpec())`."
        )
    effects = {DRAWS_FROM_TORCH} if program.draws_from_torch else set()
    return [output_aval(spec.shape, spec.dtype, avals) for spec in program.out_specs], effects


torch_call_p.def_effectful_abstract_eval(_abstract_eval)


# -- lowering -------------------------------------------------------------------------------------------


def _bind(program: Program, *arrays: Any) -> list[Any]:
    return torch_call_p.bind(*arrays, program=program)


def _lower_on_devices(lower: Any, platform: str, context: Any, *operands: Any, program: Program) -> Any:
    """The lowering rule, given that of one device: XLA may partition the computation by itself."""
    if is_export(context):
        return _lower_nowhere(context, *operands, program=program)
    n_devices = n_partitions(context)
    if n_devices > 1 and program.root.shardable and can_be_partitioned(platform):
        call, keeper = partitioned(program, _bind)
        context.module_context.add_keepalive(keeper)
        return mlir.lower_fun(call, multiple_results=True)(context, *operands)
    if n_devices > 1 and program.draws_from_torch:
        # On the first device, for all of them; XLA knows how to do that for JAX's own callbacks only.
        results = [jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in program.out_specs]
        return mlir.lower_fun(functools.partial(io_callback, functools.partial(_draw, program), results))(context)
    if n_devices > 1 and program.root.first_time("replicated"):
        advice = "Call" if program.root.shardable else "Say along which axes it can be split (`batch_axes=0`), or call"
        warnings.warn(
            f"{program.root.name}: the same call of torch runs on each of {n_devices} devices, on inputs that are "
            f"gathered there, because XLA cannot see into it. {advice} it inside `jax.shard_map`. The results are "
            "right.",
            ReplicationWarning,
            stacklevel=2,
        )
    return lower(context, *operands, program=program)


def _lower_nowhere(context: Any, *operands: Any, program: Program) -> Any:
    """Where there is no torch: in programs that are saved, and on other devices."""
    raise ExportError(
        f"{program.describe()}: expected a program without calls of torch, because it is saved (`jax.export`) or runs "
        'on a device that torch does not share with JAX, got one that calls torch. Convert with `backend="xla"`; if it '
        "was, this is an operator without a JAX function: replace it in the model."
    )


def _staged(*arrays: Any, program: Program) -> tuple[Any, ...]:
    return call_in_xla(program, *arrays)


_lower_for_cuda = mlir.lower_fun(_staged, multiple_results=True)
mlir.register_lowering(torch_call_p, _lower_nowhere)
mlir.register_lowering(torch_call_p, functools.partial(_lower_on_devices, lower_on_host, "cpu"), platform="cpu")
mlir.register_lowering(torch_call_p, functools.partial(_lower_on_devices, _lower_for_cuda, "cuda"), platform="cuda")
lower_with_devices(torch_call_p)


# -- jvp ------------------------------------------------------------------------------------------------


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, program: Program) -> tuple[list[Any], list[Any]]:
    active = tuple(i for i, t in enumerate(tangents) if type(t) is not ad.Zero)
    inexact = inexact_outputs(program)
    handle = []
    if active and inexact and program.tapeable and TAPE.enabled:
        # y, handle = f(x); the tangent is a function of x, the handle and dx.
        *outputs, number = torch_call(program.derive(Taped, active), *primals)
        handle = [number]
    else:
        outputs = torch_call(program, *primals)
    result = [ad.Zero(jax.typeof(o).to_tangent_aval()) for o in outputs]
    if not active or not inexact:
        return outputs, result
    if isinstance(program, FromTape):  # derivatives of derivatives do not use the tape
        primals, tangents = program.without_handle(primals), program.without_handle(tangents)
        active = tuple(i for i, t in enumerate(tangents) if type(t) is not ad.Zero)
    if isinstance(program, (Taped, FromTape)):
        program = program.base
    first_linear = len(primals) - program.n_linear
    if active[0] >= first_linear:
        # f(x, t) linear in t and x constant: the tangent is f(x, dt).
        linear = [ad.instantiate_zeros(t) for t in tangents[first_linear:]]
        tangents_out = torch_call(program, *primals[:first_linear], *linear)
    else:
        # The tangent is f'(x) dx, over the inputs that have a dx.
        tangent: Derived = program.derive(Jvp, active)
        program.root.check_depth(tangent.order)
        if handle:
            tangent = tangent.derive(FromTape, program.derive(Taped, active))
        tangents_out = torch_call(tangent, *primals, *handle, *(tangents[i] for i in active))
    for index, value in zip(inexact, tangents_out, strict=True):
        result[index] = value
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
        pull = program.derive(Vjp, wanted, given)
        program.root.check_depth(pull.order)
        pulled = torch_call(pull, *zeros, *given_cotangents)
    else:
        # c f'(x), over the outputs that have a c.
        assert isinstance(program, Derived)
        transposed = program.transposed(tuple(i - first_linear for i in wanted), given)
        pulled = torch_call(transposed, *inputs[:first_linear], *given_cotangents)
    for index, cotangent in zip(wanted, pulled, strict=True):
        result[index] = cotangent
    return result


ad.primitive_transposes[torch_call_p] = _transpose


# -- batching -------------------------------------------------------------------------------------------


def _batch(inputs: Sequence[Any], dims: Sequence[Any], *, program: Program) -> tuple[list[Any], list[Any]]:
    in_dims = tuple(dims)  # None: not batched
    size = next(x.shape[d] for x, d in zip(inputs, in_dims, strict=True) if d is not None)
    if isinstance(program, Taped):
        return _batch_taped(inputs, in_dims, size, program)
    if isinstance(program, FromTape):
        if _keeps_tape(program, in_dims):
            return _batch_from_tape(inputs, in_dims, size, program)
        inputs, in_dims = program.without_handle(inputs), tuple(program.without_handle(in_dims))
        program = program.base
    out_dims = (0,) * len(program.out_specs)
    return torch_call(program.derive(Vmap, in_dims, out_dims, size), *inputs), list(out_dims)


# A batch has one graph, if each example has its own value of each active input. Gradients of shared inputs for
# each example are not gradients of the batched function; they are computed without the tape.


def _batch_taped(
    inputs: Sequence[Any], dims: tuple[int | None, ...], size: int, program: Taped
) -> tuple[list[Any], list[Any]]:
    out_dims = (0,) * len(program.base.out_specs)
    batched: Program = program.base.derive(Vmap, dims, out_dims, size)
    if any(dims[i] is None for i in program.active):
        return [*torch_call(batched, *inputs), jnp.zeros(HANDLE.shape, HANDLE.dtype)], [*out_dims, None]
    return torch_call(batched.derive(Taped, program.active), *inputs), [*out_dims, None]


def _keeps_tape(program: FromTape, dims: tuple[int | None, ...]) -> bool:
    vjp = program.base
    return isinstance(vjp, Vjp) and dims[program.where] is None and all(dims[i] is not None for i in vjp.active)


def _batch_from_tape(
    inputs: Sequence[Any], dims: tuple[int | None, ...], size: int, program: FromTape
) -> tuple[list[Any], list[Any]]:
    vjp, where = program.base, program.where
    assert isinstance(vjp, Vjp)
    primal_dims = dims[:where]
    batched = vjp.base.derive(Vmap, primal_dims, (0,) * len(vjp.base.out_specs), size)
    cotangents = [
        jnp.broadcast_to(c, (size, *c.shape)) if d is None else jnp.moveaxis(c, d, 0)
        for c, d in zip(inputs[where + 1 :], dims[where + 1 :], strict=True)
    ]
    pull = batched.derive(Vjp, vjp.active, vjp.outputs)
    from_tape = pull.derive(FromTape, batched.derive(Taped, program.taped.active))
    return torch_call(from_tape, *inputs[: where + 1], *cotangents), [primal_dims[i] for i in vjp.active]


batching.primitive_batchers[torch_call_p] = _batch


# -- dead code ------------------------------------------------------------------------------------------


def _drop_unused(used_outputs: Sequence[bool], eqn: Any) -> tuple[list[bool], Any]:
    """Without a backward pass, as in the forward pass of `jax.checkpoint`, there is nothing to keep a graph for."""
    program = eqn.params["program"]
    if program.draws_from_torch:
        return [True] * len(eqn.invars), eqn
    if not any(used_outputs):
        return [False] * len(eqn.invars), None
    if isinstance(program, Taped) and not used_outputs[-1]:
        eqn = eqn.replace(params={"program": program.base}, outvars=eqn.outvars[:-1])
    return [True] * len(eqn.invars), eqn


register_dead_code_rule(torch_call_p, _drop_unused)


# -- checks for NaN -------------------------------------------------------------------------------------

register_float_check(torch_call_p, lambda program: f"torch_call of {program.describe()}")
