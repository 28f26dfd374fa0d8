"""Programs: what the primitive runs, as flat tensors in and flat tensors out.

A program is a torch function bound to input specs (`_bound.BoundFunction`), or a derivative or batched
version of another program (`_transforms`). Programs are hashable and comparable, because JAX keys its caches
by them, and each keeps the programs derived from it, so that equal derivations are the same object.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import enum
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from pytorch2jax._autograd_functions import recorded_backwards
from pytorch2jax._buffers import Buffers
from pytorch2jax._composite import CompositeNorms
from pytorch2jax._errors import LoopWarning, NarrowingError, Pytorch2JaxError, UnsupportedTransformError
from pytorch2jax._hand_written import recorded_backward
from pytorch2jax._inference import Spec
from pytorch2jax._internals import hold_weakly
from pytorch2jax._plain_kernels import PlainKernels
from pytorch2jax._torch_state import TorchState
from pytorch2jax._transfer import fits

Tensors = tuple[torch.Tensor, ...]


class Batching(enum.Enum):
    """How a batch is evaluated."""

    RULES = "torch.vmap, each operator by its batching rule"
    FALLBACK = "torch.vmap, operators without a rule once for each example"
    LOOP = "a loop over the whole function"
    DIRECT = "one call of the function on a batch, because the user says that it takes one"


class Style(NamedTuple):
    """One way of evaluating a program; `_LADDER` lists those to try, fastest first.

    forward_mode: `True`: `torch.func.jvp`. `False`: the vjp of the vjp, for operators that have no
        forward-mode rule.
    batching: how `Vmap` runs.
    fused: `True`: torch's kernels as they come. `False`: `PlainKernels`.
    """

    forward_mode: bool = True
    batching: Batching = Batching.RULES
    fused: bool = True


_LADDER = tuple(
    Style(forward_mode, batching, fused)
    for batching in (Batching.RULES, Batching.FALLBACK, Batching.LOOP)
    for forward_mode, fused in ((True, True), (True, False), (False, False))
)


class Around(NamedTuple):
    """What goes on around a program that is part of another one.

    functional: a `torch.func` transform is at work, so that plain autograd cannot be.
    differentiated: an outer program takes a derivative of this one.
    """

    functional: bool = False
    differentiated: bool = False


Axes = tuple[str | None, ...]
"""The factors along the axes of an array; None for an axis without one."""


class Factors(NamedTuple):
    """The axes along which a program can be split; see `_partition`."""

    inputs: tuple[Axes, ...]
    outputs: tuple[Axes, ...]


_Derived = TypeVar("_Derived", bound="Program")
_Self = TypeVar("_Self", bound="Program")

_WIDE_INTS = (torch.int64, torch.uint64)


class Program(abc.ABC):
    """Flat tensors in, flat tensors out, with specs that JAX knows before anything runs.

    in_specs, out_specs: shapes and dtypes as JAX sees them.
    n_linear: the program is linear in this many of its last inputs.
    constant: outputs through which no derivative goes: the new state of a module, as in torch.
    """

    in_specs: tuple[Spec, ...]
    out_specs: tuple[Spec, ...]
    n_linear: int = 0
    constant: frozenset[int] = frozenset()

    differentiates: ClassVar[bool] = False  # is itself a derivative
    forward_mode: ClassVar[bool] = False
    batches: ClassVar[bool] = False
    computes_in_place: bool = False  # large outputs appear in the caller's buffers
    draws_from_torch: ClassVar[bool] = False  # not pure: takes numbers from torch's global generator

    def __init__(self, key: tuple[Any, ...]) -> None:
        self._key = key
        self._hash = hash((type(self), key))
        self._derived: dict[tuple[Any, ...], Program] = {}
        self._style = 0

    def __init_subclass__(cls) -> None:
        hold_weakly(cls)

    def renamed(self: _Self, key: tuple[Any, ...]) -> _Self:
        """A copy under another key, to be changed: what was derived or found out of this one is not its own."""
        program = copy.copy(self)
        for cls in type(self).__mro__:
            for name, value in vars(cls).items():
                if isinstance(value, functools.cached_property):
                    vars(program).pop(name, None)
        Program.__init__(program, key)
        return program

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (type(self) is type(other) and self._key == other._key)

    @property
    @abc.abstractmethod
    def root(self) -> RootProgram:
        """The bound torch function that everything here comes from."""

    @abc.abstractmethod
    def chain(self) -> Iterable[Program]:
        """This program, the one that it is derived from, and so on down to the root."""

    @abc.abstractmethod
    def run(self, tensors: Sequence[torch.Tensor], style: Style, around: Around) -> Tensors:
        """Evaluate in one style."""

    def derive(self, cls: Callable[..., _Derived], *arguments: Any) -> _Derived:
        """The program `cls(self, *arguments)`, the same object for equal arguments."""
        key = (cls, *arguments)
        try:
            return self._derived[key]  # type: ignore[return-value]
        except KeyError:
            return self._derived.setdefault(key, cls(self, *arguments))  # type: ignore[return-value]

    def __repr__(self) -> str:
        return self.describe()

    @abc.abstractmethod
    def describe(self) -> str:
        """The program as a formula, for messages: `vmap(vjp(Linear))`."""

    # -- execution ------------------------------------------------------------------------------------

    def kept_by(self) -> list[Any] | None:
        """Where the lowering puts what has to live as long as the executable, if not with the computation itself."""
        return None

    def abandon(self) -> None:  # noqa: B027
        """An execution in this thread ended with an error: free what it left for others."""

    def deliver(self, tensors: Sequence[torch.Tensor], buffers: Buffers) -> None:
        """Evaluate, and put the outputs into buffers; arguments as those of `execute`.

        Raises:
            NarrowingError: an integer does not fit into what JAX has for it.
        """
        for index, value in enumerate(self.execute(tensors, buffers)):
            self.put(index, value, buffers)

    def put(self, index: int, value: torch.Tensor, buffers: Buffers) -> None:
        """Copy an output into its buffer, if it is not there; errors as those of `deliver`."""
        buffers.copy(index, value)
        if value.dtype not in _WIDE_INTS:
            return
        buffer = buffers[index]
        # On CUDA the check would make the host wait for the device.
        if buffer.dtype is not value.dtype and not value.is_cuda and not fits(buffer, value):
            raise NarrowingError(
                f"{self.describe()}: output {index}: expected values that fit into {buffer.dtype}, "
                f"because jax_enable_x64 is off, and got larger ones in a tensor of {value.dtype}. Call "
                "`jax.config.update('jax_enable_x64', True)`, or return smaller values."
            )

    def is_large(self, limit: int) -> bool:
        """Whether inputs and outputs have more bytes than this together."""
        return self._bytes > limit

    @functools.cached_property
    def _bytes(self) -> int:
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in (*self.in_specs, *self.out_specs))

    def execute(self, tensors: Sequence[torch.Tensor], buffers: Buffers | None = None) -> Tensors:
        """Evaluate, in the first style that torch supports; which one that is, is remembered.

        The caller has turned grad mode off.

        Args:
            tensors: the inputs, which may not be written to.
            buffers: where the caller wants the outputs, if it knows. Those that are computed there are the buffers
                themselves; the caller copies the others.
        """
        with self.root.session():
            result = self._climb(tensors)
        self.root.check_inputs(tensors)
        return result

    def _climb(self, tensors: Sequence[torch.Tensor]) -> Tensors:
        styles = self._styles
        failures: list[Exception] = []
        for index in range(self._style, len(styles)):
            try:
                result = self._run_in(tensors, styles[index])
            except torch.OutOfMemoryError:
                raise
            except _UNSUPPORTED as error:
                if isinstance(error, Pytorch2JaxError):
                    raise
                failures.append(error)
                continue
            if failures:
                self._style = index
                self._tell_about_loop(styles[index].batching, _first_line(failures[0]))
            return result
        raise self._failure(failures)

    def _run_in(self, tensors: Sequence[torch.Tensor], style: Style) -> Tensors:
        # A backward pass is recorded for the derivatives of derivatives, and for forward mode by double backward.
        records = self.order > 1 or (not style.forward_mode and self.in_forward_mode)
        if style.fused and not records:
            return self.run(tensors, style, Around())
        with contextlib.ExitStack() as stack:
            if not style.fused:
                stack.enter_context(PlainKernels())
            if self.order > 1:
                stack.enter_context(CompositeNorms())
            if records:
                stack.enter_context(recorded_backwards(functools.partial(recorded_backward, self.describe, self.order)))
            return self.run(tensors, style, Around())

    @functools.cached_property
    def in_forward_mode(self) -> bool:
        """Whether one of the derivatives is a `jvp`."""
        return any(p.forward_mode for p in self.chain())

    @functools.cached_property
    def order(self) -> int:
        """How many derivatives are taken."""
        return sum(p.differentiates for p in self.chain())

    @functools.cached_property
    def tapeable(self) -> bool:
        """Whether a derivative of this program is one of first order, which can use autograd's graph."""
        return self.order == 0 and not self.draws_from_torch

    @functools.cached_property
    def _styles(self) -> list[Style]:
        """The part of the ladder in which this program's chain makes a difference."""
        chain = list(self.chain())
        forward_mode = self.in_forward_mode
        batches = any(p.batches for p in chain)
        wanted = self._wanted_batching() if batches else None
        return [
            style if wanted is None else style._replace(batching=wanted)
            for style in _LADDER
            if (style.batching is Batching.RULES or (batches and wanted is None))
            and (style.forward_mode or forward_mode)
            and not (style.forward_mode and forward_mode and self.root.forward_mode_errs)
            and (style.fused or self.order or batches)
        ]

    def _wanted_batching(self) -> Batching | None:
        """How batches have to be evaluated, if it is not for torch to say."""
        reason = self._reason_for_loop()
        if self.root.batching is None and reason is not None:
            self._tell_about_loop(Batching.LOOP, reason)
            return Batching.LOOP
        return self.root.batching

    def _reason_for_loop(self) -> str | None:
        """What the function does that is not the same under `torch.vmap`, if anything."""
        if self.root.loops:
            return "it has an operator for which torch.vmap is wrong"
        if self.root.flattens and self._has_batches_apart():
            return "it has an operator for which torch.vmap in torch.vmap is wrong"
        if self.root.autocasts:
            return "it uses autocast, which torch.vmap ignores"
        if self.root.asks and self.order:
            return "it asks whether a tensor requires a gradient, which torch.vmap denies"
        if self.root.has_hooks and self.order:
            return "it has hooks on gradients, which torch.vmap cannot call"
        return None

    def _has_batches_apart(self) -> bool:
        """Whether there is something else between two batch axes."""
        batches = [index for index, program in enumerate(self.chain()) if program.batches]
        return bool(batches) and batches[-1] - batches[0] >= len(batches)

    def _tell_about_loop(self, batching: Batching, reason: str) -> None:
        if batching in (Batching.FALLBACK, Batching.LOOP) and self.root.first_time("loop"):
            warnings.warn(
                f"jax.vmap of {self.root.name}: torch.vmap cannot batch it ({reason}). What runs "
                f"instead: {batching.value}. The results are right; large batches are slow.",
                LoopWarning,
                stacklevel=2,
            )

    def _failure(self, failures: list[Exception]) -> Exception:
        first, last = failures[0], failures[-1]
        chain = list(self.chain())
        if self.in_forward_mode and "modified by an inplace operation" in str(last):
            error = UnsupportedTransformError(
                f"{self.describe()}: torch cannot compute this derivative, because the function writes in place to a "
                f"tensor that its backward pass needs: {_first_line(last)} Make a new tensor there (`y = y + 1` for "
                "`y.add_(1)`)."
            )
            error.__cause__ = last
            return error
        if len(chain) == 1 or len(failures) == 1 or str(first) == str(last) or not _is_unsupported(last):
            return last
        error = UnsupportedTransformError(
            f"{self.describe()}: torch has no rule for this derivative. As it comes: {_first_line(first)} "
            f"With differentiable kernels and double backward: {_first_line(last)} "
            "Replace the operator that torch names, or use reverse mode of first order (jax.grad), which "
            "works wherever torch's own backward does."
        )
        error.__cause__ = last
        return error


class RootProgram(Program):
    """A program that calls the user's function, and what every program derived from it needs to know."""

    name: str
    device: torch.device = torch.device("cpu")  # where the arrays are expected
    vmap_randomness: str = "same"
    forward_mode_errs: bool = False  # torch's forward mode is wrong for it, without an error
    asks: bool = False  # whether tensors require a gradient, which torch.vmap denies
    hand_written: bool = True  # has a backward of the user's, which may look at parameters as objects
    has_hooks: bool = False  # on gradients
    registers_hooks: bool = False  # in each call
    autocasts: bool = False
    loops: bool = False  # batches have to be loops, because torch is wrong for them
    flattens: bool = False  # batches of batches have to be one batch, because torch is wrong for them
    recorded_too: tuple[int, ...] = ()  # inputs that require gradients whenever one of them does
    shares_tensors: bool = False  # does nothing to its input tensors, as objects, that would outlast a call
    flushes: bool = False  # takes subnormal numbers for zero, as the user wants torch to
    state: TorchState  # what surrounds each call
    batching: Batching | None = None  # how the user wants batches evaluated
    expands: bool = False  # what is not batched gets a batch axis of length one in direct batches
    depth: int | None = None  # how many derivatives the user allows
    factors: Factors | None = None  # along which axes the user allows to split it over devices
    shardable: frozenset[str] = frozenset()  # those of the factors that may be split
    is_seeded: bool = False  # the first input is a seed
    is_straight: bool = False  # nothing happens between JAX and the user's function: the same inputs, one output

    @property
    def root(self) -> RootProgram:
        return self

    def chain(self) -> Iterable[Program]:
        return (self,)

    def check_depth(self, order: int) -> None:
        """Raise where a derivative of this order is more than the user allows.

        Raises:
            UnsupportedTransformError: it is.
        """
        if self.depth is not None and order > self.depth:
            allowed = "no derivatives" if self.depth == 0 else f"derivatives up to order {self.depth}"
            raise UnsupportedTransformError(
                f"{self.describe()}: expected {allowed}, because it was wrapped with `depth={self.depth}`, got a "
                f"derivative of order {order}. Wrap it without `depth` for derivatives of any order, or take the "
                "arguments out of the differentiation with `jax.lax.stop_gradient`."
            )

    def describe(self) -> str:
        return self.name

    def first_time(self, message: str) -> bool:
        """Whether a message of this kind is new to the user's function."""
        return False

    def backward(self, primals: Sequence[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        """What surrounds a backward pass: random numbers in it, too, come from the key."""
        return contextlib.nullcontext()

    def hold(self, primals: Sequence[torch.Tensor], leaves: Mapping[int, torch.Tensor]) -> None:
        """Before a backward pass without its forward: `torch.utils.checkpoint` runs parts of that again.

        Args:
            primals: the inputs.
            leaves: those that require gradients, by their numbers.
        """

    def call_straight(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The output, if the program `is_straight`; the caller looks after torch's state, grad mode and versions."""
        raise NotImplementedError(f"{self.describe()} is not straight")

    def on_shards(self, counts: Mapping[str, int]) -> RootProgram:
        """The program for a part of the inputs, where each factor is split into so many."""
        raise NotImplementedError(f"{self.describe()} on several devices")

    def compiled_calls(self) -> dict[Any, Callable[..., Any]]:
        """Where compiled calls outside of jit are kept, for this program and those derived from it."""
        return {}

    def check_inputs(self, tensors: Sequence[torch.Tensor]) -> None:
        """Look at the version counters of the inputs after a call: they count writes in place."""

    @abc.abstractmethod
    def session(self) -> contextlib.AbstractContextManager[None]:
        """What surrounds one execution: ambient torch state, exclusive use of the module."""


# As these, torch says that it does not support something.
_UNSUPPORTED = (RuntimeError, TypeError, AssertionError)


def _is_unsupported(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, NotImplementedError) or any(
        phrase in text
        for phrase in (
            "not implemented",
            "not support",
            "functorch",
            "vmap",
            "derivative",
        )
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
