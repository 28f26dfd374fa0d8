"""What `check` does with torch modules: copies, the names of what they have."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from pytorch2jax._errors import ConversionError, OptionError


def copied(model: nn.Module) -> nn.Module:
    """A copy of a module, with the hooks of its parameters, which torch leaves out of copies.

    Raises:
        OptionError: torch cannot copy it.
    """
    memo = {id(tensor): new for tensor, new in _copies_of_our_own(model)}
    try:
        new = copy.deepcopy(model, memo)
    except Exception as error:
        name = type(model).__name__
        raise OptionError(
            f"check: {name}: expected a module that can be copied (`copy.deepcopy`), got {type(error).__name__}: "
            f"{error}"
        ) from error
    parameters = dict(new.named_parameters())
    for name, old in model.named_parameters():
        if name not in parameters or has_hooks(parameters[name]):
            continue
        for hook in (old._backward_hooks or {}).values():
            parameters[name].register_hook(hook)
        for hook in (old._post_accumulate_grad_hooks or {}).values():
            parameters[name].register_post_accumulate_grad_hook(hook)
    return new


def _copies_of_our_own(model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tensors that torch itself cannot copy, with copies: lazy buffers, what was computed from parameters before."""
    empty: Any = UninitializedBuffer  # torch has it that this is the tensor that it makes
    for module in model.modules():
        for buffer in module._buffers.values():
            if buffer is not None and is_lazy(buffer):
                yield buffer, empty(device=buffer.device, dtype=buffer.dtype)
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                yield value, value.detach().clone()


def has_hooks(parameter: nn.Parameter) -> bool:
    """Whether something is to be called with its gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def attributes_of(model: nn.Module) -> dict[str, str]:
    """The plain attributes of a module and its submodules, by address, as text."""
    return {
        f"{name}.{key}".lstrip("."): _repr(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not (key.startswith("_") or key == "training" or callable(value))
    }


def _repr(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__} at {id(value)}"  # a call makes a new one
    try:
        return repr(value)
    except Exception:  # whatever somebody else's code raises
        return f"{type(value).__name__} at {id(value)}"


def check_values(name: str, model: nn.Module) -> None:
    """Raise where parameters or buffers have no values."""
    without = [key for key, tensor in own_tensors(model).items() if tensor.is_meta and not is_lazy(tensor)]
    if without:
        more = f" (and {len(without) - 1} more)" if len(without) > 1 else ""
        raise ConversionError(
            f"check: {name}: {without[0]}{more}: expected weights with values, got some on torch's meta device, which "
            "have none. Load them (`model.load_state_dict(weights, assign=True)`), or make the model without "
            "`torch.device('meta')`."
        )
