"""The tape: autograd's graph, kept from a differentiated forward pass for its backward pass.

Reverse mode without it runs the forward pass twice: once for the value, and once more to have a graph. With it,
JAX's jvp rule binds `Taped(f)` for `f`, which keeps the graph and returns its number as one more output; the
backward pass gets the number and all the inputs (`FromTape(Vjp(f))`), and asks that graph.

The tape is a cache. An entry is used once; entries are bounded in number and bytes; where one is gone, where it
belongs to another call, or where torch refuses to use it, the inputs are there to compute everything again.
"""

from __future__ import annotations

import collections
import itertools
import os
import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from pytorch2jax._buffers import Buffers
from pytorch2jax._errors import OptionError
from pytorch2jax._inference import Spec
from pytorch2jax._internals import (
    GradientEdge,
    alias_with_storage,
    gradient_edge,
    set_grad_enabled,
    storage_address,
    storage_users,
)
from pytorch2jax._program import Around, Program, Style, Tensors
from pytorch2jax._transfer import torch_device
from pytorch2jax._transforms import (
    RECORDED,
    Derived,
    Vjp,
    conjugated,
    gradients,
    inexact_outputs,
    is_large,
    others_recorded,
)

HANDLE = Spec((2,), np.dtype("uint32"))
"""What a number on the tape looks like in JAX, with and without 64-bit dtypes; zero is none."""

_MAX_ENTRIES = 4096
_FEW_ENTRIES = 8  # of one program, until one is missed: so many graphs stay where backward passes never come
_MEMORY_SHARE = 4  # saved tensors may take up a quarter of the memory


class use_tape:  # noqa: N801
    """Turn the tape on or off, from now on or in a `with` block.

    With the tape, which is on by default, a gradient costs what torch's costs, because the forward pass runs once.
    Torch then keeps what it saved in the forward pass until the backward pass. Without it the backward pass runs
    the forward pass again. The numbers are the same but for rounding: what torch's libraries compute may differ in its
    last bits with the alignment of memory, and memory is not the same in the two cases. The environment variable
    `PYTORCH2JAX_TAPE=0` (or `false`, `no`, `off`) turns it off from the start; other values than these and their
    opposites are an `OptionError` at import.

    The setting counts when a program runs and when JAX traces. A program that was traced with the tape on asks
    for one forward pass more than necessary when it runs with it off.

    Args:
        enabled: whether to use the tape, in all threads.

    Example:
        >>> with use_tape(False):
        ...     pass
    """

    def __init__(self, enabled: bool) -> None:
        self._before = TAPE.enabled
        TAPE.enabled = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        TAPE.enabled = self._before


class Entry:
    """The graph of one forward pass.

    program: what ran.
    inputs: the recorded inputs, as leaves of the graph; the active ones come first.
    outputs: where in the graph each inexact output is; None for one that does not depend on `inputs`.
    addresses: where each input was in memory; autograd may have saved views of that memory.
    sources: the inputs, if hooks saw what autograd saved: views of inputs are saved by their place in `operands`.
    given: what the function got for an input, if that was a view of it, as long as somebody holds it.
    """

    __slots__ = (
        "__weakref__",
        "addresses",
        "given",
        "handle",
        "inputs",
        "operands",
        "outputs",
        "program",
        "size",
        "sources",
    )

    def __init__(self, program: Taped) -> None:
        self.program = program
        self.inputs: Tensors = ()
        self.outputs: tuple[GradientEdge | None, ...] = ()
        self.addresses: list[int] = []
        self.operands: Sequence[torch.Tensor] = ()
        self.sources: Sequence[torch.Tensor] = ()
        self.given: dict[int, weakref.ref[torch.Tensor]] = {}
        self.size = 0
        self.handle: Any = None

    def fits(self, primals: Sequence[torch.Tensor]) -> bool:
        """Whether everything that autograd saved is still what it was.

        An operand of the backward pass has the value that it had in the forward pass. If it also has the same
        address, then all views of it are good, whoever holds them. Without views it may be anywhere.
        """
        addresses = [p.data_ptr() for p in primals]
        if addresses == self.addresses:
            return True
        moved = [i for i, (now, then) in enumerate(zip(addresses, self.addresses, strict=True)) if now != then]
        return bool(self.sources) and not any(map(self._has_views, moved))

    def _has_views(self, index: int) -> bool:
        """Whether somebody holds views of an input besides autograd: a hand-written backward, a checkpoint."""
        return storage_users(self.sources[index]) > 1 + (index in self.program.active)


_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _is_on(variable: str) -> bool:
    """Whether an environment variable says yes; it does if it is empty or not there."""
    value = os.environ.get(variable, "").strip().lower()
    if value not in ("", *_ON, *_OFF):
        raise OptionError(
            f"{variable}: expected {', '.join(_ON)} or {', '.join(_OFF)} in the environment, got {value!r}. Unset it "
            "for the default."
        )
    return value not in _OFF


class Tape:
    """The graphs that are kept, by number."""

    def __init__(self) -> None:
        self.enabled = _is_on("PYTORCH2JAX_TAPE")
        self.last = threading.local()
        self._entries: collections.OrderedDict[int, Entry] = collections.OrderedDict()
        self._evicted: collections.deque[int] = collections.deque(maxlen=_MAX_ENTRIES)
        # Reentrant: the garbage collector may release a handle, and so an entry, at any time.
        self._lock = threading.RLock()
        self._bytes = 0
        # Numbers do not begin anew in each process: a handle that went to another one finds nothing there.
        self._number = int.from_bytes(os.urandom(7), "little")

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, entry: Entry) -> int:
        """Store an entry; the oldest ones go where there are too many."""
        gone = []
        with self._lock:
            self._number += 1
            number = self._number
            self._entries[number] = entry
            self._bytes += entry.size
            kept = entry.program.kept
            kept.append(number)
            if len(kept) > entry.program.limit:
                gone.append(self._evict(kept[0]))
            if len(self._entries) > 1:
                limit = _memory_limit(entry)
                for oldest in list(itertools.islice(self._entries, len(self._entries) - 1)):
                    if len(self._entries) <= _MAX_ENTRIES and self._bytes <= limit:
                        break
                    gone.append(self._evict(oldest))
        self.last.number = number
        return number

    def take(self, number: int) -> Entry | None:
        """Remove an entry and return it, or None if it is not there any more."""
        with self._lock:
            return self._pop(number)

    def missed(self, number: int, program: Taped) -> None:
        """A backward pass of this program found nothing; if that was for lack of room, make more."""
        with self._lock:
            if number in self._evicted:
                program.limit = min(program.limit + 1, _MAX_ENTRIES)

    def _evict(self, number: int) -> Entry | None:
        self._evicted.append(number)
        return self._pop(number)

    def _pop(self, number: int) -> Entry | None:
        entry = self._entries.pop(number, None)
        if entry is not None:
            self._bytes -= entry.size
            entry.program.kept.remove(number)
        return entry

    def drop_last(self) -> None:
        """Remove what the current thread stored last, if it is still there."""
        number = getattr(self.last, "number", 0)
        if number:
            self.take(number)

    def release_with(self, handle: jax.Array) -> None:
        """Remove an entry when the array on the host that holds its number is gone."""
        number = _number(np.asarray(handle))
        with self._lock:
            entry = self._entries.get(number)
        if entry is not None:
            entry.handle = weakref.ref(handle, lambda _: self.take(number) and None)

    def clear(self) -> None:
        """Remove all entries."""
        with self._lock:
            gone = [self._pop(number) for number in list(self._entries)]
        del gone


TAPE = Tape()


def _memory_limit(entry: Entry) -> int:
    device = entry.inputs[0].device
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // _MEMORY_SHARE
    return _HOST_MEMORY // _MEMORY_SHARE


def _host_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system can tell
        return 16 << 30


_HOST_MEMORY = _host_memory()


def handle_of(number: int) -> torch.Tensor:
    """A number as `HANDLE`."""
    return torch.from_numpy(np.array(_words_of(number), HANDLE.dtype))


def _words_of(number: int) -> tuple[int, int]:
    return number & 0xFFFFFFFF, number >> 32


def number_of(handle: torch.Tensor) -> int:
    """The number in a handle. On CUDA this waits for the forward pass."""
    return _number(handle)


def _number(words: Any) -> int:
    low, high = words.tolist()
    return int(low | high << 32)


class Taped(Derived):
    """`x -> (f(x), handle)`: keeps autograd's graph with respect to the active inputs."""

    differentiates = True

    def __init__(self, base: Program, active: tuple[int, ...]) -> None:
        super().__init__(base, active)
        self.active = active
        self.outputs = inexact_outputs(base)
        self.recorded = (*active, *others_recorded(self.root, active))  # the leaves of its graphs
        # A backward that a user wrote may look into the module's slots: at what it saved, and at `.grad`, as that of a
        # leaf. There, the function is given the leaves themselves, without hooks.
        plain = self.root.hand_written
        # A large gradient is taken from its leaf by a hook. What the function is given is then not the leaf, but a view
        # of it, because its own code may differentiate with respect to that.
        self.large = [] if plain else [i for i in active if is_large(base.in_specs[i])]
        self.in_specs = base.in_specs
        self.out_specs = (*base.out_specs, HANDLE)
        self.constant = base.constant
        self.kept: collections.deque[int] = collections.deque()  # the numbers of its graphs on the tape
        self.limit = _FEW_ENTRIES  # as many as a scan has steps, after the first one
        self.useless = False  # torch cannot use its graphs
        # What autograd saves of the inputs is found by address at first, which costs nothing; once the inputs of a
        # backward pass were somewhere else, as in a scan, by hooks.
        self.hooks = False
        self._hookable = not plain
        self._size: int | None = None

    def run(self, tensors: Sequence[torch.Tensor], style: Style, around: Around) -> Tensors:
        TAPE.last.number = 0
        if self.useless or not TAPE.enabled:
            return (*self.base.run(tensors, style, around), handle_of(0))
        entry = Entry(self)
        entry.addresses = [t.data_ptr() for t in tensors]
        set_grad_enabled(True)  # it is off, and a context manager takes longer
        try:
            results = self._record(entry, tensors, style)
        finally:
            set_grad_enabled(False)
        entry.size = self._size or 0
        entry.outputs = tuple(_edge(results[i]) for i in self.outputs)
        self.root.check_inputs(entry.sources or tensors)
        return (*results, handle_of(TAPE.keep(entry)))

    def deliver(self, tensors: Sequence[torch.Tensor], buffers: Buffers) -> None:
        # The same as `run`, without what surrounds it: for small calls, after the first one.
        root = self.root
        straight = root.is_straight and self.base is root and self._style == 0
        straight = straight and not (self.useless or self._wants_hooks())
        if not (straight and TAPE.enabled and root.state.is_current()):
            return super().deliver(tensors, buffers)
        entry = Entry(self)
        entry.addresses = [t.data_ptr() for t in tensors]
        set_grad_enabled(True)
        try:
            out = root.call_straight(self._with_leaves(entry, tensors))
        finally:
            set_grad_enabled(False)
        root.check_inputs(tensors)
        entry.size = self._size or 0
        entry.outputs = (_edge(out),)
        buffers.copy(0, out)
        buffers.put_words(1, *_words_of(TAPE.keep(entry)))

    def _wants_hooks(self) -> bool:
        return self._hookable and (self.hooks or self._size is None)

    def _record(self, entry: Entry, tensors: Sequence[torch.Tensor], style: Style) -> Tensors:
        if self._wants_hooks():
            try:
                return self._record_with_hooks(entry, tensors, style)
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error):
                    raise
                self._hookable = False  # the function calls torch.func.grad and the like
        return self.base.run(self._with_leaves(entry, tensors), style, RECORDED)

    def _with_leaves(self, entry: Entry, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inputs, the active ones as leaves of a new graph."""
        given, leaves = list(tensors), []
        for index in self.recorded:
            leaf = tensors[index].detach().requires_grad_()
            leaves.append(leaf)
            given[index] = leaf
        for index in self.large:
            given[index] = _alias(given[index])
            entry.given[index] = weakref.ref(given[index])
        entry.inputs = tuple(leaves)
        return given

    def _record_with_hooks(self, entry: Entry, tensors: Sequence[torch.Tensor], style: Style) -> Tensors:
        sources = list(map(alias_with_storage, tensors))
        saving = _Saving(entry, sources)
        leaves = {i: sources[i].detach().requires_grad_() for i in self.active}
        entry.operands = tensors  # the function may differentiate inside
        # It gets views, not the leaves, whose holders could not be counted.
        views = [_alias(leaves[i]) if i in leaves else t.detach() for i, t in enumerate(sources)]
        entry.given = {i: weakref.ref(views[i]) for i in leaves}
        with torch.autograd.graph.saved_tensors_hooks(saving.pack, saving.unpack):
            results = self.base.run(views, style, RECORDED)
        entry.operands, entry.inputs, entry.sources = (), tuple(leaves.values()), sources
        self._size = sum(saving.sizes.values())
        return results

    def abandon(self) -> None:
        TAPE.drop_last()

    def release_with(self, handle: Any) -> None:
        """Forget a graph when the array that holds its number is gone."""
        concrete = isinstance(handle, jax.Array) and not isinstance(handle, jax.core.Tracer)
        if concrete and torch_device(handle).type == "cpu":
            TAPE.release_with(handle)


_alias = torch.ops.aten.alias.default  # a view through which sparse gradients come, too


def _edge(output: torch.Tensor) -> GradientEdge | None:
    return gradient_edge(output) if output.requires_grad else None


class _View(NamedTuple):
    """A view of an input, without its memory."""

    operand: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Saving:
    """Hooks that keep addresses in memory out of what autograd saves: views of inputs are saved as `_View`."""

    def __init__(self, entry: Entry, tensors: Sequence[torch.Tensor]) -> None:
        self._entry = weakref.ref(entry)  # the graph that holds these hooks is the entry's
        self._inputs = {storage_address(t): (i, t.dtype) for i, t in enumerate(tensors) if t.numel()}
        self.sizes: dict[int, int] = {}  # of storages that autograd holds besides the inputs

    def pack(self, tensor: torch.Tensor) -> Any:
        if tensor.layout is not torch.strided:  # its values may lie in an input
            saved = tensor.detach().clone()
            return saved, saved._version
        address = storage_address(tensor)
        index, dtype = self._inputs.get(address, (None, None))
        if index is None or tensor.dtype != dtype or tensor.is_conj() or tensor.is_neg():
            self.sizes[address] = tensor.untyped_storage().nbytes()
            # Detached: an output that is saved for its own node would hold itself. Torch attaches it again.
            return tensor.detach(), tensor._version
        return _View(index, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, _View):
            entry = self._entry()
            assert entry is not None
            operand = entry.operands[packed.operand].detach()
            return operand.as_strided(packed.size, packed.stride, packed.offset)
        tensor: torch.Tensor = packed[0]
        if tensor._version != packed[1]:  # torch looks only where there are no hooks
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation"
            )
        return tensor


class FromTape(Derived):
    """A derivative `d(x, c)` of `f` as `(x, handle, c)`: reads the graph of `Taped(f)` where it can, else runs `d`."""

    base: Derived

    def __init__(self, base: Derived, taped: Taped) -> None:
        super().__init__(base, taped)
        self.taped = taped
        self.where = len(taped.in_specs)  # the handle among the inputs
        self.in_specs = (*base.in_specs[: self.where], HANDLE, *base.in_specs[self.where :])
        self.out_specs = base.out_specs
        self.n_linear = base.n_linear
        self._is_complex = any(spec.dtype.kind == "c" for spec in (*self.in_specs, *self.out_specs))
        self._is_backward = isinstance(base, Vjp)
        if isinstance(base, Vjp):  # where its outputs and inputs are among those of the graph
            self._of_outputs = [taped.outputs.index(i) for i in base.outputs]
            self._of_inputs = [taped.active.index(i) for i in base.active]
            self._large = [k for k, i in enumerate(base.active) if i in taped.large]

    def without_handle(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs of the derivative itself."""
        return [*inputs[: self.where], *inputs[self.where + 1 :]]

    def transposed(self, positions: tuple[int, ...], given: tuple[int, ...]) -> Derived:
        return self.base.transposed(positions, given).derive(FromTape, self.taped)

    def execute(self, tensors: Sequence[torch.Tensor], buffers: Buffers | None = None) -> Tensors:
        number = number_of(tensors[self.where])
        error: Exception | None = None
        entry = TAPE.take(number)
        if self._is_backward:
            if entry is None:
                TAPE.missed(number, self.taped)
            elif entry.program is self.taped:
                primals = tensors[: self.where]
                if not entry.fits(primals):
                    self.taped.hooks = True
                else:
                    pulled = self._pull(entry, primals, tensors[self.where + 1 :], buffers)
                    if not isinstance(pulled, Exception):
                        return pulled
                    error = pulled
            del entry
        result = self.base.execute(self.without_handle(tensors), buffers)
        if error is not None and not isinstance(error, torch.OutOfMemoryError):
            self._give_up(error)
        return result

    def _give_up(self, error: Exception) -> None:
        """Use no graphs any more: torch has refused one, for the computation of what it does without."""
        self.taped.useless = True
        if "incompatible with .grad()" not in str(error) and self.root.first_time("tape"):
            warnings.warn(
                f"{self.describe()}: torch could not use the graph of its forward pass ({type(error).__name__}: "
                f"{error}). From now on each gradient of it runs the forward pass once more. The results are right.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _pull(
        self,
        entry: Entry,
        primals: Sequence[torch.Tensor],
        cotangents: Sequence[torch.Tensor],
        buffers: Buffers | None,
    ) -> Tensors | Exception:
        root = self.root
        entry.operands = primals
        outputs = [entry.outputs[i] for i in self._of_outputs]
        inputs = [entry.inputs[i] for i in self._of_inputs]
        others = [x for i, x in enumerate(entry.inputs) if i not in self._of_inputs] if root.recorded_too else []
        # A backward may write to what it is given, and these are XLA's.
        given = [c.clone() for c in (conjugated(cotangents) if self._is_complex else cotangents)]
        try:
            with root.session(), root.backward(primals):
                root.hold(primals, self._leaves(entry, primals))
                destinations = {i: buffers[i] for i in self._large} if buffers is not None and self._large else None
                pulled = gradients(outputs, [*inputs, *others], given, destinations=destinations)[: len(inputs)]
                return conjugated(pulled) if self._is_complex else pulled
        except Exception as error:  # whatever it is: the computation without the tape meets it, too, or does without
            return error.with_traceback(None)  # whose frames hold the graph

    def _leaves(self, entry: Entry, primals: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """What a backward finds in the module's slots where it looks there: tensors that require gradients."""
        # The graph's own, unless these are elsewhere by now, or have a hook that is meant for the graph.
        leaves = dict(zip(self.taped.recorded, entry.inputs, strict=True))
        for index in self.taped.active if entry.sources else self.taped.large:
            # A hand-written checkpoint holds what it was given, and differentiates with respect to that.
            given = entry.given[index]()
            leaves[index] = primals[index].detach().requires_grad_() if given is None else given
        return leaves

    def run(self, tensors: Sequence[torch.Tensor], style: Style, around: Around) -> Tensors:
        return self.base.run(self.without_handle(tensors), style, around)
