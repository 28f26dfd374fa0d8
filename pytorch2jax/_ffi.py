"""XLA's foreign function interface from Python alone, on the host: a call arrives as addresses in memory.

`jax.experimental.buffer_callback`, which goes through the same interface, makes two objects for each array in each
call, which costs half a microsecond an array. Here a `ctypes` function is the handler. It reads the addresses out of
the call frame, whose layout is fixed by the C API (`xla/ffi/api/c_api.h` in jaxlib) and versioned.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

HostFunction = Callable[[Sequence[int], Sequence[int]], None]
"""Gets the addresses of the inputs and of the outputs; what it raises becomes XLA's error."""

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


_functions: dict[int, HostFunction] = {}
_numbers = itertools.count(1)


class _Lease:
    """Keeps a function for the handler to find; held by the executables that call it."""

    def __init__(self, function: HostFunction) -> None:
        self.number = next(_numbers)
        _functions[self.number] = function
        weakref.finalize(self, _functions.pop, self.number)

    def __call__(self, *args: Any) -> None:
        raise NotImplementedError("XLA calls the handler, which looks the function up by its number")


def _handle(frame: int) -> int | None:
    api = 0
    try:
        extension, api, n_in, inputs, n_out, outputs, attributes = _FRAME.unpack(_FrameBytes.from_address(frame))
        if extension:
            _describe(extension)
        else:
            number = _word_at(_word_at(_word_at(attributes).value + _VALUE_OFFSET).value).value
            _functions[number](_addresses(inputs, n_in), _addresses(outputs, n_out))
        return None
    except BaseException as error:
        return _error(api, str(error))


_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(_handle)


@functools.cache
def _register() -> None:
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(_HANDLER), platform="cpu")


_word_at = ctypes.c_size_t.from_address


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
    arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, message.encode(), _INTERNAL_ERROR)
    create = _CREATE_ERROR(_word_at(api + _ERROR_CREATE_OFFSET).value)
    error: int | None = create(ctypes.byref(arguments))
    return error


def lower_host_call(
    context: Any, *operands: Any, function: HostFunction, has_side_effect: bool, keeper: list[Any] | None = None
) -> Any:
    """Lower an operation to a call of `function` on the host, in a lowering rule.

    The executable keeps the function alive; where it does not know, because it was lowered before, `keeper` does.
    """
    _register()
    lease = _Lease(function)
    if keeper is not None:
        keeper.append(lease)
    # Among the host callbacks of a program it also keeps the executable out of JAX's persistent cache: in another
    # process its number means nothing.
    context.module_context.add_host_callback(lease)
    rule = jax.ffi.ffi_lowering(_TARGET, has_side_effect=has_side_effect)
    return rule(context, *operands, function=np.uint64(lease.number))
