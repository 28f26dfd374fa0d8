"""The engine: a bound torch function as a JAX function that is traced once for each kind of call."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import jax

from pytorch2jax._bound import BoundFunction
from pytorch2jax._errors import BridgedWarning, CaptureError, UnsupportedTransformError
from pytorch2jax.xla._bridged import Bridged
from pytorch2jax.xla._capture import capture
from pytorch2jax.xla._graph import Graph
from pytorch2jax.xla._interpret import constant, constants_of, evaluate
from pytorch2jax.xla._symbolic import Unifier

_TRANSLATED: weakref.WeakKeyDictionary[BoundFunction, Callable[..., list[Any]]] = weakref.WeakKeyDictionary()


def xla_call(program: BoundFunction, *arrays: Any) -> list[Any]:
    """Call a program on arrays, translated to JAX; the counterpart of `torch_call`.

    Raises:
        CaptureError: it cannot be translated.
    """
    inputs = list(arrays)
    key = _key(inputs.pop(0)) if program.is_seeded else None
    call = _TRANSLATED.get(program)
    if call is None:
        call = _TRANSLATED[program] = _translated(program)
    return call(inputs, key)


def graph_of(program: BoundFunction) -> Graph:
    """The graph of a program, captured anew."""
    if program.at_sizes is not None:
        symbols, tried, programs = program.at_sizes
        return Unifier(program.name, symbols, tried).graph([graph_of(p) for p in programs])
    if program.inferred.host_random:
        raise CaptureError(
            f"{program.name}: expected random numbers of torch's, which become JAX's by the key of a call, got some of "
            "Python's or NumPy's global generator, which would be the same in all calls. Draw them with torch, or use "
            'backend="torch", which seeds those generators by the key, too.'
        )
    with program.session():
        active = program.inferred.needs_grad is not False or program.inferred.asks
        keeps = program.inferred.keeps
        return capture(program.name, program.outputs_of, program.tensor_inputs(), active=active, keeps=keeps)


def _translated(program: BoundFunction) -> Callable[..., list[Any]]:
    graph = graph_of(program)
    _tell_about_bridged(program, graph)
    first, held = program.held_inputs()
    # Made here, and not while the function below is traced: they are kept for all traces to come.
    values, constants = list(map(constant, held)), constants_of(graph)

    def call(inputs: list[Any], key: Any) -> list[Any]:
        return evaluate(graph, constants, [*inputs[:first], *values, *inputs[first:]], key)

    call.__name__ = call.__qualname__ = program.name
    compiled = jax.jit(call)

    def checked(inputs: list[Any], key: Any) -> list[Any]:
        try:
            return compiled(inputs, key)
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            raise UnsupportedTransformError(
                f"{program.name}: expected reverse mode (jax.grad, jax.vjp), got forward mode (jax.jvp, jax.jacfwd) of "
                "a torch.autograd.Function whose backward is not linear in the gradient that it gets (it clips it), so "
                "that it is the derivative of no function."
            ) from error

    return checked


def _tell_about_bridged(program: BoundFunction, graph: Graph) -> None:
    names = sorted({str(e.operator) for e in graph.equations if isinstance(e.operator, Bridged)})
    if names and program.first_time("bridged"):
        warnings.warn(
            f"{program.name}: operators without a JAX function, which torch runs inside the compiled program: "
            f"{', '.join(names)}. Such a program cannot be exported or run on a TPU.",
            BridgedWarning,
            stacklevel=2,
        )


def _key(seed: jax.Array) -> jax.Array:
    """A key whose numbers are those of a loop where it is batched, whatever generator the seed is from."""
    key = jax.random.wrap_key_data(seed[:2], impl="threefry2x32")
    for index in range(2, seed.shape[0]):
        key = jax.random.fold_in(key, seed[index])
    return key
