"""What `forward` leaves in the plain attributes of a module, and putting it back."""

from __future__ import annotations

import collections
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pytorch2jax._internals import torch_pytree

_MISSING: Any = object()
_TORCHS_OWN = frozenset({"_parameters", "_buffers", "_modules", "training"})
_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict)
_SEQUENCES = (list, set, collections.deque)
_ATOMS = (nn.Module, torch.Tensor, type, types.FunctionType, types.MethodType, types.ModuleType, str, bytes)
_DEPTH = 4


class Change(NamedTuple):
    """A container that is not as it was.

    path: its address, or that of the changed item.
    container: the dict (also one of attributes), list, set or deque.
    key: the changed key of a dict; None for other containers, which are taken as a whole.
    old: what was there, or `_MISSING`.
    """

    path: str
    container: Any
    key: Any
    old: Any

    def put_back(self) -> None:
        """Make it as it was."""
        if isinstance(self.container, np.ndarray):
            self.container[...] = self.old
        elif not isinstance(self.container, dict):
            self.container.clear()
            (self.container.update if isinstance(self.container, set) else self.container.extend)(self.old)
        elif self.old is _MISSING:
            self.container.pop(self.key, None)
        else:
            self.container[self.key] = self.old

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that are there now."""
        if isinstance(self.container, np.ndarray):
            return []
        now = self.container.get(self.key) if isinstance(self.container, dict) else list(self.container)
        return [leaf for leaf in torch_pytree.tree_leaves(now) if isinstance(leaf, torch.Tensor)]


class Held(NamedTuple):
    """A tensor in a plain attribute, or inside of one.

    path: its address.
    tensor: the tensor.
    place: the dict or list that has it and the key there; None where it cannot be exchanged (in a tuple).
    """

    path: str
    tensor: torch.Tensor
    place: tuple[Any, Any] | None


class Snapshot:
    """The plain attributes of a module and its submodules, and what is inside of them: containers and objects."""

    def __init__(self, module: nn.Module) -> None:
        self._seen: set[int] = set()
        self._before: list[tuple[str, Any, Any]] = []
        self.tensors: list[Held] = []
        for name, submodule in module.named_modules():
            self._walk_mapping(name, submodule.__dict__, 0)

    def _walk(self, path: str, value: Any, depth: int, place: tuple[Any, Any] | None = None) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors.append(Held(path, value, place))
        if isinstance(value, _ATOMS) or depth > _DEPTH or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if type(value) in _MAPPINGS:
            self._walk_mapping(path, value, depth)
        elif type(value) in _SEQUENCES:
            self._before.append((path, value, list(value)))
            for index, item in enumerate(value):
                self._walk(f"{path}[{index}]", item, depth + 1, (value, index) if isinstance(value, list) else None)
        elif isinstance(value, np.ndarray):
            self._before.append((path, value, value.copy()))
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                self._walk(f"{path}[{index}]", item, depth + 1)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._walk_mapping(path, value.__dict__, depth)

    def _walk_mapping(self, path: str, mapping: dict[Any, Any], depth: int) -> None:
        before = {key: value for key, value in mapping.items() if key not in _TORCHS_OWN}
        self._before.append((path, mapping, before))
        for key, value in before.items():
            self._walk(f"{path}.{key}" if path else str(key), value, depth + 1, (mapping, key))

    def changes(self) -> Iterator[Change]:
        """What has changed since."""
        for path, container, before in self._before:
            if isinstance(container, dict):
                for key in (container.keys() | before.keys()) - _TORCHS_OWN:
                    if container.get(key, _MISSING) is not before.get(key, _MISSING):
                        yield Change(f"{path}.{key}" if path else str(key), container, key, before.get(key, _MISSING))
            elif isinstance(container, np.ndarray):
                if not np.array_equal(container, before):
                    yield Change(path, container, None, before)
            elif len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
                yield Change(path, container, None, before)
