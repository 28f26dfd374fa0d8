"""A graph as a JAX function: each operator by its rule, those that have none by the bridge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch

from pytorch2jax._dtypes import canonical_dtype_t2j, narrowed
from pytorch2jax._errors import CaptureError, NarrowingError, Pytorch2JaxError
from pytorch2jax._internals import is_symbolic
from pytorch2jax._transfer import t2j
from pytorch2jax.xla._graph import Equation, Graph, Var, leaves, replaced, variables
from pytorch2jax.xla._internals import OpOverload
from pytorch2jax.xla._registry import Out, Rule, rule_for
from pytorch2jax.xla.lowerings._promotion import cast

_ABOUT_MEMORY = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking", "generator"})
"""Arguments of operators that mean nothing in JAX."""

ON_SIZES = (
    'Say which sizes there are (`jax.export.symbolic_shape("n", constraints=["n >= 4", "n <= 512"])`). Or: '
    "Give the program fixed sizes."
)


def constants_of(graph: Graph) -> dict[Var, Any]:
    """The constants of a graph as arrays, to be made once and kept."""
    return {var: constant(tensor) for var, tensor in graph.constants.items()}


def evaluate(graph: Graph, constants: Mapping[Var, Any], inputs: Sequence[Any], key: Any) -> list[Any]:
    """The outputs of a graph.

    Args:
        graph: the graph.
        constants: an array for each of its constants.
        inputs: an array for each of its inputs.
        key: a JAX key; random operators fold their numbers into it. None for a graph without any.
    """
    env: dict[Var, Any] = dict(constants)
    env.update(zip(graph.inputs, inputs, strict=True))
    try:
        run(graph.equations, env, key)
    except CaptureError as error:
        if graph.symbolic is None:
            raise
        raise CaptureError(f"{graph.symbolic}: {error}") from error
    return [env[var] for var in graph.outputs]


def constant(tensor: torch.Tensor) -> Any:
    """A tensor as an array that may be part of compiled programs; no tracer, also if JAX traces around."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype is torch.int64 and narrowed(tensor.dtype) is torch.int32:
        # The ends of the range stand for infinity. Other numbers that do not fit are an error.
        wide, narrow = torch.iinfo(torch.int64), torch.iinfo(torch.int32)
        tensor = tensor.masked_fill(tensor == wide.min, narrow.min).masked_fill(tensor == wide.max, narrow.max)
    return t2j(tensor, copy=True)


def run(equations: Sequence[Equation], env: dict[Var, Any], key: Any) -> None:
    """Evaluate equations in their order; their results are added to `env`.

    Raises:
        NarrowingError: an integer does not fit into what JAX has for it.
    """
    # Rules are written for JAX as it comes, whatever the user has forbidden in functions of their own.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        _run(equations, env, key)


def _run(equations: Sequence[Equation], env: dict[Var, Any], key: Any) -> None:
    narrow = narrowed(torch.int64) is torch.int32
    for equation in equations:
        if narrow:
            _check_numbers(equation)
        args = replaced(equation.args, env.__getitem__, Var)
        kwargs = {n: replaced(v, env.__getitem__, Var) for n, v in equation.kwargs.items() if n not in _ABOUT_MEMORY}
        rule = rule_for(equation.operator) or Rule(equation.operator, False, hasattr(equation.operator, "takes_key"))
        outs = tuple(_out(var) for var in equation.outputs)
        if rule.wants_out:
            kwargs["out"] = outs if equation.several else outs[0]
        if rule.wants_key and equation.draw is not None:
            # Some draw nothing with these arguments, and then there may be no key.
            kwargs["key"] = None if key is None else jax.random.fold_in(key, equation.draw)
        results = _results(equation, rule, args, kwargs)
        results = results if equation.several else (results,)
        for var, out, result in zip(equation.outputs, outs, results, strict=True):
            if var is not None and out is not None:
                env[var] = _checked(equation, out, result)


_ENDS = (torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max)


def _check_numbers(equation: Equation) -> None:
    """Raise if int64 tensors, which are int32, meet a number that is not; the ends of the range stand for infinity."""
    operator = equation.operator
    if not isinstance(operator, OpOverload) or rule_for(operator) is None:
        return
    dtypes = {var.dtype for var in equation.outputs if var is not None}
    if dtypes == {torch.bool}:  # a comparison
        dtypes |= {var.dtype for var in variables(equation.args)}
    if torch.int64 not in dtypes:
        return
    parameters = operator._schema.arguments
    given = [*zip(parameters, equation.args, strict=False), *((p, equation.kwargs.get(p.name)) for p in parameters)]
    draws = equation.draw is not None  # its bounds have the type that sizes have
    for parameter, value in given:
        if type(value) is not int or -(2**31) <= value < 2**31 or (value in _ENDS and not draws):
            continue
        if draws or any(kind in str(parameter.type) for kind in ("number", "Tensor")):
            raise NarrowingError(
                f"{equation.name}: expected integers that fit into 32 bits, because jax_enable_x64 is off and tensors "
                f"of int64 are int32, got {parameter.name}={value}. Call `jax.config.update('jax_enable_x64', True)`, "
                'or use `backend="torch"`, which computes with 64 bits.'
            )


def _results(equation: Equation, rule: Rule, args: Any, kwargs: Any) -> Any:
    """What a rule returns. What JAX says of sizes and dtypes does not say of which operator."""
    try:
        return rule.function(*args, **kwargs)
    except Pytorch2JaxError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        if not _is_symbolic(equation):
            if type(error) not in _OF_ARGUMENTS:
                raise
            raise CaptureError(
                f"{equation.name}: expected arguments that JAX can compute this for, got {type(error).__name__}: "
                f'{reason}. Use `backend="torch"`, which runs it as it is.'
            ) from error
        raise CaptureError(
            f"{equation.name}: expected an operator that can be computed for all sizes, got {type(error).__name__}: "
            f"{reason} {ON_SIZES}"
        ) from error


_OF_ARGUMENTS = (TypeError, ValueError, OverflowError, NotImplementedError)


def _is_symbolic(equation: Equation) -> bool:
    given = (equation.args, equation.kwargs)
    seen = (*variables(given), *(var for var in equation.outputs if var is not None))
    return any(is_symbolic(n) for var in seen for n in var.shape) or any(map(is_symbolic, leaves(given)))


def _out(var: Var | None) -> Out | None:
    return None if var is None else Out(var.shape, var.dtype, canonical_dtype_t2j(var.dtype))


def _checked(equation: Equation, out: Out, result: Any) -> Any:
    array = jnp.asarray(result)
    if array.shape != out.shape:
        if _is_symbolic(equation):
            raise CaptureError(
                f"{equation.name}: expected a result of shape {out.shape}, as torch has it at the sizes that were "
                f"tried, got {array.shape}. {ON_SIZES}"
            )
        raise CaptureError(
            f"{equation.name}: expected a result of shape {out.shape}, as torch has it, got {array.shape}: the rule "
            'for this operator is wrong for these arguments. Please report it; `backend="torch"` runs the function.'
        )
    if array.dtype != out.dtype:
        array = cast(array, out.dtype)
    return jax.lax.stop_gradient(array) if equation.constant else array
