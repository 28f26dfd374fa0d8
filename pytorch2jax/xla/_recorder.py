"""The mode that writes down operators, and which tensor has which value.

It sits below autograd, so that functions that torch composes of others arrive as those. Writes in place become new
values (`_writes`), and operators that have no JAX function are taken apart (torch's own decompositions) until all parts
have one. What remains is left to the bridge.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import torch

from pytorch2jax._errors import CaptureError
from pytorch2jax._internals import (
    HigherOrderOperator,
    TorchDispatchMode,
    is_fake,
    is_inside_autograd_function,
)
from pytorch2jax.xla import _writes as writes
from pytorch2jax.xla._bridged import bridged
from pytorch2jax.xla._decompositions import OPERATORS, bmm_with_one
from pytorch2jax.xla._dtype_rules import NoKernelError, ask
from pytorch2jax.xla._graph import Equation, Var, replaced
from pytorch2jax.xla._internals import (
    OpOverload,
    aten,
    decomposition,
    is_traced_by_others,
)
from pytorch2jax.xla._registry import rule_for
from pytorch2jax.xla._storage import Geometry, Storage, geometry_of, new_value


class Recorder(TorchDispatchMode):
    """Writes down the operators that run.

    Args:
        name: the function's name, for messages.
        active: whether the function takes derivatives itself, or wants to know whether there will be any.
    """

    supports_higher_order_operators = True

    def __init__(self, name: str, *, active: bool = False) -> None:
        super().__init__()
        self.equations: list[Equation] = []
        self.arguments: list[torch.Tensor] = []
        self.constants: dict[Var, torch.Tensor] = {}
        self.name = name
        self._active = active
        # The value of a tensor, and of what: of which storage and version of it, and where in it.
        self._vars: dict[int, tuple[Var, int, int, Geometry]] = {}
        self._detached: set[int] = set()  # tensors through which no derivative goes into their memory
        self._storages: dict[int, Storage] = {}
        self._main = self.equations
        self._depth = 0  # of hand-written gradients
        self._asleep = False
        self._foreign: dict[int, torch.Tensor] = {}
        self._alive: list[torch.Tensor] = []  # so that nothing gets the address of something else
        self._unseen: set[Var] = set()  # made inside of hand-written gradients that nobody has told us of
        self.n_draws = 0
        self._apart: list[OpOverload] = []  # what is taken apart now: some operators have nothing but themselves inside

    # -- tensors and variables -------------------------------------------------------------------------------

    def take(self, tensor: torch.Tensor) -> Var:
        """A new variable for a tensor that comes from outside."""
        var = Var(tensor.shape, tensor.dtype)
        self.bind(tensor, var)
        return var

    def var_of(self, tensor: torch.Tensor) -> Var:
        """The present value of a tensor."""
        known = self._vars.get(id(tensor))
        key = tensor.untyped_storage()._cdata
        storage = self._storages.get(key)
        if known is not None and storage is not None and known[1:] == (key, storage.version, geometry_of(tensor)):
            return known[0]
        if storage is None:
            return self._constant(tensor)
        if id(tensor) in self._detached:
            return self.detach(tensor)
        read = self.in_memory(tensor)
        self.note(tensor, read, storage)
        return read

    def in_memory(self, tensor: torch.Tensor) -> Var:
        """What is in the memory of a tensor that has been seen, with the derivative of what has been written there."""
        storage = self.storage_of(tensor)
        read = storage.read(geometry_of(tensor))
        key = tensor.untyped_storage()._cdata
        if read is None and key in self._foreign and not storage.version:  # another view of a constant
            read = Var(tensor.shape, tensor.dtype)
            self.constants[read] = tensor
            storage.add(geometry_of(tensor), read)
        if read is None:
            raise CaptureError(
                f"{self.name}: expected views that JAX can follow, got a tensor of {tensor.dtype} that shares memory "
                "with one of another dtype that was written to. Write to a copy (`x = x.clone()`), or use "
                '`backend="torch"`, which runs it as it is.'
            )
        return read

    def note(self, tensor: torch.Tensor, var: Var, storage: Storage) -> None:
        """A tensor has this value until its storage is written to."""
        self._vars[id(tensor)] = var, tensor.untyped_storage()._cdata, storage.version, geometry_of(tensor)
        self._alive.append(tensor)

    def _constant(self, tensor: torch.Tensor) -> Var:
        if getattr(tensor, "fake_mode", None) is not None or tensor.is_meta:
            raise CaptureError(
                f"{self.name}: expected tensors that are made of its arguments, got {tensor.dtype}"
                f"{list(tensor.shape)} that was computed where no operator was seen. "
                'Use `backend="torch"`, which runs it as it is.'
            )
        var = Var(tensor.shape, tensor.dtype)
        self.constants[var] = tensor
        self.bind(tensor, var, self._main)
        self._foreign[tensor.untyped_storage()._cdata] = tensor
        return var

    def bind(self, tensor: torch.Tensor, var: Var, equations: list[Equation] | None = None) -> None:
        """A tensor that nobody has seen has this value."""
        key = tensor.untyped_storage()._cdata
        storage = self._storages.get(key)
        if storage is None:
            n_elements = int(tensor.untyped_storage().nbytes()) // max(tensor.element_size(), 1)
            storage = Storage(n_elements, self.equations if equations is None else equations)
            self._storages[key] = storage
        storage.add(geometry_of(tensor), var)
        self.note(tensor, var, storage)

    def seen(self) -> list[weakref.ref[torch.Tensor]]:
        """The tensors without values that have come by."""
        return [weakref.ref(t) for t in self._alive if is_fake(t)]

    def storage_of(self, tensor: torch.Tensor) -> Storage:
        """The storage of a tensor that has been seen."""
        return self._storages[tensor.untyped_storage()._cdata]

    def check_constants(self) -> None:
        """Raise if something was written to that is neither an argument nor made of them."""
        for key, tensor in self._foreign.items():
            # Some are seen in hand-written gradients only, which cannot write to them.
            if key in self._storages and self._storages[key].version:
                raise CaptureError(
                    f"{self.name}: wrote to a tensor that is no argument ({tensor.dtype}{list(tensor.shape)}), "
                    "expected a function of its arguments. Make it an argument or a buffer (`register_buffer`), or "
                    'use `backend="torch"`.'
                )

    def check_functions(self, equations: Sequence[Equation]) -> None:
        """Raise if one of these is part of a hand-written gradient, whose backward pass has not been written down."""
        inexact = (var for e in equations for var in e.outputs if var is not None and var.dtype in _INEXACT)
        if not self._unseen.isdisjoint(inexact):
            raise CaptureError(
                f"{self.name}: expected to see each call of a torch.autograd.Function, got one that went unseen, so "
                "that its gradient would be zero. Please report it, with the version of torch "
                f'({torch.__version__}); `backend="torch"` runs the function as it is.'
            )

    # -- operators ---------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == _META:
            # Where `torch.func` batches fake tensors, they say that they are there, and others are made to follow them.
            kwargs = {**kwargs, "device": _HOST}
        if self._asleep:
            return func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            raise CaptureError(
                f"{self.name}: {func.name()}: an operator on functions that JAX has no counterpart of. Use "
                '`backend="torch"`, which runs it as it is.'
            )
        if is_traced_by_others():
            raise CaptureError(
                f"{self.name}: expected a function that torch runs, got one that traces its operators itself "
                '(`make_fx`, `torch.func.linearize`). Use `backend="torch"`, which runs it as it is.'
            )
        if not isinstance(func, OpOverload) or not _computes(func):
            return func(*args, **kwargs)
        dtypes = () if self._apart else self._checked_dtypes(func, args, kwargs)
        if func is aten.native_batch_norm.default:
            return writes.batch_norm(self, *args, **kwargs)
        if func._schema.is_mutable:
            return writes.in_place(self, func, args, kwargs)
        if func is aten.bmm.default and args[1].stride(0) == 0 and args[1].shape[0] > 1:
            with self:
                return bmm_with_one(*args)
        if rule_for(func) is None and func not in self._apart:
            out = self._taken_apart(func, args, kwargs)
            if out is not NotImplemented:
                with self:
                    return _retyped(out, dtypes)
        return self.record(func, args, kwargs, dtypes)

    def _checked_dtypes(self, func: OpOverload, args: Any, kwargs: Any) -> tuple[torch.dtype | None, ...]:
        """The dtypes that torch's kernel returns, as far as it is known."""
        answer = ask(func, args, kwargs)
        if answer.refusal is not None:
            raise NoKernelError(f"{func}: {answer.refusal}")  # who catches it says where
        return answer.dtypes

    def _taken_apart(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        whole = OPERATORS.get(func) or decomposition(func)
        if whole is None:
            return NotImplemented
        self._apart.append(func)
        try:
            with self:
                return whole(*args, **kwargs)
        finally:
            self._apart.pop()

    def record(self, func: OpOverload, args: Any, kwargs: Any, dtypes: tuple[torch.dtype | None, ...] = ()) -> Any:
        """Write an operator down; returns the fake tensors that it returns, with `dtypes` where they are known."""
        detaches = func.is_view and (self.cuts() or id(args[0]) in self._detached)
        value_of = self.in_memory if detaches and id(args[0]) in self._vars else self.var_of
        given, named = (replaced(tree, value_of, torch.Tensor) for tree in (args, kwargs))
        out = _FAKES.get(func, func)(*args, **kwargs)
        if not func.is_view:
            out = _retyped(out, dtypes)
        several = isinstance(out, (list, tuple))
        results = list(out) if several else [out]
        if func.is_view and rule_for(func) is None:  # by its strides
            for result in results:
                self.var_of(result)
        else:
            outputs = tuple(Var(r.shape, r.dtype) if isinstance(r, torch.Tensor) else None for r in results)
            cut = self.cuts() and not detaches
            if cut and is_inside_autograd_function():
                self._unseen.update(var for var in outputs if var is not None)
            equation = Equation(func, tuple(given), named, outputs, several, cut, self.draw_of(func))
            translates = rule_for(func) and not _rounds_its_own_way(func, args)
            self.equations.append(equation if translates else bridged(equation))
            for result, var in zip(results, outputs, strict=True):
                if var is not None:
                    self.bind(result, var)
        if detaches:
            for result in results:
                self.detach(result)
        return out

    def write(self, operator: Any, given: Sequence[Var], made: Sequence[torch.Tensor], first_draw: int) -> None:
        """Write down an operator of this engine's own.

        Args:
            operator: a function of arrays: of `given`, and of the variables from around it (`operator.free`).
            given: its arguments.
            made: tensors for its results, made by `anew`.
            first_draw: how many random operators there were before those that it consists of.
        """
        outputs = tuple(Var(tensor.shape, tensor.dtype) for tensor in made)
        draw = first_draw if self.n_draws > first_draw else None
        self.equations.append(
            Equation(operator, (*given, *operator.free), {}, outputs, True, constant=self.cuts(), draw=draw)
        )
        for tensor, var in zip(made, outputs, strict=True):
            self.bind(tensor, var)

    def detach(self, tensor: torch.Tensor) -> Var:
        """Cut the derivatives of a tensor; what is in its memory keeps them, for others. Returns its value."""
        if tensor.untyped_storage()._cdata not in self._storages:
            self._constant(tensor)
        self._detached.add(id(tensor))
        live = self.in_memory(tensor)
        cut = Var(live.shape, live.dtype)
        if self.cuts() and is_inside_autograd_function():
            self._unseen.add(cut)
        self.equations.append(Equation(jax.lax.stop_gradient, (live,), {}, (cut,), False))
        self.note(tensor, cut, self.storage_of(tensor))
        return cut

    def exchange(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """`tensor.data = value`: other memory, the same derivatives."""
        old, new = self.var_of(tensor), self.var_of(value)
        tensor.data = value
        var = Var(new.shape, new.dtype)
        if old.shape == new.shape:
            self.equations.append(Equation(new_value, (new, old), {}, (var,), False))
        else:
            self.equations.append(Equation(jax.lax.stop_gradient, (new,), {}, (var,), False))
        self.note(tensor, var, self.storage_of(tensor))

    def keeps_derivative(self, tensor: torch.Tensor) -> bool:
        """Whether a write through this tensor leaves the derivatives of its memory as they are."""
        inexact = tensor.is_floating_point() or tensor.is_complex()
        return inexact and (self.cuts() or id(tensor) in self._detached)

    def draw_of(self, func: OpOverload) -> int | None:
        """The number of a random operator among them."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None
        self.n_draws += 1
        return self.n_draws - 1

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within this context, equations go into a list of their own.

        What is found out about tensors there is forgotten: it is in variables that nobody else has.
        """
        outer = self.equations, self._storages, self._vars
        self.equations, self._vars = [], dict(self._vars)
        self._storages = {key: storage.copy(self.equations) for key, storage in self._storages.items()}
        try:
            yield
        finally:
            self.equations, self._storages, self._vars = outer

    def versions(self) -> dict[int, int]:
        """How often each storage was written to."""
        return {key: storage.version for key, storage in self._storages.items()}

    @contextmanager
    def hand_written(self) -> Iterator[None]:
        """The same, where grad mode is off as in any backward pass."""
        with self.apart():
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    @property
    def differentiates(self) -> bool:
        """Whether torch itself may take derivatives of what runs now."""
        return self._active or self._depth > 0

    @property
    def is_hand_written(self) -> bool:
        """Whether this is within a hand-written gradient."""
        return self._depth > 0

    def anew(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor like this one that shares nothing with it, made by no operator."""
        with torch.no_grad():
            return self.unseen(
                torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )

    def unseen(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of torch's that is not to be written down."""
        self._asleep = True
        try:
            return function(*args, **kwargs)
        finally:
            self._asleep = False

    def cuts(self) -> bool:
        """Whether no derivative goes through what runs now. Hand-written gradients run with grad mode off."""
        return not torch.is_grad_enabled() and self._depth == 0


_META, _HOST = torch.device("meta"), torch.device("cpu")
_INEXACT = frozenset(
    d for d in vars(torch).values() if isinstance(d, torch.dtype) and (d.is_floating_point or d.is_complex)
)


def _retyped(out: Any, dtypes: tuple[torch.dtype | None, ...]) -> Any:
    """Results with the dtypes that torch's kernel gives them, where fake tensors have others."""
    results = out if isinstance(out, (list, tuple)) else [out]
    if len(results) != len(dtypes) or all(getattr(r, "dtype", d) is d for r, d in zip(results, dtypes, strict=True)):
        return out
    retyped = [r.to(d) if isinstance(r, torch.Tensor) and d else r for r, d in zip(results, dtypes, strict=True)]
    return type(out)(retyped) if isinstance(out, (list, tuple)) else retyped[0]


def _rounds_its_own_way(func: OpOverload, args: Any) -> bool:
    """Whether torch resamples integers here: its kernels round them at places that no formula gives."""
    return func in _RESAMPLE and not (args[0].is_floating_point() or args[0].is_complex())


_RESAMPLE = frozenset(
    {
        aten.upsample_bilinear2d.default,
        aten.upsample_bicubic2d.default,
        aten._upsample_bilinear2d_aa.default,
        aten._upsample_bicubic2d_aa.default,
    }
)


def _computes(func: OpOverload) -> bool:
    """Whether an operator has to do with values, not only with shapes and devices."""
    if func.namespace == "prim" or func in _ABOUT_TENSORS:
        return False
    return any(_is_tensor(r.type) for r in func._schema.returns) or func._schema.is_mutable


def _ctc_loss(log_probs: torch.Tensor, *how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return log_probs.new_empty(log_probs.shape[1:-1]), log_probs.new_empty(0)


def _grouped_mm(
    x: torch.Tensor, y: torch.Tensor, offs: torch.Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> torch.Tensor:
    torch._check(bias is None, lambda: "grouped_mm: torch does not support a bias.")
    groups = () if x.dim() != y.dim() else ((x if offs is None else offs).shape[0],)
    return x.new_empty((*groups, x.shape[-2], y.shape[-1]), dtype=out_dtype)


_FAKES: dict[Any, Callable[..., Any]] = {
    aten._ctc_loss.default: _ctc_loss,
    aten._ctc_loss.Tensor: _ctc_loss,
    aten._grouped_mm.default: _grouped_mm,
}
"""Operators whose outputs torch cannot tell shapes of without values, or only for the dtypes of some devices."""


def _is_tensor(kind: Any) -> bool:
    return "Tensor" in str(kind)


_ABOUT_TENSORS = frozenset({aten.is_same_size.default, aten._assert_tensor_metadata.default})
