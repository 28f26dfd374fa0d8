"""Outputs that torch computes where XLA wants them, by the `out=` variants of its operators.

It takes a Python call for each operator that the function runs, so that it pays for large outputs of short functions:
there it saves a pass over memory, and the pages of a temporary tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pytorch2jax._internals import TorchDispatchMode


class Maker(NamedTuple):
    """The operator that made an output.

    position: how many operators ran before it.
    operator: the overload.
    """

    position: int
    operator: Any


def out_variant(operator: Any) -> Any:
    """The overload that does the same with an argument `out`, or None."""
    wanted = [(a.name, str(a.type)) for a in operator._schema.arguments]
    packet = operator.overloadpacket
    for name in packet.overloads():
        overload = getattr(packet, name)
        *arguments, last = overload._schema.arguments or (None,)
        if last is not None and last.is_out and [(a.name, str(a.type)) for a in arguments] == wanted:
            return overload
    return None


class IntoBuffer(TorchDispatchMode):
    """While active, has one operator write its result into a buffer; which one it is, inference has found out.

    A function that does something else this time returns another tensor than the buffer, as it would without.
    """

    def __init__(self, maker: Maker, variant: Any, buffer: torch.Tensor) -> None:
        super().__init__()
        self._maker, self._variant, self._buffer = maker, variant, buffer
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        index, self._count = self._count, self._count + 1
        if index == self._maker.position and func is self._maker.operator:
            return self._variant(*args, **kwargs, out=self._buffer)
        return func(*args, **kwargs)
