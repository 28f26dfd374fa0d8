"""XLA's foreign function interface from Python alone, on the host: a call arrives as addresses in memory.

`jax.experimental.buffer_callback`, which goes through the same interface, makes two objects for each array in each
call, which costs half a microsecond an array. Here a `ctypes` function is the handler. It reads the addresses out of
the call frame, whose layout is fixed by the C API (`xla/ffi/api/c_api.h` in jaxlib) and versioned.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import secrets
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pytorch2jax._errors import ExportError
from pytorch2jax._internals import begins_without_signals, interrupt_when_back, is_python_thread, threads_running

HostFunction = Callable[[Sequence[int], Sequence[int]], None]
"""Gets the addresses of the inputs and of the outputs; what it raises becomes XLA's error."""

Blank = Callable[[Sequence[int]], None]
"""Gets the addresses of the outputs of a function that was interrupted, and writes something to them."""

_TARGET = "pytorch2jax_host_call"
_API_VERSION = (0, 1)  # the lowest with this layout; minor versions only add to it
_INTERNAL_ERROR = 13
_METADATA_EXTENSION = 1

# XLA_FFI_CallFrame begins with: struct_size, extension, api, ctx, stage; XLA_FFI_Args (struct_size, extension, size,
# types, args); XLA_FFI_Rets (the same); XLA_FFI_Attrs (struct_size, extension, size, types, names, attrs).
_FRAME = struct.Struct("@8xPP16x 16xq8xP 16xq8xP 40xP")
_DATA_OFFSET = 24  # of `data` in XLA_FFI_Buffer
_VALUE_OFFSET = 8  # of `value` in XLA_FFI_Scalar
_ERROR_CREATE_OFFSET = 48  # of XLA_FFI_Error_Create in XLA_FFI_Api
_FrameBytes = ctypes.c_char * _FRAME.size


class _ErrorArguments(ctypes.Structure):
    """XLA_FFI_Error_Create_Args."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


class _Extension(ctypes.Structure):
    """XLA_FFI_Metadata_Extension."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
    )


class _Metadata(ctypes.Structure):
    """XLA_FFI_Metadata, with its XLA_FFI_Api_Version."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("version_struct_size", ctypes.c_size_t),
        ("version_extension", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
        ("traits", ctypes.c_uint32),
    )


def _describe(extension: int) -> None:
    """Answer XLA's question for metadata, which it asks once, when the handler is registered."""
    found = _Extension.from_address(extension)
    if found.type == _METADATA_EXTENSION:
        metadata = _Metadata.from_address(found.metadata)
        metadata.major, metadata.minor = _API_VERSION
        metadata.traits = 0


_functions: dict[int, tuple[HostFunction, Blank]] = {}


class _Lease:
    """Keeps a function for the handler to find; held by the executables that call it.

    Its number is part of the program, and JAX (since 0.11.2) writes programs to its persistent cache. So no two numbers
    are the same in any two processes, also if one is a fork of the other: 63 random bits from the operating system.
    """

    def __init__(self, function: HostFunction, blank: Blank) -> None:
        self.number = secrets.randbits(63)
        _functions[self.number] = function, blank
        weakref.finalize(self, _functions.pop, self.number).atexit = False

    def __call__(self, *args: Any) -> None:
        raise NotImplementedError("XLA calls the handler, which looks the function up by its number")


@begins_without_signals
def _handle(frame: int) -> int | None:
    api = 0
    try:
        try:
            if _exiting:
                _stay()
            extension, api, n_in, inputs, n_out, outputs, attributes = _FRAME.unpack(_FrameBytes.from_address(frame))
            if extension:
                _describe(extension)
            elif _given_up:
                _function(_number_in(attributes))[1](_addresses(outputs, n_out))
            else:
                _function(_number_in(attributes))[0](_addresses(inputs, n_in), _addresses(outputs, n_out))
            if _exiting:
                _stay()
            return None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return _error(api, str(error))
    except KeyboardInterrupt:
        result, thread = _wind_up(frame)
        if thread is not None:
            interrupt_when_back[thread]
        return result


def _function(number: int) -> tuple[HostFunction, Blank]:
    found = _functions.get(number)
    if found is None:
        raise ExportError(
            "expected a program that was compiled in this process, got one from another process, which has the torch "
            "function that it calls. A compiled program with torch calls cannot be saved or sent: compile it here, or "
            'convert with `backend="xla"`.'
        )
    return found


_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(_handle)


@functools.cache
def _register() -> None:
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(_HANDLER), platform="cpu")


_word_at = ctypes.c_size_t.from_address


def _number_in(attributes: int) -> int:
    return _word_at(_word_at(_word_at(attributes).value + _VALUE_OFFSET).value).value


def _addresses(table: int, n: int) -> list[int]:
    """Where the data of `n` arrays is, from a table of pointers to XLA_FFI_Buffer."""
    if n <= _FEW:
        return [_word_at(_word_at(table + 8 * i).value + _DATA_OFFSET).value for i in range(n)]
    pointers: list[int] = (ctypes.c_size_t * n).from_address(table)[:]
    first, stride = pointers[0], pointers[1] - pointers[0]
    if stride > 0 and stride % 8 == 0 and pointers == [*range(first, first + n * stride, stride)]:
        # XLA has them one after the other: then they are read at once.
        words = (n - 1) * stride // 8 + 1
        return (ctypes.c_size_t * words).from_address(first + _DATA_OFFSET)[:: stride // 8]
    return [_word_at(pointer + _DATA_OFFSET).value for pointer in pointers]


_FEW = 4


_CREATE_ERROR = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorArguments))


def _error(api: int, message: str) -> int | None:
    if _exiting:
        _stay()
    arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, message.encode(), _INTERNAL_ERROR)
    create = _CREATE_ERROR(_word_at(api + _ERROR_CREATE_OFFSET).value)
    error: int | None = create(ctypes.byref(arguments))
    return error


# -- Ctrl-C ---------------------------------------------------------------------------------------------
#
# What XLA makes of an error of the handler is JAX's exception, never a KeyboardInterrupt. So there is no error: the
# program ends, with blank results of torch, and before anybody sees what came of them, the interrupt comes again.


def _wind_up(frame: int) -> tuple[int | None, int | None]:
    """After an interrupt: what the handler returns, and the thread to interrupt when it is back from XLA.

    It is an error in a thread that never comes back, because it is XLA's, and in a loop that goes on and on.
    """
    extension, api, _, _, n_out, outputs, attributes = _FRAME.unpack(_FrameBytes.from_address(frame))
    if not is_python_thread():
        return _error(api, "KeyboardInterrupt"), None
    now = time.monotonic()
    since, last = getattr(_interrupted, "times", (now, now))
    if now - last > _PATIENCE_S:  # another time
        since = now
    _interrupted.times = since, now
    thread = threading.get_ident()
    if now - since > _PATIENCE_S:
        return _error(api, "KeyboardInterrupt"), thread
    if not extension:
        _function(_number_in(attributes))[1](_addresses(outputs, n_out))
    return None, thread


_PATIENCE_S = 1.0
_interrupted = threading.local()


# -- the end of the interpreter --------------------------------------------------------------------------
#
# A thread that wants to run Python code once the interpreter is gone takes the process down, and JAX, which waits for
# XLA's threads then, does not let them run it. So what is in flight ends before that.

_exiting = False
_given_up = False  # after an interrupt, nobody wants the results of what still runs: they are blank, and loops end
_stayed: set[int] = set()
_never = threading.Lock()
_never.acquire()


def _stay() -> None:
    """Keep a daemon thread from going on in Python: neither into torch nor back to its caller."""
    thread = threading.get_ident()
    if thread != threading.main_thread().ident and is_python_thread():
        _stayed.add(thread)
        _never.acquire()


@atexit.register
def _wait_for_calls() -> None:
    """Before JAX drops its executables (it was imported earlier): wait for what the main thread has dispatched.

    Other threads that are daemons stay where they come to the handler next. One that does not in a few seconds, because
    torch takes longer, is left alone. After an interrupt, or with one while it waits, programs end without torch.
    """
    global _exiting, _given_up
    if not _register.cache_info().currsize:
        return
    # In an interactive interpreter, the last error may be an interrupt of long ago.
    _exiting = True
    _given_up = getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1")
    waits = True
    while waits:
        try:
            _wait_for_programs()
            waits = False
        except KeyboardInterrupt:
            _given_up = True
        except Exception:
            waits = False
    end = time.monotonic() + _LONGEST_S
    while left := threads_running(_handle) - _stayed - {threading.get_ident()}:
        if all(map(is_python_thread, left)) and time.monotonic() > end:
            break
        time.sleep(0.005)


_LONGEST_S = 5.0


def _wait_for_programs() -> None:
    # XLA runs what a thread dispatches one after the other, programs for several devices in a row of their own.
    devices = jax.local_devices(backend="cpu")
    add = jax.jit(lambda x: x + 1)
    add(jax.device_put(np.zeros(1, np.float32), devices[0])).block_until_ready()
    if len(devices) > 1:
        sharding = NamedSharding(Mesh(np.array(devices), ("i",)), PartitionSpec("i"))
        add(jax.device_put(np.zeros(len(devices), np.float32), sharding)).block_until_ready()


def lower_host_call(
    context: Any,
    *operands: Any,
    function: HostFunction,
    blank: Blank,
    has_side_effect: bool,
    keeper: list[Any] | None = None,
) -> Any:
    """Lower an operation to a call of `function` on the host, in a lowering rule.

    The executable keeps the function alive; where it does not know, because it was lowered before, `keeper` does.
    """
    _register()
    lease = _Lease(function, blank)
    if keeper is not None:
        keeper.append(lease)
    # Among the host callbacks of a program it also keeps the executable out of the persistent cache of jax 0.11.1 and
    # older. Newer ones write it there, and nobody finds it again.
    context.module_context.add_host_callback(lease)
    rule = jax.ffi.ffi_lowering(_TARGET, has_side_effect=has_side_effect)
    return rule(context, *operands, function=np.uint64(lease.number))
