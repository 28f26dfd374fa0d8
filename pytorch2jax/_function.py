"""A torch callable, and the programs that it was bound to, one for each kind of call."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import torch

from pytorch2jax._arguments import Arguments, take_apart
from pytorch2jax._bound import BoundFunction, Call, OwnTensor, TorchCallable, spec_of
from pytorch2jax._engines import bind_symbolic
from pytorch2jax._errors import InferenceError
from pytorch2jax._inference import Spec
from pytorch2jax._internals import x64_enabled
from pytorch2jax._options import Examples, Options
from pytorch2jax._threads import note_team_size
from pytorch2jax._torch_state import capture_torch_state, flushes_subnormals
from pytorch2jax._transfer import torch_device

_KEPT_PROGRAMS = 256
_NO_OPTIONS = Options()
_TRACED = torch.device("cpu")  # where torch code is written down, on whatever device it runs as JAX code


class TorchFunction:
    """A torch callable, and the programs that it was bound to, one for each kind of call.

    Args:
        name: for messages.
        call: what runs.
        identity: equal for functions that do the same; JAX's caches go by it.
        own: the tensors that `call` gets besides its arguments.
        options: what the user says about it.
    """

    def __init__(
        self,
        name: str,
        call: TorchCallable,
        *,
        identity: Hashable,
        own: Sequence[OwnTensor] = (),
        options: Options = _NO_OPTIONS,
    ) -> None:
        self.name = name
        self.call = call
        self.identity: Hashable = (identity, options)
        self.own = tuple(own)
        self.options = options
        self.examples: list[Any] = []  # arguments to try the function on where it has to run for inference
        self.example_specs: tuple[Spec, ...] | None = None
        self.said: set[str] = set()
        self.compiled: dict[Any, Callable[..., Any]] = {}  # of programs that ran outside of jit
        self._bound: collections.OrderedDict[Hashable, BoundFunction] = collections.OrderedDict()
        self._recent: dict[Hashable, BoundFunction] = {}  # the same by what JAX knows of arrays, which is at hand
        self._lock = threading.RLock()  # a torch function may call the JAX function that it is

    def keep_examples(self, examples: Examples) -> None:
        """Try the function on these where fake tensors do not do."""
        self.example_specs = tuple(map(spec_of, examples.specs()))
        if not any(isinstance(examples.leaves[i], jax.ShapeDtypeStruct) for i in examples.positions):
            self.examples = take_apart(self.name, *examples.treedef.unflatten(examples.leaves)).arrays

    def bind(
        self,
        own: Sequence[Any],
        arguments: Arguments,
        *,
        variant: Hashable = None,
        output_shapes: Any = None,
        output_key: Hashable = None,
    ) -> BoundFunction:
        """The program for arguments like these.

        Args:
            own: arrays for the function's own tensors, or for the first few of them; the others keep the
                values that the callable holds.
            arguments: the call's arguments.
            variant: passed on to the callable.
            output_shapes: what the user declared, or None to infer it.
            output_key: a hashable key for `output_shapes`.

        Raises:
            InferenceError: the function fails on inputs of these specs.
            StateError: it changes a tensor of its own that is not among `own`.
        """
        arrays = [*own, *arguments.arrays]
        avals = tuple([x.aval if isinstance(x, jax.Array) else spec_of(x) for x in arrays])
        note_team_size()
        state = capture_torch_state()
        device = _device(arrays) if self.options.backend == "torch" else _TRACED
        around = (arguments.key, variant, output_key, x64_enabled(), state, device, flushes_subnormals())
        program = self._recent.get((around, avals))
        if program is None:
            program = self._find(around, arrays, len(own), arguments, output_shapes)
            if len(self._recent) >= _KEPT_PROGRAMS:
                self._recent.clear()
            self._recent[around, avals] = program
        return program

    def _find(
        self, around: tuple[Any, ...], arrays: list[Any], n_own: int, arguments: Arguments, output_shapes: Any
    ) -> BoundFunction:
        specs = tuple(map(spec_of, arrays))
        if not all(isinstance(n, int) for spec in specs for n in spec.shape):
            fixed = functools.partial(self._find, around, n_own=n_own, arguments=arguments, output_shapes=output_shapes)
            return bind_symbolic(self.name, self.options.backend, specs, fixed)
        _, variant, _, _, state, device, flushes = around
        key = (around, specs)
        with self._lock:
            if key not in self._bound:
                call = Call(arguments._replace(arrays=[]), n_own, variant, state, device, flushes)
                program = BoundFunction(self, call, specs, key)
                self._infer(program, arrays, output_shapes, specs[n_own:])
                self._bound[key] = program
                while len(self._bound) > _KEPT_PROGRAMS:  # a new static value for each call
                    self._forget(self._bound.popitem(last=False)[1])
            self._bound.move_to_end(key)
            return self._bound[key]

    def _infer(
        self, program: BoundFunction, arrays: list[Any], output_shapes: Any, arguments: tuple[Spec, ...]
    ) -> None:
        """What was declared holds for inputs like the examples, or for all; for others it is a last resort."""
        if output_shapes is None or self.example_specs in (None, arguments):
            return program.infer(arrays, output_shapes)
        try:
            program.infer(arrays, None)
        except InferenceError:
            program.infer(arrays, output_shapes)

    def _forget(self, program: BoundFunction) -> None:
        self._recent.clear()
        for derived in [p for p in self.compiled if p.root == program]:
            del self.compiled[derived]


def _device(arrays: Sequence[Any]) -> torch.device:
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
            return torch_device(array)
    default: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    platform = getattr(default, "platform", default) or jax.default_backend()
    return torch.device("cpu" if platform == "cpu" else "cuda")
