"""Torch modules as Equinox modules, and back; needs the extra `equinox`."""

try:
    import equinox as _equinox
except ImportError as _error:
    raise ImportError(
        "pytorch2jax.equinox: expected the package `equinox`, which is not installed. Install it with "
        "`pip install 'pytorch2jax[equinox]'`."
    ) from _error

from pytorch2jax.equinox._module import TorchModule, convert_pytnn_to_equinox
from pytorch2jax.equinox._to_torch import convert_equinox_to_pytnn

__all__ = ["TorchModule", "convert_equinox_to_pytnn", "convert_pytnn_to_equinox"]

del _equinox
