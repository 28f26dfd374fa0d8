"""The model that is checked, and its arguments, as torch has them and as JAX has them."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from pytorch2jax._arguments import parameters_of
from pytorch2jax._check._machine import generators
from pytorch2jax._check._modules import attributes_of, check_values, copied, own_tensors
from pytorch2jax._containers import flatten_arguments
from pytorch2jax._dtypes import narrowed
from pytorch2jax._errors import OptionError
from pytorch2jax._inference import as_output_tensor, is_output_leaf
from pytorch2jax._module import ConvertedModule
from pytorch2jax._params import is_dense
from pytorch2jax._rng import seeded
from pytorch2jax._transfer import j2t, t2j
from pytorch2jax._trees import flatten_output, is_static, output_paths, static_outputs

BATCH = (1.0, 0.75, 1.25)  # by what the floating arguments of each example of a batch are multiplied
_TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 5e-2, torch.float64: 1e-9, torch.complex128: 1e-9}
_TOLERANCE = 1e-4
_KEYWORDS = {"rng": None, "train": False}


class Subject:
    """A torch module and example arguments; `try_out` comes before everything else.

    Args:
        model: the module. It is not changed.
        args, kwargs: what `forward` gets: tensors, arrays, pytrees of them, and static values.

    Attributes:
        key: from which it draws with JAX.
        tensors, names: the arguments that are arrays, and their addresses.
        outputs: what torch gives, as flat tensors.
        parameters: those that are trained.
        inexact: which of `tensors` have derivatives.
        made: names of the parameters and buffers that the first call made.
        changed: addresses of the attributes that a call changes.
        draws: whether it draws random numbers in eval mode.

    Raises:
        ConversionError: it has parameters or buffers without values.
        OptionError: torch cannot copy it, or an argument has no values.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name = type(model).__name__
        check_values(self.name, model)
        self.model = copied(model).eval()
        self.key = jax.random.key(0)
        leaves, self._treedef = flatten_arguments((args, kwargs))
        self._static = [leaf if is_static(leaf) else None for leaf in leaves]
        self._places = [i for i, leaf in enumerate(leaves) if not is_static(leaf)]
        names = _names_of_arguments(self._treedef)
        self.names = [names[i] for i in self._places]
        self.tensors = [_tensor(f"{self.name}: {names[i]}", leaves[i]) for i in self._places]
        self.inexact = [i for i, t in enumerate(self.tensors) if is_inexact(t)]
        self.outputs: list[torch.Tensor] = []
        self.parameters: list[nn.Parameter] = []
        self.made: list[str] = []
        self.changed: list[str] = []
        self.draws = False
        self._has_state = False
        self._differentiates = False  # itself, so that it fails under `torch.no_grad()`

    @property
    def has_lazy_parts(self) -> bool:
        """Whether it has parameters whose shapes are not known before the first call."""
        return any(map(is_lazy, own_tensors(self.model).values()))

    def try_out(self) -> None:
        """Run the module in torch, which makes the parameters of lazy modules.

        Raises:
            OptionError: it does not run on these arguments.
        """
        before = {name for name, tensor in own_tensors(self.model).items() if not is_lazy(tensor)}
        probe = copied(self.model)
        try:
            try:
                self._look_at_call(probe)
            except RuntimeError:
                self._differentiates, probe = True, copied(self.model)
                self._look_at_call(probe)
        except Exception as error:
            raise OptionError(
                f"check: {self.name}: expected arguments on which the module runs in torch, got "
                f"{type(error).__name__}: {error}{self._about_dtypes()}"
            ) from error
        self.made = [name for name in own_tensors(probe) if name not in before]
        if self.made:
            self.model = probe
            self._look_at_call(copied(probe))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.outputs = self.run(self.tensors)

    def _look_at_call(self, probe: nn.Module) -> None:
        """Find out in a call of a copy what it changes, and whether it draws random numbers."""
        attributes, drawn_from = attributes_of(probe), generators()
        buffers = {name: (buffer, buffer.clone()) for name, buffer in probe.named_buffers() if not is_lazy(buffer)}
        self.run(self.tensors, probe, draws=False)
        self.draws = generators() != drawn_from
        self.changed = sorted(name for name, value in attributes_of(probe).items() if attributes.get(name) != value)
        same = all(probe_buffer is buffers.get(name, (None,))[0] for name, probe_buffer in probe.named_buffers())
        self._has_state = bool(self.changed) or not same or not all(itertools.starmap(torch.equal, buffers.values()))

    def _about_dtypes(self) -> str:
        """What to do where the arguments have another precision than the parameters, for messages."""
        given = {t.dtype for t in self.tensors if t.is_floating_point()}
        own = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        if not given or not own or given <= own:
            return ""
        dtypes = [" and ".join(sorted(str(d).removeprefix("torch.") for d in some)) for some in (given, own)]
        return (
            f". The floating arguments are {dtypes[0]}, the parameters {dtypes[1]}: convert the ones (`x.to(dtype)`) "
            "or the others (`model.to(dtype)`)."
        )

    def in_double_precision(self) -> list[str]:
        """The parameters, buffers and arguments that JAX rounds to single precision while `jax_enable_x64` is off."""
        tensors = {**own_tensors(self.model), **dict(zip(self.names, self.tensors, strict=True))}
        wide = (torch.float64, torch.complex128)
        return [name for name, t in tensors.items() if t.dtype in wide and narrowed(t.dtype) is not t.dtype]

    @property
    def taken(self) -> list[str]:
        """The arguments of `forward` that have the name of a keyword of the converted module's own."""
        return [name for name in _KEYWORDS if name in (p.name for p in parameters_of(self.model.forward) or ())]

    def converted(self, backend: str) -> ConvertedModule:
        """The module as a function for JAX."""
        prefix = "jax_" if self.taken else ""
        return ConvertedModule(self.model, copy=True, keywords=_KEYWORDS, prefix=prefix, backend=backend)

    def fill(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with these in the place of arrays."""
        leaves = list(self._static)
        for place, value in zip(self._places, values, strict=True):
            leaves[place] = value
        args, kwargs = self._treedef.unflatten(leaves)
        return args, kwargs

    def run(
        self, tensors: Sequence[torch.Tensor], model: nn.Module | None = None, *, draws: bool | None = None
    ) -> list[torch.Tensor]:
        """What torch gives, as flat tensors without a graph.

        Args:
            tensors: the arguments, which are not changed.
            model: a copy of the module, or None for the module itself.
            draws: whether it draws random numbers, if not as in eval mode.
        """
        with torch.set_grad_enabled(self._differentiates):
            outputs = self.flat(self.model if model is None else model, tensors, draws=draws)
            return [o.detach() for o in outputs]

    def flat(self, model: nn.Module, tensors: Sequence[torch.Tensor], *, draws: bool | None = None) -> list[Any]:
        """The same with a graph, if grad mode is on; it draws what the converted module draws from `key`."""
        words = torch.tensor(jax.random.key_data(self.key).tolist())
        if model is self.model and self._has_state:  # what one call changes, the next one does not see
            model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        with seeded(words, host=True) if (self.draws if draws is None else draws) else contextlib.nullcontext():
            return self.flat_as_it_comes(model, [t.clone() for t in tensors])

    def flat_as_it_comes(self, model: nn.Module, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The same with what torch's generators draw, on these very tensors, and with what earlier calls have left."""
        args, kwargs = self.fill(tensors)
        leaves, self._tree = flatten_output(model(*args, **kwargs), is_output_leaf)
        return self._in_order(list(map(_output_tensor, leaves)))

    def time_forward(self) -> None:
        """What a call in torch takes a user: nothing is seeded, copied or put back."""
        with torch.set_grad_enabled(self._differentiates):
            self.flat_as_it_comes(self.model, self.tensors)

    def _in_order(self, leaves: Sequence[Any]) -> list[Any]:
        """The leaves of an output in the order in which JAX has them, which sorts the keys of dicts."""
        places = jax.tree.leaves(self._tree.unflatten([np.int64(i) for i in range(len(leaves))]))
        return [leaves[int(i)] for i in places if isinstance(i, np.int64)]

    def arrays(self, tensors: Sequence[torch.Tensor] | None = None) -> list[jax.Array]:
        """The arguments as arrays."""
        return [t2j(t.detach(), copy=True) for t in (self.tensors if tensors is None else tensors)]

    def examples(self) -> list[list[torch.Tensor]]:
        """A batch of arguments."""
        return [[t * f if t.is_floating_point() else t.clone() for t in self.tensors] for f in BATCH]

    def described(self, tensors: Sequence[torch.Tensor], paths: Sequence[str]) -> list[str]:
        """Addresses, dtypes and shapes."""
        return [
            f"{path} {str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
            for path, t in zip(paths, tensors, strict=False)
        ]

    def output_paths(self) -> list[str]:
        """The addresses of the outputs."""
        return self._in_order(output_paths(self._tree))

    def output_constants(self) -> list[str]:
        """The addresses of what it returns besides arrays and None."""
        return [path for path, value in static_outputs(self._tree) if value is not None]

    def tolerance(self) -> float:
        """How far values may be from torch's, relative to the largest one."""
        dtypes = {narrowed(t.dtype) for t in (*self.parameters, *self.outputs) if t.is_floating_point()}
        return max((_TOLERANCES.get(dtype, _TOLERANCE) for dtype in dtypes), default=_TOLERANCE)

    # -- derivatives of one number, which torch and JAX make of the outputs in the same way -----------------------

    def why_no_derivatives(self) -> str:
        """Why there is nothing to differentiate; empty if there is."""
        if not (self.parameters or self.inexact):
            return "it has no trainable parameters, and no floating arguments"
        return "" if any(map(is_inexact, self.outputs)) else "it has no floating outputs"

    def loss(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """A number that depends on all floating and complex outputs."""
        inexact = [as_real(o) for o in outputs if is_inexact(o)]
        # In double precision each for itself, so that gradients are rounded as those of `jax_loss`.
        parts = [(o.double() * torch.cos(torch.arange(o.numel()).double()).reshape(o.shape)).sum() for o in inexact]
        squares = [(o.double() ** 2).mean() for o in inexact if o.numel()]
        return sum((p / max(1, len(parts)) for p in parts), torch.zeros(())) + sum(squares, torch.zeros(()))

    def variables(self, tensors: Sequence[Any], parameters: Sequence[Any]) -> list[Any]:
        """What derivatives are taken with respect to: the parameters, and the floating ones among the arguments."""
        return [*parameters, *(tensors[i] for i in self.inexact)]

    def gradients(
        self, tensors: Sequence[torch.Tensor], *, second: bool = False, as_it_comes: bool = False
    ) -> list[torch.Tensor]:
        """Torch's gradients of the loss for all variables.

        Args:
            tensors: the arguments.
            second: instead, the gradients of their product with `directions`.
            as_it_comes: see `flat_as_it_comes`.
        """
        directions = self.directions if second else []
        live = [t.clone().requires_grad_(i in self.inexact) for i, t in enumerate(tensors)]
        variables = self.variables(live, self.parameters)
        call = self.flat_as_it_comes if as_it_comes else self.flat
        with _differentiable_kernels() if second else contextlib.nullcontext():
            # Clones, because a function may not write to what requires a gradient.
            loss = self.loss(call(self.model, [t.clone() for t in live]))
            if not loss.requires_grad:
                return [torch.zeros_like(v) for v in variables]
            found = torch.autograd.grad(loss, variables, create_graph=second, materialize_grads=True)
            if not second:
                return list(found)
            slope = along(found, directions)
            _check_twice(slope)
            if not slope.requires_grad:
                return [torch.zeros_like(v) for v in variables]
            return list(torch.autograd.grad(slope, variables, materialize_grads=True))

    @functools.cached_property
    def directions(self) -> list[torch.Tensor]:
        """A direction in the space of the variables; zero where torch's gradient is.

        There torch's two modes may say different things: reverse mode leaves out the row of an embedding's
        `padding_idx`, forward mode does not.
        """
        return [torch.where(g == 0, 0, _waves(g)) for g in self.gradients(self.tensors)]


def _check_twice(slope: torch.Tensor) -> None:
    """Raise where torch would leave a part of the derivative out, without a word."""
    waiting, seen = [slope.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a backward pass is marked `once_differentiable`")
        waiting += [before for before, _ in node.next_functions]


def _waves(like: torch.Tensor) -> torch.Tensor:
    waves = torch.sin(torch.arange(like.numel(), dtype=torch.float64)).reshape(like.shape)
    return (waves * (1 + 0.5j) if like.is_complex() else waves).to(like.dtype)


def is_inexact(tensor: torch.Tensor) -> bool:
    """Whether a tensor has derivatives."""
    return tensor.is_floating_point() or tensor.is_complex()


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor with its real and imaginary parts along one more axis; a real one as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def along(gradients: Sequence[torch.Tensor], directions: Sequence[torch.Tensor]) -> torch.Tensor:
    """The slope along a direction."""
    slopes = [(as_real(g) * as_real(d)).sum().double() for g, d in zip(gradients, directions, strict=True)]
    return sum(slopes, torch.zeros(()).double())


@contextlib.contextmanager
def _differentiable_kernels() -> Iterator[None]:
    """Has torch use kernels of attention and recurrent layers that it can differentiate twice."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        yield


def jax_loss(outputs: Sequence[jax.Array]) -> jax.Array:
    """The same number as `Subject.loss`."""
    jnp = jax.numpy
    inexact = [
        jnp.stack([o.real, o.imag], -1) if jnp.issubdtype(o.dtype, jnp.complexfloating) else o
        for o in outputs
        if jnp.issubdtype(o.dtype, jnp.inexact)
    ]
    wide = [o.astype(jnp.promote_types(o.dtype, jnp.float32)) for o in inexact]
    parts = [(o * np.cos(np.arange(o.size)).reshape(o.shape).astype(o.dtype)).sum() for o in wide]
    squares = [(o**2).mean() for o in wide if o.size]
    zero = jnp.zeros(())
    return sum((p / max(1, len(parts)) for p in parts), zero) + sum(squares, zero)


def _names_of_arguments(treedef: Any) -> list[str]:
    """The address of each leaf of `(args, kwargs)`: `#0['mask']`, `mask[0]`."""
    tree = treedef.unflatten(range(treedef.num_leaves))
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    if len(paths) != treedef.num_leaves:
        return [f"#{i}" for i in range(treedef.num_leaves)]
    keystr = jax.tree_util.keystr
    return [("" if path[0].idx else "#") + keystr(path[1:2], simple=True) + keystr(path[2:]) for path in paths]


def _tensor(where: str, leaf: Any) -> torch.Tensor:
    if not isinstance(leaf, torch.Tensor):
        try:
            return j2t(jax.numpy.asarray(leaf), copy=True)
        except Exception as error:  # JAX's own, about dtypes that it does not have
            raise OptionError(
                f"check: {where}: expected an array of numbers, got {type(leaf).__name__} of dtype {leaf.dtype}."
            ) from error
    if leaf.is_meta:
        raise OptionError(
            f"check: {where}: expected an argument with values, got a tensor on torch's meta device, which has none. "
            "Make it without `torch.device('meta')`."
        )
    if not is_dense(leaf):
        kind = "a nested tensor" if leaf.is_nested else f"a tensor of layout {leaf.layout}"
        raise OptionError(f"check: {where}: expected a dense tensor, got {kind}, which JAX does not have.")
    return leaf.detach().clone()


def _output_tensor(leaf: Any) -> torch.Tensor:
    """A part of an output as the converted module has it; also a sparse one, which that refuses."""
    if isinstance(leaf, torch.Tensor):
        return leaf if leaf.layout == torch.strided else leaf.to_dense()
    return as_output_tensor("", "", leaf)
