"""The oldest versions of jax and torch that the package runs on; imported before anything that needs them."""

from __future__ import annotations

import re

import jax
import torch

TORCH = (2, 10, 0)  # older ones give wrong gradients where a backward pass uses autograd's graph again
JAX = (0, 8, 1)  # older ones abort the process


def check(name: str, version: str, lowest: tuple[int, ...]) -> None:
    """Raise an `ImportError` if a package is too old.

    Args:
        name: the package.
        version: its version.
        lowest: the lowest version that does.

    Example:
        >>> check("torch", "2.13.0+cpu", (2, 10, 0))
    """
    found = tuple(map(int, re.findall(r"\d+", version)[: len(lowest)]))
    if found < lowest:
        needed = ".".join(map(str, lowest))
        raise ImportError(
            f"pytorch2jax needs {name} {needed} or newer, and found {name} {version}: install a newer one "
            f"(`pip install '{name}>={needed}'`), because older ones give wrong results or crash with it."
        )


check("torch", torch.__version__, TORCH)
check("jax", jax.__version__, JAX)
