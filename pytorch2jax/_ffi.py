"""XLA's foreign function interface, on the host: how a compiled program calls a Python function on torch tensors.

The handler is the C++ extension `_native` (`native/handler.cpp`). Where that was not built, or torch has no table of
DLPack functions, `jax.experimental.buffer_callback` does the same through the same interface; it makes two Python
objects for each array in each call, which costs half a microsecond an array.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pytorch2jax._dtypes import dtype_j2t
from pytorch2jax._inference import Spec

if TYPE_CHECKING:
    from pytorch2jax import _native

HostFunction = Callable[[list[torch.Tensor], Sequence[int]], None]
"""Gets tensors over the inputs and the addresses of the outputs; what it raises becomes XLA's error."""

_TARGET = "pytorch2jax_host_call"
_LONGEST_S = 5.0  # that the end of the process waits for torch


@functools.cache
def native() -> Any | None:
    """The extension, ready for use; None where there is none, or `PYTORCH2JAX_NATIVE=0` says not to use it."""
    if os.environ.get("PYTORCH2JAX_NATIVE") == "0":
        return None
    try:
        extension = importlib.import_module("pytorch2jax._native")
        extension.use_torch(torch.Tensor.__dlpack_c_exchange_api__)
    except (ImportError, AttributeError, RuntimeError):
        return None
    jax.ffi.register_ffi_target(_TARGET, extension.handler(), platform="cpu")
    atexit.register(_end, extension)
    return extension


def lower_host_call(
    context: Any,
    *operands: Any,
    function: HostFunction,
    in_specs: Sequence[Spec],
    has_side_effect: bool,
    keeper: list[Any] | None = None,
) -> tuple[Any, Callable[[], None]]:
    """Lower an operation to a call of `function` on the host, in a lowering rule, by the extension.

    The executable keeps the function alive; where it does not know, because it was lowered before, `keeper` does.

    Returns:
        What the rule returns, and a function that has new tensors made from the next call on.
    """
    extension = native()
    assert extension is not None
    number = new_number()
    inputs = tuple((torch.empty(0, dtype=dtype_j2t(spec.dtype)), spec.shape) for spec in in_specs)
    call: _native.Call = extension.Call(number, function, inputs)
    lease = _Lease(call)
    if keeper is not None:
        keeper.append(lease)
    # Among the host callbacks of a program it also keeps the executable out of the persistent cache of jax 0.11.1 and
    # older. Newer ones write it there, and nobody finds it again.
    context.module_context.add_host_callback(lease)
    rule = jax.ffi.ffi_lowering(_TARGET, has_side_effect=has_side_effect)
    return rule(context, *operands, function=np.uint64(number)), call.forget


def new_number() -> int:
    """A number for a call.

    Numbers are part of programs, and JAX (since 0.11.2) writes programs to its persistent cache. So no two are the same
    in any two processes, also if one is a fork of the other: 63 random bits from the operating system.
    """
    return secrets.randbits(63)


class _Lease:
    """Keeps a call for the handler to find; held by the executables that use it, among their host callbacks."""

    def __init__(self, call: _native.Call | None) -> None:
        self._call = call

    def __reduce__(self) -> Any:
        return _Lease, (None,)  # in a serialised executable; the handler of another process has no such call

    def __call__(self, *args: Any) -> None:
        raise NotImplementedError("XLA calls the handler, which looks the function up by its number")


def _end(extension: Any) -> None:
    """Before JAX drops its executables (it was imported earlier): wait for what was dispatched, and shut the handler.

    A thread that wants to run Python code once the interpreter is gone takes the process down. After an interrupt
    nobody wants the results of what still runs, which may be an endless loop: torch is not called for them.
    """
    interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1")
    if not interrupted:
        with contextlib.suppress(Exception, KeyboardInterrupt):  # of one of the programs, or while it waits
            _wait_for_programs()
    extension.close(_LONGEST_S, interrupted)


def _wait_for_programs() -> None:
    # XLA runs what a thread dispatches one after the other, programs for several devices in a row of their own.
    devices = jax.local_devices(backend="cpu")
    add = jax.jit(lambda x: x + 1)
    add(jax.device_put(np.zeros(1, np.float32), devices[0])).block_until_ready()
    if len(devices) > 1:
        sharding = NamedSharding(Mesh(np.array(devices), ("i",)), PartitionSpec("i"))
        add(jax.device_put(np.zeros(len(devices), np.float32), sharding)).block_until_ready()
