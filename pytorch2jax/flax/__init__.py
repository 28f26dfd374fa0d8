"""Torch modules as Flax modules; needs the extra `flax`."""

try:
    import flax as _flax
except ImportError as _error:
    raise ImportError(
        "pytorch2jax.flax: expected the package `flax`, which is not installed. Install it with "
        "`pip install 'pytorch2jax[flax]'`."
    ) from _error

from pytorch2jax.flax._linen import convert_pytnn_to_flax
from pytorch2jax.flax._nnx import Buffer, TorchModule, convert_pytnn_to_nnx

__all__ = ["Buffer", "TorchModule", "convert_pytnn_to_flax", "convert_pytnn_to_nnx"]

del _flax
