"""PyTorch models as JAX functions, and as Flax modules.

`convert_pytnn_to_jax(model)` gives a pure function and its parameters, `convert_pytnn_to_flax(model)` a Linen
module; `torch2jax(fn)` turns any torch function into a JAX function. They run torch's own kernels on XLA's
buffers, under every JAX transformation, or with `backend="xla"` translate to plain JAX. `jax2torch(fn)`,
`convert_flax_to_pytnn` and their like go the other way.
See the README for what works where.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytorch2jax._versions  # noqa: F401  # before what needs newer versions than somebody may have

# isort: split
from pytorch2jax._dtypes import dtype_j2t, dtype_t2j

# Kinds of the errors above, for programs that tell them apart; not in `__all__`.
from pytorch2jax._errors import (
    BridgedWarning,
    CaptureError,
    ConversionError,
    DeadlockError,
    DeviceError,
    DtypeError as DtypeError,
    ExportError as ExportError,
    ForkError as ForkError,
    InferenceError,
    LeafTypeError as LeafTypeError,
    LoopWarning,
    MissingLeafError as MissingLeafError,
    NarrowingError as NarrowingError,
    NarrowingWarning,
    NestingError as NestingError,
    OptionError,
    OutputMismatchError as OutputMismatchError,
    Pytorch2JaxError,
    RandomnessError as RandomnessError,
    ReplicationWarning,
    StateError,
    StatisticsWarning,
    StructureError,
    TorchCallError,
    UnsupportedTransformError,
)
from pytorch2jax._module import convert_pytnn_to_jax
from pytorch2jax._reverse import jax2torch
from pytorch2jax._tape import use_tape
from pytorch2jax._transfer import j2t, t2j
from pytorch2jax._weights import label_params, load_params, params_from_state_dict, params_to_state_dict, trainable_mask
from pytorch2jax._wrap import py_to_jax_wrapper, torch2jax
from pytorch2jax.compat import (
    Size,
    compile_and_import_module,
    convert_to_jax,
    convert_to_pyt,
    to_jax,
    torch2jax_auto,
    torch2jax_with_vjp,
    torch2jax_without_vjp,
    tree_j2t,
    tree_t2j,
    wrap_torch_fn,
)

if TYPE_CHECKING:
    from pytorch2jax._check import check
    from pytorch2jax.equinox import convert_equinox_to_pytnn, convert_pytnn_to_equinox
    from pytorch2jax.flax import (
        convert_flax_to_pytnn,
        convert_nnx_to_pytnn,
        convert_pytnn_to_flax,
        convert_pytnn_to_nnx,
    )

__version__ = "0.2.0"

__all__ = [
    "BridgedWarning",
    "CaptureError",
    "ConversionError",
    "DeadlockError",
    "DeviceError",
    "InferenceError",
    "LoopWarning",
    "NarrowingWarning",
    "OptionError",
    "Pytorch2JaxError",
    "ReplicationWarning",
    "Size",
    "StateError",
    "StatisticsWarning",
    "StructureError",
    "TorchCallError",
    "UnsupportedTransformError",
    "check",
    "compile_and_import_module",
    "convert_equinox_to_pytnn",
    "convert_flax_to_pytnn",
    "convert_nnx_to_pytnn",
    "convert_pytnn_to_equinox",
    "convert_pytnn_to_flax",
    "convert_pytnn_to_jax",
    "convert_pytnn_to_nnx",
    "convert_to_jax",
    "convert_to_pyt",
    "dtype_j2t",
    "dtype_t2j",
    "j2t",
    "jax2torch",
    "label_params",
    "load_params",
    "params_from_state_dict",
    "params_to_state_dict",
    "py_to_jax_wrapper",
    "t2j",
    "to_jax",
    "torch2jax",
    "torch2jax_auto",
    "torch2jax_with_vjp",
    "torch2jax_without_vjp",
    "trainable_mask",
    "tree_j2t",
    "tree_t2j",
    "use_tape",
    "wrap_torch_fn",
]

# Looked up on first use: the adapters import frameworks that need not be installed, and few programs check models.
_LATE = {
    "check": "pytorch2jax._check",
    "convert_equinox_to_pytnn": "pytorch2jax.equinox",
    "convert_flax_to_pytnn": "pytorch2jax.flax",
    "convert_nnx_to_pytnn": "pytorch2jax.flax",
    "convert_pytnn_to_equinox": "pytorch2jax.equinox",
    "convert_pytnn_to_flax": "pytorch2jax.flax",
    "convert_pytnn_to_nnx": "pytorch2jax.flax",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
