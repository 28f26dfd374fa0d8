"""Torch modules as Flax modules, and back; needs the extra `flax`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

try:
    import flax as _flax
except ImportError as _error:
    raise ImportError(
        "pytorch2jax.flax: expected the package `flax`, which is not installed. Install it with "
        "`pip install 'pytorch2jax[flax]'`."
    ) from _error

if TYPE_CHECKING:
    from pytorch2jax.flax._linen import convert_pytnn_to_flax
    from pytorch2jax.flax._linen_to_torch import convert_flax_to_pytnn
    from pytorch2jax.flax._nnx import Buffer, TorchModule, convert_pytnn_to_nnx
    from pytorch2jax.flax._nnx_to_torch import convert_nnx_to_pytnn

__all__ = [
    "Buffer",
    "TorchModule",
    "convert_flax_to_pytnn",
    "convert_nnx_to_pytnn",
    "convert_pytnn_to_flax",
    "convert_pytnn_to_nnx",
]

# Each module system is imported on first use: who has Linen only need not wait for NNX, or have one that works.
_LATE = {
    "Buffer": "_nnx",
    "TorchModule": "_nnx",
    "convert_flax_to_pytnn": "_linen_to_torch",
    "convert_nnx_to_pytnn": "_nnx_to_torch",
    "convert_pytnn_to_flax": "_linen",
    "convert_pytnn_to_nnx": "_nnx",
}

del _flax


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(f"pytorch2jax.flax.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
