"""A torch callable as a JAX function."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jax
import torch

from pytorch2jax._arguments import take_apart
from pytorch2jax._dtypes import canonical_dtype_t2j
from pytorch2jax._errors import LeafTypeError
from pytorch2jax._function import TorchFunction, spec_of
from pytorch2jax._inference import Surroundings
from pytorch2jax._primitive import torch_call
from pytorch2jax._reverse import JaxFunction, note_original
from pytorch2jax._rng import SEED_DRAW, seed_from_key
from pytorch2jax._trees import is_static


def torch2jax(
    fn: Callable[..., Any],
    *example_args: Any,
    example_kw: dict[str, Any] | None = None,
    output_shapes: Any = None,
    widen_ints: bool = True,
) -> Callable[..., Any]:
    """Turn a torch function into a JAX function that runs it.

    The result works under every JAX transformation: `jax.jit`, `grad`, `jvp`, `hessian`, `vmap`, `lax.scan`,
    `jax.checkpoint`, nested in any order. It runs torch's own kernels on XLA's buffers.

    Args:
        fn: a function of tensors, pytrees of tensors, and static values (bool, int, float, str, None,
            dtypes), given by position or by keyword. It returns tensors in any torch pytree. An
            `nn.Module` works too, with its parameters as constants; `convert_pytnn_to_jax` makes them
            arguments.
        *example_args: optional arguments like those of later calls: tensors, arrays or
            `jax.ShapeDtypeStruct`. With them, `fn` is checked here instead of at its first call. Later
            calls may have other shapes.
        example_kw: the same for keyword arguments.
        output_shapes: what `fn` returns, as a pytree of objects with `shape` and `dtype`. Without it that
            is found out at trace time, by one run on fake tensors. With it `fn` never runs before it is
            called; then nothing is known about in-place writes, so that every input is copied.
        widen_ints: while `jax_enable_x64` is off, `fn` gets JAX's int32 arrays as int64, the dtype that
            torch wants for indices. `False` hands them over as int32.

    Returns:
        A function of arrays in the place of tensors. Its extra keyword `rng` (unless `fn` has an argument
        of that name) takes a JAX key from which a random `fn` draws. Without a key, each call takes a
        seed from torch's global generator. Either way a gradient sees the random numbers of its forward.
        What `jax2torch` made of a JAX function is that function again.

    Copies:
        Inputs are not copied, except those that `fn` writes to in place; each output is copied once.

    Raises:
        LeafTypeError: an argument or output is something that cannot pass between the frameworks.
        InferenceError: `fn` fails on inputs of these shapes and dtypes.
        OutputMismatchError: `fn` returns something else than declared or inferred; at run time.
        TorchCallError: torch raised an exception; at run time, outside of `jax.jit`. Under `jax.jit` JAX
            raises a `jax.errors.JaxRuntimeError` with torch's message and traceback in its text.
        NestingError: `fn` calls JAX, which could wait for itself for ever.

    Example:
        >>> import jax, jax.numpy as jnp, torch
        >>> f = torch2jax(lambda x, y: torch.sin(x) @ y)
        >>> x, y = jnp.ones((2, 3)), jnp.ones((3,))
        >>> jax.jit(f)(x, y).shape
        (2,)
        >>> jax.grad(lambda x: f(x, y).sum())(x).shape
        (2, 3)
    """
    if not callable(fn):
        raise LeafTypeError(f"torch2jax: expected a torch callable, got {type(fn).__name__}.")
    has_options = bool(example_args or example_kw or output_shapes is not None or not widen_ints)
    if isinstance(fn, JaxFunction) and not has_options:
        return fn.jax_function
    name = _name(fn)
    takes_rng = "rng" not in _parameter_names(fn)
    output_key = None if output_shapes is None else _declared_key(output_shapes)
    function = TorchFunction(
        name,
        _PlainCall(fn),
        identity=_Identity(fn),
        widen_ints=widen_ints,
    )

    @functools.wraps(fn, updated=())
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        key = kwargs.pop("rng", None) if takes_rng else None
        arguments = take_apart(name, args, kwargs)
        program = function.bind((), arguments, output_shapes=output_shapes, output_key=output_key)
        inputs = list(arguments.arrays)
        if key is not None:
            seed = seed_from_key(name, key)
        elif program.inferred.random:
            seed = torch_call(SEED_DRAW)[0]
        else:
            return program.rebuild(torch_call(program, *inputs))[0]
        program = program.with_seed(seed.shape[0], shared=key is not None)
        inputs.insert(0, seed)
        return program.rebuild(torch_call(program, *inputs))[0]

    if example_args or example_kw:
        _check_on_examples(function, wrapped, example_args, example_kw or {})
    if not has_options:
        note_original(wrapped, fn)
    return wrapped


def py_to_jax_wrapper(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a torch function so that it takes and returns JAX arrays; `torch2jax(fn)`.

    Args:
        fn: a torch function; see `torch2jax`.

    Returns:
        The JAX function.

    Example:
        >>> import jax.numpy as jnp, torch
        >>> @py_to_jax_wrapper
        ... def double(x):
        ...     return torch.add(x, x)
        >>> double(jnp.ones(2))
        Array([2., 2.], dtype=float32)
    """
    return torch2jax(fn)


_NOTHING = contextlib.nullcontext()


class _PlainCall:
    """A torch callable without tensors of its own, as a `TorchCallable`."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(
        self, own: list[torch.Tensor], variant: Hashable, args: Any, kwargs: Any
    ) -> tuple[Any, list[torch.Tensor]]:
        return self.fn(*args, **kwargs), own

    def plain_function(self) -> Callable[..., Any]:
        return self.fn

    def hold(self, own: list[torch.Tensor], variant: Hashable) -> None:
        pass

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        return _NOTHING

    def learning(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def surroundings(self) -> Surroundings:
        return Surroundings()

    def constants(self, device: torch.device) -> list[torch.Tensor]:
        return []


class _Identity:
    """Equal for the same function, also where it is unhashable or a method bound anew at each access."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self._parts = (fn.__func__, id(fn.__self__)) if inspect.ismethod(fn) else (id(fn),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__name__


def _parameter_names(fn: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(fn).parameters)
    except (TypeError, ValueError):  # torch's built-in functions have no signature
        return frozenset()


def _declared_key(output_shapes: Any) -> Hashable:
    leaves, treedef = jax.tree.flatten(output_shapes, is_leaf=lambda x: hasattr(x, "shape"))
    return treedef, tuple((tuple(x.shape), str(x.dtype)) for x in leaves if hasattr(x, "shape"))


def _check_on_examples(
    function: TorchFunction, wrapped: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Infer for the example arguments, and keep their values for functions that fake tensors cannot follow."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    positions = [i for i, leaf in enumerate(leaves) if not is_static(leaf)]
    examples = [leaves[i] for i in positions]
    structs = [
        jax.ShapeDtypeStruct(
            tuple(x.shape), canonical_dtype_t2j(x.dtype) if isinstance(x.dtype, torch.dtype) else x.dtype
        )
        for x in examples
    ]

    def call(*arrays: Any) -> Any:
        filled = list(leaves)
        for position, array in zip(positions, arrays, strict=True):
            filled[position] = array
        args, kwargs = jax.tree.unflatten(treedef, filled)
        return wrapped(*args, **kwargs)

    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in examples):
        function.examples = take_apart(function.name, args, kwargs).arrays
        function.example_specs = tuple(map(spec_of, function.examples))
    jax.eval_shape(call, *structs)
