"""The way back: converted parameters, with their new values, into torch; and what optax wants to know of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pytorch2jax._dtypes import dtype_j2t, narrowed
from pytorch2jax._errors import DtypeError, StructureError
from pytorch2jax._params import Path, Slot, Slots, address, check_module, check_shapes, flatten, layout_of, listed, nest
from pytorch2jax._transfer import j2t
from pytorch2jax._trees import PATH_SEPARATOR


def params_to_state_dict(model: nn.Module, params: Any, state: Any = None) -> dict[str, torch.Tensor]:
    """Turn converted parameters back into a torch `state_dict`.

    Args:
        model: the torch module that was converted, or one of the same architecture. It is not changed.
        params: nested dict of arrays, as `convert_pytnn_to_jax` returned it, with new values.
        state: nested dict of the buffers (`with_state=True`), or None: the buffers that `model` has now.

    Returns:
        What `model.state_dict()` returns, with these values: every name of a tied weight, torch's own
        dtypes, on the model's devices. The tensors are copies.

    Raises:
        ConversionError: `model` is no torch module.
        MissingLeafError: a parameter or buffer of the model is not in the tree.
        StructureError: the tree has a leaf that the model lacks, or one of another shape.
        DtypeError: a leaf has another dtype than the model's tensor.

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
    # The model's own state_dict says which names there are: hooks may rename or drop some.
    result = dict(model.state_dict())
    for slot, tensor in tensors.items():
        name = f"{slot.module}.{slot.name}" if slot.module else slot.name
        if name in result:
            result[name] = tensor
    return result


def load_params(model: nn.Module, params: Any, state: Any = None) -> nn.Module:
    """Write converted parameters, with their new values, into a torch module.

    Args:
        model: the torch module that was converted, or one of the same architecture. Its tensors are
            overwritten in place, so that optimizers and tied weights keep referring to them.
        params: nested dict of arrays, as `convert_pytnn_to_jax` returned it, with new values.
        state: nested dict of the buffers (`with_state=True`), or None: the buffers stay as they are.

    Returns:
        `model`.

    Raises:
        ConversionError: `model` is no torch module.
        MissingLeafError: a parameter or buffer of the model is not in the tree.
        StructureError: the tree has a leaf that the model lacks, or one of another shape.
        DtypeError: a leaf has another dtype than the model's tensor. Nothing is written in any of these cases.

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
    slots = Slots(model)
    with torch.no_grad():
        for slot, tensor in tensors.items():
            slots[slot].copy_(tensor)
    return model


def _tensors_by_slot(call: str, model: nn.Module, params: Any, state: Any) -> dict[Slot, torch.Tensor]:
    check_module(call, model)
    layout = layout_of(model)
    trees = [("params", layout.params, params)]
    if state is not None:
        trees.append(("state", layout.state, state))
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
            device = slots[leaf.slots[0]].device
            tensor = j2t(value, copy=True).to(device=device, dtype=leaf.dtype)
            tensors.update(dict.fromkeys(leaf.slots, tensor))
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
    leaves = layout_of(model).params
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
            f"or that an earlier rule hides. The leaves are under {', '.join(map(str, params))}."
        )
    return labels
