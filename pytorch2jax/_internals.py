"""The place that knows private or version-dependent names of jax and torch.

Apart from `_autograd_functions.py` and `xla/_internals.py`, everything else in the package imports only documented
names of the two frameworks. `make versions` tests the lowest and the newest versions that `pyproject.toml` allows.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.export
import jax.extend.backend
import jax.extend.core
import numpy as np
import torch
import torch.utils._pytree as torch_pytree
from jax._src import checkify, core as jax_core, dispatch, effects, util, xla_bridge
from jax._src.array import ArrayImpl as _ArrayImpl
from jax._src.core import trace_state_clean
from jax._src.lib import _jax
from jax._src.sharding_impls import ShardingContext, parse_flatten_op_sharding
from jax.experimental import io_callback
from jax.experimental.buffer_callback import ExecutionContext, buffer_callback
from jax.experimental.custom_partitioning import SdyShardingRule as ShardingRule, custom_partitioning
from jax.interpreters import ad, batching, mlir, partial_eval
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from torch._ops import HigherOrderOperator, _higher_order_ops
from torch.autograd.graph import GradientEdge, get_gradient_edge as gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DETACHING",
    "DRAWS_FROM_TORCH",
    "ExecutionContext",
    "GradientEdge",
    "HigherOrderOperator",
    "InconclusiveDimensionOperation",
    "Primitive",
    "RefusingTrace",
    "ShapedArray",
    "ShardingRule",
    "TorchDispatchMode",
    "ad",
    "alias_with_storage",
    "array_from_tensor",
    "axes_of_sharding",
    "batching",
    "buffer_callback",
    "current_trace",
    "custom_partitioning",
    "explicit_axes",
    "fake_tensor_mode",
    "flat_vmap",
    "flatten_torch_node",
    "float_checks",
    "generic_associative_scan",
    "gradient_edge",
    "has_backends",
    "has_memory",
    "has_only_host",
    "hold_weakly",
    "io_callback",
    "is_any_autocast_enabled",
    "is_batched",
    "is_deterministic",
    "is_differentiated",
    "is_fake",
    "is_functorch_active",
    "is_held_elsewhere",
    "is_inside_autograd_function",
    "is_python_thread",
    "is_symbolic",
    "is_turning_grad_off",
    "is_under_dual_level",
    "jit_disabled",
    "keeps_graph",
    "load_forward_mode",
    "lower_with_devices",
    "math_attention",
    "mlir",
    "n_devices",
    "n_partitions",
    "operators_on_functions",
    "output_aval",
    "outside_of_torch_compile",
    "outside_of_traces",
    "register_dead_code_rule",
    "register_float_check",
    "run_backward",
    "set_grad_enabled",
    "set_vmap_fallback",
    "storage_address",
    "storage_users",
    "tensor_from_capsule",
    "torch_node_type",
    "torch_pytree",
    "trace_state_clean",
    "tracing_with",
    "uncommitted",
    "unflatten_torch_node",
    "unwrap_if_dead",
    "vary_together",
    "with_mesh",
    "without_float_checks",
    "without_subclasses",
    "x64_enabled",
]

Primitive = jax.extend.core.Primitive
ShapedArray = jax.core.ShapedArray

# `torch.from_dlpack` spends half of its time on negotiating streams and copies, which a capsule that XLA
# has just made for this very call does not need.
tensor_from_capsule: Callable[[Any], torch.Tensor] = torch._C._from_dlpack


def array_from_tensor(tensor: torch.Tensor, device: Any) -> jax.Array:
    """Take over the memory of a contiguous tensor on the host, without a copy if it is aligned to 64 bytes."""
    if _array_from_capsule is None:
        return jax.dlpack.from_dlpack(tensor)
    # `jax.dlpack.from_dlpack` takes several times as long, and narrows 64-bit dtypes.
    return _array_from_capsule(torch.utils.dlpack.to_dlpack(tensor), device, None)


def uncommitted(array: jax.Array) -> jax.Array:
    """The same array on the default device, free to follow others to their devices, as results of JAX are.

    DLPack commits arrays to their device; a program with such arguments is compiled again for its own results.
    """
    if array.devices() != {jax.devices()[0]} or jax.config.jax_default_device is not None:  # type: ignore[attr-defined]
        return array
    arrays: list[Any] = [array]
    return _ArrayImpl(array.aval, array.sharding, arrays, committed=False, _skip_checks=True)


_Effect: Any = getattr(jax.extend.core, "Effect", effects.Effect)  # public since jax 0.10


class DrawsFromTorch(_Effect):  # type: ignore[misc]
    """The effect of drawing from torch's global generator; its text is part of JAX's error messages.

    `jax.checkpoint` refuses it, rightly: it would draw other numbers when it runs the forward again.
    """

    def __repr__(self) -> str:
        return "random numbers of torch without a JAX key (pass a key to the torch function, `rng=key`)"


DRAWS_FROM_TORCH = DrawsFromTorch()
effects.lowerable_effects.add_type(DrawsFromTorch)
effects.control_flow_allowed_effects.add_type(DrawsFromTorch)

# `torch.no_grad()` takes a microsecond, which is a tenth of a small call.
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
is_deterministic: Callable[[], bool] = torch._C._get_deterministic_algorithms
_array_from_capsule: Callable[..., jax.Array] | None = getattr(_jax, "dlpack_managed_tensor_to_buffer", None)
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled


def hold_weakly(cls: type) -> None:
    """Let JAX's cache of abstract evaluations refer weakly to instances of a class among its keys.

    Otherwise it keeps the last 2048 of them, with the torch modules that they run. Where JAX has no such set,
    it does.
    """
    types: set[type] | None = getattr(util, "weakref_cache_key_types", None)
    if types is not None:
        types.add(cls)


@contextlib.contextmanager
def fake_tensor_mode() -> Iterator[None]:
    """A context in which torch operations compute shapes and dtypes only.

    Torch logs errors of fake tensors; here they are an answer. And autocast would keep them, as weights that it has
    cast already.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # 40 ms to import: only when it is needed

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    quiet, logger.disabled = logger.disabled, True
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        logger.disabled = quiet


def vary_together(arrays: Sequence[Any]) -> Sequence[Any]:
    """Inside of `jax.shard_map`: the arrays, each varying over all the axes over which one of them does.

    JAX does so for its own operations; gradients of what did not vary are then summed over the axes.
    """
    axes = [_varying(jax.typeof(a)) for a in arrays]
    together: frozenset[Any] = frozenset().union(*axes)
    if not together:
        return arrays
    return [
        a if own == together else _made_varying(a, tuple(together - own)) for a, own in zip(arrays, axes, strict=True)
    ]


def _made_varying(array: Any, axes: tuple[Any, ...]) -> Any:
    if hasattr(jax.lax, "pcast"):  # since jax 0.9
        return jax.lax.pcast(array, axes, to="varying")
    return jax.lax.pvary(array, axes)  # type: ignore[attr-defined]


def output_aval(shape: tuple[int, ...], dtype: Any, inputs: Sequence[Any]) -> ShapedArray:
    """What JAX knows of an output; inside of `jax.shard_map` it varies as the inputs do."""
    if not inputs or not _varying(inputs[0]):
        return ShapedArray(shape, dtype)
    sharding = NamedSharding(inputs[0].sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return ShapedArray(shape, dtype, sharding=sharding, **{_VARYING: getattr(inputs[0], _VARYING)})


_VARYING = "manual_axis_type" if hasattr(ShapedArray((), np.dtype("float32")), "manual_axis_type") else "vma"


def _varying(aval: Any) -> frozenset[Any]:
    """The mesh axes over which a value varies."""
    axes: Any = getattr(aval, _VARYING, frozenset())
    return frozenset(getattr(axes, "varying", axes))


def explicit_axes(aval: Any) -> tuple[str, ...]:
    """The explicit axes of its mesh along which an array is sharded."""
    sharding = getattr(aval, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return ()
    types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in sharding.spec]
    return tuple(axis for entry in entries for axis in entry if types.get(axis) is AxisType.Explicit)


def axes_of_sharding(mesh: Any, sharding: Any) -> list[tuple[str, ...]]:
    """Over which axes of a mesh each axis of an array is split, for a sharding as XLA has it; none if it is mixed."""
    if mesh.empty or sharding is None:
        return []
    try:
        spec = parse_flatten_op_sharding(sharding._hlo_sharding, mesh)[0]
    except AssertionError:  # a part of an axis of the mesh
        return []
    return [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]


def n_partitions(context: Any) -> int:
    """Over how many devices XLA itself partitions the computation that is being lowered."""
    around = context.module_context.axis_context
    return around.num_devices if isinstance(around, ShardingContext) else 1


def n_devices(context: Any) -> int:
    """On how many devices the computation that is being lowered runs, partitioned by XLA or by `jax.shard_map`."""
    around = context.module_context.axis_context
    mesh = getattr(around, "mesh", None)
    return n_partitions(context) if mesh is None else mesh.size


def symbols_of(sizes: Iterable[Any]) -> dict[str, Any]:
    """The symbols in the sizes of arrays that `jax.export` is called with, by name."""
    found: dict[str, Any] = {}
    for size in sizes:
        if not isinstance(size, int):
            for name in size._get_vars():
                found.setdefault(name, jax.export.symbolic_shape(name, scope=size.scope)[0])
    return dict(sorted(found.items()))


def bounds_of(symbol: Any) -> tuple[int, float]:
    """The smallest and the largest value of a symbol, as its constraints say."""
    low, high = _bounds(symbol)
    return int(low), high


def _bounds(symbol: Any) -> tuple[float, float]:
    if hasattr(jax.export, "symbolic_dim_bounds"):  # since jax 0.12
        bounds: tuple[float, float] = jax.export.symbolic_dim_bounds(symbol)
        return bounds
    from jax._src.export.shape_poly import BoundsPrecision, _bounds_decision

    return _bounds_decision(symbol, BoundsPrecision.BEST)


def _inconclusive_dimension_operation() -> type[Exception]:
    if hasattr(jax.errors, "InconclusiveDimensionOperation"):  # since jax 0.10
        public: type[Exception] = jax.errors.InconclusiveDimensionOperation
        return public
    from jax._src.core import InconclusiveDimensionOperation

    return InconclusiveDimensionOperation


InconclusiveDimensionOperation = _inconclusive_dimension_operation()


is_symbolic: Callable[[Any], bool] = jax.export.is_symbolic_dim


def size_at(size: Any, symbols: Mapping[str, int]) -> int:
    """A size where the symbols have these values."""
    return size if isinstance(size, int) else int(size._evaluate(dict(symbols)))


def is_export(context: Any) -> bool:
    """Whether a lowering rule is called for `jax.export`."""
    return bool(context.module_context.lowering_parameters.for_export)


def lower_with_devices(primitive: Any) -> None:
    """Have JAX tell the lowering rule of a primitive which devices there are; `custom_partitioning` asks."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def register_dead_code_rule(primitive: Any, rule: Callable[[Sequence[bool], Any], tuple[list[bool], Any]]) -> None:
    """Tell JAX what a primitive can do without where some of its outputs are not used.

    Args:
        primitive: the primitive.
        rule: takes which outputs are used and the equation; returns which inputs are used and the equation that is
            left, or None for none. It is called for equations without references among their inputs.
    """

    def in_jax(used_outputs: Sequence[bool], *rest: Any) -> tuple[list[bool], Any]:
        return rule(used_outputs, rest[-1])  # since jax 0.12, the liveness of references comes before the equation

    partial_eval.dce_rules[primitive] = in_jax


def register_float_check(primitive: Any, name_of: Callable[..., str]) -> None:
    """Let `jax.experimental.checkify` look for NaN in the results of a primitive, as in those of JAX's own.

    Args:
        primitive: a primitive with several results.
        name_of: makes the name for the message from the parameters of a call.
    """

    def check(*arguments: Any, **params: Any) -> Any:
        named = types.SimpleNamespace(bind=primitive.bind, name=name_of(**params), multiple_results=True)
        return checkify.nan_error_check(named, *arguments, **params)

    checkify.error_checks[primitive] = check


def without_float_checks() -> contextlib.ExitStack:
    """A context without `jax_debug_nans` and `jax_debug_infs`."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.debug_nans(False))
    stack.enter_context(jax.debug_infs(False))
    return stack


def float_checks() -> tuple[bool, bool]:
    """Whether JAX is to look for NaN and for infinities in all results."""
    config: Any = jax.config
    return bool(config.jax_debug_nans), bool(config.jax_debug_infs)


class RefusingTrace(jax.core.Trace):
    """While it is JAX's current trace in a thread, no operation of JAX runs there.

    Args:
        error: makes the exception to raise, from the name of JAX's primitive.
    """

    def __init__(self, error: Callable[[str], Exception]) -> None:
        super().__init__()
        self.error = error

    def process_primitive(self, primitive: Any, *_: Any, **__: Any) -> Any:
        """Refuse; so do the others, for what JAX calls in its own ways."""
        raise self.error(primitive.name)

    process_call = process_custom_jvp_call = process_custom_vjp_call = process_primitive

    def stage_value(self, val: Any) -> Any:
        """Constants are no operations."""
        return val


def _trace_context() -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    if hasattr(jax.extend.core, "take_current_trace"):  # since jax 0.10
        return jax.extend.core.take_current_trace, jax.extend.core.set_current_trace
    from jax._src.core import set_current_trace, take_current_trace

    return take_current_trace, set_current_trace


_take_current_trace, tracing_with = _trace_context()


def current_trace() -> Any:
    """What JAX does with operations in this thread at present."""
    with _take_current_trace() as trace:
        return trace


def outside_of_traces() -> contextlib.AbstractContextManager[None]:
    """A context in which JAX computes at once, whatever it traces around, so that results can be kept.

    Where JAX is refused (`RefusingTrace`), it is refused there, too.
    """
    if trace_state_clean() or isinstance(current_trace(), RefusingTrace):
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = jax.ensure_compile_time_eval()
    return context


@contextlib.contextmanager
def with_mesh(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """As `jax.set_mesh`, which older versions of JAX refuse inside of `jax.vmap`."""
    if trace_state_clean():
        with jax.set_mesh(mesh):
            yield
        return
    from jax._src import config

    settings: Any = config.abstract_mesh_context_manager, config.device_context
    before = [setting.swap_local(value) for setting, value in zip(settings, (mesh.abstract_mesh, mesh), strict=True)]
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.set_local(value)


def x64_enabled() -> bool:
    """Whether JAX keeps 64-bit dtypes, in this thread and context."""
    return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]


def jit_disabled() -> bool:
    """Whether the user has turned `jax.jit` off."""
    return bool(jax.config.jax_disable_jit)  # type: ignore[attr-defined]


def set_vmap_fallback(enabled: bool) -> bool:
    """Allow or forbid `torch.vmap`'s loop over operators without a batching rule; returns what was before."""
    before: bool = torch._C._functorch._is_vmap_fallback_enabled()  # type: ignore[attr-defined]
    torch._C._functorch._set_vmap_fallback_enabled(enabled)  # type: ignore[attr-defined]
    return before


def flat_vmap(
    fn: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]],
    tensors: Sequence[torch.Tensor],
    in_dims: Sequence[int | None],
    out_dims: Sequence[int],
    size: int,
    randomness: str,
) -> list[torch.Tensor]:
    """`torch.vmap` without its work on pytrees and its checks of arguments, which take a third of a small call."""
    _load_decompositions()
    level = torch._C._functorch._vmap_increment_nesting(size, randomness)
    try:
        inputs = [
            t if d is None else torch._C._functorch._add_batch_dim(t, d, level)
            for t, d in zip(tensors, in_dims, strict=True)
        ]
        outputs = fn(inputs)
        return [
            torch._C._functorch._remove_batch_dim(o, level, size, d) for o, d in zip(outputs, out_dims, strict=True)
        ]
    finally:
        torch._C._functorch._vmap_decrement_nesting()


@functools.cache
def _load_decompositions() -> None:
    """What `torch.vmap` loads at its first call, by a first call."""
    torch.vmap(torch.sin)(torch.zeros(1))


@functools.cache
def load_forward_mode() -> None:
    """What torch loads at its first call of forward mode, without its warnings that torch itself uses TorchScript."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*is deprecated")
        import torch._decomp.decompositions_for_jvp  # noqa: F401


def run_backward(outputs: Any, cotangents: Any, inputs: Any) -> tuple[torch.Tensor | None, ...]:
    """`torch.autograd.grad` without its checks of arguments, which take a tenth of a small backward pass."""
    return torch.autograd.Variable._execution_engine.run_backward(
        outputs, cotangents, False, False, inputs, allow_unreachable=True, accumulate_grad=False
    )


def storage_address(tensor: torch.Tensor) -> int:
    """Where torch keeps the record of a tensor's memory; the same for all views of it."""
    return int(tensor.untyped_storage()._cdata)


def has_backends() -> bool:
    """Whether JAX has started up in this process."""
    return bool(xla_bridge.backends_are_initialized())


@functools.cache
def has_only_host() -> bool:
    """Whether JAX has no other devices than the host's."""
    return set(jax.extend.backend.backends()) <= {"cpu", "interpreter"}


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no values."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether there is data behind a tensor: it is not on the meta device, not fake, not wrapped by `torch.func`."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not (tensor.is_meta or is_fake(tensor) or wrapped)


def register_name_in_jaxprs(primitive: Primitive, name_of: Callable[..., str]) -> None:
    """Print the equations of a primitive as `primitive[name]`, with a name made of its parameters."""

    def rule(equation: Any, context: Any, settings: Any) -> Any:
        named = Primitive(f"{primitive.name}[{name_of(**equation.params)}]")
        return jax_core._pp_eqn(equation.replace(primitive=named), context, settings, params=())

    jax_core.pp_eqn_rules[primitive] = rule


def is_python_thread(ident: int | None = None) -> bool:
    """Whether a thread, by default the calling one, was started by Python, and not by XLA."""
    ident = threading.get_ident() if ident is None else ident
    known = threading._active.get(ident)  # type: ignore[attr-defined]
    return known is not None and not isinstance(known, threading._DummyThread)  # one that has asked for its name


def is_held_elsewhere(tensor: torch.Tensor, references: int) -> bool:
    """Whether somebody else can reach a tensor's memory: another tensor, a reference, or its owner outside of torch.

    Args:
        tensor: a tensor.
        references: how many Python references the caller has to it, its own variable included.
    """
    here = references + 2  # the argument of this function, and that of getrefcount
    in_cpp: int = tensor._use_count()  # type: ignore[attr-defined]
    foreign = not tensor.untyped_storage().resizable()  # NumPy's, JAX's, anybody's who lends it to torch
    return foreign or sys.getrefcount(tensor) > here or in_cpp > 1 or storage_users(tensor) > 1


def alias_with_storage(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over the same memory that torch takes for the memory's only user, and with versions of its own."""
    return tensor_from_capsule(torch.utils.dlpack.to_dlpack(tensor))


def storage_users(tensor: torch.Tensor) -> int:
    """How many tensors share the memory of this one, itself included."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count - 1  # the storage object that has just been made for the question


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a batch inside of `torch.vmap`."""
    return bool(torch._C._functorch.is_batchedtensor(tensor))


without_subclasses: Callable[[], contextlib.AbstractContextManager[Any]] = torch._C.DisableTorchFunctionSubclass
_is_forward_grad_enabled: Callable[[], bool] = torch._C._is_fwd_grad_enabled


def is_inside_autograd_function() -> bool:
    """Whether the `forward` of a `torch.autograd.Function` runs.

    Nothing else turns off grad mode and forward mode at once, but for `torch.inference_mode`.
    """
    return not (torch.is_grad_enabled() or _is_forward_grad_enabled() or torch.is_inference_mode_enabled())


is_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
unwrap_if_dead: Callable[[torch.Tensor], torch.Tensor] = torch._C._functorch.unwrap_if_dead
keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


def is_differentiated(tensor: torch.Tensor) -> bool:
    """Whether a tensor requires a gradient, in autograd or in any of the `torch.func` transforms around."""
    while not tensor.requires_grad:
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def is_under_dual_level() -> bool:
    """Whether torch's forward mode is at work (`torch.autograd.forward_ad.dual_level`)."""
    return torch.autograd.forward_ad._current_level >= 0


DETACHING: frozenset[Callable[..., Any]] = frozenset(
    {torch.detach, torch.Tensor.detach, vars(torch._C.TensorBase)["data"].__get__}
)
"""Functions that cut derivatives, as a `TorchFunctionMode` sees them."""


def is_turning_grad_off(func: Any, args: Sequence[Any]) -> bool:
    """Whether a call that a `TorchFunctionMode` sees is `torch.no_grad()` at work."""
    return func is torch._C._set_grad_enabled and not args[0]


class _Handlers(threading.local):
    """What this thread wants called instead of torch's operators on functions."""

    current: Mapping[str, Callable[..., Any]] | None = None


_HANDLERS = _Handlers()
_LOCK_OF_HANDLERS = threading.Lock()
_n_handling = 0
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_THAT_COMPILE = frozenset({"cond", "while_loop", "_maybe_compile_and_run_fn", "flex_attention"})
"""Functions of torch's that call `torch.compile` unless it is at work already."""


@contextlib.contextmanager
def operators_on_functions(handlers: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within this context, this thread's calls of torch's operators on functions arrive at these, by name.

    Torch's own functions (`torch.cond`) compile before they call the operator, unless `torch.compile` is at work: they
    are told that it is.
    """
    global _n_handling
    before, _HANDLERS.current = _HANDLERS.current, handlers
    with _LOCK_OF_HANDLERS:
        _n_handling += 1
        if _n_handling == 1:
            for cls, call in _calls_of_operators(tuple(handlers)).items():
                cls.__call__ = functools.partialmethod(_handled, call)  # type: ignore[method-assign, assignment]
            torch.compiler.is_dynamo_compiling = _is_dynamo_compiling_or_handled
            _let_flex_attention_differentiate(True)
    try:
        yield
    finally:
        _HANDLERS.current = before
        with _LOCK_OF_HANDLERS:
            _n_handling -= 1
            if _n_handling == 0:
                for cls, call in _calls_of_operators(tuple(handlers)).items():
                    cls.__call__ = call  # type: ignore[method-assign]
                torch.compiler.is_dynamo_compiling = _is_dynamo_compiling
                _let_flex_attention_differentiate(False)


@functools.cache
def _calls_of_operators(names: tuple[str, ...]) -> dict[type[HigherOrderOperator], Callable[..., Any]]:
    """The classes of operators, and what calls them; some check there that their arguments are flat."""
    operators = [_higher_order_ops[name] for name in names if name in _higher_order_ops]
    return {type(operator): type(operator).__call__ for operator in operators}


def _handled(self: HigherOrderOperator, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    handlers = _HANDLERS.current
    return call(self, *args, **kwargs) if handlers is None else handlers[self.name()](*args, **kwargs)


def _is_dynamo_compiling_or_handled() -> bool:
    if _is_dynamo_compiling():
        return True
    if _HANDLERS.current is None:
        return False
    code = sys._getframe(1).f_code
    ours = code.co_filename.endswith("flex_attention.py") or "_higher_order_ops" in code.co_filename
    return ours and code.co_name in _THAT_COMPILE


_refuse_gradients: Callable[..., None] | None = None  # torch's own, once it has been seen


def _let_flex_attention_differentiate(lets: bool) -> None:
    """Whether `flex_attention` takes gradients on the host, where torch's kernel has none and plain operators have."""
    global _refuse_gradients
    module: Any = sys.modules.get("torch.nn.attention.flex_attention")
    if not hasattr(module, "_validate_device"):
        return
    if _refuse_gradients is None:
        _refuse_gradients = module._validate_device
    module._validate_device = _refuse_gradients_elsewhere if lets else _refuse_gradients


def _refuse_gradients_elsewhere(*tensors: torch.Tensor) -> None:
    if _HANDLERS.current is None and _refuse_gradients is not None:
        _refuse_gradients(*tensors)


def generic_associative_scan(*args: Any, **kwargs: Any) -> Any:
    """Torch's own scan for an associative function, of plain operators."""
    from torch._higher_order_ops.associative_scan import generic_associative_scan as function

    return function(*args, **kwargs)


def math_attention(*args: Any) -> Any:
    """Torch's own `flex_attention`, of plain operators: output, logarithms of sums and largest scores, base 2."""
    from torch._higher_order_ops.flex_attention import math_attention as function

    return function(*args)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def outside_of_torch_compile(function: _Function) -> _Function:
    """Mark a function: `torch.compile` breaks its graph at calls of it, and leaves it and all that it calls alone.

    As `torch.compiler.disable`, which takes a second to import and a microsecond for each call.
    """
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = (
        "JAX compiles this function itself. torch.compile calls it between two graphs, which `fullgraph=True` and "
        "torch.export do not allow"
    )
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return function


def torch_node_type(value: Any, cls: type | None = None) -> Any:
    """The key under which torch's pytree registry knows a value, or one of another class; None if it does not."""
    key = cls or torch_pytree._get_node_type(value)
    return key if key in torch_pytree.SUPPORTED_NODES else None


def flatten_torch_node(node_type: Any, value: Any) -> tuple[list[Any], Any]:
    """The children of one torch pytree node, and the context that rebuilds it."""
    return torch_pytree.SUPPORTED_NODES[node_type].flatten_fn(value)


def unflatten_torch_node(node_type: Any, children: list[Any], context: Any) -> Any:
    """The inverse of `flatten_torch_node`."""
    return torch_pytree.SUPPORTED_NODES[node_type].unflatten_fn(children, context)
