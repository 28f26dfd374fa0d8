"""A torch module's tensors as JAX pytrees, and the way back.

`params` and `state` are nested dicts by module path with torch's own leaf names. A tensor that the module has
under several names (tied weights, a submodule reachable by two paths) is one leaf, under the first name.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torch import nn

from pytorch2jax._bound import OwnTensor
from pytorch2jax._errors import ConversionError, LeafTypeError, MissingLeafError, StructureError
from pytorch2jax._transfer import as_array, t2j
from pytorch2jax._trees import PATH_SEPARATOR

Path = tuple[str, ...]


class Slot(NamedTuple):
    """One place in a module that holds a tensor."""

    module: str  # as in `named_modules`
    name: str


class Leaf(NamedTuple):
    """One tensor of a module.

    path: where it is in the nested dict.
    slots: the places that hold it; the first one gives the path.
    shape, dtype: torch's.
    trainable: `requires_grad`; False for buffers.
    statistic: whether it is one of a batch normalisation's running statistics.
    """

    path: Path
    slots: tuple[Slot, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    statistic: bool


class Layout(NamedTuple):
    """The leaves of a module, parameters and buffers, each in a fixed order."""

    params: tuple[Leaf, ...]
    state: tuple[Leaf, ...]


def check_module(call: str, model: Any) -> None:
    """Raise where a torch module is expected and something else came.

    Raises:
        ConversionError: it did.
    """
    if not isinstance(model, nn.Module):
        if isinstance(model, type) and issubclass(model, nn.Module):
            name = model.__name__
            raise ConversionError(
                f"{call}: expected a torch.nn.Module, got the class `{name}`: pass an instance, `{name}(...)`."
            )
        advice = " For a function use `torch2jax`." if call == "convert" else ""
        raise ConversionError(f"{call}: expected a torch.nn.Module, got {type(model).__name__}.{advice}")


def unwrapped(model: Any) -> tuple[Any, str]:
    """The module inside of wrappers that run the same computation in another way, and their prefix of its names."""
    prefix = ""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model, prefix = model.module, f"{prefix}module."
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model, prefix = model._orig_mod, f"{prefix}_orig_mod."
        else:
            return model, prefix


def layout_of(model: nn.Module) -> Layout:
    """List the tensors of a module."""
    return Layout(_leaves(model, _parameters), _leaves(model, _buffers))


def _parameters(module: nn.Module) -> Mapping[str, Any]:
    return module._parameters


def _buffers(module: nn.Module) -> Mapping[str, Any]:
    return module._buffers


def _leaves(model: nn.Module, table: Callable[[nn.Module], Mapping[str, Any]]) -> tuple[Leaf, ...]:
    slots: dict[int, list[Slot]] = {}
    tensors: dict[int, torch.Tensor] = {}
    owners: dict[int, nn.Module] = {}
    # Every path counts, also a second one to the same submodule: the state_dict has them all.
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, tensor in table(module).items():
            if tensor is not None and is_dense(tensor):
                slots.setdefault(id(tensor), []).append(Slot(module_name, name))
                tensors.setdefault(id(tensor), tensor)
                owners.setdefault(id(tensor), module)
    return tuple(
        Leaf(
            path=_path(places[0]),
            slots=tuple(places),
            shape=tuple(tensors[key].shape),
            dtype=tensors[key].dtype,
            trainable=tensors[key].requires_grad,
            statistic=isinstance(owners[key], nn.modules.batchnorm._NormBase) and table is _buffers,
        )
        for key, places in slots.items()
    )


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether JAX can hold a tensor: it is strided, and of no class that has values of its own kind."""
    own_kind = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__  # MaskedTensor, DTensor
    return not (own_kind or tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized)


def _path(slot: Slot) -> Path:
    return (*slot.module.split("."), slot.name) if slot.module else (slot.name,)


class Slots:
    """The slots of a module by address. (`get_submodule` does not work on TorchScript modules.)"""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))

    def table(self, slot: Slot) -> Any:
        """The dict, of parameters or of buffers, that has the slot."""
        module = self._modules[slot.module]
        return module._parameters if slot.name in module._parameters else module._buffers

    def place(self, slot: Slot) -> tuple[nn.Module, Any]:
        """The module that has the slot, and its dict with it."""
        return self._modules[slot.module], self.table(slot)

    def __getitem__(self, slot: Slot) -> torch.Tensor:
        """The tensor in a slot."""
        return self.table(slot)[slot.name]


def arrays_of(model: nn.Module, leaves: Sequence[Leaf], *, copy: bool) -> list[jax.Array]:
    """The values of a module's tensors as arrays; shared with the module unless `copy`."""
    slots = Slots(model)
    return [t2j(slots[leaf.slots[0]], copy=copy) for leaf in leaves]


def own_tensors(root: str, leaves: Sequence[Leaf], arrays: Sequence[jax.Array]) -> list[OwnTensor]:
    """What a `TorchFunction` has to know about these leaves; the arrays are not kept alive."""
    return [
        OwnTensor(address(root, leaf), leaf.dtype, weakref.ref(array))
        for leaf, array in zip(leaves, arrays, strict=True)
    ]


# -- nested dicts ---------------------------------------------------------------------------------------


def nest(leaves: Sequence[Leaf], values: Iterable[Any]) -> dict[str, Any]:
    """A nested dict of values, one for each leaf."""
    tree: dict[str, Any] = {}
    for leaf, value in zip(leaves, values, strict=True):
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = value
    return tree


def leaf_in(tree: Any, leaf: Leaf) -> Any:
    """The value of a leaf in a nested dict, or None."""
    for key in leaf.path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def flatten(call: str, root: str, leaves: Sequence[Leaf], tree: Any) -> list[Any]:
    """The values of a nested dict in the order of `leaves`.

    Args:
        call: the function that the user called, for messages.
        root: the name of `tree` among its arguments.
        leaves: what has to be there.
        tree: nested mappings.

    Raises:
        MissingLeafError: a leaf is not there.
        StructureError: something else is there.
        LeafTypeError: a leaf is no array.
    """
    values: list[Any] = []
    missing: list[str] = []
    for leaf in leaves:
        node = tree
        for key in leaf.path:
            try:
                node = node[key]
            except (KeyError, TypeError, IndexError):
                missing.append(address(root, leaf))
                break
        else:
            if isinstance(node, Mapping) or node is None:
                raise LeafTypeError(f"{call}: {address(root, leaf)}: expected an array, got {_kind(node)}.")
            values.append(node)
    unexpected = _unexpected(root, leaves, tree)
    if missing and isinstance(tree, Mapping):
        _check_not_flat(call, root, leaves, tree)
    if missing:
        also = f" Not expected, but there: {listed(unexpected)}." if unexpected else ""
        raise MissingLeafError(
            f"{call}: {listed(missing)}: missing.{also} Expected a nested dict with {len(leaves)} leaves, as "
            f"the conversion returned it, got {_kind(tree)}."
        )
    if unexpected:
        raise StructureError(
            f"{call}: {listed(unexpected)}: the model has no such tensor. Remove it from {root}, or convert "
            "the model that it belongs to."
        )
    return values


def _check_not_flat(call: str, root: str, leaves: Sequence[Leaf], tree: Mapping[Any, Any]) -> None:
    """Raise where a `state_dict` came in the place of nested dicts."""
    for leaf in leaves:
        name = PATH_SEPARATOR.join(leaf.path)
        if len(leaf.path) > 1 and name in tree:
            keys = "".join(f"[{key!r}]" for key in leaf.path)
            raise MissingLeafError(
                f"{call}: {root}: expected nested dicts (`{root}{keys}`), got flat names, as a torch `state_dict` has "
                f"them ({name!r}). `params_from_state_dict(model, state_dict)` makes the one of the other."
            )


def check_shapes(call: str, root: str, leaves: Sequence[Leaf], values: Sequence[Any]) -> list[Any]:
    """The values as something JAX can bind, after a check of their shapes."""
    checked = []
    for leaf, value in zip(leaves, values, strict=True):
        if isinstance(value, (bool, int, float, complex)):
            value = np.asarray(value)
        value = as_array(call, functools.partial(address, root, leaf), value)
        if tuple(value.shape) != leaf.shape:
            raise StructureError(
                f"{call}: {address(root, leaf)}: expected shape {leaf.shape}, got {tuple(value.shape)}. Under "
                "`jax.vmap` map over the leading axis of stacked parameters; otherwise pass them as converted."
            )
        checked.append(value)
    return checked


def _unexpected(root: str, leaves: Sequence[Leaf], tree: Any) -> list[str]:
    expected = {leaf.path for leaf in leaves}
    found: list[str] = []

    def walk(node: Any, path: Path) -> None:
        if path in expected:
            return
        if isinstance(node, Mapping):
            for key, child in node.items():
                walk(child, (*path, str(key)))
        else:
            found.append(PATH_SEPARATOR.join((root, *path)))

    if isinstance(tree, Mapping):
        walk(tree, ())
    return found


def flat_name(slot: Slot) -> str:
    """The name of a place in a `state_dict`: `encoder.weight`."""
    return f"{slot.module}.{slot.name}" if slot.module else slot.name


def address(root: str, leaf: Leaf) -> str:
    """Where a leaf is, for messages: `params.encoder.weight`."""
    return PATH_SEPARATOR.join((root, *leaf.path))


def listed(names: Sequence[str]) -> str:
    """The first few names, for messages."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _kind(tree: Any) -> str:
    return f"a dict with keys {sorted(map(str, tree))}" if isinstance(tree, Mapping) else type(tree).__name__
