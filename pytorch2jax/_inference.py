"""What a torch function returns and writes to, found out without running its kernels.

One run on fake tensors (shapes and dtypes, no data) tells the specs of the outputs, which inputs are written
to in place, which buffers change, and whether random numbers are drawn. Functions that fake tensors cannot
follow (they read values, leave torch, or are TorchScript) are run once for real.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from pytorch2jax._autograd_functions import NoticedFunctions, noticed_functions
from pytorch2jax._containers import CONSTANTS
from pytorch2jax._control_flow import RUN, TRIED, Noticed
from pytorch2jax._destination import Maker
from pytorch2jax._dtypes import canonical_dtype_t2j, dtype_j2t
from pytorch2jax._errors import (
    CaptureError,
    InferenceError,
    LeafTypeError,
    OutputMismatchError,
    Pytorch2JaxError,
    StateError,
)
from pytorch2jax._holders import Forgotten, forget, holders_of, n_uses_of_disabled
from pytorch2jax._internals import fake_tensor_mode, operators_on_functions
from pytorch2jax._questions import CodeThatRuns, Question
from pytorch2jax._torch_state import forked_generators, host_generators
from pytorch2jax._tracking import Exposure, Tracker, storage_of
from pytorch2jax._trees import OutputTree, flatten_output, output_paths, static_outputs, tensors_in


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
    host_random: whether numbers come from NumPy's or Python's global generators, too.
    certain: whether every call does the same, as far as one can know: False where values decide.
    retains: whether the function keeps its arguments after the call.
    keeps: whether it keeps these, or what it computes from them or from its own tensors.
    forward_mode_errs: whether torch's forward mode is wrong for it, without an error: because grad mode is turned off
        inside, which forward mode ignores, because of `asks`, or because of an operator.
    marks: whether it does something to tensors as objects: their flags, their gradients, what they point to.
    asks: whether it wants to know of tensors whether they require a gradient, which forward mode and `torch.vmap` deny.
    copies: whether it copies tensors (`copy.deepcopy`), which torch allows for leaves of a graph only.
    n_operators: how many operators it runs.
    maker: which of them makes the output, where that is one tensor.
    operates_on_functions: whether it calls an operator on functions (`torch.cond`), so that any call needs
        `operators_on_functions`.
    hand_written: whether it calls a `torch.autograd.Function` of the user's, whose backward may look at parameters as
        objects.
    runs_others: whether one of these is given a function or module to run.
    autocasts: whether it turns autocast on, which `torch.vmap` ignores.
    flattens: whether nested batches have to be one, because of an operator.
    loops: whether batches have to be loops, because of an operator.
    hooks: whether it registers hooks on tensors, or its parameters have some, which act in backward passes alone.
    registers_hooks: whether it registers them itself.
    """

    outputs: tuple[TensorSpec, ...]
    specs: tuple[Spec, ...]
    tree: OutputTree
    written: frozenset[int]
    changed: tuple[int, ...]
    random: bool
    needs_grad: bool | None
    host_random: bool = False
    certain: bool = True
    retains: bool = False
    keeps: bool = False
    forward_mode_errs: bool = False
    marks: bool = True
    asks: bool = False
    copies: bool = False
    n_operators: int = sys.maxsize
    maker: Maker | None = None
    operates_on_functions: bool = False
    hand_written: bool = True
    runs_others: bool = True
    autocasts: bool = False
    flattens: bool = False
    loops: bool = False
    hooks: bool = False
    registers_hooks: bool = False


# A torch function over flat tensors: returns what the user's function returned, and the values that the
# function's own tensors (the first ones) have afterwards.
FlatCall = Callable[[list[torch.Tensor]], tuple[Any, list[torch.Tensor]]]


class Surroundings(NamedTuple):
    """What a function has besides its arguments.

    has_hooks: whether its own tensors have hooks on their gradients.
    translates: whether it is to be translated to JAX.
    n_own: how many of its inputs, the first ones, are its own tensors.
    left_behind: tells which tensors a run has left in its attributes, and where.
    put_back: undoes that.
    n_given: how many of these the caller passes.
    originals: tensors that it must not use, because others stand for them, with their names; for `n_given`.
    held: tensors in its plain attributes, with their addresses.
    advice: what to do where inference fails.
    quiet: the keyword argument with which it may not change its state, for messages.
    """

    has_hooks: bool = False
    translates: bool = False
    n_own: int = 0
    n_given: int = 0
    left_behind: Callable[[], list[tuple[str, torch.Tensor]]] = list
    put_back: Callable[[], None] = lambda: None
    originals: Callable[[int], list[tuple[str, torch.Tensor]]] = lambda n_given: []
    held: Callable[[], list[tuple[str, torch.Tensor]]] = list
    advice: str = "declare what it returns with `output_shapes`"
    quiet: str = ""


def infer(
    name: str,
    call: FlatCall,
    inputs: Sequence[TensorSpec],
    values: Callable[[], list[torch.Tensor]],
    device: torch.device,
    around: Surroundings,
) -> Inferred:
    """Find out what `call` returns for inputs of these specs.

    Args:
        name: the function's name, for messages.
        call: the function.
        inputs: the specs of its inputs.
        values: gives real input tensors, owned by nobody else, for the case that fake ones do not do.
        device: where the tensors are.
        around: what the function has besides its arguments.

    Raises:
        StateError: a run reads what the run before has computed from its arguments.
        InferenceError: the function could be run neither on fake nor on real tensors.
    """
    trackers: list[Tracker] = []
    with torch.inference_mode(False), forked_generators(host=True):
        try:
            inferred, asks_for_types = _infer_fake(name, call, inputs, device, around, trackers)
            reason = "it asks for types of tensors" if asks_for_types else "tensors that it keeps"
        except Pytorch2JaxError:
            around.put_back()
            for tracker in trackers:
                forget(tracker.survivors())
            raise
        except Exception as error:
            inferred, asks_for_types, reason = None, False, type(error).__name__
        around.put_back()
        forgotten = _forget_survivors(name, trackers, refuses=inferred is not None)
        if inferred is not None and not (forgotten or asks_for_types):
            return inferred
        n_uses = n_uses_of_disabled()
        try:
            inferred = _infer_real(name, call, inputs, values, around)
            if forgotten:
                forgotten.close_gaps()
            return inferred
        except Pytorch2JaxError:
            raise
        except Exception as error:
            if n_uses_of_disabled() > n_uses:
                raise StateError(_KEEPS.format(name=name, where="an attribute")) from error
            raise InferenceError(
                f"{name}: running it once to learn its outputs failed: {type(error).__name__}: {error}\n"
                f"Inputs: {_listed_inputs(inputs, around.n_own)}. "
                f"{_advice(error, inputs, around, reads_values=reason != type(error).__name__)} (On tensors without "
                f"values: {reason}.)"
            ) from error


_WANTS_INT32 = re.compile(r"int32|torch\.int\b|\bInt\b|IntTensor|dtype int\b")


def _advice(error: Exception, inputs: Sequence[TensorSpec], around: Surroundings, *, reads_values: bool) -> str:
    if _WANTS_INT32.search(str(error)) and any(spec.dtype == torch.int64 for spec in inputs):
        return (
            "Torch gets JAX's int32 arrays as int64; where the model wants int32, have it convert them: `x.int()`."
            if around.n_own
            else "Torch gets JAX's int32 arrays as int64; where it wants int32, `torch2jax(fn, widen_ints=False)` "
            "keeps it."
        )
    if not reads_values:  # on tensors without values it failed in the same way
        return "Check the arguments, and that torch runs on them."
    return (
        "The function reads values, and was run on those of the examples, if it has some of this shape, else on "
        f"made-up ones. If it works on others, {around.advice}."
    )


_SHOWN_INPUTS = 12


def _listed_inputs(inputs: Sequence[TensorSpec], n_own: int) -> str:
    """The arguments, then how many tensors of the module's own there are."""
    arguments = [f"{s.path}: {str(s.dtype).removeprefix('torch.')}{list(s.shape)}" for s in inputs[n_own:]]
    shown = ", ".join(arguments[:_SHOWN_INPUTS]) or "no arguments"
    if len(arguments) > _SHOWN_INPUTS:
        shown += f" and {len(arguments) - _SHOWN_INPUTS} more"
    return f"{shown}; and {n_own} parameters and buffers" if n_own else shown


def infer_without_running(
    name: str, call: FlatCall, inputs: Sequence[TensorSpec], device: torch.device, around: Surroundings
) -> Inferred | None:
    """What a run on fake tensors alone says of `call`; None where they do not tell.

    Args:
        name, call, inputs, device, around: as for `infer`.
    """
    trackers: list[Tracker] = []
    with torch.inference_mode(False), forked_generators(host=True):
        try:
            inferred, asks_for_types = _infer_fake(name, call, inputs, device, around, trackers)
            around.put_back()
            forgotten = _forget_survivors(name, trackers, refuses=False)
            if forgotten:
                forgotten.close_gaps()
            return None if forgotten or asks_for_types else inferred
        except Exception:
            around.put_back()
            forget([tensor for tracker in trackers for tensor in tracker.survivors()]).close_gaps()
            return None


def _infer_fake(
    name: str,
    call: FlatCall,
    inputs: Sequence[TensorSpec],
    device: torch.device,
    around: Surroundings,
    trackers: list[Tracker],
) -> tuple[Inferred, bool]:
    host = host_generators()
    exposure = Exposure()
    with fake_tensor_mode():
        tensors = [torch.empty(s.shape, dtype=s.dtype, device=device) for s in inputs]
        tracker = Tracker(tensors, tensors[around.n_own :])
        trackers.append(tracker)
        noticed = Noticed(TRIED)
        with tracker, operators_on_functions(noticed), noticed_functions() as functions, CodeThatRuns() as code:
            result, needs_grad = run_without_graph(call, tensors, exposure)
            inferred = _conclude(name, result, tensors, tracker)._replace(needs_grad=needs_grad)
        questions = code.questions()
        _check_questions(name, around, questions)
        if code.seeds and around.translates:
            raise CaptureError(
                f"{name}: sets the seed of torch's generator, expected one whose random numbers come from the JAX key "
                'alone. Take the seeding out and pass keys (`rng=`), or use `backend="torch"`, where it counts.'
            )
        kept = [(where, tensor) for where, tensor in around.left_behind() if tracker.is_derived(tensor)]
        if kept:
            _check_not_read(name, call, inputs, device, kept)
    _check_foreign(name, around, tracker)
    inferred = _noticed(inferred, around, tracker, exposure, noticed)
    written = frozenset(range(len(inputs))) if exposure.happened else exposure.outputs_among(tensors)
    inferred = inferred._replace(written=inferred.written | written)
    inferred = _with_functions(inferred, functions)._replace(autocasts=code.autocasts)
    return _with_host_randomness(inferred, host), bool(questions)


def _noticed(
    inferred: Inferred, around: Surroundings, tracker: Tracker, exposure: Exposure, operators: Noticed
) -> Inferred:
    """What those that watched a run say about derivatives, and about tensors as objects."""
    hooks = exposure.hooks or around.has_hooks
    errs = exposure.cuts or exposure.asks or hooks or tracker.has_wrong_tangents
    return inferred._replace(
        hooks=hooks,
        registers_hooks=exposure.hooks,
        flattens=tracker.has_wrong_nesting,
        loops=tracker.has_wrong_batches,
        forward_mode_errs=errs,
        marks=exposure.marks,
        asks=exposure.asks,
        copies=exposure.copies,
        operates_on_functions=operators.any,
    )


def _with_functions(inferred: Inferred, functions: NoticedFunctions) -> Inferred:
    classes = [cls for cls in functions.classes if cls.__module__ != torch.utils.checkpoint.__name__]
    return inferred._replace(hand_written=bool(classes), runs_others=functions.run_others and bool(classes))


def _check_questions(name: str, around: Surroundings, questions: Sequence[Question]) -> None:
    for question in questions:
        if around.translates or (question.of_parameters and around.n_own):
            kind = "nn.Parameter" if question.of_parameters else "torch.Tensor"
            way_out = "" if question.of_parameters else ', or use `backend="torch"`, where they are'
            raise CaptureError(
                f"{name}: asks at {question.where} whether a type is exactly {kind}, which those of JAX's tensors are "
                f"not. Ask `isinstance(x, {kind})`{way_out}."
            )


def _check_foreign(name: str, around: Surroundings, tracker: Tracker) -> None:
    """Complain about tensors that the run took from elsewhere, or changed there."""
    used = [where for where, tensor in around.originals(around.n_given) if tracker.has_used(tensor)]
    if used:
        raise StateError(
            f"{name}: {', '.join(used)}: used by the forward pass from somewhere else than the module's own "
            "attributes (a closure, a hook, a plain list or object), or from what was made of them before (`.data`, a "
            "view, a product), where the parameters that JAX passes cannot get. Reach it through `self` of the module "
            "that owns it."
        )
    written = [where for where, tensor in around.held() if tracker.has_written(tensor)]
    if written:
        raise StateError(
            f"{name}: {', '.join(written)}: a tensor that the forward pass writes to and that is no buffer, so that it "
            "would carry something from one call to the next. Make it a buffer (`register_buffer`) and convert "
            "with state."
        )


def _with_host_randomness(inferred: Inferred, before: Any) -> Inferred:
    """Whether NumPy's or Python's global generators have moved on since `before`."""
    (python, numpy), (python_before, numpy_before) = host_generators(), before
    same = python == python_before and all(map(np.array_equal, numpy, numpy_before))
    return inferred if same else inferred._replace(random=True, host_random=True)


def _forget_survivors(name: str, trackers: Sequence[Tracker], *, refuses: bool) -> Forgotten | None:
    """The fake tensors that the function has kept outside of its module's attributes, if any; they are taken away.

    Raises:
        InferenceError: they could not, and this `refuses`.
    """
    survivors = [tensor for tracker in trackers for tensor in tracker.survivors()]
    if not survivors:
        return None
    forgotten = forget(survivors)
    del survivors
    if not refuses or (forgotten.buries and not forgotten.refused):
        return forgotten
    if any(tracker.survivors() for tracker in trackers):
        holders = ", ".join(sorted({t.__name__ for t in forgotten.refused})) or "an unknown place"
        raise InferenceError(
            f"{name}: keeps tensors from one call to the next in {holders}, expected a function of its arguments. "
            "What it keeps now has no data, because shapes were being found out: make it anew, fill it by one "
            "call on torch tensors before wrapping, or keep it in a dict, where it can be found."
        )
    return forgotten


def _check_not_read(
    name: str,
    call: FlatCall,
    inputs: Sequence[TensorSpec],
    device: torch.device,
    kept: Sequence[tuple[str, torch.Tensor]],
) -> None:
    """Run once more, to see whether that run reads what the first one has kept of its arguments."""
    tensors = [torch.empty(s.shape, dtype=s.dtype, device=device) for s in inputs]
    with Tracker(tensors, [tensor for _, tensor in kept]) as tracker, operators_on_functions(TRIED):
        run_without_graph(call, tensors)
    read = sorted({where for where, tensor in kept if tracker.has_read(tensor)})
    if read:
        raise StateError(
            f"{name}: {', '.join(read)}: the forward pass keeps here what it computes from its arguments, and reads it "
            "in the next call, which a function of its arguments cannot. Let `forward` take and return it, or "
            "make it a buffer (`register_buffer`) and convert with state."
        )


def _infer_real(
    name: str,
    call: FlatCall,
    inputs: Sequence[TensorSpec],
    values: Callable[[], list[torch.Tensor]],
    around: Surroundings,
) -> Inferred:
    tensors = values()
    before, host = [t.clone() for t in tensors], host_generators()
    exposure = Exposure()
    noticed = Noticed(RUN)
    with (
        Tracker(tensors, [t for t in tensors if not t.is_meta]) as tracker,
        operators_on_functions(noticed),
        noticed_functions() as functions,
        CodeThatRuns() as code,
    ):
        try:
            result, needs_grad = run_without_graph(call, tensors, exposure)
        except BaseException:
            around.put_back()
            forget(tracker.kept(sure=False))
            raise
        inferred = _conclude(name, result, tensors, tracker)
    inferred = _with_functions(inferred, functions)._replace(autocasts=code.autocasts)
    _check_foreign(name, around, tracker)
    inferred = _noticed(inferred, around, tracker, exposure, noticed)
    differing = {i for i, (new, old) in enumerate(zip(tensors, before, strict=True)) if not _same_bits(new, old)}
    # On other values it may write to others of its arguments. Of its own tensors, which are many, only those are
    # copied that this run wrote to; a write to another one is an error at run time.
    written = inferred.written | exposure.outputs_among(tensors) | differing | set(range(around.n_own, len(tensors)))
    if exposure.happened:  # somebody outside of torch may write on another occasion
        written = frozenset(range(len(tensors)))
    inferred = inferred._replace(written=frozenset(written), needs_grad=needs_grad, certain=False)
    storages = [StorageWeakRef(t.untyped_storage()) for t in tensors[around.n_own :]]
    inferred = _with_host_randomness(inferred, host)
    del result, tensors, before
    around.put_back()
    if kept := tracker.kept():
        _check_not_used(name, call, values, kept)
        around.put_back()
        inferred = inferred._replace(keeps=True)
    del kept
    return inferred._replace(retains=not all(s.expired() for s in storages))


def _check_not_used(
    name: str, call: FlatCall, values: Callable[[], list[torch.Tensor]], kept: list[torch.Tensor]
) -> None:
    """Run once more, to see whether that run uses what the first one has kept somewhere."""
    holders = [holders_of([tensor], kept) for tensor in kept]  # the run may put something else there
    fresh = values()
    with Tracker(fresh, [*kept, *(t for t in fresh if not t.is_meta)]) as tracker, operators_on_functions(RUN):
        (out, _), _ = run_without_graph(call, fresh)
    returned = set(map(storage_of, tensors_in(out)))
    used = [tracker.has_read(t) or storage_of(t) in returned for t in kept]
    del out, fresh
    if not any(used):
        return
    where = sorted({name for names, is_used in zip(holders, used, strict=True) if is_used for name in names})
    forget([*kept, *tracker.kept()])
    raise StateError(_KEEPS.format(name=name, where=", ".join(where) or "an attribute"))


_KEEPS = (
    "{name}: keeps what it computes from its arguments or parameters in {where}, and uses it in the next call, which a "
    "function of its arguments cannot. Compute it in each call, or, where it depends on nothing that JAX passes, "
    "compute it before."
)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    flat = (t.detach().reshape(-1).view(torch.uint8) for t in (left, right))
    return torch.equal(*flat)


def run_without_graph(
    call: FlatCall,
    tensors: list[torch.Tensor],
    watch: contextlib.AbstractContextManager[Any] | None = None,
) -> tuple[tuple[Any, list[torch.Tensor]], bool]:
    """Call without recording a graph, or with one for functions that differentiate inside (second result)."""
    with torch.no_grad(), watch or contextlib.nullcontext():
        try:
            return call(list(tensors)), False
        except RuntimeError as error:
            if "require grad" not in str(error):
                raise
            with torch.enable_grad():
                return call(list(tensors)), True


def _conclude(
    name: str, result: tuple[Any, list[torch.Tensor]], tensors: list[torch.Tensor], tracker: Tracker
) -> Inferred:
    out, after = result
    leaves, tree = flatten_output(out, is_output_leaf)
    paths = output_paths(tree)
    check_static_outputs(name, tree)
    leaves = [as_output_tensor(name, path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
    written = tracker.written()
    renewed = tracker.changed()
    changed = tuple(i for i, tensor in enumerate(after) if tensor is not tensors[i] or i in renewed)
    leaves += [after[i] for i in changed]
    paths += [f"state {i}" for i in changed]
    outputs = tuple(TensorSpec(tuple(t.shape), t.dtype, path) for t, path in zip(leaves, paths, strict=True))
    specs = tuple(Spec(o.shape, canonical_dtype_t2j(o.dtype)) for o in outputs)
    inferred = Inferred(outputs, specs, tree, written, changed, tracker.random, None, n_operators=tracker.n_operators)
    return inferred._replace(maker=tracker.maker(leaves[0])) if len(leaves) == 1 else inferred


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
            cache = "Call it with `use_cache=False`, return" if "Cache" in type(value).__name__ else "Return"
            raise LeafTypeError(
                f"{name}: {path}: expected tensors, numbers, strings or None in what the function returns, in "
                f"containers that torch's pytrees know, got {type(value).__name__}. {cache} its tensors in a tuple or "
                "dict, or register its type with `torch.utils._pytree.register_pytree_node`."
            )


def declared(name: str, shapes: Any, inputs: Sequence[TensorSpec], state: Sequence[int]) -> Inferred:
    """What is known of a call whose outputs the user declared: nothing is run, everything else is assumed.

    Args:
        name: the function's name, for messages.
        shapes: a pytree of objects with `shape` and `dtype`.
        inputs: the specs of the call's inputs.
        state: which of them it may give new values, as buffers.
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
    for spec in (inputs[i] for i in state):
        outputs.append(spec)
        specs.append(Spec(tuple(spec.shape), canonical_dtype_t2j(spec.dtype)))
    everything, changed = frozenset(range(len(inputs))), tuple(state)
    return Inferred(
        tuple(outputs), tuple(specs), tree, everything, changed, True, None, keeps=True, operates_on_functions=True
    )


def places_of_declared(declared: Sequence[str], found: Sequence[str]) -> list[int]:
    """Where the leaves of a declaration are among those that a function returned: by address, else in order."""
    places = {path: place for place, path in enumerate(found)}
    return [places[path] for path in declared] if places.keys() == set(declared) else list(range(len(found)))


def check_declared(name: str, inferred: Inferred, declared: Inferred) -> list[int]:
    """Compare what a function returns with what its user declared, leaf by leaf, in whatever containers.

    Returns:
        Where each leaf of the declaration is among the outputs.

    Raises:
        OutputMismatchError: they differ.
    """
    n_outputs = len(declared.outputs) - len(declared.changed)
    expected, got = declared.specs[:n_outputs], inferred.specs[: len(inferred.specs) - len(inferred.changed)]
    if len(expected) != len(got):
        raise OutputMismatchError(
            f"{name}: output_shapes: expected a declaration of what the function returns, "
            f"{inferred.tree.describe()} ({len(got)} tensors), got {declared.tree.describe()} ({len(expected)}). The "
            "containers may differ, the number of tensors may not."
        )
    places = places_of_declared(output_paths(declared.tree), output_paths(inferred.tree))
    for leaf, spec, place in zip(declared.outputs, expected, places, strict=False):
        found = got[place]
        if (tuple(spec.shape), spec.dtype) != (tuple(found.shape), found.dtype):
            raise OutputMismatchError(
                f"{name}: {leaf.path}: expected {spec.dtype}{list(spec.shape)}, as declared with `output_shapes`, got "
                f"{found.dtype}{list(found.shape)}. Declare that, or leave `output_shapes` out."
            )
    return places
