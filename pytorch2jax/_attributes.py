"""What `forward` leaves in the plain attributes of a module, and putting it back."""

from __future__ import annotations

import collections
import inspect
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

_MISSING: Any = object()
_TORCHS_OWN = frozenset({"_parameters", "_buffers", "_modules", "training"})
_ATOMS = (nn.Module, torch.Tensor, type, types.FunctionType, types.MethodType, types.ModuleType, str, bytes)
_DEPTH = 6


class Container:
    """A mapping, sequence, array or set of attributes, and what was in it.

    path: its address.
    value: the object.
    before: what was in it.
    """

    def __init__(self, path: str, value: Any) -> None:
        self.path, self.value = path, value
        self.before = self.content()

    def content(self) -> Any:
        """What is in it now."""
        raise NotImplementedError

    def changes(self) -> Iterator[tuple[str, Any]]:
        """The addresses and the present values of what is not as it was."""
        now = self.content()
        if len(now) != len(self.before) or any(a is not b for a, b in zip(now, self.before, strict=True)):
            yield self.path, list(now)

    def put_back(self) -> None:
        """Make it as it was."""
        raise NotImplementedError


class _Mapping(Container):
    """A dict of any kind; of the attributes of a module, those that are not torch's business."""

    def __init__(self, path: str, value: dict[Any, Any], ignored: frozenset[str] = frozenset()) -> None:
        self._ignored = ignored
        # Subclasses may have methods of their own, which may do anything.
        self._type: Any = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
        super().__init__(path, value)

    def content(self) -> dict[Any, Any]:
        return {key: value for key, value in self._type.items(self.value) if key not in self._ignored}

    def changes(self) -> Iterator[tuple[str, Any]]:
        now = self.content()
        for key in (*now, *(key for key in self.before if key not in now)):
            if now.get(key, _MISSING) is not self.before.get(key, _MISSING):
                yield _joined(self.path, key), now.get(key)
        if not self._keeps_order(now):
            yield self.path, None

    def _keeps_order(self, now: dict[Any, Any]) -> bool:
        """Whether what was there before is still in its order."""
        return [key for key in now if key in self.before] == list(self.before)

    def put_back(self) -> None:
        now = self.content()
        if not self._keeps_order(now):
            for key in now:
                self._type.__delitem__(self.value, key)
            now = {}
        for key in now.keys() - self.before.keys():
            self._type.__delitem__(self.value, key)
        for key, value in self.before.items():
            if now.get(key, _MISSING) is not value:
                self._type.__setitem__(self.value, key, value)


class _Slots(Container):
    """The attributes that an object has in `__slots__`."""

    def content(self) -> dict[str, Any]:
        return {name: slot.__get__(self.value) for name, slot in _slots(self.value) if _is_set(slot, self.value)}

    def changes(self) -> Iterator[tuple[str, Any]]:
        now = self.content()
        for name in now.keys() | self.before.keys():
            if now.get(name, _MISSING) is not self.before.get(name, _MISSING):
                yield _joined(self.path, name), now.get(name)

    def put_back(self) -> None:
        now = self.content()
        for name, slot in _slots(self.value):
            if name in self.before and now.get(name, _MISSING) is not self.before[name]:
                slot.__set__(self.value, self.before[name])
            elif name in now and name not in self.before:
                slot.__delete__(self.value)


class _Sequence(Container):
    """A list or a deque."""

    def __init__(self, path: str, value: Any) -> None:
        self._type: Any = list if isinstance(value, list) else collections.deque
        super().__init__(path, value)

    def content(self) -> list[Any]:
        return list(self._type.__iter__(self.value))

    def put_back(self) -> None:
        self._type.clear(self.value)
        self._type.extend(self.value, self.before)


class _Set(Container):
    """A set."""

    def content(self) -> set[Any]:
        return set(set.__iter__(self.value))

    def changes(self) -> Iterator[tuple[str, Any]]:
        now = self.content()
        if now != self.before:
            yield self.path, list(now)

    def put_back(self) -> None:
        set.clear(self.value)
        set.update(self.value, self.before)


class _Array(Container):
    """An array of NumPy."""

    def content(self) -> Any:
        return self.value.copy()

    def changes(self) -> Iterator[tuple[str, Any]]:
        if self.value.tobytes() != self.before.tobytes():
            yield self.path, None

    def put_back(self) -> None:
        self.value[...] = self.before


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
    """The plain attributes of a module and its submodules, and what is inside of them: containers and objects.

    tensors: those in there.
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen: set[int] = set()
        self._containers: list[Container] = []
        self.tensors: list[Held] = []
        for name, submodule in module.named_modules():
            self._walk_mapping(_Mapping(name, submodule.__dict__, _TORCHS_OWN), 0)
            self._walk_slots(name, submodule, 0)

    def _walk(self, path: str, value: Any, depth: int, place: tuple[Any, Any] | None = None) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors.append(Held(path, value, place))
        if isinstance(value, _ATOMS) or depth > _DEPTH or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, dict):
            self._walk_mapping(_Mapping(path, value), depth)
        elif isinstance(value, (list, collections.deque)):
            found = _Sequence(path, value)
            self._containers.append(found)
            for index, item in enumerate(found.before):
                exchanged = type(value) is list
                self._walk(f"{path}[{index}]", item, depth + 1, (value, index) if exchanged else None)
        elif isinstance(value, set):
            items = _Set(path, value)
            self._containers.append(items)
            for index, item in enumerate(items.before):
                self._walk(f"{path}[{index}]", item, depth + 1)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self._containers.append(_Array(path, value))
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                self._walk(f"{path}[{index}]", item, depth + 1)
        if isinstance(getattr(value, "__dict__", None), dict):
            self._walk_mapping(_Mapping(path, value.__dict__), depth)
        self._walk_slots(path, value, depth)

    def _walk_mapping(self, mapping: _Mapping, depth: int) -> None:
        self._containers.append(mapping)
        exchanged = type(mapping.value) in (dict, collections.OrderedDict, collections.defaultdict)
        for key, value in mapping.before.items():
            self._walk(_joined(mapping.path, key), value, depth + 1, (mapping.value, key) if exchanged else None)

    def _walk_slots(self, path: str, value: Any, depth: int) -> None:
        if not any(True for _ in _slots(value)):
            return
        slots = _Slots(path, value)
        self._containers.append(slots)
        for name, item in slots.before.items():
            self._walk(_joined(path, name), item, depth + 1)

    def changes(self) -> Iterator[tuple[str, Any]]:
        """The addresses and the present values of what has changed since."""
        for container in self._containers:
            yield from container.changes()

    def changed(self) -> list[Container]:
        """The containers that are not as they were."""
        return [c for c in self._containers if any(True for _ in c.changes())]


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    """The descriptors of what an object has in `__slots__` of Python classes."""
    for cls in type(value).__mro__:
        if "__slots__" in vars(cls):
            for name, slot in vars(cls).items():
                if inspect.ismemberdescriptor(slot):
                    yield name, slot


def _is_set(slot: Any, value: Any) -> bool:
    try:
        slot.__get__(value)
    except AttributeError:
        return False
    return True
