"""The model that is checked, and its arguments, as torch has them and as JAX has them."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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
        self.floating = [i for i, t in enumerate(self.tensors) if t.is_floating_point()]

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
        leaves, self._tree = flatten_output(model(*args, **kwargs), lambda x: isinstance(x, torch.Tensor))
        return self._in_order(leaves)

    def _in_order(self, leaves: Sequence[Any]) -> list[Any]:
        """The leaves of an output in the order in which JAX has them, which sorts the keys of dicts."""
        places = jax.tree.leaves(self._tree.unflatten([np.int64(i) for i in range(len(leaves))]))
        return [leaves[int(i)] for i in places if isinstance(i, np.int64)]

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
        return self._in_order(output_paths(self._tree))

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
            if o.is_floating_point()
        ]
        squares = [(o.double() ** 2).mean() for o in outputs if o.is_floating_point()]
        return sum((p / max(1, len(parts)) for p in parts), torch.zeros(())) + sum(squares, torch.zeros(()))

    def variables(self, tensors: Sequence[Any], parameters: Sequence[Any]) -> list[Any]:
        """What derivatives are taken with respect to: the parameters, and the floating ones among the arguments."""
        return [*parameters, *(tensors[i] for i in self.floating)]

    def gradients(self, tensors: Sequence[torch.Tensor], *, second: bool = False) -> list[torch.Tensor]:
        """Torch's gradients of the loss for all variables, or the product of its Hessian with `directions`."""
        directions = self.directions if second else []
        live = [t.clone().requires_grad_(i in self.floating) for i, t in enumerate(tensors)]
        variables = self.variables(live, self.parameters)
        with _differentiable_kernels() if second else contextlib.nullcontext():
            # Clones, because a function may not write to what requires a gradient.
            loss = self.loss(self.flat(self.model, [t.clone() for t in live]))
            if not loss.requires_grad:
                return [torch.zeros_like(v) for v in variables]
            found = torch.autograd.grad(loss, variables, create_graph=second, materialize_grads=True)
            if not second:
                return list(found)
            slope = sum(((g * d).sum() for g, d in zip(found, directions, strict=True)), torch.zeros(()))
            if not slope.requires_grad:
                return [torch.zeros_like(v) for v in variables]
            return list(torch.autograd.grad(slope, variables, materialize_grads=True))

    @functools.cached_property
    def directions(self) -> list[torch.Tensor]:
        """A direction in the space of the variables; zero where torch's gradient is.

        There torch's two modes may say different things: reverse mode leaves out the row of an embedding's
        `padding_idx`, forward mode does not.
        """
        return [
            torch.where(g == 0, 0, torch.sin(torch.arange(g.numel(), dtype=torch.float64)).reshape(g.shape).to(g.dtype))
            for g in self.gradients(self.tensors)
        ]


@contextlib.contextmanager
def _differentiable_kernels() -> Iterator[None]:
    """Has torch use kernels of attention and recurrent layers that it can differentiate twice."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        yield


def jax_loss(outputs: Sequence[jax.Array]) -> jax.Array:
    """The same number as `Subject.loss`."""
    jnp = jax.numpy
    inexact = [
        o.astype(jnp.promote_types(o.dtype, jnp.float32)) for o in outputs if jnp.issubdtype(o.dtype, jnp.floating)
    ]
    parts = [(o * np.cos(np.arange(o.size)).reshape(o.shape).astype(o.dtype)).sum() for o in inexact]
    zero = jnp.zeros(())
    return sum((p / max(1, len(parts)) for p in parts), zero) + sum(((o**2).mean() for o in inexact), zero)


_SMALL_LEAF = 1e-3  # of the largest value of all: what is smaller than that is compared by that


def largest_difference(found: Sequence[Any], expected: Sequence[torch.Tensor]) -> float:
    """Between arrays and tensors, relative to the largest value of each; NaN where the shapes differ."""
    if len(found) != len(expected):
        return float("nan")
    errors: list[float] = []
    scales: list[float] = []
    for array, tensor in zip(found, expected, strict=True):
        wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).numpy()
        values = np.asarray(array).astype(wide.dtype)
        if values.shape != wide.shape:
            return float("nan")
        if wide.size:
            scales.append(float(np.where(np.isfinite(wide), np.abs(wide), 0).max()))
            same = (values == wide) | (np.isnan(values) & np.isnan(wide))
            errors.append(float(np.where(same, 0, np.abs(values - wide)).max()))
    # Where all values are zero but for rounding, there is nothing that an error could be relative to.
    floor = max(_SMALL_LEAF * max(scales, default=0.0), float(np.finfo(np.float32).tiny))
    relative = [error / max(scale, floor) for error, scale in zip(errors, scales, strict=True)]
    return float(np.max(relative, initial=0.0))  # which is NaN if one of them is


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
