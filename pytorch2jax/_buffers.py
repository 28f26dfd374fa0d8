"""Memory of XLA's: tensors over it, for inputs and for outputs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence

import torch

from pytorch2jax._dtypes import dtype_j2t
from pytorch2jax._inference import Spec
from pytorch2jax._transfer import tensor_at

_KEPT_VIEWS = 16
_SMALL_BYTES = 1 << 14


class Views(dict[int, torch.Tensor]):
    """Tensors of one shape and dtype over XLA's memory, by address.

    XLA uses the same few addresses from call to call, above all for parameters. A tensor holds nothing but the address,
    so that it is right for whatever array lies there at the time of a call.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self._shape = spec.shape
        self.dtype = dtype_j2t(spec.dtype)
        self.n_bytes = math.prod(spec.shape) * self.dtype.itemsize
        # Small outputs are copied by address, without a tensor at the destination.
        self.small = 0 < self.n_bytes <= _SMALL_BYTES and not self.dtype.is_complex

    def __missing__(self, address: int) -> torch.Tensor:
        if len(self) >= _KEPT_VIEWS:
            self.clear()
        self[address] = tensor = tensor_at(address, self.n_bytes, self.dtype, self._shape)
        return tensor


class Buffers:
    """Where the caller of a program wants its outputs.

    Args:
        tensors: a buffer for each output, by its number.
    """

    def __init__(self, tensors: Mapping[int, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._tensors[index]

    def copy(self, index: int, value: torch.Tensor) -> None:
        """Copy an output of the right shape into its buffer, converting its dtype, if it is not the buffer itself."""
        buffer = self[index]
        if buffer is not value:
            buffer.copy_(value)

    def put_words(self, index: int, low: int, high: int) -> None:
        """Set an output of two 32-bit words."""
        self[index].copy_(torch.tensor((low, high), dtype=torch.uint32))


class HostBuffers(Buffers):
    """The same in the memory of the host, by address."""

    def __init__(self, addresses: Sequence[int], views: Sequence[Views]) -> None:
        self._addresses, self._views = addresses, views
        self._tensors = {}

    def __getitem__(self, index: int) -> torch.Tensor:
        tensor = self._tensors.get(index)
        if tensor is None:
            tensor = self._tensors[index] = self._views[index][self._addresses[index]]
        return tensor

    def copy(self, index: int, value: torch.Tensor) -> None:
        views = self._views[index]
        plain = views.small and value.dtype is views.dtype and value.is_contiguous() and not value.is_neg()
        source = value.data_ptr() if plain and value.is_cpu and value.nbytes == views.n_bytes else 0
        if source:  # torch has zeros without memory: derivatives that are zero everywhere
            address = self._addresses[index]
            if source != address:
                ctypes.memmove(address, source, views.n_bytes)
        else:
            super().copy(index, value)

    def put_words(self, index: int, low: int, high: int) -> None:
        words = _TwoWords.from_address(self._addresses[index])
        words[0], words[1] = low, high


_TwoWords = ctypes.c_uint32 * 2
