"""A torch module as a Flax Linen module."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, ClassVar

import flax.core.meta
import flax.linen as nn
import jax
import jax.numpy as jnp
import torch

from pytorch2jax._errors import StateError
from pytorch2jax._module import ConvertedModule
from pytorch2jax._params import Leaf, flatten, nest

_PARAMS = "params"
_STATISTICS = "batch_stats"
_BUFFERS = "buffers"


def convert_pytnn_to_flax(model: torch.nn.Module, *, copy: bool = True) -> tuple[type[nn.Module], dict[str, Any]]:
    """Turn a torch module into a Flax Linen module class and its parameters.

    Args:
        model: any `torch.nn.Module`. It is not changed, and changes to it later do not reach the class.
        copy: see `convert_pytnn_to_jax`.

    Returns:
        `(module_class, params)`. `module_class()` takes no arguments, so that `module_class()(x)` works in
        the compact `__call__` of another module, as often as one likes. Its call takes what `forward` takes,
        and `train=False` besides (`True`, `False` or `None`, as for `convert_pytnn_to_jax`).

        Its variables are nested dicts by torch's names: the parameters in the collection `params`, the
        running statistics of normalisations in `batch_stats`, other buffers in `buffers`.
        `module_class().init(key, x)` returns torch's own values for all of them; the key is not used, and
        torch does not run. (What `init` computes behind a converted module in a parent starts from zeros of
        the right shape; `init_with_output` runs torch.) `params` is the collection `params` of that. Where
        `apply` gets no `buffers`, it takes those that the model had at conversion. Statistics are
        updated with `train=True, mutable=["batch_stats"]`; dropout draws from `rngs={"dropout": key}`.

    Raises:
        ConversionError: the module is of a kind that cannot be converted.
        MissingLeafError, StructureError, RandomnessError, StateError: in `apply`; the message says what to do.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, torch
        >>> Encoder, params = convert_pytnn_to_flax(torch.nn.Linear(3, 8))
        >>> class Classifier(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(2)(Encoder()(x))
        >>> model = Classifier()
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> sorted(variables["params"])
        ['Dense_0', 'Linear_0']
        >>> jax.jit(model.apply)(variables, jnp.ones((4, 3))).shape
        (4, 2)
    """
    converted = ConvertedModule(model, copy=copy)

    class Converted(_TorchModule):
        torch_module: ClassVar[ConvertedModule] = converted

    Converted.__name__ = Converted.__qualname__ = converted.name
    return Converted, converted.initial()[0]


class _TorchModule(nn.Module):
    """What the classes that `convert_pytnn_to_flax` returns have in common.

    Variables are read and written through `self.scope`, because `self.param` refuses names that are
    attributes of a Linen module, and torch modules have submodules called `name` or `parent`.
    """

    torch_module: ClassVar[ConvertedModule]

    @nn.compact
    def __call__(self, *args: Any, train: bool | None = False, **kwargs: Any) -> Any:
        if self.is_initializing():
            self._initialise()
        given = {collection: flax.core.meta.unbox(tree) for collection, tree in self.variables.items()}
        state = self._state_from(given)

        def call(rng: Any) -> tuple[Any, Any]:
            return self.torch_module.apply(
                _own(self._collections()[_PARAMS], given.get(_PARAMS, {})),
                state,
                args,
                kwargs,
                rng=rng,
                train=train,
                rng_argument="rngs={'dropout': jax.random.key(...)}",
            )

        rng = self.make_rng("dropout") if self.has_rng("dropout") or self._can_make_rng() else None
        if self.is_initializing() and _output_is_dropped():
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(call, rng)[0])
        out, new_state = call(rng)
        if not self.is_initializing():
            self._store(state, new_state)
        return out

    @classmethod
    def _collections(cls) -> dict[str, tuple[Leaf, ...]]:
        layout = cls.torch_module.layout
        return {
            _PARAMS: layout.params,
            _STATISTICS: tuple(leaf for leaf in layout.state if leaf.statistic),
            _BUFFERS: tuple(leaf for leaf in layout.state if not leaf.statistic),
        }

    def _can_make_rng(self) -> bool:
        return self.is_initializing() and self.has_rng(_PARAMS)  # what Linen falls back on in `init`

    def _initialise(self) -> None:
        assert self.scope is not None
        params, state = self.torch_module.initial()
        for collection, leaves in self._collections().items():
            values = flatten("init", collection, leaves, _own(leaves, params if collection == _PARAMS else state))
            for name, subtree in nest(leaves, values).items():
                if collection == _PARAMS:
                    self.scope.param(name, lambda _, tree=subtree: _copied(tree))
                else:
                    self.scope.variable(collection, name, lambda tree=subtree: _copied(tree))

    def _state_from(self, given: dict[str, Any]) -> dict[str, Any]:
        """The buffers in the collections; those that never change may be missing."""
        collections = self._collections()
        statistics, buffers = collections[_STATISTICS], collections[_BUFFERS]
        name = self.torch_module.name
        values = flatten(name, _STATISTICS, statistics, _own(statistics, given.get(_STATISTICS, {})))
        tree = given[_BUFFERS] if _BUFFERS in given else self.torch_module.initial()[1]
        values += flatten(name, _BUFFERS, buffers, _own(buffers, tree))
        return nest((*statistics, *buffers), values)

    def _store(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        assert self.scope is not None
        for collection, leaves in self._collections().items():
            if collection == _PARAMS:
                continue
            before = flatten("apply", collection, leaves, _own(leaves, old))
            after = flatten("apply", collection, leaves, _own(leaves, new))
            if all(a is b for a, b in zip(after, before, strict=True)):
                continue
            if not self.is_mutable_collection(collection):
                raise StateError(
                    f"{self.torch_module.name}: {collection}: changed by the forward pass, expected the collection "
                    f"to be mutable. Call `apply(..., mutable=['{collection}'])`, or with `train=False`."
                )
            for name, subtree in nest(leaves, after).items():
                self.scope.put_variable(collection, name, subtree)


def _own(leaves: tuple[Leaf, ...], tree: Any) -> dict[str, Any]:
    """The part of a collection that belongs to these leaves; a parent may share its scope with others."""
    wanted = nest(leaves, leaves)

    def pick(wanted: Any, tree: Any) -> Any:
        if not isinstance(wanted, dict) or not isinstance(tree, Mapping):
            return tree
        return {key: pick(child, tree[key]) for key, child in wanted.items() if key in tree}

    return pick(wanted, tree)


def _copied(tree: Any) -> Any:
    """Copies, so that donating what `init` returned leaves the originals alone."""
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(tree)):
        raise StateError(
            "init: expected the converted weights, got deleted arrays: the params that the conversion returned "
            "were donated to a jitted function. Copy them before donating, or convert the model again."
        )
    return jax.tree.map(jnp.copy, tree)


_INIT = inspect.unwrap(nn.Module.init).__code__
_INIT_WITH_OUTPUT = inspect.unwrap(nn.Module.init_with_output).__code__


def _output_is_dropped() -> bool:
    """Whether this is `Module.init`, which throws the output away, and not `init_with_output`.

    Linen runs the same code for both; only the stack tells them apart.
    """
    frame: FrameType | None = sys._getframe()
    callers = []
    while frame is not None:
        if frame.f_code in (_INIT, _INIT_WITH_OUTPUT):
            callers.append(frame.f_code)
        frame = frame.f_back
    return callers[:2] == [_INIT_WITH_OUTPUT, _INIT]
