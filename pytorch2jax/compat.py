"""Names that users of Pytorch2Jax and torch2jax already type."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch

from pytorch2jax._internals import torch_pytree
from pytorch2jax._transfer import j2t, t2j

Size = torch.Size


def convert_to_jax(value: Any) -> Any:
    """A tensor as an array (`t2j`); anything else as it is.

    Args:
        value: a leaf; for containers see `tree_t2j`.

    Returns:
        A JAX array that shares the tensor's memory where that is possible, or `value`.

    Raises:
        What `t2j` raises.

    Example:
        >>> import torch
        >>> convert_to_jax(torch.ones(2))
        Array([1., 1.], dtype=float32)
        >>> convert_to_jax("as it is")
        'as it is'
    """
    return t2j(value) if isinstance(value, torch.Tensor) else value


def convert_to_pyt(value: Any) -> Any:
    """An array as a tensor (`j2t`); anything else as it is.

    Args:
        value: a leaf; for containers see `tree_j2t`.

    Returns:
        A tensor that shares the array's memory, for reading, or `value`.

    Raises:
        What `j2t` raises.

    Example:
        >>> import jax.numpy as jnp
        >>> convert_to_pyt(jnp.ones(2))
        tensor([1., 1.])
    """
    return j2t(value) if isinstance(value, (jax.Array, np.ndarray)) else value


def tree_t2j(tree: Any) -> Any:
    """Every tensor of a torch pytree as an array; what is no tensor stays.

    Args:
        tree: tuples, lists, dicts and whatever else torch's pytrees know.

    Returns:
        The same containers. Memory is shared where `t2j` can.

    Raises:
        What `t2j` raises.

    Example:
        >>> import torch
        >>> tree_t2j({"a": torch.ones(1), "b": None})
        {'a': Array([1.], dtype=float32), 'b': None}
    """
    return torch_pytree.tree_map(convert_to_jax, tree)


def tree_j2t(tree: Any) -> Any:
    """Every array of a JAX pytree as a tensor; what is no array stays.

    Args:
        tree: tuples, lists, dicts and whatever else JAX's pytrees know.

    Returns:
        The same containers. Memory is shared, for reading.

    Raises:
        What `j2t` raises.

    Example:
        >>> import jax.numpy as jnp
        >>> tree_j2t((jnp.ones(1), "name"))
        (tensor([1.]), 'name')
    """
    return jax.tree.map(convert_to_pyt, tree)
