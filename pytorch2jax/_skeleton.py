"""A torch module without its tensors, into whose slots a call puts those that it was given.

It is a deep copy, so that what happens to the user's module does not reach it; and everything that a call sets in
it is put back, so that nothing stays in it between calls.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pytorch2jax._errors import ConversionError
from pytorch2jax._internals import torch_pytree
from pytorch2jax._params import Leaf, Slots


class Skeleton:
    """The private copy of a module, as a `TorchCallable`: its own tensors are parameters, then buffers."""

    def __init__(self, model: nn.Module, leaves: Sequence[Leaf]) -> None:
        source = Slots(model)
        tensors = [source[leaf.slots[0]] for leaf in leaves]
        self._placeholders = [_placeholder(t) for t in tensors]
        self._module = _copy_without(model, tensors, self._placeholders)
        slots = Slots(self._module)
        self._tables = [[(slots.table(slot), slot.name) for slot in leaf.slots] for leaf in leaves]
        # Buffers that a caller does not pass keep these values; parameters are always passed.
        self._held = [
            placeholder if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
            for tensor, placeholder in zip(tensors, self._placeholders, strict=True)
        ]
        self._constants: dict[torch.device, list[torch.Tensor]] = {}
        self._flags = {None: _training_flags(self._module)}
        self._leftovers: dict[tuple[int, str], _Attribute] = {}
        self._before: list[_Attributes] = []
        self._lock = threading.RLock()
        self._depth = 0
        self._empty()

    def __call__(
        self, own: list[torch.Tensor], variant: Hashable, args: Any, kwargs: Any
    ) -> tuple[Any, list[torch.Tensor]]:
        self._set_mode(variant)
        for tables, tensor in zip(self._tables, own, strict=True):
            for table, name in tables:
                table[name] = tensor
        out = self._module(*args, **kwargs)
        return out, [tables[0][0][tables[0][1]] for tables in self._tables]

    def _set_mode(self, train: Any) -> None:
        if train not in self._flags:
            self._module.train(train)
            self._flags[train] = _training_flags(self._module)
        for module, training in self._flags[train]:
            if module.training is not training:  # `forward` may have changed it
                module.training = training

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        # The tensors stay in their slots until the derivatives are done: `torch.utils.checkpoint` runs parts
        # of `forward` again during backward.
        with self._lock:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._empty()

    def _empty(self) -> None:
        for tables, placeholder in zip(self._tables, self._placeholders, strict=True):
            for table, name in tables:
                table[name] = placeholder
        for attribute in self._leftovers.values():
            attribute.put_back()

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Find out which plain attributes `forward` sets, to put them back after each call."""
        self._before = [_Attributes(name, m) for name, m in self._module.named_modules()]
        try:
            yield
        finally:
            for attribute in self._changes():
                self._leftovers.setdefault((id(attribute.attributes), attribute.name), attribute)
            self._before = []

    def _changes(self) -> list[_Attribute]:
        return [attribute for attributes in self._before for attribute in attributes.changes()]

    def left_behind(self) -> list[tuple[str, torch.Tensor]]:
        found = []
        for attribute in self._changes():
            leaves = torch_pytree.tree_leaves(attribute.attributes.get(attribute.name))
            found += [(attribute.path, t) for t in leaves if isinstance(t, torch.Tensor)]
        return found

    def constants(self, device: torch.device) -> list[torch.Tensor]:
        if device not in self._constants:
            self._constants[device] = [t if t.device.type == "meta" else t.to(device) for t in self._held]
        return self._constants[device]


_MISSING: Any = object()
_CONTAINERS = (list, dict, set, collections.OrderedDict)


class _Attribute(NamedTuple):
    """A plain attribute of a module as it was: its value, and the contents of a container."""

    path: str
    attributes: dict[str, Any]
    name: str
    value: Any
    contents: Any

    def is_unchanged(self) -> bool:
        value = self.attributes.get(self.name, _MISSING)
        if value is not self.value:
            return False
        if self.contents is None:
            return True
        new, old = (list(c.items()) if isinstance(c, dict) else list(c) for c in (value, self.contents))
        flat = [(a, b) for x, y in zip(new, old, strict=False) for a, b in zip(_parts(x), _parts(y), strict=False)]
        return len(new) == len(old) and all(a is b for a, b in flat)

    def put_back(self) -> None:
        if self.value is _MISSING:
            self.attributes.pop(self.name, None)
            return
        self.attributes[self.name] = self.value
        if self.contents is not None:
            self.value.clear()
            (self.value.extend if isinstance(self.value, list) else self.value.update)(self.contents)


def _parts(item: Any) -> tuple[Any, ...]:
    return item if isinstance(item, tuple) else (item,)


class _Attributes:
    """The plain attributes of a module: not its parameters, buffers, submodules and train flag."""

    _OTHER = ("_parameters", "_buffers", "_modules", "training")

    def __init__(self, path: str, module: nn.Module) -> None:
        self._path = path
        self._dict = module.__dict__
        self._before = {name: self._get(name) for name in self._names()}

    def _names(self) -> set[str]:
        return self._dict.keys() - self._OTHER

    def _get(self, name: str) -> _Attribute:
        value = self._dict.get(name, _MISSING)
        path = f"{self._path}.{name}" if self._path else name
        contents = copy.copy(value) if type(value) in _CONTAINERS else None
        return _Attribute(path, self._dict, name, value, contents)

    def changes(self) -> list[_Attribute]:
        """The attributes that have changed since, as they were before."""
        new = [self._get(name)._replace(value=_MISSING, contents=None) for name in self._names() - self._before.keys()]
        return new + [old for old in self._before.values() if not old.is_unchanged()]


def _training_flags(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(m, m.training) for m in module.modules()]


def _placeholder(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty


class _DeepcopyNonLeaves(TorchFunctionMode):
    """Lets modules be copied that hold results of computations, as the old `weight_norm` does."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[1].setdefault(id(args[0]), args[0].detach().clone())
        return func(*args, **(kwargs or {}))


def _copy_without(model: nn.Module, tensors: Sequence[torch.Tensor], placeholders: Sequence[torch.Tensor]) -> nn.Module:
    """A deep copy of a module with placeholders for its parameters and buffers."""
    memo: dict[int, Any] = {id(t): p for t, p in zip(tensors, placeholders, strict=True)}
    try:
        with _DeepcopyNonLeaves():
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise ConversionError(
            f"convert: {type(model).__name__}: expected a module that `copy.deepcopy` can copy, got "
            f"{type(error).__name__}: {error}. Remove what cannot be copied (locks, open files, generators) "
            "from its attributes."
        ) from error
