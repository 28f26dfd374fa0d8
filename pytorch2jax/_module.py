"""A torch module as a pure function of its parameters and buffers.

The module is copied without its weights into a private skeleton. A call puts the tensors that it was given
into the skeleton's slots, runs `forward`, and takes them out again; what happens to the user's module later
does not reach it, and nothing stays in it between calls.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pytorch2jax._errors import ConversionError, RandomnessError
from pytorch2jax._function import TorchFunction, take_apart
from pytorch2jax._params import (
    Leaf,
    Slot,
    arrays_of,
    check_shapes,
    flatten,
    layout_of,
    nest,
    own_tensors,
    tensor_in,
)
from pytorch2jax._primitive import torch_call
from pytorch2jax._rng import seed_from_key


def convert_pytnn_to_jax(model: nn.Module, *, with_state: bool = False, copy: bool = True) -> tuple[Any, ...]:
    """Turn a torch module into a pure JAX function and its parameters.

    Args:
        model: any `nn.Module`. It is not changed, and changes to it later do not reach the function.
        with_state: `True` makes the buffers (running statistics and the like) an argument and a result.
            `False` keeps them, at their present values, inside the function.
        copy: `True` copies the parameters, so that torch can no longer reach them. `False` shares memory
            with `model`: conversion takes no time and no memory, and when torch trains `model` further, in
            place, the JAX arrays change with it, against what JAX promises of arrays. Use it when the
            torch module is not used again.

    Returns:
        `(apply, params)`, with `apply(params, *args, rng=None, train=False, **kwargs)` returning what the
        module returns; or with `with_state=True` `(apply, params, state)`, with
        `apply(params, state, *args, ...)` returning `(out, new_state)`.

        `params` and `state` are nested dicts by module path with torch's leaf names, arrays in torch's
        layout: `{"encoder": {"weight": ..., "bias": ...}}`. Tied weights are one leaf, whose gradient is the
        sum. Frozen parameters are leaves too; `trainable_mask` tells them apart. `train=False` means
        `model.eval()`, `True` means `model.train()`, `None` keeps each submodule's own flag. `rng` is a JAX
        key, from which dropout and the like draw. While `jax_enable_x64` is off, 64-bit parameters are
        32-bit arrays, and 64-bit again inside of torch.

    Raises:
        ConversionError: the module is of a kind that cannot be converted; the message says why.
        MissingLeafError, StructureError: `params` or `state` is not what the conversion returned.
        RandomnessError: the module draws random numbers and got no `rng`.
        StateError: the call changes buffers, and the function was converted without `with_state`.
        See `torch2jax` for what a call may raise besides.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from torch import nn
        >>> apply, params = convert_pytnn_to_jax(nn.Linear(3, 2))
        >>> jax.jit(apply)(params, jnp.ones((4, 3))).shape
        (4, 2)
        >>> jax.grad(lambda p: apply(p, jnp.ones((4, 3))).sum())(params)["bias"]
        Array([4., 4.], dtype=float32)
    """
    converted = ConvertedModule(model, copy=copy)

    def apply(params: Any, *args: Any, rng: Any = None, train: bool | None = False, **kwargs: Any) -> Any:
        return converted.apply(params, None, args, kwargs, rng=rng, train=train)[0]

    def apply_with_state(
        params: Any, state: Any, *args: Any, rng: Any = None, train: bool | None = False, **kwargs: Any
    ) -> tuple[Any, Any]:
        return converted.apply(params, state, args, kwargs, rng=rng, train=train)

    params, state = converted.take_initial()
    return (apply_with_state, params, state) if with_state else (apply, params)


class ConvertedModule:
    """A torch module as a function `(params, state, args, kwargs) -> (out, new_state)`; adapters wrap it.

    Args:
        model: the module.
        copy: whether to copy its parameters and buffers.
    """

    def __init__(self, model: nn.Module, *, copy: bool) -> None:
        model = _checked(model)
        self.name = type(model).__name__
        self.layout = layout_of(model)
        self._params: list[jax.Array] | None = arrays_of(model, self.layout.params, copy=copy)
        self._state: list[jax.Array] | None = arrays_of(model, self.layout.state, copy=True)
        self._params_order = _Order("params", self.layout.params)
        self._state_order = _Order("state", self.layout.state)
        call = _ModuleCall(model, (*self.layout.params, *self.layout.state))
        own = own_tensors("params", self.layout.params, self._params)
        own += own_tensors("state", self.layout.state, self._state)
        self._function = TorchFunction(self.name, call, identity=call, own=own)

    def initial(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters and state as they were at conversion."""
        assert self._params is not None
        assert self._state is not None
        return nest(self.layout.params, self._params), nest(self.layout.state, self._state)

    def take_initial(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same, without keeping them alive here."""
        params, state = self.initial()
        self._params = self._state = None
        return params, state

    def apply(
        self,
        params: Any,
        state: Any,
        args: Any,
        kwargs: Any,
        *,
        rng: Any,
        train: bool | None,
        rng_argument: str = "rng=jax.random.key(...)",
    ) -> tuple[Any, Any]:
        """Call the module; with `state=None` on the buffers that it had at conversion.

        Args:
            params, state: nested dicts.
            args, kwargs: what `forward` gets.
            rng: a JAX key or None.
            train: which mode the module is in; None for the mode of each submodule at conversion.
            rng_argument: how a user of the adapter passes a key, for messages.

        Returns:
            What the module returned, and the new state.
        """
        own = self._params_order.values(self.name, params)
        if state is not None:
            own += self._state_order.values(self.name, state)
        arguments = take_apart(self.name, args, kwargs)
        program = self._function.bind(own, arguments, variant=train)
        inputs = [*own, *arguments.arrays]
        if program.inferred.random:
            if rng is None:
                raise RandomnessError(
                    f"{self.name}: the model draws random numbers (train={train}), expected a JAX key, got none. "
                    f"Pass `{rng_argument}`, a new key for each call."
                )
            seed = seed_from_key(self.name, rng)
            program = program.with_seed(seed.shape[0], shared=True)
            inputs.insert(0, seed)
        out, changed = program.rebuild(torch_call(program, *inputs))
        if state is None or not changed:
            return out, state
        values = [changed.get(i, value) for i, value in enumerate(own)]
        return out, nest(self.layout.state, values[len(self.layout.params) :])


class _Order:
    """Takes the leaves of a nested dict in a fixed order; at once where it is built as we build it."""

    def __init__(self, root: str, leaves: Sequence[Leaf]) -> None:
        self._root = root
        self._leaves = leaves
        self._treedef: Any
        positions, self._treedef = jax.tree.flatten(nest(leaves, range(len(leaves))))
        self._positions = sorted(range(len(leaves)), key=positions.__getitem__)

    def values(self, call: str, tree: Any) -> list[Any]:
        found, treedef = jax.tree.flatten(tree)
        if treedef == self._treedef:
            values = [found[i] for i in self._positions]
        else:
            values = flatten(call, self._root, self._leaves, tree)
        return check_shapes(call, self._root, self._leaves, values)


# -- the skeleton ---------------------------------------------------------------------------------------


class _ModuleCall:
    """The private copy of a module, as a `TorchCallable`: its own tensors are parameters, then buffers."""

    def __init__(self, model: nn.Module, leaves: Sequence[Leaf]) -> None:
        self._module = _skeleton(model, [tensor_in(model, leaf.slots[0]) for leaf in leaves])
        self._tables = [[_table(self._module, slot) for slot in leaf.slots] for leaf in leaves]
        self._placeholders = [tables[0][0][tables[0][1]] for tables in self._tables]
        # Buffers that a caller does not pass keep these values; parameters are always passed.
        self._held = [
            tensor_in(model, leaf.slots[0]).detach().clone() if _is_buffer(model, leaf.slots[0]) else placeholder
            for leaf, placeholder in zip(leaves, self._placeholders, strict=True)
        ]
        self._constants = {torch.device("cpu"): [t.cpu() if t.device.type != "meta" else t for t in self._held]}
        self._flags = {None: _training_flags(self._module)}
        self._leftovers: dict[tuple[int, str], _Attribute] = {}
        self._lock = threading.RLock()
        self._depth = 0

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
        for attributes, training in self._flags[train]:
            attributes["training"] = training

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
        before = [_Attributes(m) for m in self._module.modules()]
        try:
            yield
        finally:
            for attributes in before:
                for key, attribute in attributes.changes().items():
                    self._leftovers.setdefault(key, attribute)

    def constants(self, device: torch.device) -> list[torch.Tensor]:
        if device not in self._constants:
            self._constants[device] = [t if t.device.type == "meta" else t.to(device) for t in self._held]
        return self._constants[device]


_MISSING: Any = object()
_CONTAINERS = (list, dict, set, collections.OrderedDict)


class _Attribute(NamedTuple):
    """A plain attribute of a module as it was: its value, and the contents of a container."""

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

    def __init__(self, module: nn.Module) -> None:
        self._dict = module.__dict__
        self._before = {name: self._get(name) for name in self._names()}

    def _names(self) -> set[str]:
        return self._dict.keys() - self._OTHER

    def _get(self, name: str) -> _Attribute:
        value = self._dict.get(name, _MISSING)
        return _Attribute(self._dict, name, value, copy.copy(value) if type(value) in _CONTAINERS else None)

    def changes(self) -> dict[tuple[int, str], _Attribute]:
        """The attributes that have changed since, as they were before."""
        for name in self._names() - self._before.keys():
            self._before[name] = _Attribute(self._dict, name, _MISSING, None)
        return {(id(self._dict), n): old for n, old in self._before.items() if not old.is_unchanged()}


def _training_flags(module: nn.Module) -> list[tuple[dict[str, Any], bool]]:
    return [(m.__dict__, m.training) for m in module.modules()]


def _table(module: nn.Module, slot: Slot) -> tuple[dict[str, Any], str]:
    owner = module.get_submodule(slot.module)
    return (owner._parameters if slot.name in owner._parameters else owner._buffers), slot.name


def _is_buffer(module: nn.Module, slot: Slot) -> bool:
    return slot.name in module.get_submodule(slot.module)._buffers


class _DeepcopyNonLeaves(TorchFunctionMode):
    """Lets modules be copied that hold results of computations, as the old `weight_norm` does."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[1].setdefault(id(args[0]), args[0].detach().clone())
        return func(*args, **(kwargs or {}))


def _skeleton(model: nn.Module, tensors: Sequence[torch.Tensor]) -> nn.Module:
    """A deep copy of a module with empty tensors in the place of its parameters and buffers."""
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    try:
        with _DeepcopyNonLeaves():
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise ConversionError(
            f"convert: {type(model).__name__}: expected a module that `copy.deepcopy` can copy, got "
            f"{type(error).__name__}: {error}. Remove what cannot be copied (locks, open files, generators) "
            "from its attributes."
        ) from error


def _checked(model: nn.Module) -> nn.Module:
    """The module, if it is of a kind that can be converted."""
    if not isinstance(model, nn.Module):
        raise ConversionError(
            f"convert: expected a torch.nn.Module, got {type(model).__name__}. For a function use `torch2jax`."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError(
            f"convert: {type(model).__name__}: a TorchScript module keeps its weights where they cannot be "
            "exchanged. Convert the module that it was scripted from, or use `torch2jax(model)`, where its "
            "weights are constants."
        )
    for name, module in model.named_modules():
        if any(map(nn.parameter.is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise ConversionError(
                f"convert: {name or type(model).__name__}: a lazy module has no parameters yet. Run the model once "
                "on an example input, then convert it."
            )
    return model
