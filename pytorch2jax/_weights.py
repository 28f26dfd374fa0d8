"""The way back: converted parameters, with their new values, into torch; and what optax wants to know of them."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import importlib
import os
import types
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from pytorch2jax._dtypes import dtype_j2t, narrowed
from pytorch2jax._errors import (
    ConversionError,
    DtypeError,
    LeafTypeError,
    MissingLeafError,
    StatisticsWarning,
    StructureError,
)
from pytorch2jax._params import (
    Layout,
    Leaf,
    Path,
    Slot,
    Slots,
    address,
    check_module,
    check_shapes,
    flat_name,
    flatten,
    is_dense,
    layout_of,
    leaf_in,
    listed,
    nest,
    unwrapped,
)
from pytorch2jax._transfer import as_array, j2t, t2j
from pytorch2jax._trees import PATH_SEPARATOR


def params_to_state_dict(model: nn.Module, params: Any, state: Any = None) -> dict[str, torch.Tensor]:
    """Turn converted parameters back into a torch `state_dict`.

    Args:
        model: the torch module that was converted, or one of the same architecture. It is not changed.
        params, state: as for `load_params`.

    Returns:
        What `model.state_dict()` returns, with these values: every name of a tied weight, torch's own
        dtypes, on the model's devices. The tensors are copies, one for each name, so that safetensors can save
        them as they are.

    Warns:
        StatisticsWarning: as for `load_params`.

    Raises:
        ConversionError: `model` is no torch module.
        StructureError: the tree lacks a parameter or buffer of the model, has a leaf that the model lacks, or one of
            another shape or dtype.

    Example:
        >>> from torch import nn
        >>> from pytorch2jax import convert_pytnn_to_jax
        >>> model = nn.Linear(2, 3)
        >>> apply, params = convert_pytnn_to_jax(model)
        >>> sorted(params_to_state_dict(model, params))
        ['bias', 'weight']
    """
    call = "params_to_state_dict"
    tensors = _tensors_by_slot(call, model, params, state)
    if _has_state_dict_hooks(model):  # which compute entries of their own, from the values
        model = copy.deepcopy(model)
        _write(model, tensors)
        tensors = {}
    result = dict(model.state_dict())
    prefix = unwrapped(model)[1]
    for slot, tensor in tensors.items():
        name = f"{prefix}{flat_name(slot)}"
        if name in result:
            result[name] = tensor
    seen: set[int] = set()
    for name, tensor in result.items():
        if id(tensor) in seen:  # tied
            result[name] = tensor.clone()
        seen.add(id(tensor))
    return result


def _has_state_dict_hooks(model: nn.Module) -> bool:
    """Whether a `state_dict` may have other entries than the parameters and buffers by their names."""
    own = (nn.Module, nn.DataParallel, nn.parallel.DistributedDataParallel)
    return any(
        module._state_dict_hooks
        or module._state_dict_pre_hooks
        or not any(type(module)._save_to_state_dict is cls._save_to_state_dict for cls in own)
        for module in model.modules()
    )


def _write(model: nn.Module, tensors: Mapping[Slot, torch.Tensor]) -> None:
    slots = Slots(unwrapped(model)[0])
    with torch.no_grad():
        for slot, tensor in tensors.items():
            slots[slot].copy_(tensor)


def load_params(model: nn.Module, params: Any, state: Any = None) -> nn.Module:
    """Write converted parameters, with their new values, into a torch module.

    Args:
        model: the torch module that was converted, or one of the same architecture. Its tensors are
            overwritten in place, so that optimizers and tied weights keep referring to them.
        params: the new values, in the form in which a framework holds them: what `convert_pytnn_to_jax` returned; the
            variables of a Linen module (`{"params": ..., "batch_stats": ...}`), or its `params`; an NNX module, its
            `nnx.state`, or a pure dict of that; an Equinox module. Of a larger model, that part of it.
        state: the buffers, where `params` does not have them: the nested dict of `with_state=True`, or the
            `eqx.nn.State` of an Equinox module. None: the buffers stay as they are, except that an Equinox module
            without state has its own. `False` says that this is
            meant, also for statistics.

    Returns:
        `model`.

    Warns:
        StatisticsWarning: the model has running statistics, and `params` and `state` have none.

    Raises:
        ConversionError: `model` is no torch module.
        StructureError: the tree lacks a parameter or buffer of the model, has a leaf that the model lacks, or one of
            another shape or dtype. Nothing is written in any of these cases.

    Example:
        >>> import jax
        >>> from torch import nn
        >>> from pytorch2jax import convert_pytnn_to_jax
        >>> model = nn.Linear(2, 3)
        >>> apply, params = convert_pytnn_to_jax(model)
        >>> _ = load_params(model, jax.tree.map(lambda p: 0 * p, params))
        >>> model.weight.abs().sum().item()
        0.0
    """
    tensors = _tensors_by_slot("load_params", model, params, state)
    slots = Slots(unwrapped(model)[0])
    for slot in tensors:
        if why := _cannot_be_written(slots[slot]):
            raise ConversionError(f"load_params: {flat_name(slot)}: expected a tensor that can be written to, {why}.")
    _write(model, tensors)
    return model


def _cannot_be_written(tensor: torch.Tensor) -> str | None:
    if tensor.is_meta:
        return (
            "got one on torch's meta device, which holds no values. Give the model memory first: "
            "`model.to_empty(device='cpu')`"
        )
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "got one that was made in `torch.inference_mode()`. Make the model outside of it"
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return "got one that `expand` made, whose elements share memory. Copy it first (`.contiguous()`)"
    return None


@overload
def params_from_state_dict(
    model: nn.Module, state_dict: Any, *, with_state: Literal[False] = False
) -> dict[str, Any]: ...


@overload
def params_from_state_dict(
    model: nn.Module, state_dict: Any, *, with_state: Literal[True]
) -> tuple[dict[str, Any], dict[str, Any]]: ...


@overload
def params_from_state_dict(model: nn.Module, state_dict: Any, *, with_state: bool) -> Any: ...


def params_from_state_dict(model: nn.Module, state_dict: Any, *, with_state: bool = False) -> Any:
    """The parameters of a converted model, with the values of a torch `state_dict` or of a safetensors file.

    Args:
        model: the torch module that was converted, or one of the same architecture, also on torch's meta device. It
            is not changed; its values do not matter, except those of buffers that a `state_dict` does not have.
        state_dict: what `model.state_dict()` returns, of arrays or tensors, or the path of a `.safetensors` file,
            which is read one tensor after the other. Of the names of a tied weight one is enough.
        with_state: whether to return the buffers, too.

    Returns:
        `params`, or `(params, state)`, as `convert_pytnn_to_jax` returns them. Floating values are cast to the dtype
        that the model has, as `load_state_dict` does.

    Copies:
        Every tensor, once.

    Raises:
        ConversionError: `model` is no torch module, or has a buffer on the meta device that no `state_dict` has.
        StructureError: a parameter or buffer of the model is not there, there is something that the model lacks, or
            that has another shape, or integers for floating values; the message has its flat name. Or `state_dict`
            is neither a dict nor a path.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> params = params_from_state_dict(model, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
        >>> params["bias"]
        Array([0., 0., 0.], dtype=float32)
    """
    call = "params_from_state_dict"
    check_module(call, model)
    model, prefix = unwrapped(model)
    layout = layout_of(model)
    own = model.state_dict(keep_vars=True)
    slots = Slots(model)
    with _opened(call, state_dict, prefix) as (names, tensor_of):
        known = {flat_name(slot) for leaf in (*layout.params, *layout.state) for slot in leaf.slots}
        extra = [name for name in names if name not in known and name not in own]
        if extra:
            raise StructureError(
                f"{call}: {listed(extra)}: the model has no such tensor. {_advice_on_names(extra, known)}"
            )
        arrays: dict[str, list[Any]] = {}
        missing: list[str] = []
        for root, leaves in (("params", layout.params), ("state", layout.state)):
            arrays[root] = []
            for leaf in leaves:
                found = [name for slot in leaf.slots if (name := flat_name(slot)) in names]
                if found:
                    arrays[root].append(_as_leaf(call, found[0], leaf, tensor_of(found[0])))
                    for name in found[1:]:
                        if not _are_equal(arrays[root][-1], _as_leaf(call, name, leaf, tensor_of(name))):
                            raise StructureError(
                                f"{call}: {found[0]}, {name}: expected equal values, because the model has one tensor "
                                "under both names (tied weights), got different ones. Remove one of them."
                            )
                elif leaf.trainable or flat_name(leaf.slots[0]) in own:
                    missing.append(flat_name(leaf.slots[0]))
                elif slots[leaf.slots[0]].is_meta:
                    raise ConversionError(
                        f"{call}: {flat_name(leaf.slots[0])}: expected a model that has the values of buffers which no "
                        "`state_dict` has (`persistent=False`), got one on torch's meta device. Make it without "
                        "`torch.device('meta')`."
                    )
                else:  # a buffer that is not persistent
                    arrays[root].append(t2j(slots[leaf.slots[0]], copy=True))
    if missing:
        raise MissingLeafError(
            f"{call}: {listed(missing)}: missing. Expected the names of `model.state_dict()`, {len(own)}, got "
            f"{len(names)}, without these."
        )
    params, state = nest(layout.params, arrays["params"]), nest(layout.state, arrays["state"])
    return (params, state) if with_state else params


def _advice_on_names(extra: Sequence[str], known: Collection[str]) -> str:
    """What to do about names that a model lacks: take the prefix off that they all have, if that is all."""
    for name in sorted(known, key=len, reverse=True):
        prefix = extra[0].removesuffix(name)
        if prefix != extra[0] and all(e.startswith(prefix) and e.removeprefix(prefix) in known for e in extra):
            return (
                f"Its names begin with `{prefix}`: pass "
                f"`{{name.removeprefix({prefix!r}): tensor for name, tensor in state_dict.items()}}`."
            )
    return "Remove it from the dict, or pass the model that it belongs to."


def _are_equal(a: jax.Array, b: jax.Array) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=jnp.issubdtype(a.dtype, jnp.inexact))


@contextlib.contextmanager
def _opened(call: str, source: Any, prefix: str) -> Iterator[tuple[Collection[str], Callable[[str], Any]]]:
    """The names in a state dict or file, and a function that reads one of them."""
    if isinstance(source, Mapping):
        if any(isinstance(value, Mapping) for value in source.values()):
            raise LeafTypeError(
                f"{call}: state_dict: expected tensors by flat names, got nested dicts. If they are parameters of a "
                "converted model, they are what this call would return; `load_params` writes them into a torch model."
            )
        if prefix and source and all(name.startswith(prefix) for name in source):
            yield {name.removeprefix(prefix) for name in source}, lambda name: source[prefix + name]
        else:
            yield source.keys(), source.__getitem__
        return
    if not isinstance(source, (str, os.PathLike)):
        raise LeafTypeError(
            f"{call}: state_dict: expected a dict of tensors by name, or the path of a .safetensors file, got "
            f"{type(source).__name__}. For nested parameters there is `load_params`."
        )
    try:
        safetensors = importlib.import_module("safetensors")
    except ImportError as error:
        raise LeafTypeError(
            f"{call}: expected the package safetensors, with which the file is read, which is not installed. Install "
            "it with `pip install safetensors`, or pass a dict."
        ) from error
    if not os.path.isfile(source):
        raise StructureError(f"{call}: {os.fspath(source)}: expected a .safetensors file, got none, or a folder.")
    try:
        opened = safetensors.safe_open(os.fspath(source), framework="pt")
    except safetensors.SafetensorError as error:
        raise StructureError(
            f"{call}: {os.fspath(source)}: expected a .safetensors file, got another, or a broken one ({error}). What "
            "`torch.save` wrote comes by `torch.load(path, weights_only=True)`."
        ) from error
    with opened as file:
        yield set(file.keys()), file.get_tensor


def _check_concrete(call: str, name: str, value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        raise LeafTypeError(
            f"{call}: {name}: expected an array with values, got a tracer. Call it outside of `jax.jit` and `jax.grad`."
        )


def _as_leaf(call: str, name: str, leaf: Leaf, value: Any) -> jax.Array:
    _check_concrete(call, name, value)
    if isinstance(value, torch.Tensor) and not (is_dense(value) and not value.is_meta):
        raise LeafTypeError(
            f"{call}: {name}: expected a dense tensor with values, got one of layout {value.layout} on {value.device}."
        )
    tensor = value if isinstance(value, torch.Tensor) else j2t(as_array(call, lambda: name, value), copy=True)
    if tuple(tensor.shape) != leaf.shape:
        raise StructureError(f"{call}: {name}: expected shape {leaf.shape}, got {tuple(tensor.shape)}.")
    if tensor.is_floating_point() != leaf.dtype.is_floating_point or tensor.is_complex() != leaf.dtype.is_complex:
        raise DtypeError(f"{call}: {name}: expected {leaf.dtype}, got {tensor.dtype}. Cast it first.")
    return t2j(tensor.detach().to(leaf.dtype), copy=True)


class _Trees(NamedTuple):
    """Nested dicts of arrays by torch's names.

    params, state: the parameters and the buffers; None where there are no buffers.
    is_partial: whether buffers that training does not change may be missing.
    """

    params: Any
    state: Any
    is_partial: bool = False


_COLLECTIONS = ("batch_stats", "buffers")  # in which Linen and NNX have the buffers


def _trees_of(layout: Layout, params: Any, state: Any) -> _Trees:
    """What a framework holds, taken apart."""
    if type(params) is tuple and state is None:  # what a converter returned, with the function or class or without
        parts = [part for part in params if not isinstance(part, (type, types.FunctionType))]
        if len(parts) in (1, 2):
            params, state = parts[0], parts[1] if len(parts) == 2 else None
    if callable(split := getattr(params, "_trees_of_torch", None)):  # a module of one of the adapters
        params, state = split(state)
    params, state = _plain(params), _plain(state)
    is_collections = isinstance(params, Mapping) and isinstance(params.get("params"), Mapping)
    if is_collections and all(leaf.path[0] != "params" for leaf in layout.params):
        found = {name: params[name] for name in _COLLECTIONS if name in params}
        params, state = params["params"], (found or None) if state is None else state
    names = {leaf.path[0] for leaf in layout.state}
    if isinstance(state, Mapping) and state and set(state) <= set(_COLLECTIONS) and names.isdisjoint(state):
        return _Trees(params, _merged(list(state.values())), is_partial=True)
    return _Trees(params, state)


def _plain(tree: Any) -> Any:
    """A tree without the boxes that Flax puts around arrays, in plain dicts."""
    if isinstance(tree, Mapping):
        return {str(key): _plain(child) for key, child in tree.items()}
    for unboxed in ("get_value", "unbox"):  # of nnx.Variable, and of Linen's boxes with metadata
        if callable(take := getattr(tree, unboxed, None)):
            return take()
    return tree


def _merged(trees: Sequence[Any]) -> Any:
    """One nested dict of several that share no leaf."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, child in tree.items():
            both = isinstance(child, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = _merged([result[key], child]) if both else child
    return result


def _tensors_by_slot(call: str, model: nn.Module, params: Any, state: Any) -> dict[Slot, torch.Tensor]:
    check_module(call, model)
    model, _ = unwrapped(model)
    layout = layout_of(model)
    given = _trees_of(layout, params, state)
    trees = [("params", layout.params, given.params)]
    if given.state is not None and given.state is not False:
        there = [
            leaf
            for leaf in layout.state
            if leaf.statistic or not given.is_partial or leaf_in(given.state, leaf) is not None
        ]
        trees.append(("state", tuple(there), given.state))
    tensors: dict[Slot, torch.Tensor] = {}
    slots = Slots(model)
    for root, leaves, tree in trees:
        values = check_shapes(call, root, leaves, flatten(call, root, leaves, tree))
        for leaf, value in zip(leaves, values, strict=True):
            if dtype_j2t(value.dtype) not in (leaf.dtype, narrowed(leaf.dtype)):
                raise DtypeError(
                    f"{call}: {address(root, leaf)}: expected {narrowed(leaf.dtype)}, got {value.dtype}. Cast it with "
                    "`.astype(...)` first, or cast the torch model with `.to(...)`."
                )
            _check_concrete(call, address(root, leaf), value)
            device = slots[leaf.slots[0]].device
            device = torch.device("cpu") if device.type == "meta" else device
            tensor = j2t(value, copy=True).to(device=device, dtype=leaf.dtype)
            tensors.update(dict.fromkeys(leaf.slots, tensor))
    statistics = [address("state", leaf) for leaf in layout.state if leaf.statistic]
    if given.state is None and statistics:
        warnings.warn(
            f"{call}: {listed(statistics)}: running statistics, which training changes, are not among what was "
            "passed. Pass the variables, module or state that has them, or `state=False` to keep those of the torch "
            "module.",
            StatisticsWarning,
            stacklevel=3,
        )
    return tensors


def trainable_mask(model: nn.Module) -> dict[str, Any]:
    """Which leaves of `params` torch would train, for `optax.masked` and `optax.multi_transform`.

    Args:
        model: the torch module.

    Returns:
        A nested dict like `params`, with `requires_grad` of each parameter as a bool.

    Raises:
        ConversionError: `model` is no torch module.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(2, 3)
        >>> _ = model.bias.requires_grad_(False)
        >>> trainable_mask(model)
        {'weight': True, 'bias': False}
    """
    check_module("trainable_mask", model)
    leaves = layout_of(unwrapped(model)[0]).params
    return nest(leaves, (leaf.trainable for leaf in leaves))


def label_params(params: Any, rules: Mapping[str, str], default: str) -> dict[str, Any]:
    """Labels by path, for `optax.multi_transform`.

    Args:
        params: nested dict of arrays, of a converted model or of a Flax model around it.
        rules: labels by pattern. A pattern is a dotted path, with `*` for anything (also across dots); it stands
            for everything below the path, too. The first rule that fits counts.
        default: the label of the leaves that no rule fits.

    Returns:
        A nested dict like `params`, with a label for each leaf.

    Raises:
        StructureError: a rule fits no leaf, which is most often a misspelt name.

    Example:
        >>> params = {"encoder": {"norm": {"bias": 0.0}, "linear": {"bias": 0.0}}, "head": {"bias": 0.0}}
        >>> label_params(params, {"encoder.norm": "frozen", "encoder": "slow"}, "fast")
        {'encoder': {'norm': {'bias': 'frozen'}, 'linear': {'bias': 'slow'}}, 'head': {'bias': 'fast'}}
    """
    if not isinstance(params, Mapping):
        raise LeafTypeError(
            f"label_params: params: expected a nested dict of arrays, got {type(params).__name__}. Of an NNX or "
            "Equinox module pass its `params`."
        )
    if not isinstance(rules, Mapping) or not all(isinstance(pattern, str) for pattern in rules):
        raise LeafTypeError(
            f"label_params: rules: expected a dict of labels by pattern, got {rules!r}. A pattern is a dotted path: "
            f"{_example_patterns(params)}."
        )
    used: set[str] = set()

    def label(path: Path, node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: label((*path, str(key)), child) for key, child in node.items()}
        address = PATH_SEPARATOR.join(path)
        for pattern, name in rules.items():
            if fnmatch.fnmatchcase(address, pattern) or fnmatch.fnmatchcase(address, f"{pattern}.*"):
                used.add(pattern)
                return name
        return default

    labels: dict[str, Any] = label((), params)
    if unused := [pattern for pattern in rules if pattern not in used]:
        raise StructureError(
            f"label_params: {listed(unused)}: expected a pattern that fits a leaf of params, got one that fits none, "
            "or that an earlier rule hides. A pattern is a dotted path, for all that is below it, or has `*` for "
            f"anything: {_example_patterns(params)}. It is no regular expression, and has no `/`."
        )
    return labels


def _example_patterns(params: Any) -> str:
    """Patterns that fit this tree."""
    paths = [PATH_SEPARATOR.join(path) for path in _paths(params)]
    if not paths:
        return "`encoder`, `*.bias`"
    first, last = paths[0], paths[-1]
    found = dict.fromkeys((first.split(PATH_SEPARATOR)[0], first, f"*{last.split(PATH_SEPARATOR)[-1]}"))
    return ", ".join(f"`{pattern}`" for pattern in found)


def _paths(tree: Any, path: Path = ()) -> list[Path]:
    if not isinstance(tree, Mapping):
        return [path]
    return [found for key, child in tree.items() for found in _paths(child, (*path, str(key)))]
