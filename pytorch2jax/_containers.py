"""Containers that JAX does not know: dataclasses, what torch's pytree registry has, and caches of transformers.

JAX has one registry of pytrees for the whole process, in which a class can be registered once. Whose class it is
registers it. A container that goes out is therefore an instance of a *node class*: a subclass of its class, of the same
name, that the library has registered. For `isinstance` and `__class__` it is the class itself.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from pytorch2jax._internals import (
    flatten_torch_node,
    torch_node_type,
    torch_pytree,
    unflatten_torch_node,
)

CONSTANTS = (str, bytes, torch.dtype, torch.device, torch.Size, np.dtype)
"""What may be part of an output besides tensors and numbers."""

_NOBODYS = ("torch", "collections", "builtins")  # packages whose classes no user registers

_ORIGINALS: dict[type, type] = {}  # by their node classes


class Contents(NamedTuple):
    """A container taken apart.

    Attributes:
        kind: `"dataclass"`, `"object"` for a cache, or `"torch"` for a node of torch's pytree registry.
        node_type: its class, or torch's key for it.
        context: what rebuilds it besides its children.
        children: its parts.
    """

    kind: str
    node_type: Any
    context: Any
    children: Sequence[Any]

    def plain(self) -> Any:
        """The container itself, anew."""
        if self.kind == "torch":
            return _with_nones(unflatten_torch_node(self.node_type, list(self.children), self.context), self)
        instance: Any = object.__new__(self.node_type)  # unlike copy.replace, without running the user's __init__
        names = self.context
        if self.kind == "object":
            names, static = self.context
            for name, value in static.items():  # lists and dicts anew, for the next one to write to
                setattr(instance, name, copy.deepcopy(value) if isinstance(value, (list, dict, set)) else value)
        for name, value in zip(names, self.children, strict=True):
            object.__setattr__(instance, name, value)
        return instance

    def node(self) -> Any:
        """The container as one that passes through `jax.jit`."""
        try:
            value = self.plain()
        except Exception:  # a class of somebody else's that can hold nothing but tensors
            return TorchContainer(self.node_type, self.context, self.children)
        cls: Any = type(value)
        if not jax.tree_util.all_leaves([value]):
            return value
        if cls.__module__.partition(".")[0] in _NOBODYS:
            jax.tree_util.register_pytree_node(cls, _flatten, _unflatten)
            return value
        try:
            object.__setattr__(value, "__class__", _node_class(cls))
        except TypeError:  # it has no subclasses, or none of the same layout
            return TorchContainer(self.node_type, self.context, self.children) if self.kind == "torch" else value
        if self.kind == "object":
            vars(value)[_CHILDREN] = self.context[0]
        return value


def _with_nones(value: Any, contents: Contents) -> Any:
    """A mapping that leaves out what is None (as the outputs of transformers do), with that put back.

    JAX and Equinox put None into the places of leaves for a while, and the structure may not change by that.
    """
    names = contents.context
    if isinstance(value, collections.OrderedDict) and isinstance(names, (list, tuple)) and len(value) < len(names):
        for name, child in zip(names, contents.children, strict=True):
            if name not in value:
                collections.OrderedDict.__setitem__(value, name, child)
            value.move_to_end(name)
    return value


def contents_of(value: Any) -> Contents | None:
    """A container of torch's registry, a dataclass or a cache, taken apart; None if the value is none of these."""
    node_type = torch_node_type(value, _ORIGINALS.get(type(value)))
    if node_type is not None:
        children, context = flatten_torch_node(node_type, value)
        return Contents("torch", node_type, context, children)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(field.name for field in dataclasses.fields(value))
        return Contents("dataclass", value.__class__, names, [getattr(value, name) for name in names])
    if is_cache(value):
        return _contents_of_cache(value)
    return None


_CACHES = {"Cache", "CacheLayerMixin"}
_CHILDREN = "_pytorch2jax_children"  # of a node: the attributes that hold arrays, or what JAX puts in their places


def is_cache(value: Any) -> bool:
    """Whether this is a cache of keys and values of the package transformers, or one layer of one."""
    return any(c.__name__ in _CACHES and c.__module__ == "transformers.cache_utils" for c in type(value).__mro__)


def _contents_of_cache(value: Any) -> Contents:
    """Its attributes: those with tensors are its children, numbers and the like are part of its structure."""
    attributes = dict(vars(value))
    known = attributes.pop(_CHILDREN, ())
    names = tuple(name for name, part in attributes.items() if name in known or _holds_values(part))
    static = {name: part for name, part in attributes.items() if name not in names}
    return Contents("object", value.__class__, (names, static), [attributes[name] for name in names])


def _holds_values(part: Any) -> bool:
    leaves = torch_pytree.tree_leaves(part)
    return any(isinstance(leaf, (jax.Array, np.ndarray, torch.Tensor)) or is_cache(leaf) for leaf in leaves)


def flatten_arguments(tree: Any) -> tuple[list[Any], Any]:
    """`jax.tree.flatten`, which also takes apart what only torch's registry knows and what holds arrays or tensors."""
    leaves, treedef = jax.tree.flatten(tree)
    found = False
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, (jax.Array, torch.Tensor, *CONSTANTS)) and _holds_arrays(leaf):
            contents = contents_of(leaf)
            assert contents is not None
            leaves[index], found = contents.node(), True
    return flatten_arguments(jax.tree.unflatten(treedef, leaves)) if found else (leaves, treedef)


def _holds_arrays(leaf: Any) -> bool:
    if torch_node_type(leaf) is None:
        return is_cache(leaf)
    return any(isinstance(x, (jax.Array, np.ndarray, torch.Tensor)) for x in torch_pytree.tree_leaves(leaf))


@functools.cache
def _node_class(cls: Any) -> type:
    """A subclass of a class, which JAX knows as a pytree and which says that it is the class."""

    def reduce(self: Any, protocol: Any) -> Any:
        """Copies and pickles are of the class itself."""
        parts = cls.__reduce_ex__(self, protocol)
        if isinstance(parts, str):
            return parts
        function, args, *state = parts
        function, *args = (cls if part is node_class else part for part in (function, *args))
        return (function, tuple(args), *state)

    namespace = {
        "__slots__": (),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__class__": property(lambda self: cls),
        "__reduce_ex__": reduce,
    }
    node_class = type(cls)(cls.__name__, (cls,), namespace)
    _ORIGINALS[node_class] = cls
    jax.tree_util.register_pytree_node(node_class, _flatten, _unflatten)
    return node_class


class _Context:
    """A torch pytree context as JAX wants its auxiliary data: hashable and comparable."""

    def __init__(self, tree: tuple[Any, ...]) -> None:
        self.tree = tree

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and self.tree == other.tree

    def __hash__(self) -> int:
        return hash(self.tree[:2])


def _flatten(node: Any) -> tuple[list[Any], _Context]:
    contents = contents_of(node)
    assert contents is not None
    kind, node_type, context, children = contents
    # Strings and the like would be leaves that JAX refuses: they go with the auxiliary data.
    static = tuple((i, child) for i, child in enumerate(children) if isinstance(child, CONSTANTS))
    dynamic = [child for child in children if not isinstance(child, CONSTANTS)]
    return dynamic, _Context((kind, node_type, context, static))


def _unflatten(aux: _Context, dynamic: Sequence[Any]) -> Any:
    """Around tensors, the container itself, for torch; else one for JAX."""
    kind, node_type, context, static = aux.tree
    children = list(dynamic)
    for index, child in static:
        children.insert(index, child)
    contents = Contents(kind, node_type, context, children)
    return contents.plain() if _has_tensors(dynamic) else contents.node()


def _has_tensors(children: Sequence[Any]) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in jax.tree.leaves(list(children)))


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
        if _has_tensors(children):
            return Contents("torch", node_type, context, children).plain()
        return cls(node_type, context, children)
