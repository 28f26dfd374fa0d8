"""One call of a JAX function on tensors, and its rules under torch's autograd.

The counterpart of `_primitive.py`. One `torch.autograd.Function` runs a program (`_jax_program.py`); its rules run it
again with a program derived from that one:

    backward   f  ->  Pullback(f, inputs with a gradient, outputs with a cotangent)
    jvp        f  ->  Pushforward(f, inputs with a tangent)
    vmap       f  ->  Batched(f, batch axes)

The forward pass is one jitted function that also returns JAX's residuals, which wait in the `Call` for the backward
pass. Derivatives of higher order compute the forward pass again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch

from pytorch2jax._dtypes import dtype_t2j, narrowed
from pytorch2jax._errors import DeviceError, LeafTypeError, Pytorch2JaxError
from pytorch2jax._forks import check_process
from pytorch2jax._internals import (
    array_from_tensor,
    has_only_host,
    is_functorch_active,
    is_under_dual_level,
    keeps_graph,
    trace_state_clean,
    uncommitted,
    unwrap_if_dead,
    x64_enabled,
)
from pytorch2jax._jax_program import Batched, JaxProgram, Pullback, Pushforward, Residuals
from pytorch2jax._transfer import j2t, t2j

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Call:
    """One call of a torch function that runs JAX: what goes into it, and what its forward pass leaves behind.

    active: which inputs a backward pass may ask for.
    source: the call whose backward pass this one is.
    structure: the containers of the outputs.
    residuals: for the backward pass, until that is over.
    """

    def __init__(self, name: str, address: Callable[[int], str], source: Call | None = None) -> None:
        self.name = name
        self.address = address
        self.source = source
        self.active: tuple[int, ...] = ()
        self.structure: Any = None
        self.residuals: Residuals | None = None
        self._x64: bool = x64_enabled() if source is None else source._x64

    def evaluate(self, program: JaxProgram, leaves: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """Run a program on tensors, or ask the source for the answer."""
        check_process(lambda: self.name)
        if self._x64 is x64_enabled() and trace_state_clean():
            return self._evaluate(program, leaves)
        # Backward passes run wherever somebody asks for gradients.
        with jax.enable_x64(self._x64), jax.ensure_compile_time_eval():
            return self._evaluate(program, leaves)

    def _evaluate(self, program: JaxProgram, leaves: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        out = None if self.source is None else self.source.answer(program, leaves)
        if out is None:
            arrays = [self._array(i, x) for i, x in enumerate(leaves)]
            if self.active:
                out, self.residuals = program.run_for_backward(arrays, self.active)
            else:
                out = program.run(arrays)
        outputs, self.structure = jax.tree.flatten(out)
        return tuple(self._tensor(i, x) for i, x in enumerate(outputs))

    def answer(self, program: JaxProgram, leaves: Sequence[Any]) -> Any:
        """Gradients from the residuals, if the program is the pullback of what ran here, or a batch of that."""
        residuals = self.residuals
        dims: tuple[int | None, ...] | None = None
        pullback = program
        if isinstance(program, Batched):
            pullback, dims = program.base, program.dims
        if residuals is None or not isinstance(pullback, Pullback) or not {*pullback.wanted} <= {*residuals.active}:
            return None
        first = len(leaves) - len(pullback.given)
        cotangents = [self._array(None, x) for x in leaves[first:]]
        if dims is None:
            if residuals.program is not pullback.base:
                return None
            return residuals.program.pull(residuals, pullback.wanted, pullback.given, cotangents)
        ran = residuals.program
        in_batch = isinstance(ran, Batched) and ran.base is pullback.base and ran.dims == dims[:first]
        axes = (*(dims[i] for i in pullback.wanted), *dims[first:])
        if not in_batch or None in axes[: len(pullback.wanted)]:  # gradients of what all examples share
            return None
        return ran.pull_batch(residuals, pullback.wanted, pullback.given, axes, cotangents)

    def _array(self, index: int | None, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if type(leaf) not in _PLAIN and getattr(leaf, "fake_mode", None) is not None:
            raise LeafTypeError(
                f"{self.name}: {self._where(index)}: expected a tensor with data, got a FakeTensor. JAX functions run "
                "outside of `torch.compile` and `torch.export`."
            )
        try:
            return _shared_array(leaf)
        except Pytorch2JaxError as error:
            raise type(error)(f"{self.name}: {self._where(index)}: {error}") from None
        except (RuntimeError, BufferError) as error:
            kind = LeafTypeError if leaf.device.type == "cpu" else DeviceError
            raise kind(
                f"{self.name}: {self._where(index)}: expected a tensor with data on a device that JAX has, got "
                f"{type(leaf).__name__} on {leaf.device} ({error})."
            ) from error

    def _where(self, index: int | None) -> str:
        return "gradient" if index is None else self.address(index)

    def _tensor(self, index: int, array: Any) -> torch.Tensor:
        try:
            tensor = j2t(array)
        except Pytorch2JaxError as error:
            raise type(error)(f"{self.name}: output {index}: {error}") from None
        if tensor.device.type == "cpu":
            # Torch may write to the inputs as soon as this returns, and JAX computes in the background.
            array.block_until_ready()
        return tensor


def _shared_array(tensor: torch.Tensor) -> Any:
    """An array over the memory of a tensor, where that can be shared."""
    tensor = unwrap_if_dead(tensor)
    on_host = tensor.layout == torch.strided and tensor.device.type == "cpu" and has_only_host()
    changed = not on_host or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized
    if changed or tensor.numel() == 0 or narrowed(tensor.dtype) is not tensor.dtype:
        return t2j(tensor)
    dtype_t2j(tensor.dtype)  # the error for a dtype that JAX lacks
    return uncommitted(array_from_tensor(tensor.detach().contiguous(), _host()))


@functools.cache
def _host() -> Any:
    return jax.devices("cpu")[0]


def has_derivatives(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


# -- autograd ----------------------------------------------------------------------------------------------


def run(program: JaxProgram, call: Call, leaves: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """Run a program on tensors, under autograd where somebody differentiates."""
    if is_functorch_active():
        return _Run.apply(program, call, *leaves)
    recording = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in leaves)
    if recording or is_under_dual_level():
        return _RunUnderAutograd.apply(program, call, *leaves)
    call.active = ()
    return call.evaluate(program, leaves)


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    program, call, *leaves = inputs
    ctx.program, ctx.call = program, call
    ctx.set_materialize_grads(False)
    ctx.is_inexact = [has_derivatives(o) for o in output]
    ctx.mark_non_differentiable(*(o for o, inexact in zip(output, ctx.is_inexact, strict=True) if not inexact))
    ctx.others = [None if isinstance(x, torch.Tensor) else x for x in leaves]
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _saved(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if x is None else x for x in ctx.others]


class _Rules(torch.autograd.Function):
    """The derivatives that the two functions below have in common."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        leaves, call = _saved(ctx), ctx.call
        given = tuple(i for i, c in enumerate(cotangents) if c is not None and ctx.is_inexact[i])
        wanted = tuple(i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed)
        gradients: list[Any] = [None] * (2 + len(leaves))
        if not given or not wanted:
            return tuple(gradients)
        again = Call(call.name, call.address, call)
        pullback = ctx.program.derive(Pullback, wanted, given)
        pulled = run(pullback, again, [*leaves, *(cotangents[i] for i in given)])
        for index, gradient in zip(wanted, pulled, strict=True):
            gradients[2 + index] = gradient.to(leaves[index].dtype)
        if not keeps_graph():  # torch has freed its own part
            call.residuals = None
        return tuple(gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        leaves = _saved(ctx)
        active = tuple(i for i, t in enumerate(tangents[2:]) if t is not None and has_derivatives(leaves[i]))
        if not active:
            return tuple(None for _ in ctx.is_inexact)
        call = Call(ctx.call.name, ctx.call.address)
        pushforward = ctx.program.derive(Pushforward, active)
        pushed = iter(run(pushforward, call, [*leaves, *(tangents[2 + i] for i in active)]))
        return tuple(next(pushed) if inexact else None for inexact in ctx.is_inexact)


class _Run(_Rules):
    """Under the transformations of `torch.func`."""

    @staticmethod
    def forward(program: JaxProgram, call: Call, *leaves: Any) -> Any:
        return call.evaluate(program, leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _remember(ctx, inputs, output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, program: JaxProgram, call: Call, *leaves: Any) -> Any:
        outputs = run(program.derive(Batched, tuple(in_dims[2:]), info.batch_size), call, leaves)
        return outputs, (0,) * len(outputs)


class _RunUnderAutograd(_Rules):
    """Under plain autograd; torch takes less time for functions of this form."""

    @staticmethod
    def forward(ctx: Any, program: JaxProgram, call: Call, *leaves: Any) -> Any:
        output = call.evaluate(program, leaves)
        _remember(ctx, (program, call, *leaves), output)
        return output
