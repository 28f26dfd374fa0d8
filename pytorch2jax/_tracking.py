"""Watching a torch function run: what it writes to, draws, and keeps."""

from __future__ import annotations

import collections
import gc
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from pytorch2jax._destination import Maker
from pytorch2jax._errors import RandomnessError
from pytorch2jax._internals import HigherOrderOperator, TorchDispatchMode, is_turning_grad_off
from pytorch2jax._trees import tensors_in


class Tracker(TorchDispatchMode):
    """Sees every operator that a function runs.

    random: whether one of them draws random numbers.
    n_operators: how many there were.
    has_wrong_tangents: whether there was one for which torch's forward mode is wrong.
    has_wrong_nesting: whether there was one for which two levels of `torch.vmap` are wrong.
    has_wrong_batches: whether there was one for which one level is.

    Args:
        inputs: the function's tensors, to look out for writes to them.
        sources: those from which derived tensors are followed.
    """

    supports_higher_order_operators = True

    def __init__(self, inputs: Sequence[torch.Tensor], sources: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.random = False
        self.n_operators = 0
        self.has_wrong_tangents = False
        self.has_wrong_nesting = self.has_wrong_batches = False
        self._makers: dict[int, tuple[int, Any, torch.Size]] = {}
        self._inputs = [storage_of(t) for t in inputs]
        self._writers: dict[int, set[str]] = collections.defaultdict(set)
        self._sources = frozenset(storage_of(t) for t in sources)
        self._derived = set(self._sources)
        self._read: set[int] = set()
        self._others: set[int] = set()
        self._alive: list[Any] = list(inputs)  # so that no storage gets the address of another one
        self._fakes = [weakref.ref(t) for t in inputs]

    def is_derived(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was computed from the sources."""
        return storage_of(tensor) in self._derived

    def has_read(self, source: torch.Tensor) -> bool:
        """Whether an operator had this source for an input."""
        return storage_of(source) in self._read

    def has_used(self, tensor: torch.Tensor) -> bool:
        """Whether an operator had this tensor, which was no input of the function, for an input."""
        return storage_of(tensor) in self._others

    def has_written(self, tensor: torch.Tensor) -> bool:
        """Whether an operator has written to this tensor."""
        return storage_of(tensor) in self._writers

    def maker(self, output: torch.Tensor) -> Maker | None:
        """The operator that made an output, if it left it in C order and nobody has taken a part of it since."""
        if output.layout != torch.strided:
            return None
        index, operator, shape = self._makers.get(storage_of(output), (0, None, None))
        whole = operator is not None and shape == output.shape and output.is_contiguous()
        return Maker(index, operator) if whole else None

    def written(self) -> frozenset[int]:
        """The inputs that were written to."""
        return frozenset(i for i, storage in enumerate(self._inputs) if storage in self._writers)

    def changed(self) -> frozenset[int]:
        """The same, without those that were only renormalised, which any call does again (`max_norm`)."""
        return frozenset(
            i for i, s in enumerate(self._inputs) if self._writers.get(s, set()) - {"aten::embedding_renorm_"}
        )

    def survivors(self) -> list[torch.Tensor]:
        """The fake tensors that are still there, when nothing of the run should be."""
        self._alive.clear()
        alive = [ref() for ref in self._fakes]
        if any(t is not None for t in alive):
            del alive
            gc.collect()
            alive = [ref() for ref in self._fakes]
        return [t for t in alive if t is not None]

    def kept(self, *, sure: bool = True) -> list[torch.Tensor]:
        """Inputs among the sources, and tensors computed from these, that are still there when nothing should be.

        Not `sure`: also those that wait for the garbage collector, or that the frames of an error hold.
        """
        followed = [weakref.ref(t) for t in self._alive if self.is_derived(t)]
        self._alive.clear()
        if sure:
            gc.collect()
        return [t for ref in followed if (t := ref()) is not None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):  # what its functions do is not seen
            return func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and not _draws_nothing(func, args, kwargs):
            self.random = True
            if kwargs.get("generator") is not None:
                raise RandomnessError(
                    f"{func._schema.name}: expected torch's default generator, which a JAX key can seed, got a "
                    "torch.Generator of its own. Leave the argument `generator` out."
                )
        if func._schema.name in _WRONG_TANGENTS and _is_wrong_in_forward_mode(func, args, kwargs):
            self.has_wrong_tangents = True
        self.has_wrong_nesting |= func._schema.name in _WRONG_BATCHES
        self.has_wrong_batches |= func._schema.name in _WRONG_IN_BATCHES
        for value in _written_arguments(func._schema, args, kwargs):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor):
                    self._writers[storage_of(tensor)].add(func._schema.name)
        out = func(*args, **kwargs)
        made = isinstance(out, torch.Tensor) and out.layout == torch.strided
        if made and not func._schema.is_mutable and not func.is_view:
            self._makers[storage_of(out)] = (self.n_operators, func, out.shape)
        self.n_operators += 1
        self._follow(func, tensors_in((args, kwargs)), tensors_in(out))
        return out

    def _follow(self, func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        storages = {storage_of(t) for t in inputs}
        self._read |= storages & self._sources
        self._others |= {storage_of(t) for t in inputs if not _is_fake(t)}
        if storages & self._derived and not _is_factory(func):
            self._derived.update(map(storage_of, outputs))
            self._alive += outputs
        self._fakes += [weakref.ref(t) for t in outputs if _is_fake(t)]


def _is_fake(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "fake_mode", None) is not None


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


# Operators whose tangents, or those of their backward, are wrong in torch's forward mode, without an error (torch 2.13;
# `tests/test_orders.py` compares with finite differences). Reverse mode is right for them.
_WRONG_TANGENTS = frozenset(
    {
        "aten::cholesky_inverse",
        "aten::scatter_reduce",
        "aten::scatter_reduce_",
        "aten::triangular_solve",
    }
)


# Operators for which `torch.vmap` in `torch.vmap` is wrong, without an error (torch 2.13; `tests/test_batching.py`
# compares with loops and with JAX). Those of linear algebra come to `linalg_lu_solve`, if only in their derivatives.
_WRONG_BATCHES = frozenset(
    {
        "aten::_linalg_det",
        "aten::_linalg_slogdet",
        "aten::_linalg_solve_ex",
        "aten::as_strided",
        "aten::as_strided_",
        "aten::as_strided_copy",
        "aten::linalg_lu_solve",
        "aten::lu_solve",
    }
)

# Those for which one `torch.vmap` is: a batch of values is filled into what is none, and the gradient of a batch.
_WRONG_IN_BATCHES = frozenset({"aten::as_strided_scatter", "aten::index_fill", "aten::index_fill_"})


def _is_wrong_in_forward_mode(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether one of these operators is called in such a way: of the reductions, products only."""
    reductions = [value for argument, value in _arguments(func._schema, args, kwargs) if argument.name == "reduce"]
    return not reductions or reductions == ["prod"]


# What it does inside is not shown to modes: it asks where it computes in chunks, and adds up the losses. Not every
# version of torch has it.
_CHUNKED_LOSS = getattr(torch.nn.functional, "linear_cross_entropy", None)


class Exposure(TorchFunctionMode):
    """Notices what operators do not show.

    happened: memory is handed to code that torch cannot watch.
    cuts: grad mode is turned off.
    marks: something is done to tensors as objects: their flags, their gradients, what they point to.
    asks: somebody wants to know whether a tensor requires a gradient.
    copies: `copy.deepcopy` of a tensor.
    hooks: a hook is registered on a tensor.
    """

    _ASKING = vars(torch._C.TensorBase)["requires_grad"].__get__
    # These ask whether they may take kernels without a backward, and give the same numbers in any case.
    _HARMLESS = (torch.nn.modules.activation.__file__, torch.nn.modules.transformer.__file__)

    _EXPOSING = frozenset({torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.data_ptr, torch.Tensor.__dlpack__})
    _MARKING = frozenset(
        {
            *(vars(torch._C.TensorBase)[name].__set__ for name in ("requires_grad", "data", "grad")),
            vars(torch._C.TensorBase)["grad"].__get__,
            torch.Tensor.requires_grad_,
            torch.Tensor.backward,
            torch.Tensor.register_hook,
            torch.Tensor.retain_grad,
            torch.Tensor.set_,
            torch.Tensor.resize_,
            torch.Tensor.resize_as_,
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.happened = False
        self.cuts = False
        self.marks = False
        self.asks = False
        self.copies = False
        self.hooks = False
        self._out: set[int] = set()

    def outputs_among(self, tensors: Sequence[torch.Tensor]) -> frozenset[int]:
        """Which tensors torch got as `out=`. Some functions leave it as it is while a mode watches (`matrix_rank`)."""
        return frozenset(i for i, tensor in enumerate(tensors) if storage_of(tensor) in self._out)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._EXPOSING:
            self.happened = True
        if func in self._MARKING:
            self.marks = True
        if func == self._ASKING and sys._getframe(1).f_code.co_filename not in self._HARMLESS:
            self.asks = True
        if func is _CHUNKED_LOSS and kwargs and kwargs.get("options") and kwargs.get("reduction") != "none":
            self.asks = True
        if func is torch.Tensor.register_hook:
            self.hooks = True
            return _hook(*args, **(kwargs or {}))
        if func is torch.Tensor.__deepcopy__:
            self.copies = True
        if is_turning_grad_off(func, args):
            self.cuts = True
        if kwargs and "out" in kwargs:
            self._out.update(map(storage_of, tensors_in(kwargs["out"])))
        return func(*args, **(kwargs or {}))


class WithoutVainHooks(TorchFunctionMode):
    """Within this context, hooks on tensors that do not require gradients, which torch refuses, are never called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_hook if func is torch.Tensor.register_hook else func)(*args, **(kwargs or {}))


def _hook(tensor: torch.Tensor, hook: Any) -> Any:
    return tensor.register_hook(hook) if tensor.requires_grad else RemovableHandle(collections.OrderedDict())


def storage_of(tensor: torch.Tensor) -> int:
    """What tells tensors that share memory from others: an address. Sparse tensors have none and share none."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else -id(tensor)
