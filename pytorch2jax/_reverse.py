"""A JAX function as a torch function, with torch's autograd: the counterpart of `_wrap.py`."""

from __future__ import annotations

import collections
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax
import torch

from pytorch2jax._containers import flatten_arguments
from pytorch2jax._dtypes import dtype_t2j
from pytorch2jax._errors import LeafTypeError, NarrowingWarning
from pytorch2jax._forks import check_process
from pytorch2jax._internals import is_differentiated, outside_of_torch_compile, x64_enabled
from pytorch2jax._jax_call import Call, has_derivatives, run
from pytorch2jax._jax_program import FlatFunction
from pytorch2jax._nesting import check_not_inside_torch
from pytorch2jax._transfer import as_array
from pytorch2jax._trees import is_static, static_key


def jax2torch(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a JAX function into a torch function with autograd.

    The result is compiled by `jax.jit`, once for each combination of shapes, dtypes and static values, and can be
    used wherever torch functions are: in `nn.Module.forward`, under `backward()` of every order, and under
    `torch.func.grad`, `vjp`, `jvp`, `vmap`, `hessian`, nested in any order. `torch.compile` breaks its graph there.

    Args:
        fn: a function of arrays, pytrees of arrays, and static values, given by position or by keyword, that
            `jax.jit` can trace; it may be jitted already. It returns arrays in any JAX pytree.

    Returns:
        A function of tensors in the place of arrays. NumPy arrays and JAX arrays (a `jax.random.key`) may be among its
        arguments too, without a gradient. Other Python values (numbers, strings, None, dtypes) are static: each new one
        compiles again. It returns tensors in the containers that `fn` returns. Gradients flow to tensors of floating
        and complex dtypes. While `jax_enable_x64` is off, 64-bit arguments are narrowed as in `t2j`, and outputs have
        JAX's dtypes; for floating dtypes a `NarrowingWarning` says so once. What `torch2jax` made of a torch function
        is that function again.

    Copies:
        None, in both directions, for contiguous tensors in 64-byte aligned memory (every freshly allocated
        tensor). The inputs are kept until the backward pass, and torch complains if they are written to before
        it; outputs belong to torch, which may write to them.

    Raises:
        StructureError: an argument or output is something that cannot pass between the frameworks, has a dtype
            that one of them lacks, or is an integer that does not fit into 32 bits.
        DeviceError: JAX has no such device, or an output is spread over several.
        DeadlockError: it was called in a process that was forked when JAX was running already (a `DataLoader`
            worker), or by a torch function that JAX runs (`torch2jax` and the converters).

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
        self._has_warned = False

    @outside_of_torch_compile
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the JAX function on tensors."""
        check_process(lambda: self.name)
        check_not_inside_torch(self.name)
        program, leaves = self._bind(args, kwargs)
        if not self._has_warned and any(map(_is_narrowed, leaves)):
            self._has_warned = True
            warnings.warn(
                f"{self.name}: gets tensors of 64-bit floating dtypes in 32 bits, because jax_enable_x64 is off, and "
                "computes in these: `torch.autograd.gradcheck` fails for it. Call "
                '`jax.config.update("jax_enable_x64", True)`, or pass 32-bit tensors (`x.float()`).',
                NarrowingWarning,
                stacklevel=2,
            )
        call = Call(self.name, program.address)
        call.active = tuple(i for i, x in enumerate(leaves) if has_derivatives(x) and is_differentiated(x))
        outputs = run(program, call, leaves)
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
        leaves, treedef = flatten_arguments((args, kwargs))
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


def _is_narrowed(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype in _WIDE and not x64_enabled()


_WIDE = frozenset({torch.float64, torch.complex128})


# -- functions that are bridged already ----------------------------------------------------------------------

_ORIGINAL = "_pytorch2jax_original"


def note_original(wrapped: Any, fn: Callable[..., Any]) -> None:
    """Note on what `torch2jax` returns the torch function that it was made of."""
    setattr(wrapped, _ORIGINAL, (weakref.ref(wrapped), fn))


def original_of(wrapped: Any) -> Callable[..., Any] | None:
    """The torch function, if this object itself (and none that copies its attributes) was made of one."""
    own, fn = inspect.getattr_static(wrapped, _ORIGINAL, (None, None))
    return fn if own is not None and own() is wrapped else None
