"""Derivatives and batches of programs; JAX's rules in `_primitive.py` are made of these.

With `f` a program, `A` some of its inputs (`active`), `x` all of its inputs:

- `Jvp(f, A)`: `(x, t) -> f'(x) t`, the tangents of the inexact outputs; linear in `t`.
- `Vjp(f, A, B)`: `(x, c) -> c f'(x)`, the cotangents of `A` for cotangents `c` of the outputs `B`; linear in `c`.
- `Vmap(f, dims)`: `f` over a batch axis, in one call.

Cotangents follow JAX's convention for complex numbers, which is the conjugate of torch's: JAX transposes,
torch takes the adjoint, and `transpose(c) = conj(adjoint(conj(c)))`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from pytorch2jax._composite import CompositeScatter
from pytorch2jax._dtypes import dtype_j2t, is_inexact
from pytorch2jax._errors import OutputMismatchError, UnsupportedTransformError
from pytorch2jax._hand_written import any_direction, check_linear
from pytorch2jax._inference import Spec
from pytorch2jax._internals import GradientEdge, flat_vmap, load_forward_mode, run_backward
from pytorch2jax._program import Around, Batching, Program, RootProgram, Style, Tensors
from pytorch2jax._torch_state import vmap_fallback

_INSIDE = Around(functional=True, differentiated=True)
RECORDED = Around(functional=False, differentiated=True)


# Torch counts the levels of its forward mode in a global variable: of two threads that use it at once, one loses its
# tangents, without an error (torch 2.13).
_FORWARD_MODE = threading.RLock()


class _Recording(threading.local):
    """In each thread: for which program a backward pass with a graph of its own runs."""

    program: Program | None = None


_RECORDING = _Recording()


class Derived(Program):
    """A program made from another one."""

    base: Program

    def __init__(self, base: Program, *arguments: Any) -> None:
        super().__init__((base, *arguments))
        self.base = base
        self.arguments = arguments
        self._root = base.root

    @property
    def root(self) -> RootProgram:
        return self._root

    def chain(self) -> Iterable[Program]:
        yield self
        yield from self.base.chain()

    def describe(self) -> str:
        return f"{type(self).__name__.lower()}({self.base.describe()})"

    def transposed(self, positions: tuple[int, ...], given: tuple[int, ...]) -> Derived:
        """The transpose of a linear program.

        Args:
            positions: which of its last `n_linear` inputs are unknown, counted from the first of these.
            given: the outputs that have a cotangent.

        Returns:
            A program from the non-linear inputs and one cotangent for each of `given` to the cotangents of the
            unknown inputs; linear in the cotangents.
        """
        raise NotImplementedError(f"{self.describe()} is not linear")

    def _recorded_gradients(self, outputs: Tensors, inputs: Tensors, cotangents: Tensors) -> Tensors:
        """Gradients with a graph of their own.

        Raises:
            UnsupportedTransformError: a part of them would have none.
        """
        before, _RECORDING.program = _RECORDING.program, self
        try:
            pulled = gradients(outputs, inputs, cotangents, create_graph=True)
        finally:
            _RECORDING.program = before
        if self.root.has_hooks:
            what = "a backward pass with hooks on its gradients"
            check_linear(lambda: f"{self.describe()}: {what}", cotangents, pulled)
        return pulled


def inexact_outputs(program: Program) -> tuple[int, ...]:
    """Which outputs of a program have tangents."""
    return tuple(i for i, spec in enumerate(program.out_specs) if is_inexact(spec.dtype) and i not in program.constant)


class Jvp(Derived):
    """`(x, t) -> f'(x) t`: tangents of the inexact outputs for tangents of the active inputs."""

    differentiates = True
    forward_mode = True

    def __init__(self, base: Program, active: tuple[int, ...]) -> None:
        super().__init__(base, active)
        self.active = active
        self.outputs = inexact_outputs(base)
        self.in_specs = base.in_specs + tuple(base.in_specs[i] for i in active)
        self.out_specs = tuple(base.out_specs[i] for i in self.outputs)
        self.n_linear = len(active)

    def transposed(self, positions: tuple[int, ...], given: tuple[int, ...]) -> Derived:
        active = tuple(self.active[p] for p in positions)
        return self.base.derive(Vjp, active, tuple(self.outputs[i] for i in given))

    def run(self, tensors: Sequence[torch.Tensor], style: Style, around: Around) -> Tensors:
        primals, tangents = _split(tensors, len(self.base.in_specs))
        # Torch's forward-mode formulas are not all differentiable: those of layer_norm and batch_norm take
        # their saved statistics for constants. Backward formulas are, so that an inner jvp is made of them.
        if style.forward_mode and not around.differentiated:
            call = _restricted(self.base, primals, self.active, self.outputs, style, _INSIDE)
            inputs = tuple(primals[i] for i in self.active)
            load_forward_mode()
            with _FORWARD_MODE, torch.enable_grad():
                return tuple(torch.func.jvp(call, inputs, tuple(tangents))[1])
        if around.functional:
            return self._double_functional(primals, tangents, style)
        return self._double_backward(primals, tangents, style)

    def _double_functional(self, primals: Tensors, tangents: Tensors, style: Style) -> Tensors:
        """`f'(x) t` is the vjp of `u -> u f'(x)`, which is linear in `u`, with cotangent `t`.

        Any `u` does but zero, where the derivative of a determinant is 0 / 0 to torch.
        """
        call = _restricted(self.base, primals, self.active, self.outputs, style, _INSIDE)
        inputs = tuple(primals[i] for i in self.active)
        with torch.enable_grad():
            outputs, pull = torch.func.vjp(call, *inputs)[:2]
            push = torch.func.vjp(pull, tuple(any_direction(o) for o in outputs))[1]
            return tuple(push(tuple(tangents))[0])

    def _double_backward(self, primals: Tensors, tangents: Tensors, style: Style) -> Tensors:
        """The same through plain autograd."""
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs, outputs = _recorded(self, primals, style, again=True)
            duals = tuple(any_direction(o).requires_grad_() for o in outputs)
            with self.root.backward(primals):
                pulled = self._recorded_gradients(outputs, inputs, duals)[: len(self.active)]
                return gradients(pulled, duals, tangents, create_graph=keep)


class Vjp(Derived):
    """`(x, c) -> c f'(x)`: cotangents of the active inputs for cotangents of some outputs."""

    differentiates = True
    _whole_graph = False  # set where autograd.grad is refused, as by torch.utils.checkpoint(use_reentrant=True)

    def __init__(self, base: Program, active: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        super().__init__(base, active, outputs)
        self.active = active
        self.outputs = outputs
        self.in_specs = base.in_specs + tuple(base.out_specs[i] for i in outputs)
        self.out_specs = tuple(base.in_specs[i] for i in active)
        self.n_linear = len(outputs)

    def transposed(self, positions: tuple[int, ...], given: tuple[int, ...]) -> Derived:
        tangent = self.base.derive(Jvp, tuple(self.active[i] for i in given))
        kept = tuple(tangent.outputs.index(self.outputs[p]) for p in positions)
        return tangent if kept == tuple(range(len(tangent.outputs))) else tangent.derive(Select, kept)

    def run(self, tensors: Sequence[torch.Tensor], style: Style, around: Around) -> Tensors:
        primals, cotangents = _split(tensors, len(self.base.in_specs))
        cotangents = conjugated(cotangents)
        if around.functional:
            call = _restricted(self.base, primals, self.active, self.outputs, style, _INSIDE)
            inputs = tuple(primals[i] for i in self.active)
            pull = torch.func.vjp(call, *inputs)[1]
            # Some backward formulas (of det and solve) are differentiable in grad mode only.
            with torch.set_grad_enabled(around.differentiated):
                return conjugated(pull(cotangents))
        keep = torch.is_grad_enabled()  # an outer derivative records: then this one has to be recorded too
        if self._whole_graph and not keep:
            return self._pull_through_everything(primals, cotangents, style)
        try:
            return self._pull(primals, cotangents, style, keep)
        except RuntimeError as error:
            if keep or "incompatible with .grad()" not in str(error):
                raise
            self._whole_graph = True
            return self._pull_through_everything(primals, cotangents, style)

    def _pull_through_everything(self, primals: Tensors, cotangents: Tensors, style: Style) -> Tensors:
        """By `torch.autograd.backward`, which fills the `grad` of the leaves."""
        with torch.enable_grad():
            inputs, outputs = _recorded(self, primals, style, again=False)
            _forget_grad(inputs)
            live = [(o, c.clone()) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
            if live:
                with self.root.backward(primals):
                    torch.autograd.backward([o for o, _ in live], [c for _, c in live])
        active = inputs[: len(self.active)]
        return conjugated(torch.zeros_like(i) if i.grad is None else i.grad for i in active)

    def _pull(self, primals: Tensors, cotangents: Tensors, style: Style, keep: bool) -> Tensors:
        """By `torch.autograd.grad`."""
        with torch.enable_grad():
            inputs, outputs = _recorded(self, primals, style, again=keep)
            if keep:
                cotangents = tuple(c if c.requires_grad else c.detach().requires_grad_() for c in cotangents)
            else:  # a backward may write to what it is given, and these are XLA's
                cotangents = tuple(c.clone() for c in cotangents)
            with self.root.backward(primals):
                pull = self._recorded_gradients if keep else gradients
                return conjugated(pull(outputs, inputs, cotangents)[: len(self.active)])


class Vmap(Derived):
    """A program over a batch axis.

    in_dims: for each input its batch axis, or None.
    out_dims: for each output the batch axis, or None: the sum over the batch.
    """

    batches = True

    def __init__(
        self,
        base: Program,
        in_dims: tuple[int | None, ...],
        out_dims: tuple[int | None, ...],
        size: int,
    ) -> None:
        super().__init__(base, in_dims, out_dims, size)
        self.in_dims, self.out_dims, self.size = in_dims, out_dims, size
        self.constant = base.constant
        self.in_specs = tuple(map(self._batched, base.in_specs, in_dims))
        self.out_specs = tuple(map(self._batched, base.out_specs, out_dims))
        self.n_linear = base.n_linear

    def _batched(self, spec: Spec, dim: int | None) -> Spec:
        if dim is None:
            return spec
        return Spec((*spec.shape[:dim], self.size, *spec.shape[dim:]), spec.dtype)

    def transposed(self, positions: tuple[int, ...], given: tuple[int, ...]) -> Derived:
        assert isinstance(self.base, Derived)
        base = self.base.transposed(positions, given)
        first = len(self.in_specs) - self.n_linear
        in_dims = (*self.in_dims[:first], *(self.out_dims[i] for i in given))
        return base.derive(Vmap, in_dims, tuple(self.in_dims[first + p] for p in positions), self.size)

    def run(self, tensors: Sequence[torch.Tensor], style: Style, around: Around) -> Tensors:
        if self.size == 0:
            device = tensors[0].device
            return tuple(torch.zeros(s.shape, dtype=dtype_j2t(s.dtype), device=device) for s in self.out_specs)
        if style.batching is Batching.DIRECT:
            return self._run_directly(tensors, style, around)
        if style.batching is not Batching.LOOP and self.root.flattens and isinstance(self.base, Vmap):
            return self._run_flat(tensors, style, around)
        if style.batching is not Batching.LOOP:
            inside = around._replace(functional=True)
            scatter = CompositeScatter() if torch.is_grad_enabled() else contextlib.nullcontext()
            with vmap_fallback(style.batching is Batching.FALLBACK), scatter:
                outputs = flat_vmap(
                    lambda inputs: self.base.run(inputs, style, inside),
                    tensors,
                    self.in_dims,
                    [dim or 0 for dim in self.out_dims],
                    self.size,
                    self.root.vmap_randomness,
                )
            return tuple(o.sum(0) if d is None else o for o, d in zip(outputs, self.out_dims, strict=True))
        rows = [self.base.run(self._row(tensors, i), style, around) for i in range(self.size)]
        if self.root.loops and torch.is_grad_enabled():
            # The gradient of `as_strided_scatter` sees where in a larger memory its cotangent begins: not a row of one.
            rows = [tuple(o * 1 if o.requires_grad else o for o in row) for row in rows]
        return tuple(
            sum(column[1:], column[0]) if dim is None else torch.stack(column, dim)
            for column, dim in zip(map(list, zip(*rows, strict=True)), self.out_dims, strict=True)
        )

    def _run_flat(self, tensors: Sequence[torch.Tensor], style: Style, around: Around) -> Tensors:
        """Batches of batches as one batch, of all combinations."""
        inner = self.base
        assert isinstance(inner, Vmap)
        given: list[torch.Tensor] = []
        in_dims: list[int | None] = []
        for tensor, outer_dim, dim in zip(tensors, self.in_dims, inner.in_dims, strict=True):
            is_shared = outer_dim is None and dim is None
            in_dims.append(None if is_shared else 0)
            if is_shared:
                given.append(tensor)
                continue
            moved = tensor.unsqueeze(0) if outer_dim is None else tensor.movedim(outer_dim, 0)
            moved = moved.unsqueeze(1) if dim is None else moved.movedim(dim + 1, 1)
            rest = moved.shape[2:]
            given.append(moved.expand(self.size, inner.size, *rest).reshape(self.size * inner.size, *rest))
        flat = inner.base.derive(Vmap, tuple(in_dims), (0,) * len(inner.base.out_specs), self.size * inner.size)
        results = []
        for output, outer_dim, dim in zip(flat.run(given, style, around), self.out_dims, inner.out_dims, strict=True):
            parts = output.unflatten(0, (self.size, inner.size))
            parts = parts.sum(1) if dim is None else parts.movedim(1, dim + 1)
            results.append(parts.sum(0) if outer_dim is None else parts.movedim(0, outer_dim))
        return tuple(results)

    def _row(self, tensors: Sequence[torch.Tensor], index: int) -> list[torch.Tensor]:
        """The inputs of one example of a loop."""
        row = [t if d is None else _example(t, d, index) for t, d in zip(tensors, self.in_dims, strict=True)]
        if self.root.is_seeded and self.in_dims[0] is None and self.root.vmap_randomness == "different":
            row[0] = torch.cat([row[0], row[0].new_tensor([index])])  # its words, and the number of the example
        return row

    def _run_directly(self, tensors: Sequence[torch.Tensor], style: Style, around: Around) -> Tensors:
        """One call of the function on inputs with the batch axis in front, behind those of outer batches."""
        outer = tensors[0].dim() - len(self.in_specs[0].shape)
        expands = self.root.expands and self.base.order == 0
        batched = [
            _with_batch_axis(t, d, outer, 1 if expands else self.size)
            for t, d in zip(tensors, self.in_dims, strict=True)
        ]
        results = []
        for output, spec, dim in zip(
            self.base.run(batched, style, around), self.base.out_specs, self.out_dims, strict=True
        ):
            if output.dim() != outer + 1 + len(spec.shape) or output.shape[outer] not in (self.size, 1):
                raise OutputMismatchError(
                    f"{self.describe()}: expected an output with {outer + 1} batch axes in front of "
                    f"{list(spec.shape)}, the last of them of length {self.size}, because of `vmap_method`, got "
                    f"{list(output.shape)}. Wrap the function without `vmap_method` if it is for one example."
                )
            full = output.expand(*output.shape[:outer], self.size, *spec.shape)
            results.append(full.sum(outer) if dim is None else full.movedim(outer, outer + dim))
        return tuple(results)


def _example(tensor: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    """One example of a batch, in memory of its own: `as_strided` sees where in a larger one a tensor begins."""
    return tensor.select(dim, index).clone(memory_format=torch.contiguous_format)


def _with_batch_axis(tensor: torch.Tensor, dim: int | None, outer: int, size: int) -> torch.Tensor:
    """The tensor with its batch axis behind the `outer` first ones; where it has none, a new one of this size."""
    if dim is not None:
        return tensor.movedim(outer + dim, outer)
    sizes = list(tensor.shape)
    return tensor.unsqueeze(outer).expand(*sizes[:outer], size, *sizes[outer:])


class Select(Derived):
    """Some of the outputs of a program."""

    def __init__(self, base: Program, kept: tuple[int, ...]) -> None:
        super().__init__(base, kept)
        self.kept = kept
        self.in_specs = base.in_specs
        self.out_specs = tuple(base.out_specs[i] for i in kept)
        self.n_linear = base.n_linear

    def transposed(self, positions: tuple[int, ...], given: tuple[int, ...]) -> Derived:
        assert isinstance(self.base, Derived)
        return self.base.transposed(positions, tuple(self.kept[i] for i in given))

    def run(self, tensors: Sequence[torch.Tensor], style: Style, around: Around) -> Tensors:
        outputs = self.base.run(tensors, style, around)
        return tuple(outputs[i] for i in self.kept)


def _split(tensors: Sequence[torch.Tensor], index: int) -> tuple[Tensors, Tensors]:
    return tuple(tensors[:index]), tuple(tensors[index:])


def conjugated(tensors: Iterable[torch.Tensor]) -> Tensors:
    return tuple(t.conj() if t.is_complex() else t for t in tensors)


def _restricted(
    program: Program,
    primals: Tensors,
    active: tuple[int, ...],
    outputs: tuple[int, ...],
    style: Style,
    around: Around,
) -> Callable[..., Tensors]:
    """The program as a function of its active inputs only, with the chosen outputs only."""

    def call(*inputs: torch.Tensor) -> Tensors:
        arguments = list(primals)
        for index, tensor in zip(active, inputs, strict=True):
            arguments[index] = tensor
        results = program.run(arguments, style, around)
        return tuple(results[i] for i in outputs)

    return call


def _recorded(program: Jvp | Vjp, primals: Tensors, style: Style, *, again: bool) -> tuple[Tensors, Tensors]:
    """Run the base of a derivative under autograd: its active inputs and chosen outputs, as nodes of one graph.

    Behind the active inputs come the others that are recorded.

    Args:
        program: the derivative.
        primals: the inputs of its base.
        style: how to run that.
        again: whether the derivative is differentiated again.
    """
    again = again or program.base.order > 0
    arguments = list(primals)
    recorded = (*program.active, *others_recorded(program.root, program.active))
    for index in recorded:
        primal = primals[index]
        if primal.requires_grad:
            arguments[index] = primal.view_as(primal)
        else:
            arguments[index] = leaf = primal.detach().requires_grad_()
            if again:
                leaf.register_post_accumulate_grad_hook(_refuse_accumulation)
    outputs = program.base.run(arguments, style, RECORDED)
    return tuple(arguments[i] for i in recorded), tuple(outputs[i] for i in program.outputs)


def others_recorded(root: RootProgram, active: tuple[int, ...]) -> tuple[int, ...]:
    """The inputs besides the active ones with respect to which a backward pass is run, for what happens on its way."""
    return tuple(i for i in root.recorded_too if i not in active)


def _refuse_accumulation(leaf: torch.Tensor) -> None:
    """A hook: while a backward pass is recorded, nobody may leave a part of a gradient in `grad`."""
    program = _RECORDING.program
    if program is not None:
        raise UnsupportedTransformError(
            f"{program.describe()}: a backward pass in it calls `torch.autograd.backward` in its turn, which leaves a "
            "part of the gradients in `.grad`, where they have no derivatives. Let it call `torch.autograd.grad` "
            "and return what that gives, or ask for first-order reverse mode (jax.grad)."
        )


def gradients(
    outputs: Sequence[torch.Tensor | GradientEdge | None],
    inputs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    *,
    create_graph: bool = False,
    destinations: Mapping[int, torch.Tensor] | None = None,
) -> Tensors:
    """`torch.autograd.grad` with zeros where nothing depends on anything.

    A backward pass of the user's may call `torch.autograd.backward`, as reversible networks do. What that leaves in the
    `grad` of `inputs` belongs to their gradients.

    Args:
        outputs: tensors or places in the graph; None for what depends on nothing.
        inputs: what to differentiate with respect to.
        cotangents: one for each output.
        create_graph: record the backward pass, too.
        destinations: where the caller wants some of the gradients, by the number of the input. They are copied there
            as soon as torch has computed them, while they are in the processor's cache; then their memory is free for
            the next ones, and what is returned is the buffer.
    """
    where: list[Any] = []
    given: list[torch.Tensor] = []
    for output, cotangent in zip(outputs, cotangents, strict=True):
        if output is not None and (not isinstance(output, torch.Tensor) or output.requires_grad):
            where.append(output)
            given.append(cotangent)
    if not where:
        return tuple(torch.zeros_like(i) for i in inputs)
    placed: dict[int, torch.Tensor] = {}
    for index, buffer in (destinations or {}).items():
        inputs[index].register_hook(functools.partial(_place, placed, index, buffer))
    found: Sequence[torch.Tensor | None]
    _forget_grad(inputs)
    if create_graph:
        found = torch.autograd.grad(where, inputs, given, create_graph=True, allow_unused=True)
    else:
        found = run_backward(tuple(where), tuple(given), tuple(inputs))
        if any(i.grad is not None for i in inputs):
            found = list(map(_with_grad, found, inputs))
    result = []
    for index, gradient in enumerate(found):
        if index in placed:
            result.append(placed[index])
        elif gradient is None:
            result.append(torch.zeros_like(inputs[index]))
        else:
            result.append(gradient if gradient.layout is torch.strided else gradient.to_dense())
    return tuple(result)


def _forget_grad(leaves: Sequence[torch.Tensor]) -> None:
    """Leave nothing in `grad` that was there before a backward pass: the function's own code may have put it there."""
    for leaf in leaves:
        if leaf.is_leaf and leaf.grad is not None:
            leaf.grad = None


def _with_grad(gradient: torch.Tensor | None, leaf: torch.Tensor) -> torch.Tensor | None:
    if leaf.grad is None or gradient is None:
        return leaf.grad if gradient is None else gradient
    return gradient + leaf.grad


_LARGE = 1 << 18  # bytes; below, a hook costs more than it saves


def is_large(spec: Spec) -> bool:
    """Whether a gradient for an input like this goes to its buffer as soon as it is there."""
    return math.prod(spec.shape) * spec.dtype.itemsize >= _LARGE and spec.dtype.kind != "c"


def _place(
    placed: dict[int, torch.Tensor], index: int, buffer: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor | None:
    """A hook: puts a gradient into a buffer, and something without memory in its place."""
    if gradient.layout != torch.strided:
        return None
    with torch.no_grad():
        placed[index] = buffer.copy_(gradient)
    return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)
