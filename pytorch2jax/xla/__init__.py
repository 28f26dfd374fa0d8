"""The second engine, `backend="xla"`: torch functions that can be written down as a graph, as plain JAX.

Nothing here is called by name: `torch2jax` and the converters come here for `backend="xla"`.
"""

from pytorch2jax.xla import lowerings as _lowerings  # the rules register themselves
from pytorch2jax.xla._call import xla_call
from pytorch2jax.xla._symbolic import bind_symbolic

__all__ = ["bind_symbolic", "xla_call"]

del _lowerings
