"""Randomness: a JAX key seeds torch for the length of one call.

A random torch function takes its seed as one more input, an array of unsigned 32-bit integers. Forward and
backward get the same array, hence the same masks, and torch's own generators are put back afterwards.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pytorch2jax._errors import RandomnessError
from pytorch2jax._inference import Spec
from pytorch2jax._internals import TorchDispatchMode, is_batched
from pytorch2jax._program import Around, RootProgram, Style, Tensors
from pytorch2jax._torch_state import GENERATORS, forked_generators


def seed_from_key(call: str, key: Any) -> jax.Array:
    """The seed input of a torch call for a JAX key: `uint32[n]`, with `n` as the key's generator has it."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.ndim == 0:
        return jax.random.key_data(key)
    if dtype == jnp.uint32 and key.ndim == 1:
        return jnp.asarray(key)
    got = type(key).__name__ if dtype is None else f"{dtype}{list(key.shape)}"
    raise RandomnessError(
        f"{call}: rng: expected one JAX key (`jax.random.key(0)` or `jax.random.PRNGKey(0)`), got {got}. "
        "For several keys use `jax.vmap` over them."
    )


def torch_seed(words: Iterable[int]) -> int:
    """The 64-bit seed that torch gets for a key's 32-bit words; every bit of the key counts (FNV-1a)."""
    mixed = 0
    for word in words:
        mixed = ((mixed ^ word) * 0x100000001B3 + 0x9E3779B97F4A7C15) % 2**64
    return mixed


@contextlib.contextmanager
def seeded(seed: torch.Tensor, *, host: bool = False) -> Iterator[None]:
    """Seed the global generators from `seed` (`uint32[..., n]`) and put their states back afterwards.

    Args:
        seed: the words of a key; of several keys for a function that takes a whole batch, and draws once for it.
        host: seed those of NumPy and Python as well as torch's.
    """
    if is_batched(seed):
        raise RuntimeError("each example has a key of its own, and torch has one generator")
    # A key that a whole batch shares may have been repeated for its examples, and is still one key.
    keys = dict.fromkeys(map(tuple, seed.reshape(-1, seed.shape[-1]).tolist()))
    mixed = torch_seed(word for key in keys for word in key)
    devices = [torch.cuda.current_device()] if seed.is_cuda else []
    with forked_generators(devices, host=host):
        torch.random.default_generator.manual_seed(mixed)
        if devices:
            torch.cuda.manual_seed(mixed)
        if host:
            random.seed(mixed)
            np.random.seed(mixed % 2**32)
        with _InLogicalOrder():
            yield


class _InLogicalOrder(TorchDispatchMode):
    """Draws random numbers in the order of the indices of a tensor, whatever its strides.

    Torch fills a tensor in the order of its memory. The same function has other strides under `torch.func`
    transforms, and would have other masks in its derivatives than in its forward.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        dense = [t.contiguous() if isinstance(t, torch.Tensor) else t for t in args]
        out = func(*dense, **kwargs)
        for argument, given, used in zip(func._schema.arguments, args, dense, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and used is not given:
                given.copy_(used)
                out = given if out is used else out
        return out


def _draw_seed() -> torch.Tensor:
    """A seed (`int64[2]`, each under 2**32) from torch's global generator, which moves on by it."""
    with GENERATORS:
        return torch.randint(0, 2**32, (2,), dtype=torch.int64)


class SeedDraw(RootProgram):
    """Takes a seed from torch's global generator, for random functions that were given no key.

    It has no inputs, so that a batch has one seed, from which its examples draw one after the other.
    """

    name = "seed"
    draws_from_torch = True

    def __init__(self) -> None:
        super().__init__(())
        self.in_specs = ()
        self.out_specs = (Spec((2,), np.dtype("uint32")),)

    def session(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def run(self, tensors: Sequence[torch.Tensor], style: Style, around: Around) -> Tensors:
        return (_draw_seed(),)


SEED_DRAW = SeedDraw()
