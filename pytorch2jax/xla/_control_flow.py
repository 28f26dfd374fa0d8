"""Torch's operators on functions as JAX's: `torch.cond` as `lax.cond`, `while_loop` and `scan` as those of `lax`.

What the functions do is captured as blocks: equations of their own, with variables from around them as further inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import torch

from pytorch2jax._control_flow import RUN, carried_tree, check_same, cond as plain_cond
from pytorch2jax._dtypes import canonical_dtype_t2j
from pytorch2jax._errors import CaptureError, UnsupportedTransformError
from pytorch2jax._internals import Primitive, ad, batching, is_functorch_active, mlir, torch_pytree
from pytorch2jax._trees import tensors_in
from pytorch2jax.xla._graph import Equation, Unifiable, Var, pruned, used
from pytorch2jax.xla._internals import is_followed_by_autograd
from pytorch2jax.xla._interpret import run

if TYPE_CHECKING:
    from pytorch2jax.xla._recorder import Recorder


class Block(Unifiable):
    """A function of arrays: what a function that was passed to an operator does.

    Args:
        inputs: variables for its tensor arguments.
        equations: in order.
        outputs: its results.

    Attributes:
        free: variables from around it.
    """

    def __init__(self, inputs: tuple[Var, ...], equations: tuple[Equation, ...], outputs: tuple[Var, ...]) -> None:
        self.inputs, self.equations, self.outputs = inputs, equations, outputs
        known = {*inputs, *(var for e in equations for var in e.outputs)}
        self.free = tuple(dict.fromkeys(v for v in [*used(equations), *outputs] if v not in known))

    def __call__(self, arguments: Sequence[Any], around: Sequence[Any], key: Any) -> list[Any]:
        env = dict(zip(self.inputs, arguments, strict=True)) | dict(zip(self.free, around, strict=True))
        run(self.equations, env, key)
        return [_strong(env[var], var) for var in self.outputs]


def _strong(array: Any, var: Var) -> Any:
    """Of a dtype that does not give way to others, as JAX's control flow asks for."""
    return jax.lax.convert_element_type(array, canonical_dtype_t2j(var.dtype))


class Operator(Unifiable):
    """An operator on functions, as a function of arrays: of its operands, and of what its blocks take from around."""

    takes_key = True

    def __init__(self, name: str, *blocks: Block) -> None:
        self.name = name
        self.blocks = blocks

    @property
    def free(self) -> tuple[Var, ...]:
        return tuple(dict.fromkeys(var for block in self.blocks for var in block.free))

    def split(self, arrays: Sequence[Any]) -> tuple[Sequence[Any], list[list[Any]]]:
        """Operands, and for each block what it takes from around."""
        n = len(arrays) - len(self.free)
        around = dict(zip(self.free, arrays[n:], strict=True))
        return arrays[:n], [[around[var] for var in block.free] for block in self.blocks]

    def __repr__(self) -> str:
        return self.name


class Cond(Operator):
    def __call__(self, *arrays: Any, key: Any = None) -> list[Any]:
        (pred, *operands), around = self.split(arrays)
        branches = [lambda o, a, k, b=b, i=i: b(o, a[i], k) for i, b in enumerate(self.blocks)]
        return jax.lax.cond(pred.reshape(()) != 0, *branches, operands, around, key)


class WhileLoop(Operator):
    def __call__(self, *arrays: Any, key: Any = None) -> list[Any]:
        condition, body = self.blocks
        carried, (around_condition, around_body) = self.split(arrays)

        def goes_on(state: Any) -> Any:
            step, values = state
            return condition(values, around_condition, _of_step(key, step))[0].reshape(()) != 0

        def next_state(state: Any) -> Any:
            step, values = state
            return step + 1, body(values, around_body, _of_step(key, step))

        start = [_strong(a, var) for a, var in zip(carried, body.inputs, strict=True)]
        out = jax.lax.while_loop(goes_on, next_state, (0, start))[1]
        return [_no_reverse.bind(a) if jnp.issubdtype(a.dtype, jnp.inexact) else a for a in out]


def _refuse(*_: Any) -> Any:
    raise UnsupportedTransformError(
        "while_loop: expected forward mode (jax.jvp, jax.jacfwd), got reverse mode (jax.grad, jax.vjp), for which JAX "
        'would have to keep as many steps as there are. Use `scan`, or `backend="torch"`.'
    )


_no_reverse = Primitive("pytorch2jax_no_reverse")
"""The identity, whose transposition says what JAX has no reverse mode for."""
_no_reverse.def_impl(lambda x: x)
_no_reverse.def_abstract_eval(lambda x: x)
ad.deflinear2(_no_reverse, _refuse)
batching.defvectorized(_no_reverse)
mlir.register_lowering(_no_reverse, lambda _, x: [x])


class Scan(Operator):
    """Operands: what is carried, and then what is stepped through."""

    def __init__(self, name: str, n_carried: int, block: Block) -> None:
        super().__init__(name, block)
        self.n_carried = n_carried

    def __call__(self, *arrays: Any, key: Any = None) -> list[Any]:
        (block,) = self.blocks
        operands, (around,) = self.split(arrays)
        n = self.n_carried

        def step(state: Any, xs: Any) -> Any:
            index, values = state
            out = block([*values, *xs], around, _of_step(key, index))
            return (index + 1, out[:n]), out[n:]

        start = [_strong(a, var) for a, var in zip(operands[:n], block.inputs, strict=False)]
        (_, last), outputs = jax.lax.scan(step, (0, start), list(operands[n:]))
        return [*last, *outputs]


def _of_step(key: Any, step: Any) -> Any:
    return None if key is None else jax.random.fold_in(key, step)


# -- writing them down ---------------------------------------------------------------------------------------------


def handlers(recorder: Recorder) -> dict[str, Callable[..., Any]]:
    """What is called instead of torch's operators while a recorder writes down."""

    def cond(pred: Any, true_fn: Any, false_fn: Any, operands: Sequence[Any] = ()) -> Any:
        if not isinstance(pred, torch.Tensor):
            return plain_cond(pred, true_fn, false_fn, operands)
        first = recorder.n_draws
        taken, out = _block(recorder, "cond", true_fn, operands)
        other, same = _block(recorder, "cond", false_fn, operands)
        check_same("cond: the two functions", out, same)
        return _written(recorder, Cond("cond", taken, other), [pred, *tensors_in(operands)], out, first)

    def while_loop(
        cond_fn: Any, body_fn: Any, carried: Sequence[Any], additional_inputs: Sequence[Any], **_: Any
    ) -> Any:
        carried = [x if isinstance(x, torch.Tensor) else torch.as_tensor(x) for x in carried]
        first = recorder.n_draws
        condition, _ = _block(recorder, "while_loop", lambda *c: cond_fn(*c, *additional_inputs), carried)
        body, out = _block(recorder, "while_loop", lambda *c: body_fn(*c, *additional_inputs), carried)
        check_same("while_loop: what a step gets and what it returns", carried_tree(body_fn, carried), out)
        return _written(recorder, WhileLoop("while_loop", condition, body), carried, out, first)

    def scan(combine_fn: Any, init: Sequence[Any], xs: Sequence[torch.Tensor], additional_inputs: Any, **_: Any) -> Any:
        return steps("scan", combine_fn, init, xs, additional_inputs)

    def map_impl(f: Any, xs: Sequence[torch.Tensor], args: Sequence[Any], **_: Any) -> Any:
        return steps("map", lambda *given: ((), f(*given)), (), xs, args)[1]

    def steps(
        name: str, combine_fn: Any, init: Sequence[Any], xs: Sequence[torch.Tensor], additional_inputs: Any
    ) -> Any:
        first = recorder.n_draws
        slices = [recorder.unseen(lambda x=x: x.new_empty(x.shape[1:])) for x in xs]
        block, (carry, outputs) = _block(
            recorder, name, lambda *a: combine_fn(*a, *additional_inputs), [*init, *slices]
        )
        check_same(f"{name}: what is carried into a step and out of it", tuple(init), tuple(tensors_in(carry)))
        n = xs[0].shape[0]
        stacked = torch_pytree.tree_map(
            lambda y: recorder.unseen(lambda: y.new_empty((n, *y.shape))) if isinstance(y, torch.Tensor) else y, outputs
        )
        return _written(recorder, Scan(name, len(init), block), [*init, *xs], (carry, stacked), first)

    return {**RUN, "cond": cond, "while_loop": while_loop, "scan": scan, "map_impl": map_impl}


def _block(recorder: Recorder, name: str, fn: Callable[..., Any], args: Sequence[Any]) -> tuple[Block, Any]:
    """A function as a block, and what it returned."""
    leaves, tree = torch_pytree.tree_flatten(list(args))
    outside = recorder.versions()
    if is_functorch_active():
        raise _differentiated_or_batched(recorder, name)
    with recorder.apart():
        inner = [
            recorder.anew(x).requires_grad_(is_followed_by_autograd(x)) if isinstance(x, torch.Tensor) else x
            for x in leaves
        ]
        inputs = tuple(recorder.take(x) for x in inner if isinstance(x, torch.Tensor))
        out = fn(*torch_pytree.tree_unflatten(inner, tree))
        if is_followed_by_autograd(out):  # to an argument, or to something around
            raise _differentiated_or_batched(recorder, name)
        outputs = tuple(map(recorder.var_of, tensors_in(out)))
        equations = pruned(recorder.equations, outputs)
        recorder.check_functions(equations)
        written = {k: v for k, v in recorder.versions().items() if k in outside} != outside
        written |= any(recorder.storage_of(x).version for x in inner if isinstance(x, torch.Tensor))
    if written:
        raise CaptureError(
            f"{recorder.name}: {name}: expected functions that leave their arguments and all tensors around them as "
            "they are, got one that writes to them. Let it return what is new."
        )
    if any(isinstance(x, (bool, int, float)) for x in torch_pytree.tree_leaves(out)):
        raise CaptureError(
            f"{recorder.name}: {name}: expected functions that return tensors, got one that returns numbers. Return "
            "them as tensors (`torch.tensor`)."
        )
    return Block(inputs, equations, outputs), out


def _differentiated_or_batched(recorder: Recorder, name: str) -> CaptureError:
    """The error where autograd or `torch.func` would have to look into an operator, which they take for a constant."""
    return CaptureError(
        f"{recorder.name}: {name}: an operator on functions in a function that takes derivatives or batches "
        "itself, which would have to go through it (with `output_shapes=` nobody has seen whether it does: leave "
        'that out). Use `backend="torch"`, which runs it as it is.'
    )


def _written(recorder: Recorder, operator: Operator, operands: Sequence[torch.Tensor], like: Any, first: int) -> Any:
    """Write the operator down; returns fake tensors like those in a tree."""
    given = [recorder.var_of(x) for x in operands]
    out = torch_pytree.tree_map(lambda x: recorder.anew(x) if isinstance(x, torch.Tensor) else x, like)
    recorder.write(operator, given, tensors_in(out), first)
    return out
