"""Losses that torch has a kernel for; the others are made of simpler operators."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla.lowerings._promotion import precise
from pytorch2jax.xla.lowerings._special import absolute, times


def _reduced(loss: jax.Array, reduction: int) -> jax.Array:
    """The losses, their mean or their sum: torch's numbers for `reduction` are 0, 1 and 2."""
    return loss if reduction == 0 else jnp.mean(loss) if reduction == 1 else jnp.sum(loss)


# -- residuals ------------------------------------------------------------------------------------------------


@lowers("aten.huber_loss.default")
def huber_loss(x: jax.Array, target: jax.Array, reduction: int = 1, delta: float = 1, *, out: Out) -> jax.Array:
    residual = precise(x.astype(out.dtype)) - precise(target.astype(out.dtype))
    return _reduced(_quadratic_near_zero(residual, delta) * delta, reduction)


@lowers("aten.smooth_l1_loss.default")
def smooth_l1_loss(x: jax.Array, target: jax.Array, reduction: int = 1, beta: float = 1, *, out: Out) -> jax.Array:
    residual = precise(x.astype(out.dtype)) - precise(target.astype(out.dtype))
    return _reduced(_quadratic_near_zero(residual, beta) if beta else absolute(residual), reduction)


def _quadratic_near_zero(residual: jax.Array, beta: float) -> jax.Array:
    """The absolute value less a constant, and a parabola between `-beta` and `beta`."""
    linear = jnp.abs(residual) >= beta
    near = jnp.where(linear, 0, residual)
    return jnp.where(linear, absolute(residual) - 0.5 * beta, near * near * (0.5 / beta))


# -- cross entropy --------------------------------------------------------------------------------------------


@lowers("aten.binary_cross_entropy.default")
def binary_cross_entropy(
    x: jax.Array, target: jax.Array, weight: jax.Array | None = None, reduction: int = 1, *, out: Out
) -> jax.Array:
    loss = _cross_entropy(*jnp.broadcast_arrays(precise(x.astype(out.dtype)), precise(target.astype(out.dtype))))
    return _reduced(loss if weight is None else loss * precise(weight), reduction)


_TINY = 1e-12
"""What stands for a probability of 0 in derivatives."""


@jax.custom_jvp
def _cross_entropy(x: jax.Array, target: jax.Array) -> jax.Array:
    """With logarithms that are not below -100; torch's derivatives do not know about that."""
    no, yes = (jnp.maximum(log, -100) for log in (jnp.log1p(-x), jnp.log(x)))
    return (target - 1) * no - target * yes


@functools.partial(_cross_entropy.defjvp, symbolic_zeros=True)
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, target = primals
    by_target = jnp.log1p(-x) - jnp.log(x)
    return _cross_entropy(x, target), times(tangents[0], _slope(x, target)) + times(tangents[1], by_target)


@jax.custom_jvp
def _slope(x: jax.Array, target: jax.Array) -> jax.Array:
    """The derivative of the cross entropy by `x`."""
    return (x - target) / jnp.maximum((1 - x) * x, _TINY)


@functools.partial(_slope.defjvp, symbolic_zeros=True)
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, target = primals
    # XLA makes `(1 + tiny) - x` of `1 - x + tiny`, which is 0 for 1.
    by_x = (x * x - 2 * x * target + target) / (jnp.maximum(x, _TINY) * jnp.maximum(1 - x, _TINY)) ** 2
    by_target = -1 / jnp.maximum((1 - x) * x, _TINY)
    return _slope(x, target), times(tangents[0], by_x) + times(tangents[1], by_target)


# -- alignments -----------------------------------------------------------------------------------------------


@lowers("aten._ctc_loss.default", "aten._ctc_loss.Tensor")
def ctc_loss(
    log_probs: jax.Array,
    targets: jax.Array,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    zero_infinity: bool = False,
    *,
    out: Sequence[Out],
) -> tuple[jax.Array, jax.Array]:
    """The negative logarithm of the probability of all paths that spell the targets.

    A. Graves et al., "Connectionist temporal classification", 2006, section 4.1.
    """
    steps = precise(log_probs if log_probs.ndim == 3 else log_probs[:, None])
    n_steps, lengths = (jnp.asarray(n).reshape(-1) for n in (input_lengths, target_lengths))
    labels = _with_blanks(_padded_targets(targets, target_lengths), blank)
    loss = -_log_likelihood(steps, labels, n_steps, lengths, blank)
    possible = loss < jnp.inf
    # Torch's derivative is the one by what a `log_softmax` was applied to.
    inside = (np.arange(steps.shape[0])[:, None] < n_steps)[..., None]
    total = jnp.sum(jnp.where(inside & possible[:, None], jnp.exp(steps), 0), axis=(0, 2))
    loss = loss + (total - lax.stop_gradient(total))
    loss = jnp.where(possible, loss, 0) if zero_infinity else loss
    return loss.reshape(out[0].shape), jnp.zeros(out[1].shape, out[1].dtype)


def _padded_targets(targets: jax.Array, lengths: Any) -> jax.Array:
    """Targets with a row for each example; torch also takes them one after the other."""
    if targets.ndim == 2:
        return targets
    n = targets.shape[0]
    longest = n if isinstance(lengths, jax.Array) else max(lengths, default=0)
    ends = jnp.cumsum(jnp.asarray(lengths).reshape(-1))
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    if n == 0:
        return jnp.zeros((starts.shape[0], 0), targets.dtype)
    return jnp.take(targets, starts[:, None] + np.arange(longest), mode="clip")


def _with_blanks(labels: jax.Array, blank: int) -> jax.Array:
    """Blanks before, between and after the labels."""
    rows, n = labels.shape
    return jnp.full((rows, 2 * n + 1), blank, labels.dtype).at[:, 1::2].set(labels)


def _log_likelihood(
    steps: jax.Array, labels: jax.Array, n_steps: jax.Array, lengths: jax.Array, blank: int
) -> jax.Array:
    """The forward recursion, for `steps` of shape `[time, example, class]`."""
    rows, n = labels.shape
    skips = jnp.zeros(labels.shape, bool).at[:, 2:].set((labels[:, 2:] != blank) & (labels[:, 2:] != labels[:, :-2]))
    # Before the first step: a path may begin with the first blank or the first label.
    start = jnp.full((rows, n), -jnp.inf, steps.dtype).at[:, 0].set(0)

    def shifted(paths: jax.Array, by: int) -> jax.Array:
        return jnp.pad(paths, ((0, 0), (by, 0)), constant_values=-jnp.inf)[:, :n]

    def step(paths: jax.Array, at: Any) -> tuple[jax.Array, None]:
        time, log_probs = at
        emitted = jnp.take_along_axis(log_probs, labels, axis=1)
        arriving = [paths, shifted(paths, 1), jnp.where(skips, shifted(paths, 2), -jnp.inf)]
        following = _log_sum(jnp.stack(arriving)) + emitted
        return jnp.where((time < n_steps)[:, None], following, paths), None

    paths, _ = lax.scan(step, start, (np.arange(steps.shape[0]), steps))
    last = 2 * lengths[:, None] + np.array([-1, 0])
    ends = jnp.take_along_axis(paths, jnp.maximum(last, 0), axis=1)
    return _log_sum(jnp.where(last >= 0, ends, -jnp.inf).T)


def _log_sum(x: jax.Array) -> jax.Array:
    """`logsumexp` along the first axis; nothing but -inf has no derivative."""
    largest = lax.stop_gradient(jnp.max(x, axis=0))
    largest = jnp.where(largest == -jnp.inf, 0, largest)
    total = jnp.sum(jnp.exp(x - largest), axis=0)
    return jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)) + largest)
