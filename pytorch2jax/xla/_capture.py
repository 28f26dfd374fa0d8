"""A torch function as a graph: one run on fake tensors that writes down each operator.

The mode sits below autograd, so that functions that torch composes of others arrive as those. Writes in place become
new values (`_storage`), and operators that have no JAX function are taken apart (torch's own decompositions) until all
parts have one. What remains is left to the bridge.
"""

from __future__ import annotations

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
from pytorch2jax.xla._graph import Equation, Graph, Var, pruned, replaced
from pytorch2jax.xla._internals import (
    HigherOrderOperator,
    OpOverload,
    aten,
    custom_functions,
    decomposition,
    functional_variant,
)
from pytorch2jax.xla._registry import rule_for
from pytorch2jax.xla._storage import Storage, geometry_of, new_value

Call = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


def capture(name: str, call: Call, inputs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> Graph:
    """The graph of a function for inputs of these shapes and dtypes.

    Args:
        name: the function's name, for messages.
        call: flat tensors in, flat tensors out.
        inputs: shapes and dtypes of the inputs.

    Raises:
        CaptureError: the function does what no graph can: it depends on values, or leaves torch.
    """
    with torch.inference_mode(False), torch.enable_grad(), forked_generators(host=True), differentiable_kernels():
        with fake_tensor_mode():
            tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in inputs]
            recorder = Recorder(name)
            taken = [recorder.take(tensor) for tensor in tensors]
            try:
                with custom_functions(recorder.custom), _DataIsDetached(), recorder:
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
            if known[0].shape == tuple(tensor.shape):
                return known[0]
        if storage is None:
            return self._constant(tensor)
        var = storage.read(geometry_of(tensor))
        if var is None:
            raise CaptureError(
                f"{self._name}: expected views that JAX can follow, got a tensor of {tensor.dtype} that shares memory "
                "with one of another dtype that was written to. Write to a copy (`x = x.clone()`), or use "
                '`backend="torch"`, which runs it as it is.'
            )
        self._note(tensor, var, storage)
        return var

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
        if rule_for(func) is None and func not in self._apart:
            whole = decomposition(func)
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
        out = func(*args, **kwargs)
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
        if func in _MOVES:  # only the view changes, not the values
            with self:
                moved = _MOVES[func](*args, **kwargs)
            var = self.var_of(moved)
            out = func(*args, **kwargs)
            self._bind(args[0], var)
            return out
        written = _written(func, args, kwargs)
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
        n_fresh = sum(r.alias_info is None for r in func._schema.returns)
        for tensor, value in zip(written, values[n_fresh:], strict=False):
            self._write(tensor, value)
        if n_fresh:
            return values[0] if n_fresh == 1 else tuple(values[:n_fresh])
        if not func._schema.returns:
            return None
        alone = len(func._schema.returns) == 1 and str(func._schema.returns[0].type) == "Tensor"
        return written[0] if alone else tuple(written)

    def _write(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        with self:
            if value.dtype != tensor.dtype:
                value = value.to(tensor.dtype)
            if value.shape != tensor.shape:
                if tensor.numel() == 0:  # an `out=` that is made as large as it has to be
                    self._moved(tensor, lambda: tensor.resize_(value.shape))
                else:
                    value = value.expand(tensor.shape)
        old, var = self.var_of(tensor), self.var_of(value)
        geometry = geometry_of(tensor)
        if self._cuts() and (tensor.is_floating_point() or tensor.is_complex()):
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

    def _moved(self, tensor: torch.Tensor, move: Callable[[], Any]) -> Any:
        """Have only shape and strides of a tensor changed."""
        self._asleep = True
        try:
            out = move()
        finally:
            self._asleep = False
        return out

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
        if mean is None or var is None or not training:
            with self:
                if mean is None or var is None:
                    return aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, eps)
                return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, var, momentum, eps)
        with self:
            *out, new_mean, new_var = aten._native_batch_norm_legit_functional.default(
                x, weight, bias, mean, var, training, momentum, eps
            )
        with torch.no_grad():
            self._write(mean, new_mean)
            self._write(var, new_var)
        return tuple(out)

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
        primals = [self.take(inner[i]) for i in where]
        leaves = [inner[i].requires_grad_() for i in active]
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
        self._asleep = True
        try:
            with torch.no_grad():
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
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


def _is_tensor(kind: Any) -> bool:
    return "Tensor" in str(kind)


_ABOUT_TENSORS = frozenset({aten.is_same_size.default, aten._assert_tensor_metadata.default})

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
}


def _names(func: OpOverload) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def _written(func: OpOverload, args: Any, kwargs: Any) -> list[torch.Tensor]:
    written: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        written += [t for t in (value if isinstance(value, (list, tuple)) else (value,)) if t is not None]
    return written


class _DataIsDetached(TorchFunctionMode):
    """`x.data` is a tensor that no operator has made; here it is `x.detach()`, which is one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.data.__get__:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


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
        'values, TorchScript, NumPy. Use `backend="torch"`, which runs it as it is.'
    )
