"""Who keeps a tensor that was to be gone after a run, and how it is taken away from there."""

from __future__ import annotations

import collections
import functools
import gc
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch

from pytorch2jax._errors import InferenceError


class Forgotten:
    """Tensors that were taken out of the caches that hold them: dicts, lists and `functools.lru_cache`.

    refused: the types of holders from which they could not be taken.
    buries: whether some are still there, where nobody can get at them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.refused: list[type] = []
        self.buries = False
        self._emptied: list[tuple[Any, int, int]] = []
        if tensors:
            self._forget(tensors, {id(tensors)}, depth=3)

    def _forget(self, values: Sequence[Any], known: set[int], depth: int) -> None:
        holders = [h for h in gc.get_referrers(*values) if id(h) not in known and not isinstance(h, FrameType)]
        known = {*known, id(values), id(holders)}
        ids, cached = set(map(id, values)), self._taken_from_caches(holders, known) if depth else set()
        tuples = []
        for holder in holders:
            if isinstance(holder, functools._lru_cache_wrapper):
                self._delete_entries(holder, ids)
            elif id(holder) in cached:
                pass
            elif isinstance(holder, (dict, list, collections.deque)):
                try:
                    taken = self._take_from(holder, ids)
                except Exception:  # a class of somebody else's that forbids it
                    taken = False
                if not taken:
                    self.refused.append(type(holder))
            elif isinstance(holder, tuple) and depth:
                tuples.append(holder)
            elif type(holder).__name__ != "weakref":
                self.refused.append(type(holder))
        if tuples:
            self._forget(tuples, known, depth - 1)

    def _take_from(self, holder: Any, ids: set[int]) -> bool:
        """Take values out of a container; False if they are somebody's attributes."""
        if isinstance(holder, dict):
            if _is_namespace(holder):
                return False
            for key in [key for key, value in holder.items() if id(value) in ids]:
                del holder[key]
            return True
        for index in [index for index, value in enumerate(holder) if id(value) in ids][::-1]:
            if isinstance(holder, collections.deque):
                del holder[index]
            else:
                holder[index] = None  # the place may have been there before
                self._emptied.append((holder, index, len(holder)))
        return True

    def _taken_from_caches(self, holders: Sequence[Any], known: set[int]) -> set[int]:
        """Take containers that are values of an `lru_cache` away from there, so that nobody finds one incomplete."""
        containers = [h for h in holders if isinstance(h, (dict, list, tuple))]
        if not containers:
            return set()
        around = [h for h in gc.get_referrers(*containers) if id(h) not in known]
        tables = [h for h in around if type(h) is dict]
        caches = [h for h in around if isinstance(h, functools._lru_cache_wrapper)]
        if tables:  # those of caches without a bound
            caches += [h for h in gc.get_referrers(*tables) if isinstance(h, functools._lru_cache_wrapper)]
        ids = set(map(id, containers))
        return {number for cache in caches for number in self._delete_entries(cache, ids)}

    def _delete_entries(self, cached: functools._lru_cache_wrapper[Any], ids: set[int]) -> set[int]:
        """Delete the entries of an `lru_cache` that have these values, and no others.

        In the dict of one with a bound are links that do not show their values, so that the cache is asked for each of
        its keys. A link without a key goes when its turn comes to make room.
        """
        table, parameters = _table(cached), cached.cache_parameters()
        found = set()
        for key in list(table):
            args, kwargs = _arguments_of(key, typed=parameters["typed"])
            number = id(cached(*args, **kwargs))
            if number in ids:
                del table[key]
                found.add(number)
        self.buries |= bool(found) and parameters["maxsize"] is not None
        return found

    def close_gaps(self) -> None:
        """After another run: where that has filled other places, the places were made for the tensors."""
        for holder, index, length in self._emptied:
            if len(holder) > length and holder[index] is None:
                del holder[index]


def _table(cached: functools._lru_cache_wrapper[Any]) -> dict[Any, Any]:
    """The dict of an `lru_cache`, from its keys to its values or to links that have them."""
    tables = [t for t in gc.get_referents(cached) if type(t) is dict and t and t is not vars(cached)]
    if cached.cache_parameters()["maxsize"] is not None:  # its values are there, too
        tables = [t for t in tables if all(type(link).__name__ == "_lru_list_elem" for link in t.values())]
    return tables[0] if tables else {}


def _arguments_of(key: Any, *, typed: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the call that a key of an `lru_cache` stands for.

    A key is the argument itself, if that is one int or str; else a tuple: the arguments; a mark, and names and values
    of keyword arguments; and with `typed` their types.
    """
    if type(key) in (int, str):
        return (key,), {}
    mark = next((i for i, part in enumerate(key) if type(part) is object), None)
    if mark is None:
        return key[: len(key) // 2] if typed else key, {}
    named = key[mark + 1 :]
    if typed:
        named = named[: (len(named) - mark) // 3 * 2]
    return key[:mark], dict(zip(named[::2], named[1::2], strict=True))


class _LeftBehind(torch.Tensor):
    """A tensor of a trial run in a place where it could not be taken away: whatever is done with it is an error.

    n_uses: how often that was. TorchScript hides the error.
    """

    n_uses = 0

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "<a tensor of a trial run>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _LeftBehind.n_uses += 1
        raise InferenceError(
            "a tensor that an earlier call has left somewhere (a global object, an attribute of a class, a context "
            "variable) when the library ran the function to learn its outputs: expected a function of its arguments. "
            "Its values are none: delete it from there, and compute it in each call, or before the first one."
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return cls.__torch_function__(func, types, args, kwargs)


def n_uses_of_disabled() -> int:
    """How often somebody has tried to use a tensor that was disabled."""
    return _LeftBehind.n_uses


def forget(tensors: Sequence[torch.Tensor]) -> Forgotten:
    """Take tensors of a trial run away from where they are kept.

    With those that remain there nobody can compute any more. To torch, a fake tensor is memory like any other.
    """
    forgotten = Forgotten(tensors)
    for tensor in tensors:
        object.__setattr__(tensor, "__class__", _LeftBehind)
    return forgotten


def holders_of(tensors: Sequence[torch.Tensor], *ours: Sequence[torch.Tensor]) -> list[str]:
    """Who holds tensors besides lists of ours, as far as it has a name."""
    found, ids, known = set(), set(map(id, tensors)), {id(tensors), *map(id, ours)}
    for holder in gc.get_referrers(*tensors) if tensors else ():
        if isinstance(holder, functools._lru_cache_wrapper):
            found.add(f"the cache of `{holder.__wrapped__.__qualname__}`")
        elif isinstance(holder, dict):
            found |= {f"a dict, under {key!r}" for key, value in holder.items() if id(value) in ids}
        elif isinstance(holder, (list, collections.deque)) and id(holder) not in known:
            found.add(f"a {type(holder).__name__}")
    return sorted(found)


def _is_namespace(table: dict[Any, Any]) -> bool:
    """Whether a dict is the attributes of some object or class, where a missing name is an error.

    From that of a class nothing may be deleted in this way: the interpreter remembers what it has looked up there.
    """
    return any(isinstance(o, type) or getattr(o, "__dict__", None) is table for o in gc.get_referrers(table))
