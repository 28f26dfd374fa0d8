"""An Equinox module as a torch module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx

from pytorch2jax._errors import ConversionError, StateError
from pytorch2jax._jax_module import JaxModel, JaxModule, Value, argument_names, is_array, named_leaves

_KEY = "key"


def convert_equinox_to_pytnn(
    module: Any, state: eqx.nn.State | None = None, *, call: Callable[..., Any] | None = None
) -> JaxModule:
    """Turn an Equinox module into a torch module.

    Args:
        module: an `eqx.Module`, or any pytree of arrays and functions.
        state: the `eqx.nn.State` of a stateful module.
        call: what a call of the torch module runs, as a function `(module, *args, **kwargs)`; by default
            `module(*args, **kwargs)`. Most layers of Equinox take one example; for batches of them:
            `call=lambda m, x: jax.vmap(m)(x)`.

    Returns:
        A `torch.nn.Module`, in train mode as all new ones are, called with tensors for arrays. Arrays of
        floating and complex dtypes are parameters under the names that the fields have
        (`layers.0.weight`), others are buffers. `eval()` runs `eqx.nn.inference_mode(module)`, `train()` the same with
        `value=False`. In train mode, if the call has an argument `key` and gets none, it is a key from torch's
        generator. With state, the last positional argument is the state, and `(out, new_state)` comes
        back, of which the torch module returns `out`; train mode keeps the new state in buffers. `to_jax()` returns
        the module, or `(module, state)`, as they are then.

    Copies:
        The arrays, once. A call copies buffers, in train mode; parameters enter JAX without a copy.

    Raises:
        ConversionError: `module` cannot be called.
        StateError: `state` is no `eqx.nn.State`.
        StructureError: an array has a dtype that torch lacks.

    Example:
        >>> import equinox as eqx, jax, torch
        >>> mlp = eqx.nn.MLP(3, 1, 8, depth=1, key=jax.random.key(0))
        >>> net = convert_equinox_to_pytnn(mlp, call=lambda m, x: jax.vmap(m)(x))
        >>> net(torch.ones(4, 3)).shape
        torch.Size([4, 1])
        >>> [name for name, _ in net.named_parameters()]
        ['layers.0.weight', 'layers.0.bias', 'layers.1.weight', 'layers.1.bias']
    """
    if (call is None and not callable(module)) or isinstance(module, type):
        got = module.__name__ if isinstance(module, type) else type(module).__name__
        raise ConversionError(
            f"convert_equinox_to_pytnn: module: expected an instance of eqx.Module that can be called, got {got}. "
            "Pass an instance, and `call=` where it has no `__call__`."
        )
    if state is not None and not isinstance(state, eqx.nn.State):
        raise StateError(
            f"convert_equinox_to_pytnn: state: expected the eqx.nn.State that `eqx.nn.make_with_state` returned, got "
            f"{type(state).__name__}."
        )
    return JaxModule(_Equinox(module, state, call))


class _Equinox(JaxModel):
    """An Equinox module as a function of its array leaves and those of its state."""

    def __init__(self, module: Any, state: eqx.nn.State | None, call: Callable[..., Any] | None) -> None:
        self.name = type(module).__name__
        self._call = call
        self._stateful = state is not None
        names = argument_names(type(module).__call__ if call is None else call)
        self.draws = _KEY in names
        self._before_key = max(0, names.index(_KEY) - 1) if self.draws else 0  # positional arguments but the module
        leaves, self._treedef = named_leaves((module, state))
        self._paths = [path for path, _ in leaves]
        self._leaves = [leaf for _, leaf in leaves]
        self._places = [i for i, leaf in enumerate(self._leaves) if is_array(leaf)]

    def values(self) -> list[Value]:
        found = []
        for index in self._places:
            part, *path = self._paths[index]
            own = part == "0"
            address = tuple(path) if own else ("state", str(index))
            found.append(Value("module" if own else "state", address, self._leaves[index], own))
            self._leaves[index] = None
        return found

    def call(self, arrays: list[Any], key: Any, train: bool, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        module, state = self._treedef.unflatten(self._filled(arrays))
        module = eqx.nn.inference_mode(module, value=not train)
        run = module if self._call is None else lambda *a, **k: self._call(module, *a, **k)  # type: ignore[misc]
        if key is not None and _KEY not in kwargs and len(args) <= self._before_key:
            kwargs = {**kwargs, _KEY: key}
        if not self._stateful:
            return run(*args, **kwargs), arrays
        out, state = run(*args, state, **kwargs)
        new = dict(named_leaves((None, state))[0])
        return out, [new.get(self._paths[i], a) for i, a in zip(self._places, arrays, strict=True)]

    def rebuild(self, arrays: list[Any]) -> Any:
        module, state = self._treedef.unflatten(self._filled(arrays))
        return (module, state) if self._stateful else module

    def _filled(self, arrays: list[Any]) -> list[Any]:
        leaves = list(self._leaves)
        for index, array in zip(self._places, arrays, strict=True):
            leaves[index] = array
        return leaves
