"""Types of the C++ extension, whose source is `native/handler.cpp`."""

from collections.abc import Callable
from typing import Any

import torch

class Call:
    """A function that compiled programs call by a number, on the host.

    It gets the inputs as tensors over XLA's memory, and the addresses of the outputs. What it raises becomes XLA's
    error. An array of its is described by a tensor of its dtype and by its shape.
    """

    def __init__(
        self,
        number: int,
        function: Callable[[list[torch.Tensor], list[int]], None],
        inputs: tuple[tuple[torch.Tensor, tuple[int, ...]], ...],
    ) -> None: ...
    def forget(self) -> None:
        """Drop the tensors that are kept; new ones are made from now on."""

def use_torch(api: object) -> None:
    """Take torch's table of DLPack functions, `torch.Tensor.__dlpack_c_exchange_api__`."""

def handler() -> Any:
    """The handler, in a capsule, for `jax.ffi.register_ffi_target`."""

def close(seconds: float, unwanted: bool) -> bool:
    """Let no call enter Python any more, and wait for those that are inside; whether all came out in time.

    Later calls of the main thread and of XLA's are errors; if their results are `unwanted`, those of XLA's threads
    end with NaN instead, with which loops end. Daemon threads hang, as CPython has them do.
    """

def number_of_calls() -> int:
    """How many calls there are."""
