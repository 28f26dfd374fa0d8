"""A torch callable at fixed input specs, as flat tensors in, flat tensors out: the root of all programs.

`BoundFunction` is the program that `_function.TorchFunction` makes for each kind of call, and that everything in
`_transforms.py` is derived from.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import torch

from pytorch2jax._arguments import Arguments
from pytorch2jax._buffers import Buffers
from pytorch2jax._control_flow import RUN
from pytorch2jax._destination import IntoBuffer, Maker, out_variant
from pytorch2jax._dtypes import dtype_j2t, is_inexact, narrowed
from pytorch2jax._errors import (
    DtypeError,
    NarrowingError,
    OutputMismatchError,
    RandomnessError,
    StateError,
)
from pytorch2jax._inference import (
    Inferred,
    Spec,
    Surroundings,
    TensorSpec,
    as_output_tensor,
    check_declared,
    check_static_outputs,
    declared,
    infer,
    infer_without_running,
    is_output_leaf,
    places_of_declared,
    run_without_graph,
)
from pytorch2jax._internals import is_fake, is_functorch_active, operators_on_functions
from pytorch2jax._nesting import without_jax
from pytorch2jax._options import Options
from pytorch2jax._program import Around, Axes, Batching, RootProgram, Style, Tensors
from pytorch2jax._rng import seeded
from pytorch2jax._sharding import shardable
from pytorch2jax._torch_state import TorchState
from pytorch2jax._tracking import WithoutVainHooks
from pytorch2jax._transfer import j2t
from pytorch2jax._trees import flatten_output, output_paths


class TorchCallable(Protocol):
    """What a `TorchFunction` runs."""

    def __call__(
        self, own: list[torch.Tensor], variant: Hashable, args: Any, kwargs: Any
    ) -> tuple[Any, list[torch.Tensor]]:
        """Run torch.

        Args:
            own: the tensors that are not arguments: parameters and buffers.
            variant: a static choice, such as the train flag.
            args, kwargs: the arguments, with tensors for arrays.

        Returns:
            What the user's function returned, and the values of `own` afterwards.
        """

    def plain_function(self) -> Callable[..., Any] | None:
        """The user's function itself, if a call is nothing else than a call of it."""

    def hold(self, own: list[torch.Tensor], variant: Hashable) -> None:
        """Have `own` in place, as during a call, until `exclusive` ends."""

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other threads out for as long as one evaluation, with its derivatives, takes."""

    def learning(self) -> contextlib.AbstractContextManager[None]:
        """Around the run that infers: a chance to see what else a call leaves behind."""

    def surroundings(self) -> Surroundings:
        """What inference has to know of the callable besides its arguments."""

    def constants(self, device: torch.device) -> list[torch.Tensor]:
        """The callable's own tensors, for those that are not given; `[]` if it has none."""


class OwnTensor(NamedTuple):
    """A parameter or buffer that a function gets besides its arguments.

    path: its address, for messages.
    dtype: torch's dtype, which it gets back where JAX had to narrow it.
    value: its value where it was converted, or None when that is gone; for inference on real tensors.
    """

    path: str
    dtype: torch.dtype
    value: Callable[[], jax.Array | None]


class Wrapped(Protocol):
    """The function that a program belongs to."""

    name: str
    call: TorchCallable
    identity: Hashable
    own: tuple[OwnTensor, ...]
    options: Options
    examples: list[Any]
    example_specs: tuple[Spec, ...] | None
    said: set[str]
    compiled: dict[Any, Callable[..., Any]]


_FEW_OPERATORS = 8
_LARGE_BYTES = 1 << 22  # of inputs and outputs together; below, the copy comes out of the processor's cache
_VERSION = operator.attrgetter("_version")
_PLAIN = Style()


class Call(NamedTuple):
    """One kind of call, apart from the specs of its arrays.

    arguments: the arguments, without their arrays.
    n_given: how many of the function's own tensors are inputs of the program.
    variant: passed on to the callable.
    state: torch's ambient state.
    device: where the arrays are expected.
    flushes: whether the user's thread takes subnormal numbers for zero.
    """

    arguments: Arguments
    n_given: int
    variant: Hashable
    state: TorchState
    device: torch.device
    flushes: bool


class BoundFunction(RootProgram):
    """A torch function at fixed input specs, static values, train flag and ambient torch state.

    Its inputs are the given ones of the function's own tensors, then the arrays among the arguments; in a
    seeded program (`with_seed`) the seed comes first.
    """

    inferred: Inferred

    def __init__(self, function: Wrapped, call: Call, specs: tuple[Spec, ...], key: Hashable) -> None:
        super().__init__((function.identity, key))
        # Not the function itself, which keeps the compiled calls of its programs: jax's caches hold programs, and
        # a way from there to the compiled call, under which they are filed, would keep both for ever.
        self._function = weakref.ref(function)
        self._callable, self._own, self._said = function.call, function.own, function.said
        self._options = function.options
        self.depth, self.batching, self.expands = self._options.depth, self._options.batching, self._options.expands
        self.backend = self._options.backend
        self.at_sizes: Any = None  # where sizes are symbols: what the engine makes one program of
        self.name = function.name
        self.state, self.device, self.flushes = call.state, call.device, call.flushes
        self._what = call
        self._plain = call.arguments.are_plain()
        self._itself = self._callable.plain_function()
        self._unseeded: BoundFunction | None = None  # for a seeded program, the one that it was made of
        self.in_specs = specs
        self._set_dtypes()

    def _set_dtypes(self) -> None:
        """Which torch dtype each tensor has, and which inputs have to be converted to it."""
        given, own, specs = self._what.n_given, self._own, self.in_specs
        tensors = []
        for index, spec in enumerate(specs):
            path = own[index].path if index < given else self._what.arguments.path(index - given)
            try:
                dtype = dtype_j2t(spec.dtype)
            except DtypeError as error:
                raise DtypeError(f"{self.name}: {path}: {error}") from None
            wide = own[index].dtype if index < given else self._wide(dtype, index - given)
            tensors.append(TensorSpec(spec.shape, wide if narrowed(wide) == dtype else dtype, path))
        self._widened = [
            (i, t.dtype) for i, (t, s) in enumerate(zip(tensors, specs, strict=True)) if t.dtype != dtype_j2t(s.dtype)
        ]
        constants = self._callable.constants(self._what.device)[given:]
        held = [TensorSpec(tuple(c.shape), c.dtype, o.path) for c, o in zip(constants, own[given:], strict=True)]
        self._n_held = len(held)
        self._tensor_specs = [*tensors[:given], *held, *tensors[given:]]

    def _wide(self, dtype: torch.dtype, number: int) -> torch.dtype:
        """The torch dtype of an argument that is this in JAX: as an example has it, else the index type for int32."""
        examples = self._options.dtypes
        if len(examples) == len(self._what.arguments.positions) and (example := examples[number]) is not None:
            return example if narrowed(example) == dtype else dtype
        return torch.int64 if self._options.widen_ints and dtype == torch.int32 else dtype

    def infer(self, arrays: Sequence[Any], output_shapes: Any) -> None:
        """Find out the output specs, once, before anything else happens with the program."""
        translates, n_given = self.backend != "torch", self._what.n_given
        call = without_jax(self.name, self._call)
        said, found = None, None
        if output_shapes is not None:
            buffers = [i for i in range(n_given) if self._tensor_specs[i].path.startswith("state.")]
            said = declared(self.name, output_shapes, self._tensor_specs, buffers)
        with self._plain_session(), self._callable.learning():
            around = self._callable.surroundings()._replace(translates=translates, n_given=n_given)
            if said is None:
                values = functools.partial(self._values, arrays)
                found = infer(self.name, call, self._tensor_specs, values, self._what.device, around)
            else:
                found = infer_without_running(self.name, call, self._tensor_specs, self._what.device, around)
        self._places: list[int] | None = None  # of the leaves of a declaration among the outputs
        if said is not None and found is not None:
            self._places = check_declared(self.name, found, said)
        self.inferred = found or said  # type: ignore[assignment]
        self.is_guess = found is None
        self._tree = self.inferred.tree if said is None else said.tree
        self._out_dtypes = tuple(dtype_j2t(spec.dtype) for spec in self.inferred.specs)
        self._needs_grad = self.inferred.needs_grad
        self.forward_mode_errs, self.asks = self.inferred.forward_mode_errs, self.inferred.asks
        self.hand_written = self.inferred.hand_written
        self.has_hooks, self.registers_hooks = self.inferred.hooks, self.inferred.registers_hooks
        if self.inferred.runs_others:  # a backward may be about all of them
            self.recorded_too = tuple(i for i, spec in enumerate(self.in_specs) if is_inexact(spec.dtype))
        self.flattens, self.loops = self.inferred.flattens, self.inferred.loops
        self.autocasts = self.inferred.autocasts or any(enabled for enabled, _ in self.state.autocast)
        self.forward_mode_errs |= self.autocasts  # `torch.func` ignores it
        self.shares_tensors = self.inferred.certain and not (self.inferred.marks or self.inferred.retains)
        n_own = len(self._own)
        kept = range(n_own, len(self._tensor_specs)) if self.inferred.retains else ()
        self._copied = tuple(sorted(self.inferred.written.union(kept)))
        self.is_straight = self._find_whether_straight()
        self.out_specs = self.inferred.specs
        first_state = len(self.out_specs) - len(self.inferred.changed)
        self.constant = frozenset(range(first_state, len(self.out_specs)))
        self._declared = said is not None
        self._find_factors()
        self._into = self._find_destination()
        self.computes_in_place = self._into is not None
        changed = [self._tensor_specs[i].path for i in self.inferred.changed]
        trained = [path for path in changed if path.startswith("params.")]
        if trained:
            raise StateError(
                f"{self.name}: {', '.join(trained)}: a parameter that the forward pass changes, expected parameters to "
                "be arguments only. Make it a buffer (`register_buffer`), or change it outside of `forward`."
            )
        unasked = [self._tensor_specs[i].path for i in self.inferred.changed if i >= self._what.n_given]
        if unasked:
            raise StateError(
                f"{self.name}: {', '.join(unasked)}: changed by the forward pass, and the caller did not ask for "
                f"the new values. Convert with `with_state=True` to get them back{self._quiet()}."
            )

    @property
    def copied_inputs(self) -> tuple[int, ...]:
        """The inputs that are copied before torch gets them."""
        return self._copied

    def _with_containers(self, outputs: Sequence[Any]) -> Any:
        """Outputs in the containers that were declared, or in those of the function."""
        return self._tree.unflatten(outputs if self._places is None else [outputs[i] for i in self._places])

    def _quiet(self) -> str:
        """What else to do where the state changes, if that was not done, for messages."""
        quiet = self._callable.surroundings().quiet
        return f", or call with `{quiet}`" if quiet and self._what.variant is not False else ""

    def _find_factors(self) -> None:
        splitting, given = self._options.splitting, self._what.n_given
        if splitting is None:
            return
        state = len(self.constant)
        outputs = self.out_specs[: len(self.out_specs) - state]
        own, inputs = self.in_specs[:given], self.in_specs[given:]
        factors = splitting.factors(self.name, own, self._what.arguments, inputs, outputs)
        of_state = tuple((None,) * len(spec.shape) for spec in self.out_specs[len(outputs) :])
        self.factors = factors._replace(outputs=factors.outputs + of_state)
        self.shardable = shardable(self.factors, self.constant)

    def on_shards(self, counts: Mapping[str, int]) -> BoundFunction:
        key = ("on_shards", *sorted(counts.items()))
        if key not in self._derived:
            if self._unseeded is not None:
                local = self._unseeded.on_shards(counts)
                seed = self.in_specs[0]
                shared = self.vmap_randomness == "same"
                self._derived[key] = local.with_seed(seed.shape[0], shared=shared)
            else:
                self._derived[key] = self._split(counts, key)
        return self._derived[key]  # type: ignore[return-value]

    def _split(self, counts: Mapping[str, int], key: Hashable) -> BoundFunction:
        assert self.factors is not None
        program = self.renamed((*self._key, key))
        program.in_specs = tuple(map(_part, self.in_specs, self.factors.inputs, [counts] * len(self.in_specs)))
        program._set_dtypes()
        declared = None
        if self._declared:
            parts = map(_part, self.out_specs, self.factors.outputs, [counts] * len(self.out_specs))
            declared = self._with_containers([jax.ShapeDtypeStruct(s.shape, s.dtype) for s in parts])
        program.infer([jax.ShapeDtypeStruct(s.shape, s.dtype) for s in program.in_specs], declared)
        return program

    def _values(self, arrays: Sequence[Any]) -> list[torch.Tensor]:
        """Real tensors to try the function on."""
        given, device, function = self._what.n_given, self._what.device, self._function()
        known: list[Any] = [t.value() for t in self._own[:given]]
        if function is not None and tuple(map(spec_of, arrays[given:])) == function.example_specs:
            known += function.examples
        known += [None] * (len(arrays) - len(known))
        constants = [c.clone() for c in self._callable.constants(device)[given:]]
        specs = [*self._tensor_specs[:given], *self._tensor_specs[given + len(constants) :]]
        tensors = [_concrete(a, k, s, device) for a, k, s in zip(arrays, known, specs, strict=True)]
        return [*tensors[:given], *constants, *tensors[given:]]

    def with_seed(self, size: int, *, shared: bool) -> BoundFunction:
        """The same program with a seed, `uint32[size]`, as its first input.

        Args:
            size: the length of the seed.
            shared: whether the examples of a batch share their random numbers, as they do in a loop with
                one key, or not, as in a loop over torch's own generator.
        """
        key = ("with_seed", size, shared)
        if key not in self._derived:
            program = self.renamed((*self._key, *key))
            program._unseeded = self
            program.is_seeded = True
            program.is_straight = program.computes_in_place = False
            program.recorded_too = tuple(i + 1 for i in self.recorded_too)
            if self.factors is not None:
                program.factors = self.factors._replace(inputs=((None,), *self.factors.inputs))
            program.vmap_randomness = "same" if shared else "different"
            program.in_specs = (Spec((size,), np.dtype("uint32")), *self.in_specs)
            self._derived[key] = program
        return self._derived[key]  # type: ignore[return-value]

    # -- Program ---------------------------------------------------------------------------------------

    def first_time(self, message: str) -> bool:
        new = message not in self._said
        self._said.add(message)
        return new

    def backward(self, primals: Sequence[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        if not self.is_seeded:
            return contextlib.nullcontext()
        # Not the numbers of the forward over again.
        return seeded(primals[0] ^ 0x5DEECE66, host=self.inferred.host_random)

    def hold(self, primals: Sequence[torch.Tensor], leaves: Mapping[int, torch.Tensor]) -> None:
        n_own = len(self._own)
        if n_own:
            inputs = list(primals)
            for index, leaf in leaves.items():
                inputs[index] = leaf
            if self._converts:
                with torch.enable_grad():
                    inputs = self._prepared(inputs)[0]
            self._callable.hold(inputs[:n_own], self._what.variant)

    def compiled_calls(self) -> dict[Any, Callable[..., Any]]:
        function = self._function()
        return {} if function is None else function.compiled

    def session(self) -> contextlib.AbstractContextManager[None]:
        session = self._plain_session()
        return self._session_with_functions(session) if self.inferred.operates_on_functions else session

    def _plain_session(self) -> contextlib.AbstractContextManager[None]:
        return self._callable.exclusive() if self.state.is_current() else self._session_in_state()

    @contextlib.contextmanager
    def _session_in_state(self) -> Iterator[None]:
        with self._callable.exclusive(), self.state.applied():
            yield

    @contextlib.contextmanager
    def _session_with_functions(self, session: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        with session, operators_on_functions(RUN):
            yield

    def deliver(self, tensors: Sequence[torch.Tensor], buffers: Buffers) -> None:
        # Small calls: most of the time of a call of one small operation would go into finding out that there is nothing
        # to do around it.
        if not self.is_straight or self._needs_grad is not False or not self.state.is_current():
            return super().deliver(tensors, buffers)
        if self._into is None:
            out = self.call_straight(tensors)
        else:
            with IntoBuffer(*self._into, buffers[0]):
                out = self.call_straight(tensors)
        self.check_inputs(tensors)
        buffers.copy(0, out)

    def _find_whether_straight(self) -> bool:
        inferred = self.inferred
        same_inputs = self._plain and not self._converts
        one_output = inferred.tree.kind == "leaf" and not inferred.changed
        plain = inferred.certain and not (inferred.operates_on_functions or inferred.hooks)
        return same_inputs and one_output and plain and self._out_dtypes[0] is inferred.outputs[0].dtype

    def call_straight(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The output for these inputs of the program, if it `is_straight` and torch's state is current."""
        if self._itself is not None:
            out, changed = self._itself(*tensors), False
        else:
            own = list(tensors[: len(self._own)])
            with self._callable.exclusive():
                out, after = self._callable(own, self._what.variant, tensors[len(own) :], {})
            changed = any(map(operator.is_not, after, own))
        expected = self.inferred.outputs[0]
        odd = changed or type(out) is not torch.Tensor or out.is_meta
        if odd or out.dtype is not expected.dtype or out.shape != expected.shape:
            out = self._outputs(list(tensors), out, after if changed else [])[0]  # or says what is wrong
        return out

    def _find_destination(self) -> tuple[Maker, Any] | None:
        """The operator that can write its result into XLA's buffer, where that pays."""
        inferred, maker = self.inferred, self.inferred.maker
        if maker is None or inferred.n_operators > _FEW_OPERATORS or not self.is_large(_LARGE_BYTES):
            return None
        variant = out_variant(maker.operator)
        return None if variant is None else (maker, variant)

    def run(self, tensors: Sequence[torch.Tensor], style: Style, around: Around) -> Tensors:
        inputs, seed = self._prepared(tensors)
        if seed is not None:
            with seeded(seed, host=self.inferred.host_random):
                return self._outputs(inputs, *self._call_recording(inputs), style)
        if self.inferred.certain:
            return self._outputs(inputs, *self._call_recording(inputs), style)
        before = torch.get_rng_state()
        outputs = self._outputs(inputs, *self._call_recording(inputs), style)
        if not torch.equal(torch.get_rng_state(), before):
            raise RandomnessError(
                f"{self.name}: draws random numbers on these values, and drew none on those that it was tried on. "
                "Let it draw on all values, or pass a key (`rng=`)."
            )
        return outputs

    @property
    def _converts(self) -> bool:
        """Whether the callable gets something else than the inputs of the program."""
        return bool(self.is_seeded or self._widened or self._n_held or self._copied or self.inferred.copies)

    def _prepared(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """What the callable gets for these inputs of the program, and the seed."""
        inputs = list(tensors)
        seed = inputs.pop(0) if self.is_seeded else None
        for index, dtype in self._widened:
            inputs[index] = inputs[index].to(dtype)
        if self._n_held:
            given = self._what.n_given
            device = inputs[0].device if inputs else self._what.device
            inputs[given:given] = self._callable.constants(device)[given:]
        for index in self._copied:  # XLA's buffers are read only
            inputs[index] = inputs[index].clone()
        if self.inferred.copies:
            for tensor in inputs:
                tensor.__deepcopy__ = functools.partial(_deep_copy, weakref.ref(tensor))  # type: ignore[method-assign]
        return inputs, seed

    def check_inputs(self, tensors: Sequence[torch.Tensor]) -> None:
        """Complain about inputs that were written to though nobody expected it; from now on all are copied."""
        if any(map(_VERSION, tensors)):
            self._copied = tuple(range(len(self._tensor_specs)))
            self.is_straight = False
            first = next(i for i, tensor in enumerate(tensors) if tensor._version)
            raise StateError(
                f"{self.name}: wrote to an input in place (input {first}), which it did not when it was traced: the "
                "JAX array has changed. From now on its inputs are copied first. "
                "Write to a copy (`x = x.clone()`) where it depends on values or on earlier calls."
            )

    def _call_recording(self, inputs: list[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
        """Call with a graph where somebody asks for one, be it the function itself."""
        if torch.is_grad_enabled() or self._needs_grad is False:
            return self._call(inputs)
        if self._needs_grad is None:
            result, self._needs_grad = run_without_graph(self._call, inputs)
            return result
        with torch.enable_grad():
            return self._call(inputs)

    def _call(self, inputs: list[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
        if not self.registers_hooks or self.backend != "torch":  # the other engine refuses them
            return self._call_plainly(inputs)
        with WithoutVainHooks():
            return self._call_plainly(inputs)

    def _call_plainly(self, inputs: list[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
        arguments, n_own = self._what.arguments, len(self._own)
        if self._plain:
            return self._callable(inputs[:n_own], self._what.variant, inputs[n_own:], {})
        leaves = list(arguments.leaves)
        for position, tensor in zip(arguments.positions, inputs[n_own:], strict=True):
            leaves[position] = tensor
        args, kwargs = arguments.treedef.unflatten(leaves)
        return self._callable(inputs[:n_own], self._what.variant, args, kwargs)

    def _outputs(
        self, inputs: list[torch.Tensor], out: Any, after: list[torch.Tensor], style: Style = _PLAIN
    ) -> Tensors:
        inferred = self.inferred
        if isinstance(out, torch.Tensor) and inferred.tree.kind == "leaf":
            leaves = [out]
        else:
            leaves, tree = flatten_output(out, is_output_leaf)
            self._check_structure(tree, len(leaves))
            if self.is_guess and tree != inferred.tree:
                places = places_of_declared(output_paths(inferred.tree), output_paths(tree))
                leaves = [leaves[i] for i in places]
        if after:
            self._check_unchanged(inputs, after)
        leaves += [after[i] for i in inferred.changed]
        if style.batching is Batching.DIRECT:  # `Vmap` looks at the batch axes
            return tuple(map(self._output, leaves, map(_batched_like, inferred.outputs, leaves), self._out_dtypes))
        return tuple(map(self._output, leaves, inferred.outputs, self._out_dtypes))

    def _check_unchanged(self, inputs: list[torch.Tensor], after: list[torch.Tensor]) -> None:
        for index, (new, old) in enumerate(zip(after, inputs, strict=False)):
            if new is not old and index not in self.inferred.changed:
                raise StateError(
                    f"{self.name}: {self._tensor_specs[index].path}: changed by this call, and not by the one that "
                    "was traced. State that changes on some calls only cannot be used under JAX: change it on every "
                    "call, with `torch.where` for the condition."
                )

    def _check_structure(self, tree: Any, n_leaves: int) -> None:
        if self.is_guess:  # of a declaration only the leaves count
            same = n_leaves == len(self.inferred.outputs) - len(self.inferred.changed)
        else:
            same = tree == self.inferred.tree
        if not same:
            check_static_outputs(self.name, tree)
            raise OutputMismatchError(
                f"{self.name}: expected an output of structure {self.inferred.tree.describe()}, got "
                f"{tree.describe()}. A function that JAX runs must return the same structure and the same "
                "constants for inputs of the same shapes and dtypes."
            )

    def _output(self, value: Any, expected: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
        tensor = value if type(value) is torch.Tensor else as_output_tensor(self.name, expected.path, value)
        if tensor.is_meta and not is_fake(tensor):  # torch itself takes some fake tensors there
            raise StateError(
                f"{self.name}: {expected.path}: computed from a parameter or buffer that the forward pass reaches from "
                "somewhere else than the module's own attributes, where JAX's values cannot get. Reach it through "
                "`self` of the module that owns it."
            )
        if self.is_guess and tensor.dtype != expected.dtype and narrowed(tensor.dtype) == expected.dtype:
            tensor = _narrowed_as_declared(self.name, expected, tensor)
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise OutputMismatchError(
                f"{self.name}: {expected.path}: expected {expected.dtype}{list(expected.shape)}, as "
                f"{'declared with `output_shapes`' if self.is_guess else 'inferred'}, got "
                f"{tensor.dtype}{list(tensor.shape)}. "
                + ("Declare that" if self.is_guess else "Declare what it returns with `output_shapes`")
                + "; a shape that depends on values cannot be used under JAX."
            )
        if dtype is not expected.dtype and (tensor.is_floating_point() or tensor.is_complex()):
            return tensor.to(dtype)
        return tensor

    # -- for the engine that translates ----------------------------------------------------------------------

    def tensor_inputs(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what the callable gets: the given ones of its own tensors, the held ones, arguments."""
        return [(spec.shape, spec.dtype) for spec in self._tensor_specs]

    def held_inputs(self) -> tuple[int, list[torch.Tensor]]:
        """The callable's own tensors that are not given, and behind how many inputs they come."""
        given = self._what.n_given
        return given, self._callable.constants(self._what.device)[given:]

    def with_sizes(self, specs: tuple[Spec, ...], at_sizes: Any) -> BoundFunction:
        """The same program for inputs with symbols for sizes.

        Args:
            specs: its inputs.
            at_sizes: what the engine makes the program of.
        """
        program = self.renamed((*self._key, "with_sizes", specs))
        program.in_specs, program.at_sizes = specs, at_sizes
        return program

    def outputs_of(self, tensors: list[torch.Tensor]) -> Tensors:
        """Flat outputs and new values of changed own tensors, for such inputs."""
        return self._outputs(tensors, *self._call(list(tensors)))

    # -- for the callers of the primitive ------------------------------------------------------------------

    def rebuild(self, outputs: Sequence[Any]) -> tuple[Any, dict[int, Any]]:
        """The user's output containers around flat outputs, and the new values of changed own inputs."""
        n_changed = len(self.inferred.changed)
        n_out = len(outputs) - n_changed
        changed = dict(zip(self.inferred.changed, outputs[n_out:], strict=True))
        return self._with_containers(outputs[:n_out]), changed


def _deep_copy(of: weakref.ref[torch.Tensor], memo: dict[int, Any]) -> torch.Tensor:
    """What `copy.deepcopy` makes of a parameter: a leaf of its own, through which no gradient goes."""
    tensor = of()
    assert tensor is not None  # somebody is copying it
    copied = tensor.detach().clone()
    if tensor.requires_grad and not is_functorch_active():  # where torch allows no new leaves
        copied.requires_grad_()
    memo[id(tensor)] = copied
    return copied


def spec_of(array: Any) -> Spec:
    """Shape and dtype of an array or tracer."""
    return Spec(tuple(array.shape), array.dtype)


def _batched_like(spec: TensorSpec, value: Any) -> TensorSpec:
    """A spec with the batch axes that an output has in front of it."""
    n_axes = value.dim() - len(spec.shape) if isinstance(value, torch.Tensor) else 0
    return spec._replace(shape=(*value.shape[:n_axes], *spec.shape)) if n_axes > 0 else spec


def _part(spec: Spec, dims: Axes, counts: Mapping[str, int]) -> Spec:
    """What one device has of an array."""
    return Spec(tuple(n // counts.get(f or "", 1) for n, f in zip(spec.shape, dims, strict=True)), spec.dtype)


def _narrowed_as_declared(name: str, expected: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit tensor whose user declared the 32 bits that JAX has for it.

    Raises:
        NarrowingError: an integer does not fit.
    """
    result = tensor.to(expected.dtype)
    if not tensor.is_floating_point() and not tensor.is_complex() and not torch.equal(result.to(tensor.dtype), tensor):
        raise NarrowingError(
            f"{name}: {expected.path}: expected integers that fit into the declared {expected.dtype}, got larger ones. "
            "Enable 64-bit integers with `jax.config.update('jax_enable_x64', True)`, and declare them."
        )
    return result


def _concrete(array: Any, default: Any, spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """A tensor to try a function on: the argument itself, the value as converted, or a made-up one."""
    for candidate in (array, default):
        concrete = isinstance(candidate, jax.Array) and not isinstance(candidate, jax.core.Tracer)
        if concrete and not candidate.is_deleted():
            return j2t(candidate, copy=True).to(spec.dtype)
    if spec.dtype == torch.bool:
        return torch.ones(spec.shape, dtype=torch.bool, device=device)
    if not (spec.dtype.is_floating_point or spec.dtype.is_complex):
        return torch.zeros(spec.shape, dtype=spec.dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    return torch.rand(spec.shape, generator=generator).to(device=device, dtype=spec.dtype)
