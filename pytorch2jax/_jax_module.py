"""A JAX model as a torch module: what the adapters for Linen, NNX and Equinox have in common.

An adapter describes a model as a list of arrays with addresses (`Value`) and a JAX function of them (`JaxModel`).
Here the arrays become parameters and buffers, and the function becomes `forward`.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

from pytorch2jax._errors import ConversionError, Pytorch2JaxError, StateError
from pytorch2jax._reverse import JaxFunction
from pytorch2jax._transfer import j2t, t2j
from pytorch2jax._trees import PATH_SEPARATOR, path_string

# What modules of other people call the argument of a call that says whether it trains; True where it says the opposite.
_MODES = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "inference": True,
    "use_running_average": True,
}


class Value(NamedTuple):
    """An array of a JAX model.

    collection: the kind of variable, which goes in front of the address where that would be ambiguous.
    path: the address.
    array: the array.
    trained: whether it is a parameter, if it is of an inexact dtype; others are buffers.
    """

    collection: str
    path: tuple[str, ...]
    array: Any
    trained: bool


class JaxModel(abc.ABC):
    """A JAX model as a function of its arrays."""

    name: str
    draws: bool  # whether it is to get random numbers in train mode

    @abc.abstractmethod
    def values(self) -> list[Value]:
        """The arrays, as they are at conversion."""

    @abc.abstractmethod
    def call(self, arrays: list[Any], key: Any, train: bool, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        """Run the model; JAX traces this.

        Args:
            arrays: in the order of `values`.
            key: a JAX key, or None.
            train: whether the torch module is in train mode.
            args, kwargs: the arguments of the call.

        Returns:
            The output, and the new arrays, the same objects where they have not changed.
        """

    @abc.abstractmethod
    def rebuild(self, arrays: list[Any]) -> Any:
        """The model with these arrays, in the form in which it was converted."""


class JaxModule(torch.nn.Module):
    """A JAX model as a torch module: what `convert_flax_to_pytnn` and its like return.

    Its arrays of inexact dtypes are parameters, trained by any optimizer of torch's; what else the model keeps
    (running statistics, counters) is in buffers, which a call in train mode updates in place. Their names are the
    model's own: `Dense_0.kernel`. `state_dict`, `load_state_dict`, `.to(...)`, `requires_grad_` and copies are
    those of any torch module; parameters of another dtype enter the JAX model in that dtype. In train mode random
    numbers come from torch's generator: the same after the same `torch.manual_seed`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, torch
        >>> from pytorch2jax import convert_flax_to_pytnn
        >>> model = nn.Dense(2)
        >>> module = convert_flax_to_pytnn(model, model.init(jax.random.key(0), jnp.ones((1, 3))))
        >>> sorted(module.state_dict())
        ['bias', 'kernel']
        >>> module(torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(self, model: JaxModel) -> None:
        super().__init__()
        values = model.values()
        self._runner = _Runner(model, [value.array.dtype for value in values])
        self._addresses = _addresses(model.name, values)
        for value, address in zip(values, self._addresses, strict=True):
            try:
                tensor = j2t(value.array, copy=True)
            except Pytorch2JaxError as error:
                raise type(error)(f"{model.name}: {PATH_SEPARATOR.join(address)}: {error}") from None
            *scopes, last = address
            scope: torch.nn.Module = self
            for name in scopes:
                scope = scope._modules.setdefault(name, _Scope())  # type: ignore[assignment]
            # Not by `register_parameter`, which refuses names that are attributes of every module, such as `forward`.
            if value.trained and (tensor.is_floating_point() or tensor.is_complex()):
                scope._parameters[last] = torch.nn.Parameter(tensor)
            else:
                scope._buffers[last] = tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the JAX model with its present parameters, on tensors; arguments as those of `jax2torch`."""
        train, runner = self.training, self._runner
        tensors = self._tensors()
        words = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32) if train and runner.model.draws else None
        # Copies of the buffers: a call updates them, and its backward pass needs what they were.
        inputs = [t if isinstance(t, torch.nn.Parameter) or not train else t.clone() for t in tensors]
        out, new = runner.function(inputs, words, train, args, kwargs)
        if train:
            self._update(tensors, new)
        return out

    def to_jax(self, *, copy: bool = True) -> Any:
        """The model with its present parameters and buffers, as JAX has it.

        Args:
            copy: `False` shares memory with the parameters, where that is possible: the result changes when an
                optimizer writes to them.

        Returns:
            What was converted, with other arrays: the variables of a Linen module, an `nnx.Module`, an `eqx.Module`
            (with state: `(module, eqx.nn.State)`).
        """
        return self._runner.model.rebuild([t2j(tensor, copy=copy) for tensor in self._tensors()])

    def extra_repr(self) -> str:
        """For `print`: the JAX model."""
        return self._runner.model.name

    def _tensors(self) -> list[torch.Tensor]:
        found = []
        for *scopes, last in self._addresses:
            scope: Any = self
            for name in scopes:
                scope = scope._modules[name]
            tensor = scope._parameters.get(last)
            found.append(scope._buffers[last] if tensor is None else tensor)
        return found

    def _update(self, tensors: Sequence[torch.Tensor], new: Sequence[torch.Tensor | None]) -> None:
        for tensor, value, address in zip(tensors, new, self._addresses, strict=True):
            if value is None or isinstance(tensor, torch.nn.Parameter):
                continue
            if value.shape != tensor.shape:
                raise StateError(
                    f"{self._runner.model.name}: {PATH_SEPARATOR.join(address)}: expected the forward pass to keep the "
                    f"shape of what it updates, {list(tensor.shape)}, got {list(value.shape)}. Call `eval()` first, "
                    "or convert the model with variables of the right shape."
                )
            with torch.no_grad():
                tensor.copy_(value.detach())


class _Scope(torch.nn.Module):
    """A part of the names of parameters."""


class _Runner:
    """The JAX part of a module, which its copies share."""

    def __init__(self, model: JaxModel, dtypes: Sequence[Any]) -> None:
        self.model = model

        def run(arrays: Any, words: Any, train: bool, args: Any, kwargs: Any) -> Any:
            # Integers that torch keeps in a dtype of its own; inexact dtypes may have been changed by `.to(dtype)`.
            exact = [a if jnp.issubdtype(d, jnp.inexact) else a.astype(d) for a, d in zip(arrays, dtypes, strict=True)]
            key = None if words is None else _key(words)
            out, new = model.call(list(exact), key, train, args, kwargs)
            return out, [None if b is a else b for a, b in zip(exact, new, strict=True)]

        run.__name__ = run.__qualname__ = model.name
        self.function = JaxFunction(run)

    def __deepcopy__(self, memo: Any) -> _Runner:
        return self

    def __reduce__(self) -> Any:
        raise ConversionError(
            f"{self.model.name}: expected a module that can be pickled, got one that runs a JAX model, which cannot. "
            "Save its `state_dict()`; convert the JAX model again and call `load_state_dict` to get it back."
        )


def _key(words: Any) -> Any:
    first, second = jax.lax.bitcast_convert_type(words, jnp.uint32)
    return jax.random.fold_in(jax.random.key(first), second)


def _addresses(name: str, values: Sequence[Value]) -> list[tuple[str, ...]]:
    """Where each value goes in the torch module; with the collection in front where two would go to one place."""

    def clean(path: Sequence[str]) -> tuple[str, ...]:
        return tuple(part.replace(PATH_SEPARATOR, "_") for part in path) or ("value",)

    taken: dict[tuple[str, ...], int] = {}
    prefixes: set[tuple[str, ...]] = set()

    def collides(address: tuple[str, ...]) -> bool:
        return address in prefixes or any(address[:n] in taken for n in range(1, len(address)))

    # Parameters come first: they keep their names.
    for index in sorted(range(len(values)), key=lambda i: not values[i].trained):
        value = values[index]
        address = clean(value.path)
        if collides(address):
            address = clean((value.collection, *value.path))
        if collides(address):
            raise ConversionError(
                f"{name}: {PATH_SEPARATOR.join(address)}: expected different names for all arrays, got two that are "
                "the same in a torch `state_dict`. Rename one of them in the JAX model."
            )
        taken[address] = index
        prefixes.update(address[:n] for n in range(1, len(address) + 1))
    return [address for address, _ in sorted(taken.items(), key=lambda item: item[1])]


# -- for the adapters ----------------------------------------------------------------------------------------


def named_leaves(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[tuple[str, ...], Any]], Any]:
    """The leaves of a JAX pytree with their paths, and its structure."""
    found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(tuple(path_string((part,)) for part in path), leaf) for path, leaf in found], treedef


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array that torch can have, too: no key, no scalar of Python."""
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape") or isinstance(leaf, type):
        return False
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def mode_argument(call: Callable[..., Any], given: str | None) -> str | None:
    """The name of the argument of a call that says whether it trains; the one given, or one that usually does."""
    names = argument_names(call)
    return given if given is not None else next((name for name in _MODES if name in names), None)


def argument_names(call: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's arguments, where they can be found out."""
    try:
        return tuple(inspect.signature(call).parameters)
    except (TypeError, ValueError):
        return ()


def with_mode(call: Callable[..., Any], name: str | None, train: bool, args: Any, kwargs: Any) -> dict[str, Any]:
    """The keyword arguments of a call, with the one that says whether it trains, unless the caller gave it."""
    if name is None or name in kwargs or name in argument_names(call)[: len(args)]:
        return dict(kwargs)
    return {**kwargs, name: train is not _MODES.get(name, False)}
