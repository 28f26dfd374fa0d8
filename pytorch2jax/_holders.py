"""Who keeps a tensor that was to be gone after a run, and how it is taken away from there."""

from __future__ import annotations

import collections
import functools
import gc
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any

import torch


class Forgotten:
    """Tensors that were taken out of the caches that hold them: dicts, lists and `functools.lru_cache`.

    refused: the types of holders from which they could not be taken.
    buries: whether some are still there, where nobody can get at them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.refused: list[type] = []
        self.buries = False
        self._emptied: list[tuple[Any, int, int]] = []
        for tensor in tensors:
            self._forget(tensor, {id(tensors)}, depth=3)

    def _forget(self, value: Any, known: set[int], depth: int) -> None:
        holders = [h for h in gc.get_referrers(value) if id(h) not in known and not isinstance(h, FrameType)]
        known = {*known, id(holders)}
        for holder in holders:
            if isinstance(holder, functools._lru_cache_wrapper):
                self.buries |= _delete_entry(holder, value)
            elif isinstance(holder, (dict, list, tuple)) and depth and (cached := _cache_of(holder, known)):
                self.buries |= _delete_entry(cached, holder)
            elif isinstance(holder, dict) and not _is_namespace(holder):
                for key in _places(holder.items(), value):
                    del holder[key]
            elif isinstance(holder, (list, collections.deque)):
                for index in _places(enumerate(holder), value):
                    holder[index] = None  # the place may have been there before
                    self._emptied.append((holder, index, len(holder)))
            elif isinstance(holder, tuple) and depth:
                self._forget(holder, known, depth - 1)
            elif type(holder).__name__ != "weakref":
                self.refused.append(type(holder))

    def close_gaps(self) -> None:
        """After another run: where that has filled other places, the places were made for the tensors."""
        for holder, index, length in reversed(self._emptied):
            if len(holder) > length and holder[index] is None:
                del holder[index]


def _places(items: Iterable[tuple[Any, Any]], value: Any) -> list[Any]:
    return [place for place, held in items if held is value]


def _cache_of(container: Any, known: set[int]) -> Any:
    """The `lru_cache` of which a container is a value: without its entry, nobody finds the container incomplete."""
    for holder in gc.get_referrers(container):
        if isinstance(holder, functools._lru_cache_wrapper):
            return holder
        if type(holder) is dict and id(holder) not in known:
            for owner in gc.get_referrers(holder):
                if isinstance(owner, functools._lru_cache_wrapper) and holder is _table(owner):
                    return owner
    return None


def _delete_entry(cached: functools._lru_cache_wrapper[Any], value: Any) -> bool:
    """Delete the entries of a `lru_cache` that hold a value, and no others; whether one of them is still there.

    In the dict of one with a bound are links that do not show their values, so that the cache is asked for each of its
    keys. A link without a key goes when its turn comes to make room.
    """
    table, parameters = _table(cached), cached.cache_parameters()
    found = False
    for key in list(table):
        args, kwargs = _arguments_of(key, typed=parameters["typed"])
        if cached(*args, **kwargs) is value:
            del table[key]
            found = True
    return found and parameters["maxsize"] is not None


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


def holders_of(tensors: Sequence[torch.Tensor], *ours: Sequence[torch.Tensor]) -> list[str]:
    """Who holds tensors besides lists of ours, as far as it has a name."""
    found, known = set(), {id(tensors), *map(id, ours)}
    for tensor in tensors:
        for holder in gc.get_referrers(tensor):
            if isinstance(holder, functools._lru_cache_wrapper):
                found.add(f"the cache of `{holder.__wrapped__.__qualname__}`")
            elif isinstance(holder, dict):
                found |= {f"a dict, under {k!r}" for k, v in holder.items() if v is tensor}
            elif isinstance(holder, (list, collections.deque)) and id(holder) not in known:
                found.add(f"a {type(holder).__name__}")
    return sorted(found)


def _is_namespace(table: dict[Any, Any]) -> bool:
    """Whether a dict is the attributes of some object, where a missing name is an error."""
    return any(getattr(owner, "__dict__", None) is table for owner in gc.get_referrers(table))
