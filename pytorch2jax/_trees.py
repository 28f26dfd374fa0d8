"""Pytrees of both frameworks: flat leaves, paths for messages, and containers that JAX does not know.

Arguments come in as JAX pytrees. What a torch function returns is any torch pytree: besides tuples, lists
and dicts, torch's own named results, Hugging Face's `ModelOutput`, and plain dataclasses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from pytorch2jax._internals import (
    flatten_torch_node,
    is_torch_node,
    torch_node_type,
    torch_pytree,
    unflatten_torch_node,
)

PATH_SEPARATOR = "."


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in a torch pytree."""
    return [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# What may be part of an output besides tensors and numbers.
CONSTANTS = (str, bytes, torch.dtype, torch.device, torch.Size, np.dtype)


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
        children = [child._build(leaves) for child in self.children]
        if self.kind == "dataclass":
            value = _new_dataclass(self.node_type, self.context, children)
        else:
            try:
                value = unflatten_torch_node(self.node_type, children, self.context)
            except Exception:  # a class of somebody else's that can hold nothing but tensors
                return TorchContainer(self.node_type, self.context, children)
        _register_with_jax(value)
        return value

    def describe(self) -> str:
        """The structure in words, for messages: `dict(Tensor, tuple(Tensor, None))`."""
        if self.kind == "leaf":
            return "Tensor"
        if self.kind == "static":
            return repr(self.context)
        return f"{self.node_type.__name__}({', '.join(child.describe() for child in self.children)})"


@jax.tree_util.register_pytree_node_class
class TorchContainer:
    """Arrays in the place of a torch container that takes only tensors, such as a cache of keys and values.

    It passes through `jax.jit`, and becomes the torch container again where it is an argument of a converted
    function.

    Attributes:
        node_type: the type of the container.
        children: its parts, with arrays in the place of tensors.
    """

    def __init__(self, node_type: Any, context: Any, children: Sequence[Any]) -> None:
        self.node_type = node_type
        self.children = list(children)
        self._context = context

    def __repr__(self) -> str:
        return f"TorchContainer({self.node_type.__name__}, {self.children})"

    def tree_flatten(self) -> tuple[list[Any], _Context]:
        """For JAX's pytrees."""
        return self.children, _Context((self.node_type, None, self._context))

    @classmethod
    def tree_unflatten(cls, aux: _Context, children: Sequence[Any]) -> Any:
        """For JAX's pytrees; around tensors, the container itself."""
        node_type, _, context = aux.tree
        leaves = jax.tree.leaves(list(children))
        if leaves and all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            return unflatten_torch_node(node_type, list(children), context)
        return cls(node_type, context, children)


def flatten_output(value: Any, is_leaf: Callable[[Any], bool]) -> tuple[list[Any], OutputTree]:
    """Flatten what a torch function returned; what `is_leaf` refuses and no registry knows is static."""
    leaves: list[Any] = []
    return leaves, _flatten_output(value, is_leaf, leaves)


def _flatten_output(value: Any, is_leaf: Callable[[Any], bool], leaves: list[Any]) -> OutputTree:
    if is_leaf(value):
        leaves.append(value)
        return OutputTree("leaf")
    if is_torch_node(value):
        children, context = flatten_torch_node(value)
        kind, node_type = "torch", torch_node_type(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        context = tuple(field.name for field in dataclasses.fields(value))
        children = [getattr(value, name) for name in context]
        kind, node_type = "dataclass", type(value)
    else:
        return OutputTree("static", context=value)
    parts = tuple(_flatten_output(child, is_leaf, leaves) for child in children)
    return OutputTree(kind, node_type, context, parts)


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


def _new_dataclass(cls: type, names: Sequence[str], values: Sequence[Any]) -> Any:
    instance: Any = object.__new__(cls)  # as copy.replace does not: without running the user's __init__
    for name, value in zip(names, values, strict=True):
        object.__setattr__(instance, name, value)
    return instance


class _Context:
    """A torch pytree context as JAX wants its auxiliary data: hashable and comparable."""

    def __init__(self, tree: tuple[Any, ...]) -> None:
        self.tree = tree

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and self.tree == other.tree

    def __hash__(self) -> int:
        return hash(self.tree[:2])


def _register_with_jax(value: Any) -> None:
    """Let a container type pass through `jax.jit` if JAX does not know it yet.

    This is the one place where the package adds to a registry of JAX's, and only for a type that a
    converted function has just returned or been called with.
    """
    if not jax.tree_util.all_leaves([value]):
        return

    def flatten(node: Any) -> tuple[list[Any], _Context]:
        if is_torch_node(node):
            children, context = flatten_torch_node(node)
            kind, node_type = "torch", torch_node_type(node)
        else:
            context = tuple(field.name for field in dataclasses.fields(node))
            children = [getattr(node, name) for name in context]
            kind, node_type = "dataclass", type(node)
        # Strings and the like would be leaves that JAX refuses: they go with the auxiliary data.
        static = tuple((i, child) for i, child in enumerate(children) if isinstance(child, CONSTANTS))
        dynamic = [child for child in children if not isinstance(child, CONSTANTS)]
        return dynamic, _Context((kind, node_type, context, static))

    def unflatten(aux: _Context, dynamic: Sequence[Any]) -> Any:
        kind, node_type, context, static = aux.tree
        children = list(dynamic)
        for index, child in static:
            children.insert(index, child)
        if kind == "dataclass":
            return _new_dataclass(node_type, context, children)
        return unflatten_torch_node(node_type, children, context)

    jax.tree_util.register_pytree_node(type(value), flatten, unflatten)


def register_torch_nodes(leaves: Sequence[Any]) -> bool:
    """Let JAX take the containers apart that it took for leaves and torch's pytrees know; whether there were any."""
    found = [x for x in leaves if not isinstance(x, (torch.Tensor, *CONSTANTS)) and is_torch_node(x)]
    for container in found:
        _register_with_jax(container)
    return bool(found)


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
