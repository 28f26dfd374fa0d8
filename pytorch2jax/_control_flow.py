"""Torch's operators on functions: `torch.cond`, `while_loop`, `scan`, `map`, `associative_scan`, `flex_attention`.

Torch runs these through `torch.compile`, also where nobody compiles anything, and its compiler cannot run inside of
JAX's calls. Within `operators_on_functions`, a call of one of them arrives here instead, as what it means: `if`,
`while` and `for`, inside of which autograd sees operators as anywhere else.

Each function below has the signature with which torch calls the operator of the same name: flat tensors, and functions
of flat tensors. What torch notes for its compiler besides (`**_`), they leave alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pytorch2jax._errors import InferenceError
from pytorch2jax._internals import generic_associative_scan, math_attention, torch_pytree

Handlers = Mapping[str, Callable[..., Any]]


def cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any] = ()) -> Any:
    return true_fn(*operands) if pred else false_fn(*operands)


def while_loop(cond_fn: Any, body_fn: Any, carried: Sequence[Any], additional_inputs: Sequence[Any], **_: Any) -> Any:
    state = list(carried)
    out = carried_tree(body_fn, carried)
    while cond_fn(*state, *additional_inputs):
        out = body_fn(*state, *additional_inputs)
        state = torch_pytree.tree_leaves(out)
    return out


def carried_tree(body_fn: Callable[..., Any], carried: Sequence[Any]) -> Any:
    """What a loop without steps returns: what it was called with, of which torch's operator gets the leaves only."""
    around = inspect.getclosurevars(body_fn).nonlocals if inspect.isfunction(body_fn) else {}
    if "in_spec" not in around:
        return tuple(carried)
    return torch_pytree.tree_unflatten(list(carried), around["in_spec"])[0]


def scan(
    combine_fn: Callable[..., Any], init: Sequence[Any], xs: Sequence[torch.Tensor], additional_inputs: Any, **_: Any
) -> Any:
    carry, state, outputs = None, list(init), []
    for index in range(xs[0].shape[0]):
        carry, output = combine_fn(*state, *(x[index] for x in xs), *additional_inputs)
        state = torch_pytree.tree_leaves(carry)
        outputs.append(output)
    return carry, stacked(outputs)


def map_impl(f: Callable[..., Any], xs: Sequence[torch.Tensor], args: Sequence[Any], **_: Any) -> Any:
    return stacked([f(*(x[index] for x in xs), *args) for index in range(xs[0].shape[0])])


def stacked(trees: Sequence[Any]) -> Any:
    """Trees of tensors as one, with a new first axis."""
    return torch_pytree.tree_map(lambda *leaves: None if leaves[0] is None else torch.stack(leaves), *trees)


def associative_scan(combine_fn: Any, xs: Sequence[torch.Tensor], additional_inputs: Sequence[Any], **_: Any) -> Any:
    def flat(*leaves: Any) -> list[Any]:
        return torch_pytree.tree_leaves(combine_fn(*leaves))

    out = generic_associative_scan(flat, list(xs), additional_inputs=tuple(additional_inputs))
    return torch_pytree.tree_unflatten(list(out), combine_fn.keywords["spec"])


def _cond_on_fake(pred: Any, true_fn: Any, false_fn: Any, operands: Sequence[Any] = ()) -> Any:
    """Both ways: whatever either of them does is found out."""
    if not isinstance(pred, torch.Tensor):
        return cond(pred, true_fn, false_fn, operands)
    outputs = [fn(*operands) for fn in (true_fn, false_fn)]
    check_same("cond: the two functions", *outputs)
    return outputs[0]


def _while_on_fake(
    cond_fn: Any, body_fn: Any, carried: Sequence[Any], additional_inputs: Sequence[Any], **_: Any
) -> Any:
    """One step."""
    cond_fn(*carried, *additional_inputs)
    out = body_fn(*carried, *additional_inputs)
    check_same("while_loop: what a step gets and what it returns", carried_tree(body_fn, carried), out)
    return out


def check_same(what: str, left: Any, right: Any) -> None:
    """Raise if two trees of tensors differ in structure, shapes or dtypes."""
    described = []
    for tree in (left, right):
        leaves = torch_pytree.tree_leaves(tree)
        described.append([(*x.shape, x.dtype) if isinstance(x, torch.Tensor) else type(x) for x in leaves])
    first, second = described
    if first != second:
        raise InferenceError(f"{what}: expected tensors of the same shapes and dtypes, got {first} and {second}")


RUN: Handlers = {
    "cond": cond,
    "while_loop": while_loop,
    "scan": scan,
    "map_impl": map_impl,
    "associative_scan": associative_scan,
    "flex_attention": math_attention,
}
"""For tensors that have values."""

TRIED: Handlers = {**RUN, "cond": _cond_on_fake, "while_loop": _while_on_fake}
"""For fake tensors, which have none."""


class Noticed(dict[str, Callable[..., Any]]):
    """The same, and whether any of them was called.

    Attributes:
        any: whether.
    """

    any = False

    def __getitem__(self, name: str) -> Callable[..., Any]:
        self.any = True
        return super().__getitem__(name)
