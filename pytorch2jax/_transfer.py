"""Tensors to arrays and back over DLPack, outside of any JAX transformation.

Memory is shared wherever the two frameworks can share it, in both directions. A shared array changes when
torch writes to the tensor that it came from, and XLA's buffer changes when torch writes to a tensor that was
made from an array: pass `copy=True` where that can happen. The functions in `_bridge.py`, which run under
`jax.jit`, never let torch write to an array.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pytorch2jax._dtypes import dtype_j2t, dtype_t2j, narrowed
from pytorch2jax._errors import DeviceError, LeafTypeError, NarrowingError, OptionError
from pytorch2jax._forks import check_process
from pytorch2jax._internals import has_memory, has_only_host, outside_of_traces, uncommitted, x64_enabled

_INTEGERS = (torch.int64, torch.uint64)


def t2j(tensor: torch.Tensor, via: str = "dlpack", *, copy: bool = False) -> jax.Array:
    """Convert a torch tensor to a JAX array on the same device.

    Args:
        tensor: a tensor of any shape, strides and shared dtype. It is detached from autograd; conjugate
            and negative views are resolved.
        via: `"dlpack"` as described here, or `"cpu"` or `"host"` for a copy.
        copy: `False` shares memory where that is possible; `True` never does.

    Returns:
        An array of the same shape and dtype, with its values also where JAX traces around. While `jax_enable_x64`
        is off, `int64` and `uint64` become their 32-bit siblings if every value fits (an error otherwise), and
        `float64` and `complex128` are rounded to `float32` and `complex64`.

    Copies:
        None for a contiguous tensor with 64-byte aligned memory (every freshly allocated tensor). Strided
        and unaligned tensors, resolved views and narrowed dtypes are copied.

    Raises:
        StructureError: `tensor` is not a dense torch tensor, JAX has no such dtype, or a 64-bit integer does not fit
            into 32 bits while `jax_enable_x64` is off.
        OptionError: there is no such `via`.
        DeadlockError: JAX was running already when the process was forked.

    Example:
        >>> import torch
        >>> t2j(torch.arange(3.0))
        Array([0., 1., 2.], dtype=float32)
    """
    check_process(lambda: "t2j")
    copy = copy or _is_by_host("t2j", via)
    if not isinstance(tensor, torch.Tensor):
        raise LeafTypeError(f"t2j: expected a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise LeafTypeError(
            f"t2j: expected a dense tensor, got layout {tensor.layout}, quantized={tensor.is_quantized}, "
            f"nested={tensor.is_nested}. Call `.to_dense()`, `.dequantize()` or `.to_padded_tensor()` first."
        )
    if not has_memory(tensor):
        raise LeafTypeError(
            f"t2j: expected a tensor with data, got a {type(tensor).__name__} on {tensor.device} without any: on "
            "torch's meta device, or inside a torch function while its outputs are inferred, or inside `torch.func`. "
            "Convert outside of the function."
        )
    dtype_t2j(tensor.dtype)  # the error for a dtype that JAX lacks
    with outside_of_traces():
        return _array_of(tensor, copy)


def _array_of(tensor: torch.Tensor, copy: bool) -> jax.Array:
    dense = _narrow(tensor.detach().resolve_conj().resolve_neg())
    if dense.numel() == 0:  # DLPack gives empty tensors no address; JAX refuses some of their strides
        return jnp.zeros(tuple(dense.shape), dtype_t2j(dense.dtype))
    if not dense.is_contiguous() or not dense.data_ptr():  # zeros without memory: derivatives that are zero everywhere
        dense = torch.empty_like(dense, memory_format=torch.contiguous_format).copy_(dense)
    array = uncommitted(jax.dlpack.from_dlpack(dense))
    if copy and dense.data_ptr() == tensor.data_ptr():
        # JAX copies in the background; torch may write to the tensor as soon as this returns.
        array = jax.block_until_ready(jnp.copy(array))
    return array


def j2t(array: Any, via: str = "dlpack", *, copy: bool = False) -> torch.Tensor:
    """Convert a JAX array to a torch tensor on the same device.

    Args:
        array: a JAX array on one device or replicated over several, or anything that `jax.numpy.asarray` takes.
        via: `"dlpack"` as described here, or `"cpu"` or `"host"` for a copy.
        copy: `False` shares memory with the array: the tensor must then be read only, because a JAX array
            is taken by everybody else to be immutable. `True` gives a tensor that may be written to.

    Returns:
        A contiguous tensor of the same shape and dtype, without `requires_grad`.

    Raises:
        StructureError: `array` is a tracer, nothing that JAX takes for an array, or of a dtype that torch lacks.
        OptionError: there is no such `via`.
        DeadlockError: JAX was running already when the process was forked.
        DeviceError: the array is spread over several devices.

    Example:
        >>> import jax.numpy as jnp
        >>> j2t(jnp.arange(3))
        tensor([0, 1, 2], dtype=torch.int32)
    """
    check_process(lambda: "j2t")
    copy = copy or _is_by_host("j2t", via)
    if isinstance(array, jax.core.Tracer):
        raise LeafTypeError(
            "j2t: expected a concrete array, got a tracer. Inside jax.jit, jax.grad or jax.vmap wrap the "
            "torch function with `torch2jax` instead of converting its arguments."
        )
    if not isinstance(array, jax.Array):
        try:
            array = jnp.asarray(array)
        except (TypeError, ValueError) as error:
            raise LeafTypeError(f"j2t: expected a JAX array, got {type(array).__name__}.") from error
    if array.is_deleted():
        raise LeafTypeError("j2t: expected an array, got one that has been deleted or donated.")
    dtype = dtype_j2t(array.dtype)
    array = on_one_device("j2t", "array", array)
    if array.size == 0:
        return torch.empty(array.shape, dtype=dtype, device=torch_device(array))
    tensor = torch.from_dlpack(array)
    return tensor.clone() if copy else tensor


def _is_by_host(call: str, via: str) -> bool:
    if via not in ("dlpack", "cpu", "host"):
        raise OptionError(f"{call}: via: expected 'dlpack', 'cpu' or 'host', got {via!r}.")
    return via != "dlpack"


def as_array(call: str, path: Callable[[], str], value: Any) -> Any:
    """Turn what a user passed as an array argument into something that JAX can bind, or say why not."""
    check_process(lambda: f"{call}: {path()}")
    if isinstance(value, jax.Array):  # tracers, too
        return value
    if isinstance(value, torch.Tensor):
        return t2j(value)
    if isinstance(value, (int, float, complex)):  # what JAX hands on where a Python number was differentiated
        return jnp.asarray(value)
    if isinstance(value, (np.ndarray, np.generic)):
        wide = value.dtype.kind in "iu" and value.dtype.itemsize == 8 and not x64_enabled()
        narrow = value.astype(np.dtype(f"{value.dtype.kind}4")) if wide else value
        if wide and not np.array_equal(narrow, value):
            raise NarrowingError(_narrowing_message(f"{call}: {path()}", value.dtype.name))
        return jnp.asarray(narrow)
    raise LeafTypeError(f"{call}: {path()}: expected an array, got {type(value).__name__}.")


def tensor_at(address: int, n_bytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A contiguous tensor over memory of the host, which somebody else owns."""
    if n_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer((ctypes.c_char * n_bytes).from_address(address), dtype=dtype)
    return flat if len(shape) == 1 else flat.view(shape)


def on_one_device(call: str, path: str, array: jax.Array) -> jax.Array:
    """An array on one device: itself, or this process's first copy of one that is replicated.

    Raises:
        DeviceError: it is spread over several devices.
    """
    if len(array.sharding.device_set) == 1:
        return array
    if array.is_fully_replicated:
        return array.addressable_data(0)
    raise DeviceError(
        f"{call}: {path}: expected an array on one device, or one that is replicated, got one that is spread over "
        f"{len(array.sharding.device_set)} devices ({array.sharding}). Gather it with `jax.device_put(x, device)`, say "
        "with `batch_axes=` along which axes it may be split, or call the function inside `jax.shard_map`, where each "
        "device sees its own part."
    )


def torch_device(array: jax.Array) -> torch.device:
    """The torch device on which a one-device JAX array lies."""
    if has_only_host():
        return _HOST
    device = next(iter(array.devices()))
    if device.platform == "cpu":
        return _HOST
    return torch.device("cuda", getattr(device, "local_hardware_id", device.id))


_HOST = torch.device("cpu")


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    narrow = tensor.to(narrowed(tensor.dtype))
    if narrow.dtype != tensor.dtype and tensor.dtype in _INTEGERS and not fits(narrow, tensor):
        raise NarrowingError(_narrowing_message("t2j", str(tensor.dtype).removeprefix("torch.")))
    return narrow


def fits(narrow: torch.Tensor, wide: torch.Tensor) -> bool:
    """Whether an integer tensor kept all of its values when it was narrowed."""
    return torch.equal(narrow.to(wide.dtype), wide)


def _narrowing_message(where: str, dtype: str) -> str:
    return (
        f"{where}: expected {dtype} values that fit into 32 bits, because jax_enable_x64 is off, and got "
        "larger ones. Call `jax.config.update('jax_enable_x64', True)`, or reduce the values."
    )
