"""The model that is checked, and its arguments, as torch has them and as JAX has them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from pytorch2jax._containers import flatten_arguments
from pytorch2jax._errors import OptionError
from pytorch2jax._module import ConvertedModule
from pytorch2jax._transfer import j2t, t2j
from pytorch2jax._trees import flatten_output, is_static, output_paths

BATCH = (1.0, 0.75, 1.25)  # by what the floating arguments of each example of a batch are multiplied
_TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 5e-2, torch.float64: 1e-9, torch.complex128: 1e-9}
_TOLERANCE = 1e-4


class Subject:
    """A torch module and example arguments.

    Args:
        model: the module. It is not changed.
        args, kwargs: what `forward` gets: tensors, arrays, pytrees of them, and static values.

    Raises:
        OptionError: the module does not run on them in torch.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name = type(model).__name__
        self.model = copied(model).eval()
        leaves, self._treedef = flatten_arguments((args, kwargs))
        self._static = [leaf if is_static(leaf) else None for leaf in leaves]
        self._places = [i for i, leaf in enumerate(leaves) if not is_static(leaf)]
        self.tensors = [_tensor(leaves[i]) for i in self._places]
        try:
            self.outputs = self.run(self.tensors)
        except Exception as error:
            raise OptionError(
                f"check: {self.name}: expected arguments on which the module runs in torch, got "
                f"{type(error).__name__}: {error}"
            ) from error
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def converted(self, backend: str) -> ConvertedModule:
        """The module as a function for JAX."""
        return ConvertedModule(self.model, copy=True, keywords={"rng": None, "train": False}, backend=backend)

    def fill(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with these in the place of arrays."""
        leaves = list(self._static)
        for place, value in zip(self._places, values, strict=True):
            leaves[place] = value
        args, kwargs = self._treedef.unflatten(leaves)
        return args, kwargs

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What torch gives, as flat tensors."""
        with torch.no_grad():
            return self.flat(self.model, [t.clone() for t in tensors])

    def flat(self, model: nn.Module, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors in what a module returns."""
        args, kwargs = self.fill(tensors)
        leaves, self.tree = flatten_output(model(*args, **kwargs), lambda x: isinstance(x, torch.Tensor))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def arrays(self, tensors: Sequence[torch.Tensor] | None = None) -> list[jax.Array]:
        """The arguments as arrays."""
        return [t2j(t.detach(), copy=True) for t in (self.tensors if tensors is None else tensors)]

    def examples(self) -> list[list[torch.Tensor]]:
        """A batch of arguments."""
        return [[t * f if t.is_floating_point() else t.clone() for t in self.tensors] for f in BATCH]

    def described(self, tensors: Sequence[torch.Tensor], paths: Sequence[str]) -> list[str]:
        """Addresses, dtypes and shapes."""
        return [
            f"{path} {str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
            for path, t in zip(paths, tensors, strict=False)
        ]

    def output_paths(self) -> list[str]:
        """The addresses of the outputs."""
        return output_paths(self.tree)

    def tolerance(self) -> float:
        """How far values may be from torch's, relative to the largest one."""
        dtypes = {t.dtype for t in (*self.parameters, *self.outputs) if t.is_floating_point()}
        return max((_TOLERANCES.get(dtype, _TOLERANCE) for dtype in dtypes), default=_TOLERANCE)

    # -- derivatives of one number, which torch and JAX make of the outputs in the same way -----------------------

    def loss(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """A number that depends on all floating outputs."""
        parts = [
            (o.double() * torch.cos(torch.arange(o.numel()).double()).reshape(o.shape)).sum()
            for o in outputs
            if _inexact(o)
        ]
        squares = [(o.double() ** 2).mean() for o in outputs if _inexact(o)]
        return sum((p / max(1, len(parts)) for p in parts), torch.zeros(())) + sum(squares, torch.zeros(()))

    def gradients(self, tensors: Sequence[torch.Tensor], *, second: bool = False) -> list[torch.Tensor]:
        """Torch's gradients of the loss for the parameters, or the product of its Hessian with `directions`."""
        loss = self.loss(self.flat(self.model, [t.clone() for t in tensors]))
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in self.parameters]
        found = torch.autograd.grad(loss, self.parameters, create_graph=second, materialize_grads=True)
        if not second:
            return list(found)
        slope = sum(((g * d).sum() for g, d in zip(found, self.directions(), strict=True)), torch.zeros(()))
        if not slope.requires_grad:
            return [torch.zeros_like(p) for p in self.parameters]
        return list(torch.autograd.grad(slope, self.parameters, materialize_grads=True))

    def directions(self) -> list[torch.Tensor]:
        """A direction in the space of the parameters.

        Rows of an embedding at its `padding_idx` stay: torch's gradients leave them out, and its tangents do not.
        """
        found = []
        for parameter in self.parameters:
            direction = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64)).reshape(parameter.shape)
            for module in self.model.modules():
                if isinstance(module, nn.Embedding) and module.weight is parameter and module.padding_idx is not None:
                    direction[module.padding_idx] = 0
            found.append(direction.to(parameter.dtype))
        return found


def jax_loss(outputs: Sequence[jax.Array]) -> jax.Array:
    """The same number as `Subject.loss`."""
    jnp = jax.numpy
    inexact = [
        o.astype(jnp.promote_types(o.dtype, jnp.float32)) for o in outputs if jnp.issubdtype(o.dtype, jnp.floating)
    ]
    parts = [(o * np.cos(np.arange(o.size)).reshape(o.shape).astype(o.dtype)).sum() for o in inexact]
    zero = jnp.zeros(())
    return sum((p / max(1, len(parts)) for p in parts), zero) + sum(((o**2).mean() for o in inexact), zero)


def largest_difference(found: Sequence[Any], expected: Sequence[torch.Tensor]) -> float:
    """Between all arrays and tensors, relative to the largest value; NaN where the shapes differ."""
    if len(found) != len(expected):
        return float("nan")
    scale, errors = 1.0, [0.0]
    for array, tensor in zip(found, expected, strict=True):
        wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).numpy()
        values = np.asarray(array).astype(wide.dtype)
        if values.shape != wide.shape:
            return float("nan")
        if wide.size:
            finite = np.where(np.isfinite(wide), np.abs(wide), 0)
            scale = max(scale, float(finite.max()))
            same = (values == wide) | (np.isnan(values) & np.isnan(wide))
            errors.append(float(np.where(same, 0, np.abs(values - wide)).max()))
    return float(np.max(errors)) / scale  # which is NaN if one of them is


def copied(model: nn.Module) -> nn.Module:
    """A copy of a module.

    Raises:
        OptionError: torch cannot copy it.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        name = type(model).__name__
        raise OptionError(
            f"check: {name}: expected a module that can be copied (`copy.deepcopy`), got {type(error).__name__}: "
            f"{error}"
        ) from error


def _tensor(leaf: Any) -> torch.Tensor:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else j2t(jax.numpy.asarray(leaf), copy=True)


def _inexact(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point()
