"""A JAX function as a torch function, with torch's autograd.

The counterpart of `_wrap.py` and `_primitive.py`. One `torch.autograd.Function` runs a program (`_jax_program.py`);
its rules run it again with a program derived from that one:

    backward   f  ->  Pullback(f, inputs with a gradient, outputs with a cotangent)
    jvp        f  ->  Pushforward(f, inputs with a tangent)
    vmap       f  ->  Batched(f, batch axes)

The forward pass is one jitted function that also returns JAX's residuals, which wait in the `Call` for the backward
pass. Derivatives of higher order compute the forward pass again.
"""

from __future__ import annotations

import collections
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import torch

from pytorch2jax._dtypes import dtype_t2j, narrowed
from pytorch2jax._errors import DeviceError, LeafTypeError, Pytorch2JaxError
from pytorch2jax._internals import (
    array_from_tensor,
    has_only_host,
    is_differentiated,
    is_functorch_active,
    is_under_dual_level,
    keeps_graph,
    trace_state_clean,
    uncommitted,
    unwrap_if_dead,
    x64_enabled,
)
from pytorch2jax._jax_program import Batched, FlatFunction, JaxProgram, Pullback, Pushforward, Residuals
from pytorch2jax._nesting import check_not_inside_torch
from pytorch2jax._transfer import as_array, j2t, t2j
from pytorch2jax._trees import is_static, register_torch_nodes, static_key


def jax2torch(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a JAX function into a torch function with autograd.

    The result is compiled by `jax.jit`, once for each combination of shapes, dtypes and static values, and can be
    used wherever torch functions are: in `nn.Module.forward`, under `backward()` of every order, and under
    `torch.func.grad`, `vjp`, `jvp`, `vmap`, `hessian`, nested in any order.

    Args:
        fn: a function of arrays, pytrees of arrays, and static values, given by position or by keyword, that
            `jax.jit` can trace; it may be jitted already. It returns arrays in any JAX pytree.

    Returns:
        A function of tensors in the place of arrays. NumPy arrays and JAX arrays (a `jax.random.key`) may be among
        its arguments too, without a gradient. Other Python values (numbers, strings, None, dtypes) are static: each
        new one compiles again. It returns tensors in the containers that `fn` returns. Gradients flow to tensors of
        floating and complex dtypes. While `jax_enable_x64` is off, 64-bit arguments are narrowed as in `t2j`, and
        outputs have JAX's dtypes. What `torch2jax` made of a torch function is that function again.

    Copies:
        None, in both directions, for contiguous tensors in 64-byte aligned memory (every freshly allocated
        tensor). The inputs are kept until the backward pass, and torch complains if they are written to before
        it; outputs belong to torch, which may write to them.

    Raises:
        LeafTypeError: an argument or output is something that cannot pass between the frameworks.
        DtypeError, NarrowingError: one framework has no such dtype, or an integer does not fit into 32 bits.
        DeviceError: JAX has no such device, or an output is spread over several.
        NestingError: it was called by a torch function that JAX runs (`torch2jax` and the converters).

    Example:
        >>> import jax.numpy as jnp, torch
        >>> f = jax2torch(lambda x, y: jnp.sin(x) @ y)
        >>> x, y = torch.zeros(2, 3, requires_grad=True), torch.ones(3)
        >>> f(x, y).sum().backward()
        >>> x.grad
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    if not callable(fn):
        raise LeafTypeError(f"jax2torch: expected a JAX callable, got {type(fn).__name__}.")
    if isinstance(fn, JaxFunction):
        return fn
    original = original_of(fn)
    return JaxFunction(fn) if original is None else original


class JaxFunction:
    """What `jax2torch` returns; see there.

    A copy of it is the same object. It can be pickled if the JAX function can.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        functools.update_wrapper(self, fn, updated=())
        self.jax_function = fn
        self.name = getattr(fn, "__qualname__", None) or type(fn).__name__
        self._programs: collections.OrderedDict[Hashable, FlatFunction] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the JAX function on tensors."""
        check_not_inside_torch(self.name)
        program, leaves = self._bind(args, kwargs)
        call = Call(self.name, program.address)
        call.active = tuple(i for i, x in enumerate(leaves) if _has_derivatives(x) and is_differentiated(x))
        outputs = _run(program, call, leaves)
        return call.structure.unflatten(outputs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """A method, where it is an attribute of a class."""
        return self if instance is None else functools.partial(self, instance)

    def __repr__(self) -> str:
        return f"jax2torch({self.name})"

    def __copy__(self) -> JaxFunction:
        return self

    def __deepcopy__(self, memo: Any) -> JaxFunction:
        return self

    def __reduce__(self) -> Any:
        return jax2torch, (self.jax_function,)

    def _bind(self, args: Any, kwargs: Any) -> tuple[FlatFunction, list[Any]]:
        """The program for arguments like these, and their tensors and arrays."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        if register_torch_nodes(leaves):
            leaves, treedef = jax.tree.flatten((args, kwargs))
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) or not is_static(leaf)]
        inputs = [leaves[i] for i in positions]
        for position in positions:
            leaves[position] = None
        leaves = [dtype_t2j(leaf) if isinstance(leaf, torch.dtype) else leaf for leaf in leaves]
        try:
            key = (treedef, tuple(positions), tuple(map(static_key, leaves)))
            for leaf in leaves:
                hash(leaf)
        except TypeError:
            leaf = next(leaf for leaf in leaves if not isinstance(leaf, Hashable))
            raise LeafTypeError(
                f"{self.name}: expected tensors, arrays and hashable Python values among the arguments, got "
                f"{type(leaf).__name__}. Pass tensors, numbers, strings, None, dtypes, or pytrees of them."
            ) from None
        with self._lock:
            program = self._programs.get(key)
            if program is None:
                program = FlatFunction(self.name, self.jax_function, treedef, leaves, positions)
                self._programs[key] = program
                while len(self._programs) > _KEPT_PROGRAMS:  # a new static value for each call
                    self._programs.popitem(last=False)
            self._programs.move_to_end(key)
        for index, leaf in enumerate(inputs):
            if not isinstance(leaf, torch.Tensor):
                inputs[index] = self._array(program, index, leaf)
        return program, inputs

    def _array(self, program: FlatFunction, index: int, leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer):
            raise LeafTypeError(
                f"{self.name}: {program.address(index)}: expected a tensor or an array with a value, got a tracer. "
                "Inside of JAX's transformations call the JAX function itself."
            )
        return as_array(self.name, lambda: program.address(index), leaf)


_KEPT_PROGRAMS = 256
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


def _has_derivatives(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


# -- autograd ----------------------------------------------------------------------------------------------


def _run(program: JaxProgram, call: Call, leaves: Sequence[Any]) -> tuple[torch.Tensor, ...]:
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
    ctx.is_inexact = [_has_derivatives(o) for o in output]
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
        pulled = _run(pullback, again, [*leaves, *(cotangents[i] for i in given)])
        for index, gradient in zip(wanted, pulled, strict=True):
            gradients[2 + index] = gradient.to(leaves[index].dtype)
        if not keeps_graph():  # torch has freed its own part
            call.residuals = None
        return tuple(gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        leaves = _saved(ctx)
        active = tuple(i for i, t in enumerate(tangents[2:]) if t is not None and _has_derivatives(leaves[i]))
        if not active:
            return tuple(None for _ in ctx.is_inexact)
        call = Call(ctx.call.name, ctx.call.address)
        pushforward = ctx.program.derive(Pushforward, active)
        pushed = iter(_run(pushforward, call, [*leaves, *(tangents[2 + i] for i in active)]))
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
        outputs = _run(program.derive(Batched, tuple(in_dims[2:]), info.batch_size), call, leaves)
        return outputs, (0,) * len(outputs)


class _RunUnderAutograd(_Rules):
    """Under plain autograd; torch takes less time for functions of this form."""

    @staticmethod
    def forward(ctx: Any, program: JaxProgram, call: Call, *leaves: Any) -> Any:
        output = call.evaluate(program, leaves)
        _remember(ctx, (program, call, *leaves), output)
        return output


# -- functions that are bridged already ----------------------------------------------------------------------

_ORIGINAL = "_pytorch2jax_original"


def note_original(wrapped: Any, fn: Callable[..., Any]) -> None:
    """Note on what `torch2jax` returns the torch function that it was made of."""
    setattr(wrapped, _ORIGINAL, (weakref.ref(wrapped), fn))


def original_of(wrapped: Any) -> Callable[..., Any] | None:
    """The torch function, if this object itself (and none that copies its attributes) was made of one."""
    own, fn = inspect.getattr_static(wrapped, _ORIGINAL, (None, None))
    return fn if own is not None and own() is wrapped else None
