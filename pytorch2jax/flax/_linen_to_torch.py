"""A Flax Linen module as a torch module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from pytorch2jax._errors import ConversionError
from pytorch2jax._jax_module import JaxModel, JaxModule, Value, is_array, mode_argument, named_leaves, with_mode

_PARAMS = "params"


def convert_flax_to_pytnn(
    module: Any, variables: Any, *, mode: str | None = None, rngs: Sequence[str] = ("dropout",)
) -> JaxModule:
    """Turn a Flax Linen module and its variables into a torch module.

    Args:
        module: an instance of a Linen module.
        variables: what `module.init` returned, or a checkpoint of that form: `{"params": ..., "batch_stats": ...}`.
        mode: the name of the argument of `module.__call__` that says whether it trains, which then follows
            `train()` and `eval()` unless a call gives it. By default `train`, `training`, `is_training`,
            `deterministic`, `inference` or `use_running_average`, whichever there is; the last three say the opposite.
        rngs: the names of the streams of random numbers that a call in train mode gets.

    Returns:
        A `torch.nn.Module`, in train mode as all new ones are, called with tensors for arrays. The collection
        `params` becomes its parameters under the names that Linen has (`Dense_0.kernel`), other collections become
        buffers, which are mutable, and updated, in train mode. `to_jax()` returns the variables as they are then.

    Copies:
        The variables, once. A call copies buffers, in train mode; parameters enter JAX without a copy.

    Raises:
        ConversionError: `module` is no Linen module, or not an instance, or `variables` are no dict of collections.
        StructureError: an array has a dtype that torch lacks.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, torch
        >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)])
        >>> net = convert_flax_to_pytnn(model, model.init(jax.random.key(0), jnp.ones((1, 3))))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> net(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()
        >>> [name for name, _ in net.named_parameters()]
        ['layers_0.bias', 'layers_0.kernel', 'layers_2.bias', 'layers_2.kernel']
    """
    if not isinstance(module, nn.Module):
        got = module.__name__ if isinstance(module, type) else type(module).__name__
        raise ConversionError(
            f"convert_flax_to_pytnn: module: expected an instance of flax.linen.Module, got {got}. For `nnx` modules "
            "there is `convert_nnx_to_pytnn`."
        )
    if not hasattr(variables, "keys"):
        raise ConversionError(
            f"convert_flax_to_pytnn: variables: expected a dict of collections, `{{'params': ...}}`, got "
            f"{type(variables).__name__}. Pass all that `module.init` returned."
        )
    return JaxModule(_Linen(module, variables, mode, tuple(rngs)))


class _Linen(JaxModel):
    """A Linen module as a function of the leaves of its variables."""

    def __init__(self, module: Any, variables: Any, mode: str | None, rngs: tuple[str, ...]) -> None:
        self.name = type(module).__name__
        self.draws = bool(rngs)
        self._module, self._rngs = module, rngs
        self._mode = mode_argument(module.__call__, mode)
        leaves, self._treedef = named_leaves(variables)
        self._leaves = [leaf for _, leaf in leaves]  # those that torch cannot have stay here
        self._paths = [path for path, _ in leaves]
        self._places = [i for i, leaf in enumerate(self._leaves) if is_array(leaf)]
        self._mutable = [name for name in variables if name != _PARAMS]

    def values(self) -> list[Value]:
        found = []
        for index in self._places:
            collection, *path = self._paths[index]
            found.append(Value(collection, tuple(path), self._leaves[index], collection == _PARAMS))
            self._leaves[index] = None
        return found

    def call(self, arrays: list[Any], key: Any, train: bool, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        keywords = with_mode(self._module.__call__, self._mode, train, args, kwargs)
        variables = self.rebuild(arrays)
        rngs = None if key is None else {name: jax.random.fold_in(key, i) for i, name in enumerate(self._rngs)}
        if not train or not self._mutable:
            return self._module.apply(variables, *args, rngs=rngs, **keywords), arrays
        out, updates = self._module.apply(variables, *args, rngs=rngs, mutable=self._mutable, **keywords)
        new = dict(named_leaves(updates)[0])
        return out, [new.get(self._paths[i], a) for i, a in zip(self._places, arrays, strict=True)]

    def rebuild(self, arrays: list[Any]) -> Any:
        leaves = list(self._leaves)
        for index, array in zip(self._places, arrays, strict=True):
            leaves[index] = array
        return self._treedef.unflatten(leaves)
