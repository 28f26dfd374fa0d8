"""The JAX function for each operator of torch's, one file for each family."""

from pytorch2jax.xla.lowerings import (
    attention,
    convolution,
    creation,
    elementwise,
    fft,
    indexing,
    linalg,
    losses,
    normalisation,
    pooling,
    random,
    recurrent,
    reductions,
    sorting,
    views,
)

__all__ = [
    "attention",
    "convolution",
    "creation",
    "elementwise",
    "fft",
    "indexing",
    "linalg",
    "losses",
    "normalisation",
    "pooling",
    "random",
    "recurrent",
    "reductions",
    "sorting",
    "views",
]
