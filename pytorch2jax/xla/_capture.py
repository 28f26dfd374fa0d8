"""A torch function as a graph: one run on fake tensors that writes down each operator.

The mode sits below autograd, so that functions that torch composes of others arrive as those. Writes in place become
new values (`_storage`), and operators that have no JAX function are taken apart (torch's own decompositions) until all
parts have one. What remains is left to the bridge.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pytorch2jax._errors import CaptureError, Pytorch2JaxError
from pytorch2jax._internals import TorchDispatchMode, fake_tensor_mode
from pytorch2jax._torch_state import differentiable_kernels, forked_generators
from pytorch2jax.xla._bridged import bridged
from pytorch2jax.xla._custom import CustomGradient
from pytorch2jax.xla._decompositions import FUNCTIONS, OPERATORS, bmm_with_one
from pytorch2jax.xla._graph import Equation, Graph, Var, pruned, replaced
from pytorch2jax.xla._internals import (
    HigherOrderOperator,
    OpOverload,
    aten,
    custom_functions,
    decomposition,
    functional_variant,
    variant_with_results,
)
from pytorch2jax.xla._registry import rule_for
from pytorch2jax.xla._storage import Storage, geometry_of, new_value

Call = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


def capture(
    name: str, call: Call, inputs: Sequence[tuple[tuple[int, ...], torch.dtype]], *, active: bool = False
) -> Graph:
    """The graph of a function for inputs of these shapes and dtypes.

    Args:
        name: the function's name, for messages.
        call: flat tensors in, flat tensors out.
        inputs: shapes and dtypes of the inputs.
        active: whether they require gradients, for functions that differentiate inside.

    Raises:
        CaptureError: the function does what no graph can: it depends on values, or leaves torch.
    """
    with torch.inference_mode(False), torch.enable_grad(), forked_generators(host=True), differentiable_kernels():
        with fake_tensor_mode():
            tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in inputs]
            if active:  # and are no leaves, so that the function may write to them
                tensors = [t.requires_grad_() * 1 if t.is_floating_point() or t.is_complex() else t for t in tensors]
            recorder = Recorder(name)
            taken = [recorder.take(tensor) for tensor in tensors]
            try:
                with custom_functions(recorder.custom), _Instead(), recorder:
                    outputs = call(tensors)
                    results = tuple(recorder.var_of(t) for t in outputs)
                recorder.check_constants()
            except Pytorch2JaxError:
                raise
            except Exception as error:
                raise _not_captured(name, error) from error
    return Graph(tuple(taken), recorder.constants, pruned(recorder.equations, results), results)


class Recorder(TorchDispatchMode):
    """Writes down the operators that run.

    Args:
        name: the function's name, for messages.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.equations: list[Equation] = []
        self.constants: dict[Var, torch.Tensor] = {}
        self._name = name
        self._vars: dict[int, tuple[Var, int, int]] = {}  # with the storage, and the version of it, that a value is of
        self._storages: dict[int, Storage] = {}
        self._main = self.equations
        self._depth = 0  # of hand-written gradients
        self._asleep = False
        self._foreign: dict[int, torch.Tensor] = {}
        self._alive: list[torch.Tensor] = []  # so that nothing gets the address of something else
        self._n_draws = 0
        self._apart: list[OpOverload] = []  # what is taken apart now: some operators have nothing but themselves inside

    # -- tensors and variables -------------------------------------------------------------------------------

    def take(self, tensor: torch.Tensor) -> Var:
        """A new variable for a tensor that comes from outside."""
        var = Var(tensor.shape, tensor.dtype)
        self._bind(tensor, var)
        return var

    def var_of(self, tensor: torch.Tensor) -> Var:
        """The present value of a tensor."""
        known = self._vars.get(id(tensor))
        key = tensor.untyped_storage()._cdata
        storage = self._storages.get(key)
        if known is not None and storage is not None and known[1:] == (key, storage.version):
            var = known[0]
            if var.shape == tuple(tensor.shape):  # it may have been moved since
                return var
        if storage is None:
            return self._constant(tensor)
        read = storage.read(geometry_of(tensor))
        if read is None:
            raise CaptureError(
                f"{self._name}: expected views that JAX can follow, got a tensor of {tensor.dtype} that shares memory "
                "with one of another dtype that was written to. Write to a copy (`x = x.clone()`), or use "
                '`backend="torch"`, which runs it as it is.'
            )
        self._note(tensor, read, storage)
        return read

    def _note(self, tensor: torch.Tensor, var: Var, storage: Storage) -> None:
        self._vars[id(tensor)] = var, tensor.untyped_storage()._cdata, storage.version
        self._alive.append(tensor)

    def _constant(self, tensor: torch.Tensor) -> Var:
        if getattr(tensor, "fake_mode", None) is not None or tensor.is_meta:
            raise CaptureError(
                f"{self._name}: expected tensors that are made of its arguments, got {tensor.dtype}"
                f"{list(tensor.shape)} that was computed where no operator was seen. "
                'Use `backend="torch"`, which runs it as it is.'
            )
        var = Var(tensor.shape, tensor.dtype)
        self.constants[var] = tensor
        self._bind(tensor, var, self._main)
        self._foreign[tensor.untyped_storage()._cdata] = tensor
        return var

    def _bind(self, tensor: torch.Tensor, var: Var, equations: list[Equation] | None = None) -> None:
        key = tensor.untyped_storage()._cdata
        storage = self._storages.get(key)
        if storage is None:
            n_elements = int(tensor.untyped_storage().nbytes()) // max(tensor.element_size(), 1)
            storage = Storage(n_elements, self.equations if equations is None else equations)
            self._storages[key] = storage
        storage.add(geometry_of(tensor), var)
        self._note(tensor, var, storage)

    def check_constants(self) -> None:
        """Raise if something was written to that is neither an argument nor made of them."""
        for key, tensor in self._foreign.items():
            if self._storages[key].version:
                raise CaptureError(
                    f"{self._name}: wrote to a tensor that is no argument ({tensor.dtype}{list(tensor.shape)}), "
                    "expected a function of its arguments. Make it an argument or a buffer (`register_buffer`), or "
                    'use `backend="torch"`.'
                )

    # -- operators ---------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._asleep:
            return func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            raise CaptureError(
                f"{self._name}: {func}: an operator on functions, which cannot be translated. "
                'Use `backend="torch"`, which runs it as it is.'
            )
        if not isinstance(func, OpOverload) or not _computes(func):
            return func(*args, **kwargs)
        if func is aten.native_batch_norm.default:
            return self._batch_norm(*args, **kwargs)
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs)
        if func is aten.bmm.default and args[1].stride(0) == 0 and args[1].shape[0] > 1:
            with self:
                return bmm_with_one(*args)
        if rule_for(func) is None and func not in self._apart:
            whole = OPERATORS.get(func) or decomposition(func)
            if whole is not None:
                self._apart.append(func)
                try:
                    with self:
                        out = whole(*args, **kwargs)
                finally:
                    self._apart.pop()
                if out is not NotImplemented:
                    return out
        return self._record(func, args, kwargs)

    def _record(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        given, named = (replaced(tree, self.var_of, torch.Tensor) for tree in (args, kwargs))
        out = _FAKES.get(func, func)(*args, **kwargs)
        several = isinstance(out, (list, tuple))
        results = list(out) if several else [out]
        if func.is_view and rule_for(func) is None:  # by its strides
            for result in results:
                self.var_of(result)
            return out
        outputs = tuple(Var(r.shape, r.dtype) if isinstance(r, torch.Tensor) else None for r in results)
        draw = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            draw, self._n_draws = self._n_draws, self._n_draws + 1
        equation = Equation(func, tuple(given), named, outputs, several, self._cuts(), draw)
        self.equations.append(equation if rule_for(func) else bridged(equation))
        for result, var in zip(results, outputs, strict=True):
            if var is not None:
                self._bind(result, var)
        return out

    def _in_place(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """An operator that writes to its arguments, as one that returns what they become."""
        if func in _MOVES and not _grows(func, args):  # only the view changes, not the values
            with self:
                moved = _MOVES[func](*args, **kwargs)
            var = self.var_of(moved)
            out = func(*args, **kwargs)
            self._bind(args[0], var)
            return out
        written = _written(func, args, kwargs)
        whole = variant_with_results(func)
        if whole is not None:
            return self._with_results(func, whole, args, kwargs, written)
        found = functional_variant(func)
        if found is None:
            return self._opaque(func, args, kwargs, written)
        variant, takes_written = found
        if not takes_written:
            kwargs = {name: value for name, value in kwargs.items() if not any(value is w for w in written)}
            for name in {"dtype", "device"} & (set(_names(variant)) - set(_names(func))):
                kwargs[name] = getattr(written[0], name)
        if _names(func)[: len(args)] != _names(variant)[: len(args)] and set(_names(func)) <= set(_names(variant)):
            args, kwargs = (), {**dict(zip(_names(func), args, strict=False)), **kwargs}  # `polygamma` begins with `n`
        with self:
            new = variant(*args, **kwargs)
        values = list(new) if isinstance(new, (list, tuple)) else [new]
        for tensor, value in zip(written, values, strict=False):
            self._write(tensor, value)
        if not func._schema.returns:
            return None
        alone = len(func._schema.returns) == 1 and str(func._schema.returns[0].type) == "Tensor"
        return written[0] if alone else tuple(written)

    def _with_results(self, func: OpOverload, whole: OpOverload, args: Any, kwargs: Any, written: Any) -> Any:
        """An operator that has results, and writes to some of its arguments: statistics, noise."""
        with self:
            values = whole(*args, **kwargs)
        n = len(func._schema.returns)
        with torch.no_grad():
            for tensor, value in zip(written, values[n:], strict=True):
                self._write(tensor, value)
        return values[0] if n == 1 else tuple(values[:n])

    def _write(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        resized = False
        with self:
            if value.dtype != tensor.dtype:
                value = value.to(tensor.dtype)
            if value.shape != tensor.shape:
                if _broadcasts(value.shape, tensor.shape):
                    value = value.expand(tensor.shape)
                else:  # an `out=` that is made as large as it has to be
                    resized = self._resize(tensor, value.shape)
        var, geometry = self.var_of(value), geometry_of(tensor)
        old = None if resized else self.var_of(tensor)
        if old is not None and self._cuts() and (tensor.is_floating_point() or tensor.is_complex()):
            cut = Var(var.shape, var.dtype)
            self.equations.append(Equation(new_value, (var, old), {}, (cut,), False))
            var = cut
        storage = self._storages[tensor.untyped_storage()._cdata]
        if storage.equations is not self.equations or not storage.write(geometry, var):
            raise CaptureError(
                f"{self._name}: expected writes to tensors whose memory JAX can follow, got one to a part of a storage "
                f"that {tensor.dtype} shares with others, or from within a hand-written gradient. "
                'Use `backend="torch"`, which runs it as it is.'
            )
        self._note(tensor, var, storage)

    def _resize(self, tensor: torch.Tensor, shape: Sequence[int]) -> bool:
        """Give another shape to a tensor that all of is written to next; returns whether it has new memory."""
        self.var_of(tensor)
        memory = tensor.untyped_storage()
        before = memory.nbytes()
        self._unseen(tensor.resize_, shape)
        grown = memory.nbytes() > before
        if grown:
            self._storages[memory._cdata].grow(memory.nbytes() // tensor.element_size())
        return grown

    def _opaque(self, func: OpOverload, args: Any, kwargs: Any, written: list[torch.Tensor]) -> Any:
        """An operator of somebody else's that writes to its arguments."""
        raise CaptureError(
            f"{self._name}: {func}: an operator that writes to its arguments, and has no other form. "
            'Use `backend="torch"`, which runs it as it is.'
        )

    def _batch_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor | None,
        var: torch.Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Any:
        """Torch does not say of this operator that it writes to the running statistics."""
        if mean is None or var is None:
            with self:
                return aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, eps)
        if not training:
            with self:
                return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, var, momentum, eps)
        whole = aten._native_batch_norm_legit_functional.default
        args = (x, weight, bias, mean, var, training, momentum, eps)
        return self._with_results(aten.native_batch_norm.default, whole, args, {}, [mean, var])

    # -- hand-written gradients ------------------------------------------------------------------------------

    def custom(self, apply: Callable[..., Any], cls: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of `cls.apply(*args)`, where `cls` is a `torch.autograd.Function`: its forward and its backward."""
        if cls.__module__ == "torch.utils.checkpoint":
            run, _, *rest = args
            return run(*rest)
        where = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        active = [i for i in where if args[i].is_floating_point() or args[i].is_complex()]
        if not active or self._cuts():
            return apply(*args, **kwargs)
        if any(args[i].requires_grad for i in active):
            raise CaptureError(
                f"{self._name}: {cls.__qualname__}: a torch.autograd.Function in a function that takes derivatives "
                'itself, which would have to go through it. Use `backend="torch"`, which runs it as it is.'
            )
        given = [self.var_of(args[i]) for i in where]
        first_draw = self._n_draws
        outer, self.equations = self.equations, []
        self._depth += 1
        try:
            function, out = self._capture_custom(apply, cls, args, kwargs, where, active)
        finally:
            self._depth -= 1
            self.equations = outer
        several = isinstance(out, (tuple, list))
        results = [self._anew(o) if isinstance(o, torch.Tensor) else o for o in (out if several else (out,))]
        made = [r for r in results if isinstance(r, torch.Tensor)]
        produced = tuple(Var(r.shape, r.dtype) for r in made)
        draw = first_draw if self._n_draws > first_draw else None
        arguments = (*given, *function.free)
        self.equations.append(Equation(function, arguments, {}, produced, True, draw=draw))
        for tensor, var in zip(made, produced, strict=True):
            self._bind(tensor, var)
        return tuple(results) if several else results[0]

    def _capture_custom(
        self, apply: Callable[..., Any], cls: Any, args: Any, kwargs: Any, where: list[int], active: list[int]
    ) -> tuple[CustomGradient, Any]:
        inner = list(args)
        for i in where:
            inner[i] = self._anew(args[i])
        leaves = [inner[i].requires_grad_() for i in active]
        for i in active:  # torch itself refuses writes to a leaf
            inner[i] = self._unseen(inner[i].clone)
        primals = [self.take(inner[i]) for i in where]
        out = apply(*inner, **kwargs)
        tensors = [o for o in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(o, torch.Tensor)]
        outputs = tuple(self.var_of(o) for o in tensors)
        for i in where:
            if self._storages[inner[i].untyped_storage()._cdata].version:
                raise CaptureError(
                    f"{self._name}: {cls.__qualname__}: expected a torch.autograd.Function that leaves its inputs as "
                    'they are, got one that writes to them, for which JAX has no rule. Use `backend="torch"`.'
                )
        forward, self.equations = self.equations, []
        differentiable = [i for i, o in enumerate(tensors) if o.requires_grad]
        cotangents = [self._anew(tensors[i]) for i in differentiable]
        arriving = tuple(map(self.take, cotangents))
        gradients: Sequence[torch.Tensor | None] = [None] * len(leaves)
        if differentiable:
            ends = [tensors[i] for i in differentiable]
            gradients = torch.autograd.grad(ends, leaves, cotangents, allow_unused=True)
        pulled = tuple(None if g is None else self.var_of(g) for g in gradients)
        return CustomGradient(
            name=cls.__qualname__,
            primals=tuple(primals),
            active=tuple(where.index(i) for i in active),
            forward=tuple(forward),
            outputs=outputs,
            differentiable=tuple(differentiable),
            cotangents=arriving,
            backward=tuple(self.equations),
            gradients=pulled,
        ), out

    def _anew(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor like this one that shares nothing with it, made by no operator."""
        with torch.no_grad():
            return self._unseen(
                torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )

    def _unseen(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of torch's that is not to be written down."""
        self._asleep = True
        try:
            return function(*args, **kwargs)
        finally:
            self._asleep = False

    def _cuts(self) -> bool:
        """Whether no derivative goes through what runs now. Hand-written gradients run with grad mode off."""
        return not torch.is_grad_enabled() and self._depth == 0


def _computes(func: OpOverload) -> bool:
    """Whether an operator has to do with values, not only with shapes and devices."""
    if func.namespace == "prim" or func in _ABOUT_TENSORS:
        return False
    return any(_is_tensor(r.type) for r in func._schema.returns) or func._schema.is_mutable


def _ctc_loss(log_probs: torch.Tensor, *how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return log_probs.new_empty(log_probs.shape[1:-1]), log_probs.new_empty(0)


_FAKES: dict[Any, Callable[..., Any]] = {aten._ctc_loss.default: _ctc_loss, aten._ctc_loss.Tensor: _ctc_loss}
"""Operators whose outputs torch cannot tell shapes of without values, where it matters for no result."""


def _is_tensor(kind: Any) -> bool:
    return "Tensor" in str(kind)


_ABOUT_TENSORS = frozenset({aten.is_same_size.default, aten._assert_tensor_metadata.default})


def _resized(x: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
    return x.as_strided(size, torch.empty(size, device="meta").stride(), x.storage_offset())


def _grows(func: Any, args: Any) -> bool:
    """Whether this makes a tensor larger than its memory; what is new there has any value."""
    if func not in (aten.resize_.default, aten.resize_as_.default):
        return False
    n = math.prod(args[1].shape if isinstance(args[1], torch.Tensor) else args[1])
    return (args[0].storage_offset() + n) * args[0].element_size() > args[0].untyped_storage().nbytes()


_MOVES: dict[Any, Any] = {
    aten.transpose_.default: aten.transpose.int,
    aten.t_.default: aten.t.default,
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.swapaxes_.default: aten.swapaxes.default,
    aten.swapdims_.default: aten.swapdims.default,
    aten.as_strided_.default: aten.as_strided.default,
    aten.detach_.default: aten.detach.default,
    aten.resize_.default: _resized,
    aten.resize_as_.default: lambda x, like, **options: _resized(x, like.shape),
}


def _names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments] if isinstance(func, OpOverload) else []


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of one shape can be expanded to the other."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(n in (1, m) for n, m in pairs)


def _written(func: OpOverload, args: Any, kwargs: Any) -> list[torch.Tensor]:
    written: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        written += [t for t in (value if isinstance(value, (list, tuple)) else (value,)) if t is not None]
    return written


class _Instead(TorchFunctionMode):
    """Calls others for some of torch's functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


_TORCH, _OURS = Path(torch.__file__).parent, Path(__file__).parent.parent


def _not_captured(name: str, error: Exception) -> CaptureError:
    """What to say where fake tensors cannot follow: at which line of the model, and what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(Path(f.filename).is_relative_to(p) for p in (_TORCH, _OURS))]
    where = f" at {own[-1].filename}:{own[-1].lineno} (`{own[-1].line}`)" if own else ""
    reason = str(error).strip().split("\n")[0]
    return CaptureError(
        f"{name}: expected a function that can be written down without its values, got {type(error).__name__}{where}: "
        f"{reason} A graph has one course for all values: without `.item()`, `if tensor:`, shapes that depend on "
        'values, NumPy. Use `backend="torch"`, which runs it as it is.'
    )
