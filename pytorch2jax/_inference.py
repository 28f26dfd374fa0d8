"""What a torch function returns and writes to, found out without running its kernels.

One run on fake tensors (shapes and dtypes, no data) tells the specs of the outputs, which inputs are written
to in place, which buffers change, and whether random numbers are drawn. Functions that fake tensors cannot
follow (they read values, leave torch, or are TorchScript) are run once for real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from pytorch2jax._dtypes import canonical_dtype_t2j, dtype_j2t
from pytorch2jax._errors import InferenceError, LeafTypeError, Pytorch2JaxError, StateError
from pytorch2jax._internals import TorchDispatchMode, fake_tensor_mode, torch_pytree
from pytorch2jax._torch_state import differentiable_kernels
from pytorch2jax._trees import CONSTANTS, OutputTree, flatten_output, output_paths, static_outputs


class Spec(NamedTuple):
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class TensorSpec(NamedTuple):
    """Shape, dtype and device of a tensor, and which argument it is (for messages)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: str


class Inferred(NamedTuple):
    """What is known of a call before it runs.

    outputs: shape and torch dtype of each flat output.
    specs: the same as JAX sees them.
    tree: how the flat outputs fit together.
    written: which inputs the function writes to in place.
    changed: which of the function's own inputs (parameters, buffers) have another value afterwards.
    random: whether random numbers are drawn.
    needs_grad: whether the function differentiates inside, and so fails under `torch.no_grad()`; None where
        that is not known.
    """

    outputs: tuple[TensorSpec, ...]
    specs: tuple[Spec, ...]
    tree: OutputTree
    written: frozenset[int]
    changed: tuple[int, ...]
    random: bool
    needs_grad: bool | None


# A torch function over flat tensors: returns what the user's function returned, and the values that the
# function's own tensors (the first ones) have afterwards.
FlatCall = Callable[[list[torch.Tensor]], tuple[Any, list[torch.Tensor]]]


def infer(
    name: str,
    call: FlatCall,
    inputs: Sequence[TensorSpec],
    values: Callable[[], list[torch.Tensor]],
    device: torch.device,
    n_own: int = 0,
    left_behind: Callable[[], list[tuple[str, torch.Tensor]]] = list,
) -> Inferred:
    """Find out what `call` returns for inputs of these specs.

    Args:
        name: the function's name, for messages.
        call: the function.
        inputs: the specs of its inputs.
        values: gives real input tensors, owned by nobody else, for the case that fake ones do not do.
        device: where the tensors are.
        n_own: how many of the inputs are the function's own tensors.
        left_behind: tells which tensors a run has left in the function's own attributes, and where.

    Raises:
        StateError: a run reads what the run before has computed from its arguments.
        InferenceError: the function could be run neither on fake nor on real tensors.
    """
    try:
        return _infer_fake(name, call, inputs, device, n_own, left_behind)
    except Pytorch2JaxError:
        raise
    except Exception as error:
        fake_error = error
    try:
        return _infer_real(name, call, inputs, values())
    except Pytorch2JaxError:
        raise
    except Exception as error:
        raise InferenceError(
            f"{name}: running it once to learn its outputs failed: {type(error).__name__}: {error}\n"
            f"Inputs: {', '.join(f'{s.path}: {s.dtype}{list(s.shape)}' for s in inputs) or 'none'}. "
            "If the function only works on other values than these, declare what it returns with "
            f"`output_shapes`. (Before that, fake tensors failed: {type(fake_error).__name__}.)"
        ) from error


def _infer_fake(
    name: str,
    call: FlatCall,
    inputs: Sequence[TensorSpec],
    device: torch.device,
    n_own: int,
    left_behind: Callable[[], list[tuple[str, torch.Tensor]]],
) -> Inferred:
    tracker, fakes = _Tracker(), fake_tensor_mode()
    with torch.random.fork_rng([]), differentiable_kernels(), fakes, tracker:
        tensors = [torch.empty(s.shape, dtype=s.dtype, device=device) for s in inputs]
        tracker.watch(tensors, tensors[n_own:])
        result, needs_grad = run_without_graph(call, tensors)
        inferred = _conclude(name, result, tensors, tracker)._replace(needs_grad=needs_grad)
        kept = [(where, tensor) for where, tensor in left_behind() if tracker.is_derived(tensor)]
    if kept:
        with fakes:
            _check_not_read(name, call, inputs, device, kept)
    return inferred


def _check_not_read(
    name: str,
    call: FlatCall,
    inputs: Sequence[TensorSpec],
    device: torch.device,
    kept: Sequence[tuple[str, torch.Tensor]],
) -> None:
    """Run once more, to see whether that run reads what the first one has kept of its arguments."""
    tracker = _Tracker()
    with differentiable_kernels(), tracker:
        tensors = [torch.empty(s.shape, dtype=s.dtype, device=device) for s in inputs]
        tracker.watch(tensors, [tensor for _, tensor in kept])
        run_without_graph(call, tensors)
    read = sorted({where for where, tensor in kept if tracker.has_read(tensor)})
    if read:
        raise StateError(
            f"{name}: {', '.join(read)}: the forward pass keeps here what it computes from its arguments, and reads it "
            "in the next call, which a function of its arguments cannot. Let `forward` take and return it, or "
            "make it a buffer (`register_buffer`) and convert with state."
        )


def _infer_real(name: str, call: FlatCall, inputs: Sequence[TensorSpec], tensors: list[torch.Tensor]) -> Inferred:
    before = [t.clone() for t in tensors]
    tracker, exposure = _Tracker(), _Exposure()
    with torch.random.fork_rng([]), tracker, exposure:
        tracker.watch(tensors)
        result, needs_grad = run_without_graph(call, tensors)
        inferred = _conclude(name, result, tensors, tracker)._replace(needs_grad=needs_grad)
    if exposure.happened:  # somebody outside of torch may write on another occasion
        return inferred._replace(written=frozenset(range(len(tensors))))
    differing = {i for i, (new, old) in enumerate(zip(tensors, before, strict=True)) if not _same_bits(new, old)}
    return inferred._replace(written=inferred.written | differing)


def run_without_graph(call: FlatCall, tensors: list[torch.Tensor]) -> tuple[tuple[Any, list[torch.Tensor]], bool]:
    """Call without recording a graph, or with one for functions that differentiate inside (second result)."""
    with torch.no_grad():
        try:
            return call(list(tensors)), False
        except RuntimeError as error:
            if "require grad" not in str(error):
                raise
            with torch.enable_grad():
                return call(list(tensors)), True


def _conclude(
    name: str, result: tuple[Any, list[torch.Tensor]], tensors: list[torch.Tensor], tracker: _Tracker
) -> Inferred:
    out, after = result
    leaves, tree = flatten_output(out, is_output_leaf)
    paths = output_paths(tree)
    check_static_outputs(name, tree)
    leaves = [as_output_tensor(name, path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
    written = tracker.written()
    changed = tuple(i for i, tensor in enumerate(after) if tensor is not tensors[i] or i in written)
    leaves += [after[i] for i in changed]
    paths += [f"state {i}" for i in changed]
    outputs = tuple(TensorSpec(tuple(t.shape), t.dtype, path) for t, path in zip(leaves, paths, strict=True))
    specs = tuple(Spec(o.shape, canonical_dtype_t2j(o.dtype)) for o in outputs)
    return Inferred(outputs, specs, tree, written, changed, tracker.random, None)


def is_output_leaf(value: Any) -> bool:
    """Whether a part of an output becomes an array: tensors, NumPy arrays and Python numbers."""
    return isinstance(value, (torch.Tensor, np.ndarray, np.generic, bool, int, float, complex))


def as_output_tensor(name: str, path: str, value: Any) -> torch.Tensor:
    """An output leaf as a dense tensor; Python numbers get JAX's default dtypes."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_nested:
            raise LeafTypeError(
                f"{name}: {path}: expected a dense tensor, got layout {value.layout}, quantized="
                f"{value.is_quantized}, nested={value.is_nested}. Make it dense before returning it."
            )
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.as_tensor(np.array(value))
    wide = {float: torch.float64, complex: torch.complex128}.get(type(value))
    return torch.tensor(value, dtype=wide)


def check_static_outputs(name: str, tree: OutputTree) -> None:
    """Raise for parts of an output that are neither tensors nor plain constants."""
    for path, value in static_outputs(tree):
        if value is not None and not isinstance(value, CONSTANTS):
            raise LeafTypeError(
                f"{name}: {path}: expected tensors, numbers, strings or None in what the function returns, "
                f"in containers that torch's pytrees know, got {type(value).__name__}. Return its tensors in "
                "a tuple or dict, or register its type with `torch.utils._pytree.register_pytree_node`."
            )


def declared(name: str, shapes: Any, n_inputs: int) -> Inferred:
    """What is known of a call whose outputs the user declared: nothing is run, everything else is assumed.

    Args:
        name: the function's name, for messages.
        shapes: a pytree of objects with `shape` and `dtype`.
        n_inputs: how many inputs the call has.
    """
    leaves, tree = flatten_output(shapes, lambda x: hasattr(x, "shape") and hasattr(x, "dtype"))
    for path, value in static_outputs(tree, "output_shapes"):
        if value is not None:
            raise LeafTypeError(
                f"{name}: {path}: expected an object with `shape` and `dtype` (jax.ShapeDtypeStruct, an array "
                f"or a tensor), got {type(value).__name__}."
            )
    outputs, specs = [], []
    for path, leaf in zip(output_paths(tree), leaves, strict=True):
        dtype = leaf.dtype if isinstance(leaf.dtype, torch.dtype) else dtype_j2t(leaf.dtype)
        outputs.append(TensorSpec(tuple(leaf.shape), dtype, path))
        specs.append(Spec(tuple(leaf.shape), canonical_dtype_t2j(dtype)))
    everything = frozenset(range(n_inputs))
    return Inferred(tuple(outputs), tuple(specs), tree, everything, (), True, None)


class _Tracker(TorchDispatchMode):
    """Sees every operator: which storages are written to, and whether random numbers are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.random = False
        self._written: set[int] = set()
        self._watched: list[int] = []
        self._sources: frozenset[int] = frozenset()
        self._derived: set[int] = set()
        self._read: set[int] = set()
        self._alive: list[Any] = []  # so that no storage gets the address of another one

    def watch(self, tensors: Sequence[torch.Tensor], sources: Sequence[torch.Tensor] = ()) -> None:
        """Look out for writes to `tensors`, and for everything that is computed from `sources`."""
        self._watched = [_storage(t) for t in tensors]
        self._derived = {_storage(t) for t in sources}
        self._sources = frozenset(self._derived)

    def is_derived(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was computed from the sources."""
        return _storage(tensor) in self._derived

    def has_read(self, source: torch.Tensor) -> bool:
        """Whether an operator had this source for an input."""
        return _storage(source) in self._read

    def written(self) -> frozenset[int]:
        return frozenset(i for i, storage in enumerate(self._watched) if storage in self._written)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and not _draws_nothing(func, args, kwargs):
            self.random = True
        for value in _written_arguments(func._schema, args, kwargs):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor):
                    self._written.add(_storage(tensor))
        out = func(*args, **kwargs)
        if self._derived and not _is_factory(func):
            self._follow(args, kwargs, out)
        return out

    def _follow(self, args: Any, kwargs: Any, out: Any) -> None:
        storages = {_storage(t) for t in torch_pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self._read |= storages & self._sources
        if storages & self._derived:
            outputs = [t for t in torch_pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            self._derived.update(map(_storage, outputs))
            self._alive += outputs


def _is_factory(func: Any) -> bool:
    """Whether an operator takes nothing but shape and dtype from its tensors: `zeros_like`, `new_ones`."""
    name = func._schema.name.removeprefix("aten::")
    return name.endswith("_like") or name.startswith("new_")


def _arguments(schema: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for index, argument in enumerate(schema.arguments):
        yield (
            argument,
            args[index] if index < len(args) else kwargs.get(argument.name, argument.default_value),
        )


# Batch normalisations of the older kind update these without saying so in their schema.
_RUNNING_STATISTICS = ("running_mean", "running_var")


def _written_arguments(schema: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    unannounced = not schema.is_mutable and any(a.name in _RUNNING_STATISTICS for a in schema.arguments)
    if not schema.is_mutable and not unannounced:
        return
    training = True
    for argument, value in _arguments(schema, args, kwargs):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield value
        if argument.name in ("training", "train", "use_input_stats"):
            training = value is not False
    if unannounced and training:
        yield from (v for a, v in _arguments(schema, args, kwargs) if a.name in _RUNNING_STATISTICS)


def _draws_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator that may draw random numbers was told not to (attention without dropout)."""
    return any(
        (argument.name in ("dropout_p", "dropout") and value == 0.0)
        or (argument.name in ("train", "training") and value is False)
        for argument, value in _arguments(func._schema, args, kwargs)
    )


class _Exposure(TorchFunctionMode):
    """Notices when memory is handed to code that torch cannot watch."""

    _EXPOSING = frozenset({torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.data_ptr, torch.Tensor.__dlpack__})

    def __init__(self) -> None:
        super().__init__()
        self.happened = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._EXPOSING:
            self.happened = True
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    flat = (t.detach().reshape(-1).view(torch.uint8) for t in (left, right))
    return torch.equal(*flat)
