"""Torch's threads on the host, where XLA calls from threads of its own.

Each thread that runs torch gets an OpenMP team as large as the machine, for as long as it lives, and teams that wait
for each other's cores slow each other down. XLA calls from the thread that called it where it can, and torch's own team
is there. Where it does not, with several devices or arguments that are still being computed, it calls now from one and
now from another thread of a pool. Large programs that come from there run in one thread of this library's, one after
the other, with one team.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import queue
import threading
from collections.abc import Callable

import torch

from pytorch2jax._internals import is_python_thread

_PATIENCE_S = 0.5
_FEW_CALLS = 8
_calls = itertools.count()  # from XLA's threads
_team_size = torch.get_num_threads()


def note_team_size() -> None:
    """Remember what the user has set in the calling thread (`torch.set_num_threads`), for the worker."""
    global _team_size
    _team_size = torch.get_num_threads()


def on_one_team(call: Callable[[], None]) -> None:
    """Run `call` here, or in the worker if this is a thread of XLA's.

    The first few calls of XLA's threads run there, in a single thread: with one device there are often no more, and
    the worker's team, once it is there, slows torch's own team down for good (OpenMP lets its threads spin only as
    long as there is a core for each).

    It never waits for ever: a call that the worker does not begin in half a second, because another one takes long or
    waits for this one, runs here, in a single thread.
    """
    if is_python_thread():
        return call()
    if next(_calls) < _FEW_CALLS:
        _set_team_size(1)
        return call()
    job = _Job(call)
    _worker().put(job)
    if not job.done.acquire(timeout=_PATIENCE_S):
        if job.claim.acquire(blocking=False):
            _set_team_size(1)
            return call()
        job.done.acquire()
    if job.error is not None:
        raise job.error


class _Job:
    """A call for the worker; who has the claim runs it."""

    __slots__ = ("call", "claim", "done", "error")

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.claim, self.done = threading.Lock(), threading.Lock()
        self.done.acquire()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Run it, if nobody else has begun."""
        if self.claim.acquire(blocking=False):
            try:
                self.call()
            except BaseException as error:
                self.error = error
            finally:
                self.done.release()


def _work(jobs: queue.SimpleQueue[_Job]) -> None:
    while True:
        job = jobs.get()
        _set_team_size(_team_size)
        job.run()
        del job  # it holds the program


_lock = threading.Lock()
_jobs: queue.SimpleQueue[_Job] | None = None


def _worker() -> queue.SimpleQueue[_Job]:
    global _jobs
    with _lock:  # the first calls come all at once
        if _jobs is None:
            _jobs = queue.SimpleQueue()
            threading.Thread(target=_work, args=(_jobs,), name="pytorch2jax", daemon=True).start()
        return _jobs


def _after_fork() -> None:
    global _jobs, _lock
    _jobs, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _set_team_size(size: int) -> None:
    """Set the size of the calling thread's team, which `torch.set_num_threads` would do for all later threads, too."""
    if torch.get_num_threads() == size:  # asking also lets torch set up the thread, once
        return
    for set_size in _omp_set_num_threads():
        set_size(size)
        if torch.get_num_threads() == size:  # it was torch's: other packages bring OpenMP libraries of their own
            return


@functools.cache
def _omp_set_num_threads() -> tuple[Callable[[int], None], ...]:
    """`omp_set_num_threads` of each OpenMP library that is loaded; those that lie beside torch's own come first."""
    try:
        with open("/proc/self/maps") as maps:
            loaded = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line}
    except OSError:  # not Linux
        return ()
    libraries = [path for path in loaded if os.path.basename(path).startswith(("libgomp", "libiomp", "libomp"))]
    folder = os.path.dirname(torch.__file__)
    found = []
    for path in sorted(libraries, key=lambda path: (not path.startswith(folder), path)):
        function = ctypes.CDLL(path).omp_set_num_threads
        function.argtypes, function.restype = (ctypes.c_int,), None
        found.append(function)
    return tuple(found)
