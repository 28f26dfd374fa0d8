"""Names that users of Pytorch2Jax and torch2jax (`wrap-torch2jax`) already type."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from pytorch2jax._internals import torch_pytree
from pytorch2jax._transfer import j2t, t2j
from pytorch2jax._wrap import torch2jax

Size = torch.Size
wrap_torch_fn = torch2jax


def to_jax(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A torch function as plain JAX operations; `torch2jax(fn, backend="xla")`.

    Args:
        fn: a torch function; see `torch2jax`.

    Returns:
        The JAX function.

    Example:
        >>> import jax.numpy as jnp, torch
        >>> to_jax(torch.sin)(jnp.zeros(2))
        Array([0., 0.], dtype=float32)
    """
    return torch2jax(fn, backend="xla")


def torch2jax_auto(fn: Callable[..., Any], output_shapes: Any = None, **options: Any) -> Callable[..., Any]:
    """`torch2jax` without example arguments.

    Args:
        fn: a torch function; see `torch2jax`.
        output_shapes, **options: see `torch2jax`.

    Returns:
        The JAX function.

    Raises:
        What `torch2jax` raises.

    Example:
        >>> import jax.numpy as jnp, torch
        >>> torch2jax_auto(torch.exp)(jnp.zeros(2))
        Array([1., 1.], dtype=float32)
    """
    return torch2jax(fn, output_shapes=output_shapes, **options)


def torch2jax_with_vjp(
    fn: Callable[..., Any], *example_args: Any, depth: int = 2, **options: Any
) -> Callable[..., Any]:
    """An old name of `torch2jax(fn, ..., depth=2)`; warns that it is old.

    Args:
        fn, *example_args, **options: see `torch2jax`.
        depth: the highest order of derivatives.

    Returns:
        The JAX function.

    Raises:
        What `torch2jax` raises.

    Example:
        >>> import jax.numpy as jnp, torch, warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     f = torch2jax_with_vjp(torch.exp, torch.zeros(2))
        >>> f(jnp.zeros(2))
        Array([1., 1.], dtype=float32)
    """
    warnings.warn(
        f"torch2jax_with_vjp: an old name. Write `torch2jax(fn, ..., depth={depth})`, or leave `depth` out for "
        "derivatives of any order.",
        DeprecationWarning,
        stacklevel=2,
    )
    return torch2jax(fn, *example_args, depth=depth, **options)


def torch2jax_without_vjp(fn: Callable[..., Any], *example_args: Any, **options: Any) -> Callable[..., Any]:
    """`torch2jax(fn, ..., depth=0)`: without derivatives, which are an error.

    Args:
        fn, *example_args, **options: see `torch2jax`.

    Returns:
        The JAX function.

    Raises:
        What `torch2jax` raises.

    Example:
        >>> import jax.numpy as jnp, torch
        >>> torch2jax_without_vjp(torch.exp, torch.zeros(2))(jnp.zeros(2))
        Array([1., 1.], dtype=float32)
    """
    return torch2jax(fn, *example_args, depth=0, **options)


def compile_and_import_module(*args: Any, **kwargs: Any) -> types.ModuleType:
    """Return this library: there is nothing to compile. Older programs call it first.

    Args:
        *args, **kwargs: whatever they pass.

    Returns:
        The module `pytorch2jax`.

    Raises:
        Nothing.

    Example:
        >>> compile_and_import_module().__name__
        'pytorch2jax'
    """
    return sys.modules["pytorch2jax"]


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


def tree_t2j(tree: Any, via: str = "dlpack") -> Any:
    """Every tensor of a torch pytree as an array; what is no tensor stays.

    Args:
        tree: tuples, lists, dicts and whatever else torch's pytrees know.
        via: see `t2j`.

    Returns:
        The same containers. Memory is shared where `t2j` can.

    Raises:
        What `t2j` raises.

    Example:
        >>> import torch
        >>> tree_t2j({"a": torch.ones(1), "b": None})
        {'a': Array([1.], dtype=float32), 'b': None}
    """
    return torch_pytree.tree_map(lambda leaf: t2j(leaf, via=via) if isinstance(leaf, torch.Tensor) else leaf, tree)


def tree_j2t(tree: Any, via: str = "dlpack") -> Any:
    """Every array of a JAX pytree as a tensor; what is no array stays.

    Args:
        tree: tuples, lists, dicts and whatever else JAX's pytrees know.
        via: see `j2t`.

    Returns:
        The same containers. Memory is shared, for reading.

    Raises:
        What `j2t` raises.

    Example:
        >>> import jax.numpy as jnp
        >>> tree_j2t((jnp.ones(1), "name"))
        (tensor([1.]), 'name')
    """
    return jax.tree.map(lambda leaf: j2t(leaf, via=via) if isinstance(leaf, (jax.Array, np.ndarray)) else leaf, tree)
