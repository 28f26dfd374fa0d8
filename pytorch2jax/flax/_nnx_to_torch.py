"""A Flax NNX module as a torch module."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from pytorch2jax._errors import ConversionError
from pytorch2jax._jax_module import JaxModel, JaxModule, Value, is_array, mode_argument, named_leaves, with_mode


def convert_nnx_to_pytnn(module: Any, *, mode: str | None = None) -> JaxModule:
    """Turn a Flax NNX module into a torch module.

    Args:
        module: an instance of `nnx.Module`. It is not changed, and changes to it later do not reach the result.
        mode: the name of an argument of `module.__call__` that says whether it trains, see `convert_flax_to_pytnn`;
            modules whose layers follow `m.train()` and `m.eval()` need none.

    Returns:
        A `torch.nn.Module`, in train mode as all new ones are, called with tensors for arrays. Its `nnx.Param`s are
        parameters under the names that NNX has (`linear.kernel`), other variables are buffers, which calls in
        train mode update. `train()` and `eval()` do what those of NNX do. In train mode the streams of
        `nnx.Rngs` that the module holds are seeded from torch's generator for each call; in eval mode they stay as
        they are. `to_jax()` returns an `nnx.Module` with the parameters and buffers as they are then.

    Copies:
        The variables, once. A call copies buffers, in train mode; parameters enter JAX without a copy.

    Raises:
        ConversionError: `module` is no `nnx.Module`.
        StructureError: an array has a dtype that torch lacks.

    Example:
        >>> import torch
        >>> from flax import nnx
        >>> net = convert_nnx_to_pytnn(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> net(torch.ones(4, 3)).sum().backward()
        >>> net.bias.grad
        tensor([4., 4.])
    """
    if not isinstance(module, nnx.Module):
        got = module.__name__ if isinstance(module, type) else type(module).__name__
        raise ConversionError(
            f"convert_nnx_to_pytnn: module: expected an instance of flax.nnx.Module, got {got}. For Linen modules "
            "there is `convert_flax_to_pytnn`."
        )
    return JaxModule(_Nnx(module, mode))


class _Nnx(JaxModel):
    """An NNX module as a function of the values of its variables."""

    def __init__(self, module: nnx.Module, mode: str | None) -> None:
        self.name = type(module).__name__
        self._mode = mode_argument(type(module).__call__, mode) if callable(module) else mode
        self._mode = None if mode is None and self._mode in vars(module) else self._mode
        self._graph, state = nnx.split(module)
        leaves, self._treedef = named_leaves(state, is_leaf=_is_variable)
        self._paths = [path for path, _ in leaves]
        self._variables = [variable for _, variable in leaves]
        self._streams = [i for i, v in enumerate(self._variables) if isinstance(v, nnx.RngState)]
        self._places = [i for i, v in enumerate(self._variables) if i not in self._streams and is_array(v.get_value())]
        self.draws = bool(self._streams)

    def values(self) -> list[Value]:
        return [
            Value(type(v).__name__, self._paths[i], v.get_value(), isinstance(v, nnx.Param))
            for i, v in ((i, self._variables[i]) for i in self._places)
        ]

    def call(self, arrays: list[Any], key: Any, train: bool, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        module = self._merged(arrays, key)
        if train:
            module.train()
        else:
            module.eval()
        out = module(*args, **with_mode(module.__call__, self._mode, train, args, kwargs))
        if not train:
            return out, arrays
        new = dict(named_leaves(nnx.state(module), is_leaf=_is_variable)[0])
        values = [new[self._paths[i]].get_value() if self._paths[i] in new else None for i in self._places]
        return out, [a if v is None else v for a, v in zip(arrays, values, strict=True)]

    def rebuild(self, arrays: list[Any]) -> Any:
        return self._merged(arrays, None)

    def _merged(self, arrays: list[Any], key: Any) -> Any:
        variables = [variable.copy() for variable in self._variables]  # NNX updates those of its own trace only
        for index, array in zip(self._places, arrays, strict=True):
            variables[index] = variables[index].copy(array)
        for index in self._streams if key is not None else ():
            if isinstance(variables[index], nnx.RngKey):
                variables[index] = variables[index].copy(jax.random.fold_in(key, index))
        return nnx.merge(self._graph, self._treedef.unflatten(variables))


def _is_variable(value: Any) -> bool:
    return isinstance(value, nnx.Variable)
