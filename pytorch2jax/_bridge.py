"""What XLA calls: view its buffers as tensors, run torch, write the outputs.

This file is the only one that knows how a program gets into an XLA computation. It goes through JAX's own
`jax.experimental.buffer_callback`; a compiled transport would replace `call_in_xla` and nothing else.
"""

from __future__ import annotations

import collections
import itertools
import re
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch

from pytorch2jax._errors import NarrowingError, Pytorch2JaxError, TorchCallError
from pytorch2jax._internals import ExecutionContext, buffer_callback, tensor_from_capsule
from pytorch2jax._program import Program
from pytorch2jax._transfer import fits

_INT64 = torch.int64
_NARROW_INTS = (torch.int32, torch.uint32)


def call_in_xla(program: Program, *arrays: Any) -> tuple[Any, ...]:
    """Stage one run of a program into the XLA computation that is being traced.

    Copies: no input; each output once, into the buffer that XLA has for it.
    """
    results = tuple(jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in program.out_specs)
    callback = buffer_callback(_callback(program), results, has_side_effect=program.draws_from_torch)
    return tuple(callback(*arrays))


def _callback(program: Program) -> Callable[..., None]:
    def run(context: ExecutionContext, results: Sequence[Any], *arguments: Any) -> None:
        try:
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False):
                    return run(context, results, *arguments)
            tensors = [tensor_from_capsule(a.__dlpack__()) for a in arguments]
            buffers = [tensor_from_capsule(r.__dlpack__()) for r in results]
            if any(t.is_cuda for t in (*tensors[:1], *buffers[:1])):
                device = (*tensors, *buffers)[0].device
                with torch.cuda.stream(torch.cuda.ExternalStream(context.stream, device=device)):
                    _write(program.execute(tensors), buffers, program)
            else:
                _write(program.execute(tensors), buffers, program)
        except Exception as error:
            raise RuntimeError(_report(program, error)) from None

    return run


def _write(values: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], program: Program) -> None:
    with torch.no_grad():
        for index, (value, buffer) in enumerate(zip(values, buffers, strict=True)):
            buffer.copy_(value)
            narrowed = buffer.dtype in _NARROW_INTS and value.dtype != buffer.dtype
            # On CUDA the check would make the host wait for the device.
            if narrowed and not value.is_cuda and not fits(buffer, value):
                raise NarrowingError(
                    f"{program.describe()}: output {index}: expected values that fit into {buffer.dtype}, "
                    f"because jax_enable_x64 is off, and got larger ones in a tensor of {value.dtype}. Call "
                    "`jax.config.update('jax_enable_x64', True)`, or return smaller values."
                )


# -- errors ---------------------------------------------------------------------------------------------
#
# XLA hands on the text of an exception only. The originals wait here, under a number that is in the text,
# for a caller of this library that is on the stack to take them (`original_error`).

_KEPT_ERRORS = 16
_errors: collections.OrderedDict[int, Exception] = collections.OrderedDict()
_errors_lock = threading.Lock()
_numbers = itertools.count(1)
_NUMBER = re.compile(r"pytorch2jax error (\d+):")


def _report(program: Program, error: Exception) -> str:
    with _errors_lock:
        number = next(_numbers)
        _errors[number] = error
        while len(_errors) > _KEPT_ERRORS:
            _errors.popitem(last=False)
    text = "".join(traceback.format_exception(error))
    traceback.clear_frames(error.__traceback__)  # they hold views of XLA's memory
    return f"pytorch2jax error {number}: {program.describe()} raised {type(error).__name__}: {error}\n{text}"


def original_error(error: Exception) -> Exception | None:
    """The exception behind one that XLA raised: the library's own, or a `TorchCallError` with its cause."""
    found = _NUMBER.search(str(error))
    if found is None:
        return None
    with _errors_lock:
        original = _errors.pop(int(found[1]), None)
    if original is None or isinstance(original, Pytorch2JaxError):
        return original
    wrapped = TorchCallError(f"{type(original).__name__}: {original}")
    wrapped.__cause__ = original
    return wrapped
