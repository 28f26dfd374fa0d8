"""JAX functions over flat arrays, and the functions derived from them: what `jax2torch` runs.

The counterpart of `_program.py`: `Pullback`, `Pushforward` and `Batched` are derived from a function, and each keeps
those derived from itself, so that equal derivations are the same object with the same compiled code.
"""

from __future__ import annotations

import abc
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pytorch2jax._dtypes import is_complex, is_inexact
from pytorch2jax._errors import LeafTypeError
from pytorch2jax._trees import path_string


class Residuals(NamedTuple):
    """What a forward pass has left for its backward pass.

    program: the function that ran.
    active: the inputs with respect to which the backward pass gives gradients.
    vjp: the pullback, a pytree whose leaves are arrays.
    specs: shape and dtype of each output.
    """

    program: JaxProgram
    active: tuple[int, ...]
    vjp: Any
    specs: tuple[tuple[tuple[int, ...], Any], ...]


_Derived = TypeVar("_Derived", bound="JaxProgram")


class JaxProgram(abc.ABC):
    """A function of flat arrays that returns a pytree of arrays."""

    def __init__(self) -> None:
        self._derived: dict[tuple[Any, ...], JaxProgram] = {}
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._lock = threading.Lock()

    @abc.abstractmethod
    def function(self, *arrays: Any) -> Any:
        """The function, for JAX to trace."""

    def derive(self, cls: Callable[..., _Derived], *arguments: Any) -> _Derived:
        """The program `cls(self, *arguments)`, the same object for equal arguments."""
        key = (cls, *arguments)
        with self._lock:
            if key not in self._derived:
                self._derived[key] = cls(self, *arguments)
            return self._derived[key]  # type: ignore[return-value]

    def _jitted(self, function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
        """`function(*arguments, ...)`, compiled once for equal arguments."""
        key = (function.__name__, *arguments)
        compiled = self._compiled.get(key)
        if compiled is None:
            with self._lock:
                compiled = self._compiled.setdefault(key, jax.jit(functools.partial(function, *arguments)))
        return compiled

    def run(self, arrays: Sequence[Any]) -> Any:
        """Evaluate; the result is a pytree whose arrays share no memory with others."""
        return self._jitted(self._fresh)(*arrays)

    def run_for_backward(self, arrays: Sequence[Any], active: tuple[int, ...]) -> tuple[Any, Residuals]:
        """Evaluate, and keep what gradients with respect to the inputs `active` need."""
        out, packed = self._jitted(self._with_vjp, active)(*arrays)
        specs = tuple((tuple(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(out))
        return out, Residuals(self, active, packed.unpacked(arrays), specs)

    def _fresh(self, *arrays: Any) -> Any:
        return _fresh(self.function(*arrays))

    def _with_vjp(self, active: tuple[int, ...], *arrays: Any) -> Any:
        flat, structure = _flat(self.function, arrays, active)
        leaves, vjp = jax.vjp(flat, *(arrays[i] for i in active))
        return structure[0].unflatten(_fresh(leaves)), _pack(vjp, arrays)

    def pull(self, residuals: Residuals, wanted: tuple[int, ...], given: tuple[int, ...], cotangents: Any) -> Any:
        """Gradients for the inputs `wanted`, from what `run_for_backward` has kept.

        Args:
            residuals: of a run of this program.
            wanted: some of its active inputs.
            given: the outputs that have a cotangent; that of others is zero.
            cotangents: for each of `given`.
        """
        places = tuple(residuals.active.index(i) for i in wanted)
        return self._jitted(_pulled, places, given, residuals.specs)(residuals.vjp, *cotangents)

    def pull_batch(
        self,
        residuals: Residuals,
        wanted: tuple[int, ...],
        given: tuple[int, ...],
        dims: tuple[Any, ...],
        cotangents: Any,
    ) -> Any:
        """The same for a batched program; `dims` are the batch axes of its wanted inputs, then of the cotangents."""
        places = tuple(residuals.active.index(i) for i in wanted)
        return self._jitted(_pulled_batch, places, given, residuals.specs, dims)(residuals.vjp, *cotangents)


class FlatFunction(JaxProgram):
    """A user's function at a given structure of its arguments and given static values.

    Args:
        name: for messages.
        fn: the function.
        treedef, leaves, positions: its arguments, where `leaves` has static values, and gaps at `positions`.
    """

    def __init__(
        self, name: str, fn: Callable[..., Any], treedef: Any, leaves: Sequence[Any], positions: Sequence[int]
    ) -> None:
        super().__init__()
        self._name, self._fn, self._treedef = name, fn, treedef
        self._leaves, self._positions = tuple(leaves), tuple(positions)

    def function(self, *arrays: Any) -> Any:
        """Call the user's function."""
        leaves = list(self._leaves)
        for position, array in zip(self._positions, arrays, strict=True):
            leaves[position] = array
        args, kwargs = self._treedef.unflatten(leaves)
        out = self._fn(*args, **kwargs)
        for path, leaf in jax.tree_util.tree_leaves_with_path(out):
            if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
                raise LeafTypeError(
                    f"{self._name}: {path_string(path) or 'output'}: expected arrays and numbers in what the function "
                    f"returns, in containers that JAX's pytrees know, got {type(leaf).__name__}. Return its arrays in "
                    "a tuple or dict, or register its type with `jax.tree_util.register_pytree_node`."
                )
        return jax.tree.map(jnp.asarray, out)

    def address(self, number: int) -> str:
        """Where the array with this number is among the arguments: `args.0`, `kwargs.mask`."""
        tree = self._treedef.unflatten(range(self._treedef.num_leaves))
        path = jax.tree_util.tree_leaves_with_path(tree)[self._positions[number]][0]
        return f"{'kwargs' if path[0].idx else 'args'}.{path_string(path[1:])}"


class Pullback(JaxProgram):
    """The vjp of a program: a function of its inputs and of cotangents, which gives gradients as torch has them.

    Args:
        base: the program.
        wanted: the inputs that get a gradient.
        given: the outputs that have a cotangent.
    """

    def __init__(self, base: JaxProgram, wanted: tuple[int, ...], given: tuple[int, ...]) -> None:
        super().__init__()
        self.base, self.wanted, self.given = base, wanted, given

    def function(self, *arrays: Any) -> Any:
        """Inputs of the program, then the cotangents."""
        first = len(arrays) - len(self.given)
        flat, _ = _flat(self.base.function, arrays[:first], self.wanted)
        leaves, vjp = jax.vjp(flat, *(arrays[i] for i in self.wanted))
        specs = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        return _pulled(tuple(range(len(self.wanted))), self.given, specs, vjp, *arrays[first:])


class Pushforward(JaxProgram):
    """The jvp of a program: a function of its inputs and of tangents, which gives the tangents of inexact outputs.

    Args:
        base: the program.
        active: the inputs that have a tangent.
    """

    def __init__(self, base: JaxProgram, active: tuple[int, ...]) -> None:
        super().__init__()
        self.base, self.active = base, active

    def function(self, *arrays: Any) -> Any:
        """Inputs of the program, then the tangents."""
        first = len(arrays) - len(self.active)
        flat, _ = _flat(self.base.function, arrays[:first], self.active)
        primals = [arrays[i] for i in self.active]
        tangents = [t.astype(p.dtype) for t, p in zip(arrays[first:], primals, strict=True)]
        leaves, tangents_out = jax.jvp(flat, primals, tangents)
        return tuple(t for leaf, t in zip(leaves, tangents_out, strict=True) if is_inexact(leaf.dtype))


class Batched(JaxProgram):
    """A program over a batch; the batch axis of each output is its first.

    Args:
        base: the program.
        dims: the batch axis of each input, or None.
        size: of the batch.
    """

    def __init__(self, base: JaxProgram, dims: tuple[int | None, ...], size: int) -> None:
        super().__init__()
        self.base, self.dims, self._size = base, dims, size

    def function(self, *arrays: Any) -> Any:
        """Inputs of the program, with their batch axes."""
        return jax.vmap(self.base.function, in_axes=self.dims, axis_size=self._size)(*arrays)


@jax.tree_util.register_pytree_node_class
class _Packed:
    """A pullback on its way out of a jitted function, without the inputs of that, which XLA would copy.

    Args:
        own: its other leaves.
        shape: its structure, and for each leaf the number of the input that it is, or None.
    """

    def __init__(self, own: Sequence[Any], shape: tuple[Any, tuple[int | None, ...]]) -> None:
        self.own, self.shape = own, shape

    def tree_flatten(self) -> tuple[Sequence[Any], Any]:
        """For JAX's pytrees."""
        return self.own, self.shape

    @classmethod
    def tree_unflatten(cls, shape: Any, own: Sequence[Any]) -> _Packed:
        """For JAX's pytrees."""
        return cls(own, shape)

    def unpacked(self, arrays: Sequence[Any]) -> Any:
        """The pullback; `arrays` are the inputs."""
        own = iter(self.own)
        treedef, numbers = self.shape
        return treedef.unflatten(next(own) if number is None else arrays[number] for number in numbers)


def _pack(vjp: Any, arrays: Sequence[Any]) -> _Packed:
    leaves, treedef = jax.tree.flatten(vjp)
    inputs = {id(array): number for number, array in enumerate(arrays)}
    numbers = tuple(inputs.get(id(leaf)) for leaf in leaves)
    return _Packed([leaf for leaf, number in zip(leaves, numbers, strict=True) if number is None], (treedef, numbers))


def _fresh(tree: Any) -> Any:
    # Inside of `jax.jit` this takes no time. It keeps JAX from handing out an input, or a constant, as an output.
    return jax.tree.map(jnp.copy, tree)


def _flat(function: Callable[..., Any], arrays: Sequence[Any], active: Sequence[int]) -> tuple[Any, list[Any]]:
    """`function` as one of the active arrays only, with flat outputs; and where their structure will be noted."""
    structure: list[Any] = []

    def flat(*values: Any) -> tuple[Any, ...]:
        filled = list(arrays)
        for index, value in zip(active, values, strict=True):
            filled[index] = value
        leaves, treedef = jax.tree.flatten(function(*filled))
        structure[:] = [treedef]
        return tuple(leaves)

    return flat, structure


def _pulled(places: Sequence[int], given: Sequence[int], specs: Sequence[Any], vjp: Any, *cotangents: Any) -> Any:
    """Torch's gradients: its cotangents are the conjugates of JAX's."""
    everything = []
    remaining = iter(cotangents)
    for index, (shape, dtype) in enumerate(specs):
        if index in given:
            cotangent = next(remaining).astype(dtype)
            everything.append(jnp.conj(cotangent) if is_complex(dtype) else cotangent)
        else:
            everything.append(np.zeros(shape, dtype if is_inexact(dtype) else jax.dtypes.float0))
    gradients = vjp(tuple(everything))
    return tuple(jnp.conj(g) if is_complex(g.dtype) else jnp.copy(g) for g in (gradients[i] for i in places))


def _pulled_batch(
    places: Sequence[int], given: Sequence[int], specs: Sequence[Any], dims: Sequence[Any], vjp: Any, *cotangents: Any
) -> Any:
    moved = []
    for cotangent, dim, index in zip(cotangents, dims[len(places) :], given, strict=True):
        size = specs[index][0][0]
        whole = jnp.broadcast_to(cotangent, (size, *cotangent.shape)) if dim is None else cotangent
        moved.append(jnp.moveaxis(whole, dim or 0, 0))
    gradients = _pulled(places, given, specs, vjp, *moved)
    return tuple(jnp.moveaxis(g, dim, 0) for g, dim in zip(gradients, dims, strict=False))
