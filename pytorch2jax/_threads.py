"""Torch's threads on the host, where XLA calls from several threads of its own.

Each thread that runs torch gets an OpenMP team, as large as the machine, for as long as it lives. One device runs a
program in the thread that called it, where torch's own team is. Several host devices have a thread each: there the
team is a share of the machine, so that the teams of all devices together are as large as one was.

The size is set through OpenMP itself, because `torch.set_num_threads` changes it for all threads that begin later.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import jax
import torch

from pytorch2jax._internals import is_python_thread

_home_threads = torch.get_num_threads()


def note_threads() -> None:
    """Remember what the user has set in the calling thread (`torch.set_num_threads`), for XLA's threads to share."""
    global _home_threads
    _home_threads = torch.get_num_threads()


def share_threads() -> None:
    """In a thread of XLA's, one for each of several devices: limit torch to a share of the threads."""
    if is_python_thread():
        return
    share = max(1, _home_threads // jax.local_device_count())
    if torch.get_num_threads() != share:  # which also lets torch set up the thread, once
        set_team_size = _omp_set_num_threads()
        if set_team_size is not None:
            set_team_size(share)


@functools.cache
def has_several_devices() -> bool:
    """Whether this process has several devices on the host."""
    return len(jax.local_devices(backend="cpu")) > 1


@functools.cache
def _omp_set_num_threads() -> Callable[[int], None] | None:
    """`omp_set_num_threads` of the OpenMP library that torch has loaded; it sets the size for the calling thread."""
    try:
        with open("/proc/self/maps") as maps:
            loaded = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line}
    except OSError:  # not Linux
        return None
    for path in sorted(loaded):
        name = path.rsplit("/", 1)[-1]
        if name.startswith(("libgomp", "libiomp", "libomp")):
            function = ctypes.CDLL(path).omp_set_num_threads
            function.argtypes, function.restype = (ctypes.c_int,), None
            return function
    return None
