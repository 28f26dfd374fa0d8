"""A program outside of `jax.jit`: through XLA where arrays are small, over DLPack where they are large.

XLA takes a few microseconds to hand over small arrays and has to copy large outputs into memory of its own. Without
XLA, torch reads the arrays where they are, and JAX takes over the memory that torch has allocated for the results.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pytorch2jax._bridge import original_error, torch_call_error
from pytorch2jax._buffers import Buffers, Views
from pytorch2jax._dtypes import dtype_j2t
from pytorch2jax._forks import check_process
from pytorch2jax._internals import (
    array_from_tensor,
    float_checks,
    is_held_elsewhere,
    jit_disabled,
    uncommitted,
    with_mesh,
    without_float_checks,
)
from pytorch2jax._nesting import refusal, refusing_jax
from pytorch2jax._program import Program
from pytorch2jax._transfer import on_one_device, torch_device

_LARGE_BYTES = 1 << 21
"""Of inputs and outputs together: from here on a copy takes longer than taking over memory does."""


def evaluate(program: Program, arrays: Sequence[Any], staged: Callable[..., Any]) -> list[Any]:
    """Run a program now.

    Args:
        program: what to run.
        arrays: its inputs.
        staged: the program as a JAX function, to be compiled where it goes through XLA.

    Copies:
        Inputs are not copied. Large outputs (with the inputs, more than 2 MiB) are not copied either, if torch has
        allocated their memory in this call, in C order, and nobody else holds it.

    Raises:
        DeviceError: an array is spread over several devices. (One that is replicated has a copy on each of them.)
        TorchCallError: torch raised an exception, which is the cause.
        ForkError: JAX was running already when the process was forked.
    """
    check_process(program.describe)
    if not program.root.shardable and any(map(_has_several_devices, arrays)):
        return _on_replicas(program, arrays, staged)
    if program.is_large(_LARGE_BYTES) and not program.computes_in_place and _is_on_host(arrays):
        return _over_dlpack(program, arrays)
    return _through_xla(program, arrays, staged)


def _has_several_devices(array: Any) -> bool:
    sharding: Any = getattr(array, "sharding", None)
    single = sharding is None or type(sharding) is SingleDeviceSharding or isinstance(array, jax.core.Tracer)
    return not single and len(sharding.device_set) > 1


def _on_replicas(program: Program, arrays: Sequence[Any], staged: Callable[..., Any]) -> list[Any]:
    """Run once, on one copy of each replicated array, and replicate the results in the same way."""
    sharding = next(array.sharding for array in arrays if _has_several_devices(array))
    name = program.describe()
    local = [on_one_device(name, f"input {i}", a) if _has_several_devices(a) else a for i, a in enumerate(arrays)]
    first = next(a for a, whole in zip(local, arrays, strict=True) if a is not whole)
    local = [jax.device_put(a, first.sharding) for a in local]
    mesh: Any = (
        sharding.mesh if isinstance(sharding, NamedSharding) else Mesh(np.array([*sharding.device_set]), ("copies",))
    )
    with _alone_on(next(iter(first.devices()))):
        outputs = evaluate(program, local, staged)
    return [_replicated(out, mesh, sharding.memory_kind) for out in outputs]


def _alone_on(device: Any) -> contextlib.AbstractContextManager[Any]:
    """Without the mesh of `jax.set_mesh`, on whose devices JAX would otherwise compile and run everything."""
    if jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return with_mesh(Mesh(np.array([device]), ("device",)))


def _replicated(array: jax.Array, mesh: Mesh, memory_kind: str | None) -> jax.Array:
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * array.ndim), memory_kind=memory_kind)
    devices: list[Any] = sorted(sharding.addressable_devices, key=operator.attrgetter("id"))
    copies = [jax.device_put(array, device) for device in devices]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, copies)


def check_floats(program: Program, outputs: Sequence[Any]) -> None:
    """What `jax_debug_nans` and `jax_debug_infs` ask for.

    Raises:
        FloatingPointError: there is a NaN, or an infinity; as JAX has it for its own functions.
    """
    nans, infs = float_checks()
    if not (nans or infs):
        return
    for index, output in enumerate(outputs):
        if not jnp.issubdtype(output.dtype, jnp.inexact) or isinstance(output, jax.core.Tracer):
            continue
        with without_float_checks():
            found = "nan" if nans and jnp.isnan(output).any() else "inf" if infs and jnp.isinf(output).any() else None
        if found is not None:
            raise FloatingPointError(
                f"invalid value ({found}) encountered in output {index} of the torch function {program.describe()}. "
                "(jax_debug_nans and jax_debug_infs look for them.)"
            )


def _through_xla(program: Program, arrays: Sequence[Any], staged: Callable[..., Any]) -> list[Any]:
    compiled_calls = program.root.compiled_calls()
    compiled = compiled_calls.get(program)
    if compiled is None:
        compiled = compiled_calls[program] = jax.jit(staged)
    try:
        # The call would come back here, if JAX had it run without `jit`, which it also does where it has found a NaN:
        # this is the implementation, there is nothing below it.
        if jit_disabled() or any(float_checks()):
            with jax.disable_jit(False), without_float_checks():
                outputs: list[Any] = compiled(*arrays)
        else:
            outputs = compiled(*arrays)
        if program.root.device.type == "cpu":
            # Waiting costs nothing where torch has done its work by then, and shows errors here.
            for output in outputs:
                if not isinstance(output, jax.core.Tracer):
                    output.block_until_ready()
        return outputs
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # which of them depends on jax's dispatch path
        original = original_error(error)
        if original is None:
            raise
    raise original


def _is_on_host(arrays: Sequence[Any]) -> bool:
    """Whether there are arrays, all of them in C order in the memory of this process, and on the same device."""
    for array in arrays:
        if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
            return False
        if torch_device(array).type != "cpu" or array.sharding.memory_kind not in _HOST_MEMORY:
            return False
        if array.devices() != arrays[0].devices():
            return False
        layout = array.format.layout  # type: ignore[attr-defined]
        if layout is not None and layout.major_to_minor != tuple(range(array.ndim)):
            return False
    return bool(arrays)


_HOST_MEMORY = (None, "device", "unpinned_host")


def _over_dlpack(program: Program, arrays: Sequence[Any]) -> list[Any]:
    for array in arrays:
        array.block_until_ready()
    addresses = [array.unsafe_buffer_pointer() for array in arrays]
    device = next(iter(arrays[0].devices()))
    committed = any(array.committed for array in arrays)
    try:
        with torch.inference_mode(False), torch.no_grad():
            tensors = [Views(spec)[at] for at, spec in zip(addresses, program.in_specs, strict=True)]
            with refusing_jax(refusal(program.root.describe())):
                outputs = list(program.execute(tensors))
            results = [_take_over(program, i, outputs, device) for i in range(len(outputs))]
            return results if committed else list(map(uncommitted, results))
    except BaseException as error:
        program.abandon()
        raised = torch_call_error(error)
    raise raised


def _take_over(program: Program, index: int, outputs: list[torch.Tensor], device: Any) -> jax.Array:
    """An array with the memory of an output, or with a copy of it."""
    spec = program.out_specs[index]
    dtype = dtype_j2t(spec.dtype)
    output = outputs[index]
    if output.numel() == 0:  # DLPack gives empty tensors no address
        return jax.device_put(np.zeros(spec.shape, spec.dtype), device)
    unowned = is_held_elsewhere(output, references=2) or not output.data_ptr()  # 2: the list of outputs, this variable
    if unowned or output.dtype != dtype or not output.is_contiguous() or output.is_conj() or output.is_neg():
        buffers = Buffers({index: torch.empty(spec.shape, dtype=dtype)})
        program.put(index, output, buffers)
        output = buffers[index]
    return array_from_tensor(output.detach(), device)  # the array must not keep the graph that `output` is part of
