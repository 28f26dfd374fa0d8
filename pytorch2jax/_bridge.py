"""What XLA calls: view its buffers as tensors, run torch, write the outputs.

This file is the only one that knows how a program gets into an XLA computation: on the host through `_ffi.py`; on a
CUDA device, and where the extension is missing, through JAX's own `jax.experimental.buffer_callback`, which knows XLA's
stream.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import torch

from pytorch2jax._buffers import Buffers, HostBuffers, Views
from pytorch2jax._errors import Pytorch2JaxError, TorchCallError
from pytorch2jax._ffi import lower_host_call, native
from pytorch2jax._internals import (
    ExecutionContext,
    buffer_callback,
    mlir,
    n_devices,
    set_grad_enabled,
    tensor_from_capsule,
    tracing_with,
)
from pytorch2jax._nesting import refusal, refusing_jax
from pytorch2jax._profiling import is_profiling, profiled
from pytorch2jax._program import Program
from pytorch2jax._threads import on_one_team
from pytorch2jax._torch_state import flushes_subnormals, set_flushing
from pytorch2jax._transfer import tensor_at


def lower_on_host(context: Any, *operands: Any, program: Program) -> Any:
    """The lowering rule for CPU: a call of torch on XLA's memory.

    Copies: no input; each output once, into the buffer that XLA has for it, or not at all.
    """
    if native() is None:
        return _lower_by_callback(context, *operands, program=program)
    call = _HostCall(program, n_devices(context))
    lowered, call.forget = lower_host_call(
        context,
        *operands,
        function=call.on_addresses,
        in_specs=program.in_specs,
        has_side_effect=_has_to_run(program),
        keeper=program.kept_by(),
    )
    return lowered


def can_be_partitioned(platform: str) -> bool:
    """Whether XLA may split a call over several devices.

    The program for one device is lowered while XLA compiles. JAX's own callbacks do not work there: they are numbered
    by the program that they are lowered into, and JAX looks them up in the one around it.
    """
    return platform == "cpu" and native() is not None


def _lower_by_callback(context: Any, *operands: Any, program: Program) -> Any:
    """The same by `jax.experimental.buffer_callback`, where there is no extension."""
    call = _HostCall(program, n_devices(context))

    def staged(*arrays: Any) -> tuple[Any, ...]:
        return _staged_callback(program, call.on_buffers, arrays)

    return mlir.lower_fun(staged, multiple_results=True)(context, *operands)


def _staged_callback(program: Program, function: Callable[..., None], arrays: Sequence[Any]) -> tuple[Any, ...]:
    results = tuple(jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in program.out_specs)
    return tuple(buffer_callback(function, results, has_side_effect=_has_to_run(program))(*arrays))


def _has_to_run(program: Program) -> bool:
    """Whether XLA may not leave a call out whose results nobody uses, or that has none.

    Of results without elements nobody would notice that they are none because of the values that the function was tried
    on.
    """
    return program.draws_from_torch or not any(math.prod(spec.shape) for spec in program.out_specs)


_TEAM_BYTES = 1 << 16  # less is not worth a second thread to torch


class _HostCall:
    """One program on the host.

    Args:
        program: the program.
        n_devices: on how many devices XLA runs what it is part of.

    Attributes:
        forget: has tensors over the inputs made anew from the next call on.
    """

    def __init__(self, program: Program, n_devices: int) -> None:
        self.forget: Callable[[], None] = lambda: None
        self._program = program
        self._n_devices = n_devices
        self._outputs = [Views(spec) for spec in program.out_specs]
        self._shares_tensors = program.root.shares_tensors
        self._refusal = refusal(program.root.describe())
        self._profiler_name = f"torch_call[{program.describe()}]"
        self._uses_team = program.is_large(_TEAM_BYTES)
        self._first = True

    def on_addresses(self, tensors: list[torch.Tensor], outputs: Sequence[int]) -> None:
        """Run, on what the extension gives."""
        self._run_on_team(tensors, HostBuffers(outputs, self._outputs))

    def on_buffers(self, context: ExecutionContext, results: Sequence[Any], *arguments: Any) -> None:
        """Run, on what `jax.experimental.buffer_callback` gives."""
        if torch.is_inference_mode_enabled():  # in which tensors are made that autograd cannot use
            with torch.inference_mode(False):
                return self.on_buffers(context, results, *arguments)
        tensors = [tensor_from_capsule(a.__dlpack__()) for a in arguments]
        buffers = Buffers({i: tensor_from_capsule(r.__dlpack__()) for i, r in enumerate(results)})
        self._run_on_team(tensors, buffers)

    def _run_on_team(self, tensors: list[torch.Tensor], buffers: Buffers) -> None:
        """Run, and a large program where torch has its one team of threads."""
        if self._uses_team:
            on_one_team(functools.partial(self.run, tensors, buffers))
        else:
            self.run(tensors, buffers)

    def run(self, tensors: list[torch.Tensor], buffers: Buffers) -> None:
        program = self._program
        flushing = flushes_subnormals()
        if flushing is not program.root.flushes:
            set_flushing(program.root.flushes)
        recording = torch.is_grad_enabled()
        with tracing_with(self._refusal):
            try:
                if torch.is_inference_mode_enabled():
                    with torch.inference_mode(False):
                        return self.run(self._outside_of_inference_mode(tensors), buffers)
                if recording:
                    set_grad_enabled(False)
                if not self._shares_tensors:
                    tensors = [t.detach() for t in tensors]
                if is_profiling():
                    with profiled(self._profiler_name):
                        program.deliver(tensors, buffers)
                else:
                    program.deliver(tensors, buffers)
                if self._first:
                    self._first = False
                    self._look_for_attributes(tensors)
            except BaseException as error:
                program.abandon()
                self.forget()  # somebody may have written to one
                if isinstance(error, KeyboardInterrupt):
                    raise
                report = _report(program, error)
                if self._n_devices > 1:
                    _tell_now(report, self._n_devices)
                raise RuntimeError(report) from None
            finally:
                if recording:
                    set_grad_enabled(True)
                if flushing is not program.root.flushes:
                    set_flushing(flushing)

    def _outside_of_inference_mode(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors over the same memory that autograd can use; those made in inference mode it cannot."""
        self.forget()
        return [tensor_at(tensor.data_ptr(), tensor.nbytes, tensor.dtype, tuple(tensor.shape)) for tensor in tensors]

    def _look_for_attributes(self, tensors: Sequence[torch.Tensor]) -> None:
        """A tensor with attributes that a call has set must not be seen by the next one."""
        if any(vars(tensor) for tensor in tensors):
            self._shares_tensors = False
            self.forget()


def call_in_xla(program: Program, *arrays: Any) -> tuple[Any, ...]:
    """The implementation for CUDA, to be lowered: the same through `jax.experimental.buffer_callback`."""
    return _staged_callback(program, _device_call(program), arrays)


def _device_call(program: Program) -> Callable[..., None]:
    refusing = refusal(program.root.describe())
    profiler_name = f"torch_call[{program.describe()}]"

    def run(context: ExecutionContext, results: Sequence[Any], *arguments: Any) -> None:
        try:
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False):
                    return run(context, results, *arguments)
            tensors = [tensor_from_capsule(a.__dlpack__()) for a in arguments]
            buffers = [tensor_from_capsule(r.__dlpack__()) for r in results]
            device = next((t.device for t in (*tensors, *buffers)), None)
            stream = torch.cuda.ExternalStream(context.stream, device=device)
            on_stream = torch.cuda.stream(stream)
            with profiled(profiler_name), torch.no_grad(), _ordered(stream), on_stream, refusing_jax(refusing):
                program.deliver(tensors, Buffers(dict(enumerate(buffers))))
        except Exception as error:
            program.abandon()
            raise RuntimeError(_report(program, error)) from None

    return run


@contextlib.contextmanager
def _ordered(stream: torch.cuda.Stream) -> Iterator[None]:
    """Order XLA's stream against torch's current one by events, on the device; the host waits for nothing.

    What torch queued before may write to memory that the arrays share; what it queues afterwards may use memory that
    is freed here.
    """
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    yield
    current.wait_stream(stream)


# -- errors ---------------------------------------------------------------------------------------------
#
# XLA hands on the text of an exception only. The originals wait here, under a number that is in the text,
# for a caller of this library that is on the stack to take them (`original_error`).

_KEPT_ERRORS = 16
_errors: collections.OrderedDict[int, BaseException] = collections.OrderedDict()
_errors_lock = threading.Lock()
_numbers = itertools.count(1)
_NUMBER = re.compile(r"pytorch2jax error (\d+):")


def _report(program: Program, error: BaseException) -> str:
    with _errors_lock:
        number = next(_numbers)
        _errors[number] = error
        while len(_errors) > _KEPT_ERRORS:
            _errors.popitem(last=False)
    text = "".join(traceback.format_exception(error))
    traceback.clear_frames(error.__traceback__)  # they hold views of XLA's memory
    return f"pytorch2jax error {number}: {program.describe()} raised {type(error).__name__}: {error}\n{text}"


def _tell_now(report: str, n_devices: int) -> None:
    """Print an error that may never reach its caller, because XLA ends the process."""
    print(
        f"{report}This was on one of {n_devices} devices. If the others wait for it (`jax.lax.psum`), XLA ends the "
        "process after a while: XLA_FLAGS=--xla_cpu_collective_call_terminate_timeout_seconds=5 says after which.",
        file=sys.stderr,
        flush=True,
    )


def original_error(error: Exception) -> BaseException | None:
    """The exception behind one that XLA raised, as `torch_call_error` gives it; None if it is not torch's."""
    found = _NUMBER.search(str(error))
    if found is None:
        return None
    with _errors_lock:
        original = _errors.pop(int(found[1]), None)
    return None if original is None else torch_call_error(original)


def torch_call_error(error: BaseException) -> BaseException:
    """An exception as users see it: the library's own, or a `TorchCallError` with its cause.

    `KeyboardInterrupt`, `SystemExit` and the like are what they are.
    """
    if isinstance(error, Pytorch2JaxError) or not isinstance(error, Exception):
        return error
    wrapped = TorchCallError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
