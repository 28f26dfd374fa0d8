"""What torch has for a call: values and derivatives, by plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from conformance.compare import leaves_of
from conformance.samples import Call

Tensors = list[torch.Tensor]


class TorchCannotError(Exception):
    """Torch itself has no answer."""


def directions(tensors: Sequence[torch.Tensor], seed: int) -> Tensors:
    """A random tensor for each of these."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in tensors]


def values(call: Call, tensors: Sequence[torch.Tensor] | None = None) -> Any:
    """What the function returns."""
    try:
        return call.run(tensors)
    except Exception as error:
        raise TorchCannotError(f"{type(error).__name__}: {error}") from error


def is_random(call: Call) -> bool:
    """Whether the function draws from torch's generator."""
    before = torch.get_rng_state()
    values(call)
    return not torch.equal(before, torch.get_rng_state())


class Differentiable:
    """A call as a function of its active inputs, with the outputs that have derivatives.

    Args:
        call: the call.
        tensors: its inputs; None: those of the sample.

    Raises:
        TorchCannotError: torch has no derivative.
    """

    def __init__(self, call: Call, tensors: Sequence[torch.Tensor] | None = None) -> None:
        self.call = call
        self.tensors = [t.clone() for t in (call.tensors if tensors is None else tensors)]
        self.primals = [self.tensors[i] for i in call.active]
        outputs = self.outputs([t.clone().requires_grad_() for t in self.primals])
        if not outputs:
            raise TorchCannotError("no output has a derivative")
        self.cotangents = directions(outputs, 1)
        self.tangents = directions(self.primals, 2)

    def outputs(self, primals: Sequence[torch.Tensor]) -> Tensors:
        """The outputs that can have a derivative, for these active inputs."""
        tensors = [t.clone() for t in self.tensors]
        for position, primal in zip(self.call.active, primals, strict=True):
            tensors[position] = primal.clone()  # a leaf cannot be written to
        return [leaf for leaf in leaves_of(values(self.call, tensors)) if _inexact(leaf)]

    def pulled(self, primals: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor], again: bool) -> Tensors:
        """`c f'(x)` as JAX has it; recorded by autograd if asked for."""
        outputs = self.outputs(primals)
        return conjugated(_gradients(outputs, primals, conjugated(cotangents), again))

    def reverse(self) -> Tensors:
        """First order, reverse mode."""
        return self.pulled(_fresh(self.primals), self.cotangents, False)

    def forward(self) -> Tensors:
        """First order, forward mode: by torch's own, else by the derivative of the derivative.

        Some of either are wrong in torch (2.13): where they differ, it is the one that is closer to finite differences.
        """
        try:
            own = self._dual()
        except (RuntimeError, NotImplementedError, TorchCannotError):
            return self._double_backward()
        try:
            other = self._double_backward()
        except (RuntimeError, TypeError, TorchCannotError):  # torch has no such derivative
            return own
        if _distance(own, other) < _NOISE:
            return own
        differences = self._differences()
        return min((own, other), key=lambda tangents: _distance(tangents, differences))

    def _differences(self, step: float = 1e-6) -> Tensors:
        with torch.no_grad():
            ahead, behind = (
                self.outputs([p + s * t for p, t in zip(self.primals, self.tangents, strict=True)])
                for s in (step, -step)
            )
        return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]

    def _dual(self) -> Tensors:
        with torch.autograd.forward_ad.dual_level():
            make, split = torch.autograd.forward_ad.make_dual, torch.autograd.forward_ad.unpack_dual
            primals = [make(p.clone(), t) for p, t in zip(self.primals, self.tangents, strict=True)]
            pairs = [split(output) for output in self.outputs(primals)]
            return [torch.zeros_like(p) if t is None else t.clone() for p, t in pairs]

    def _double_backward(self) -> Tensors:
        primals = _fresh(self.primals)
        outputs = self.outputs(primals)
        duals = [t.requires_grad_() for t in directions(outputs, 3)]
        pulled = _gradients(outputs, primals, duals, True)
        return _gradients(pulled, duals, self.tangents, False)

    def second(self) -> Tensors:
        """Reverse over reverse: the gradients of a pullback for the active inputs and for the cotangents."""
        primals, cotangents = _fresh(self.primals), _fresh(self.cotangents)
        pulled = self.pulled(primals, cotangents, True)
        return conjugated(_gradients(pulled, [*primals, *cotangents], conjugated(self.tangents), False))


def conjugated(tensors: Sequence[torch.Tensor]) -> Tensors:
    """JAX's convention for cotangents out of torch's, and back."""
    return [t.conj().resolve_conj() if t.is_complex() else t for t in tensors]


_NOISE = 1e-7  # less is rounding, and finite differences could not decide it


def _distance(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """The largest difference; NaN and infinity, which come of singular points, count for nothing."""
    gaps = [(a - b).abs().nan_to_num(0.0, 0.0, 0.0).flatten() for a, b in zip(left, right, strict=True)]
    return max((float(gap.max()) for gap in gaps if gap.numel()), default=0.0)


def _inexact(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _fresh(tensors: Sequence[torch.Tensor]) -> Tensors:
    return [t.detach().clone().requires_grad_() for t in tensors]


def _gradients(
    outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor], again: bool
) -> Tensors:
    live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    try:
        found: Sequence[Any] = [None] * len(inputs)
        if live:
            where, given = zip(*live, strict=True)
            found = torch.autograd.grad(where, inputs, given, create_graph=again, allow_unused=True)
    except Exception as error:
        raise TorchCannotError(f"{type(error).__name__}: {error}") from error
    return [torch.zeros_like(i) if g is None else g.to_dense() for g, i in zip(found, inputs, strict=True)]
