"""A torch callable as a JAX function."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from pytorch2jax._arguments import parameters_of, take_apart
from pytorch2jax._engines import run as run_program
from pytorch2jax._errors import ConversionError, LeafTypeError, OptionError
from pytorch2jax._function import TorchFunction
from pytorch2jax._inference import Surroundings
from pytorch2jax._options import (
    Backend,
    Examples,
    Options,
    checked_options,
    constants,
    lock_of,
    normalised_shapes,
    shapes_key,
)
from pytorch2jax._primitive import torch_call
from pytorch2jax._reverse import JaxFunction, note_original
from pytorch2jax._rng import SEED_DRAW, seed_from_key
from pytorch2jax._sharding import run_on_shards, whole_shapes


def torch2jax(
    fn: Callable[..., Any] | None = None,
    *example_args: Any,
    torch_fn: Callable[..., Any] | None = None,
    example_kw: dict[str, Any] | None = None,
    output_shapes: Any = None,
    depth: int | None = None,
    nondiff_argnums: int | Sequence[int] | None = None,
    nondiff_mask: Any = None,
    use_zeros: bool = True,
    use_torch_vjp: bool = True,
    out_specs: Any = None,
    output_sharding_spec: Any = None,
    batch_axes: int | Sequence[int | None] | None = None,
    sharding_rule: str | None = None,
    vmap_method: str | None = None,
    lock: Any = False,
    widen_ints: bool = True,
    backend: Backend = "torch",
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
            `jax.ShapeDtypeStruct`. With them, `fn` is checked here instead of at its first call, and gets
            tensors of the dtypes that its example tensors have, while `jax_enable_x64` is off. Later calls
            may have other shapes.
        torch_fn: the old name of `fn`, as a keyword.
        example_kw: the same for keyword arguments.
        output_shapes: what `fn` returns, as a pytree of objects with `shape` and `dtype`, or of shapes alone
            (`torch.Size`, tuples or lists of int) where all floating arguments have the dtype of the outputs.
            The number of tensors and their shapes and dtypes have to be those of the outputs, in order; the containers
            are those in which the outputs come back. Without it the outputs are found out at trace time, by one run on
            fake tensors, and where these cannot follow by one on real ones. With it no real one is made, and every
            input of such a function is copied, because nothing is known about in-place writes.
            It holds for inputs like the examples. For others it is found out, and taken as declared where that
            fails. Without examples it holds for all calls.
        depth: the highest order of derivatives that may be asked for; `0` for none. None: any order.
        nondiff_argnums: positional arguments that are constants to JAX's derivatives.
        nondiff_mask: the same for single leaves: a pytree of bools in the structure of the positional
            arguments, or of a prefix of it.
        use_zeros, use_torch_vjp: without effect. Gradients of what is not differentiated are always zeros, which
            JAX does not compute; and the way through torch (`torch.autograd`, `torch.func`) is found out.
        out_specs: how the outputs are sharded, a `jax.sharding.PartitionSpec` or a pytree of them, for arguments
            that are sharded along explicit axes of a mesh: `fn` then runs on each shard, inside `jax.shard_map`.
            Without it such a call is an error, because JAX would have to gather the arguments.
        output_sharding_spec: the old name of `out_specs`.
        batch_axes: the axis of the batch in the arguments, a number for all of them or a tuple with a number or None
            for each positional argument; outputs have it first. Where XLA partitions a computation over devices by
            itself (sharded arguments under `jax.jit`), each device then runs `fn` on its part of the batch, and
            gradients of what has no batch are summed. Without it each device runs `fn` on everything. `fn` has
            to treat the rows of a batch each by itself; in training mode, normalisations over the batch do
            so with the rows of one device, and random numbers differ between devices.
        sharding_rule: the same for any axes, in the notation of Shardy: `"b i, o i -> b o"` names the axes of all
            arguments and outputs, and `fn` can be split along those that all outputs have.
        vmap_method: how `jax.vmap` runs `fn`. None: as `torch.vmap` where torch can, else once for each
            example. `"sequential"`: once for each example. `"expand_dims"` and `"broadcast_all"`: once, on tensors
            with the batch axis in front, for an `fn` that can take that; what is not batched has an axis of length 1
            there, or is repeated.
        lock: `True`, or a lock, to hold while `fn` runs: where it has state of its own, and runs on several
            devices or in several threads.
        widen_ints: while `jax_enable_x64` is off, `fn` gets JAX's int32 arrays as int64, the dtype that
            torch wants for indices. `False` hands them over as int32.
        backend: `"torch"` runs torch's kernels. `"xla"` translates `fn` to JAX operations, which XLA compiles, exports
            and shards: for functions whose operators do not depend on values. `jax.vmap` and `batch_axes` are then
            XLA's own matter, and `depth` does not limit.

    Returns:
        A function of arrays in the place of tensors. Its extra keyword `rng` (unless `fn` has an argument
        of that name) takes a JAX key from which a random `fn` draws. Without a key, each call takes a
        seed from torch's global generator. Either way a gradient sees the random numbers of its forward.
        What `jax2torch` made of a JAX function is that function again.

    Copies:
        Inputs are not copied, except those that `fn` writes to in place; each output is copied once.

    Raises:
        StructureError: an argument or output is something that cannot pass between the frameworks.
        OptionError: an option has a value that does not exist, or does not fit the arguments.
        DeviceError: an argument is sharded along an explicit axis of a mesh, and there are no `out_specs`.
        UnsupportedTransformError: a derivative of higher order than `depth` is asked for.
        InferenceError: `fn` fails on inputs of these shapes and dtypes; or, at run time, it returns something else
            than declared or inferred.
        CaptureError: `fn` cannot be translated, with `backend="xla"`.
        TorchCallError: torch raised an exception; at run time, outside of `jax.jit`. Under `jax.jit` JAX
            raises a `jax.errors.JaxRuntimeError` with torch's message and traceback in its text.
        DeadlockError: `fn` calls JAX, which could wait for itself for ever.

    Example:
        >>> import jax, jax.numpy as jnp, torch
        >>> f = torch2jax(lambda x, y: torch.sin(x) @ y)
        >>> x, y = jnp.ones((2, 3)), jnp.ones((3,))
        >>> jax.jit(f)(x, y).shape
        (2,)
        >>> jax.grad(lambda x: f(x, y).sum())(x).shape
        (2, 3)
    """
    if torch_fn is not None:
        if fn is not None:
            raise OptionError("torch2jax: expected `fn` or `torch_fn`, got both. `torch_fn` is the old name.")
        fn = torch_fn
    if fn is None or not callable(fn):
        raise LeafTypeError(f"torch2jax: expected a torch callable, got {type(fn).__name__}.")
    if isinstance(fn, type) and issubclass(fn, torch.nn.Module):
        raise ConversionError(
            f"torch2jax: expected a torch callable, got the class `{fn.__name__}`: pass an instance, "
            f"`{fn.__name__}(...)`."
        )
    name = _name(fn)
    takes_rng = all(parameter.name != "rng" for parameter in parameters_of(fn) or ())
    examples = Examples.of(example_args, example_kw or {})
    options = checked_options(
        name,
        widen_ints=widen_ints,
        depth=depth,
        vmap_method=vmap_method,
        example_dtypes=examples.dtypes,
        batch_axes=batch_axes,
        sharding_rule=sharding_rule,
        backend=backend,
    )
    held = constants(name, nondiff_argnums, nondiff_mask)
    has_options = (
        options != Options() or bool(examples.leaves) or any((output_shapes is not None, held, out_specs, lock))
    )
    if isinstance(fn, JaxFunction) and not has_options:
        return fn.jax_function
    out_specs = output_sharding_spec if out_specs is None else out_specs
    call = _PlainCall(fn, lock_of(name, lock))
    function = TorchFunction(name, call, identity=call.identity, options=options)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any], local: Callable[[Any], Any] = whole_shapes) -> Any:
        key = kwargs.pop("rng", None) if takes_rng else None
        arguments = take_apart(name, args, kwargs)
        shapes = None if output_shapes is None else local(normalised_shapes(name, output_shapes, arguments.arrays))
        output_key = None if shapes is None else shapes_key(shapes)
        program = function.bind((), arguments, output_shapes=shapes, output_key=output_key)
        inputs = list(arguments.arrays)
        if key is not None:
            seed = seed_from_key(name, key)
        elif program.inferred.random:
            seed = torch_call(SEED_DRAW)[0]
        else:
            return program.rebuild(run_program(program, *inputs))[0]
        program = program.with_seed(seed.shape[0], shared=key is not None)
        inputs.insert(0, seed)
        return program.rebuild(run_program(program, *inputs))[0]

    def call_on_arrays(*args: Any, **kwargs: Any) -> Any:
        if held is not None:
            args = held.held(name, args)
        return run(args, kwargs) if out_specs is None else run_on_shards(name, run, args, kwargs, out_specs)

    wrapped = WrappedFunction(fn, name, options.backend, call_on_arrays)
    if examples.positions:
        function.keep_examples(examples)
        if out_specs is None or output_shapes is None:  # examples are not sharded, and declarations are
            examples.check(wrapped)
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


class WrappedFunction:
    """What `torch2jax` returns: a function of JAX arrays with the torch function's name, signature and docstring."""

    def __init__(self, fn: Callable[..., Any], name: str, backend: str, call: Callable[..., Any]) -> None:
        self.__name__, self.__qualname__ = name.rpartition(".")[2], name
        functools.update_wrapper(self, fn, updated=())
        self._backend = backend
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"TorchFunction({self.__qualname__}, backend={self._backend!r})"

    def __copy__(self) -> WrappedFunction:
        return self

    def __deepcopy__(self, memo: Any) -> WrappedFunction:
        return self

    def __reduce__(self) -> str:
        return self.__qualname__  # pickled by its name, as functions are


_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


class _PlainCall:
    """A torch callable without tensors of its own, as a `TorchCallable`."""

    def __init__(self, fn: Callable[..., Any], lock: contextlib.AbstractContextManager[Any] | None) -> None:
        self.fn = fn
        self._lock = lock

    @property
    def identity(self) -> Hashable:
        """Equal for the same function with the same lock."""
        return _Identity(self.fn), id(self._lock)

    def __call__(
        self, own: list[torch.Tensor], variant: Hashable, args: Any, kwargs: Any
    ) -> tuple[Any, list[torch.Tensor]]:
        return self.fn(*args, **kwargs), own

    def plain_function(self) -> Callable[..., Any] | None:
        return self.fn if self._lock is None else None

    def hold(self, own: list[torch.Tensor], variant: Hashable) -> None:
        pass

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        return _NOTHING if self._lock is None else self._lock

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
