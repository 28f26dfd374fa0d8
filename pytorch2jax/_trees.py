"""Pytrees of both frameworks: flat leaves, and paths for messages.

Arguments come in as JAX pytrees. What a torch function returns is any torch pytree: besides tuples, lists
and dicts, torch's own named results, Hugging Face's `ModelOutput`, and plain dataclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from pytorch2jax._containers import Contents, contents_of
from pytorch2jax._internals import torch_pytree

PATH_SEPARATOR = "."


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in a torch pytree."""
    return [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class OutputTree(NamedTuple):
    """How to put the flat outputs of a torch function back together.

    kind: what the node is: `"leaf"` (the next flat output), `"static"` (the value in `context`),
        `"dataclass"` or `"torch"` (a node of torch's pytree registry).
    """

    kind: str
    node_type: Any = None
    context: Any = None
    children: tuple[OutputTree, ...] = ()

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Rebuild the containers around `leaves`."""
        if self.kind == "leaf":
            return leaves[0]
        return self._build(iter(leaves))

    def _build(self, leaves: Any) -> Any:
        if self.kind == "leaf":
            return next(leaves)
        if self.kind == "static":
            return self.context
        return Contents(
            self.kind, self.node_type, self.context, [child._build(leaves) for child in self.children]
        ).node()

    def describe(self) -> str:
        """The structure in words, for messages: `dict(Tensor, tuple(Tensor, None))`."""
        if self.kind == "leaf":
            return "Tensor"
        if self.kind == "static":
            return repr(self.context)
        return f"{self.node_type.__name__}({', '.join(child.describe() for child in self.children)})"


def flatten_output(value: Any, is_leaf: Callable[[Any], bool]) -> tuple[list[Any], OutputTree]:
    """Flatten what a torch function returned; what `is_leaf` refuses and no registry knows is static."""
    leaves: list[Any] = []
    return leaves, _flatten_output(value, is_leaf, leaves)


def _flatten_output(value: Any, is_leaf: Callable[[Any], bool], leaves: list[Any]) -> OutputTree:
    if is_leaf(value):
        leaves.append(value)
        return OutputTree("leaf")
    if (contents := contents_of(value)) is None:
        return OutputTree("static", context=value)
    parts = tuple(_flatten_output(child, is_leaf, leaves) for child in contents.children)
    return OutputTree(contents.kind, contents.node_type, contents.context, parts)


def output_paths(tree: OutputTree, prefix: str = "output") -> list[str]:
    """A readable address for each flat output, in order."""
    if tree.kind == "leaf":
        return [prefix]
    return [path for name, child in _named_children(tree) for path in output_paths(child, f"{prefix}[{name!r}]")]


def static_outputs(tree: OutputTree, prefix: str = "output") -> list[tuple[str, Any]]:
    """The values in an output that are no tensors, with their addresses."""
    if tree.kind == "static":
        return [(prefix, tree.context)]
    return [found for name, child in _named_children(tree) for found in static_outputs(child, f"{prefix}[{name!r}]")]


def _named_children(tree: OutputTree) -> list[tuple[Any, OutputTree]]:
    """The parts of a node under their names: keys where torch's registry has a list of them, else positions."""
    names: Sequence[Any] = range(len(tree.children))
    for context in (
        tree.context,
        tree.context[0] if isinstance(tree.context, (list, tuple)) and tree.context else None,
    ):
        if isinstance(context, (list, tuple)) and len(context) == len(tree.children):
            names = context
    return list(zip(names, tree.children, strict=True))


def is_static(leaf: Any) -> bool:
    """Whether an argument leaf is a Python value that torch gets as it is, and not an array."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return False
    return not hasattr(leaf, "dtype") or isinstance(leaf, (np.dtype, type))


def static_key(value: Any) -> Hashable:
    """A key under which equal static values, and only those, fall together (`1`, `1.0` and `True` do not)."""
    if isinstance(value, (float, complex)):
        return (type(value), repr(value))  # tells -0.0 from 0.0, and a NaN from nothing but other values
    try:
        hash(value)
    except TypeError:
        return (type(value), id(value))
    return (type(value), value)


def path_string(path: Sequence[Any]) -> str:
    """A JAX key path as a user would write it: `params.encoder.layers.0.weight`."""
    return PATH_SEPARATOR.join(jax.tree_util.keystr((key,), simple=True) for key in path)
