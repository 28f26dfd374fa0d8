"""A process that times one competitor of one case, told by its parent over a pipe when to.

    python -m benchmarks.worker CASE COMPETITOR

It reads commands as lines of JSON and answers each with one: `["prepare", row, warm_up_s]`, `["time", count]`,
`["release"]`. What libraries print goes to standard error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

from benchmarks import machine
from benchmarks.bridges import torch_device
from benchmarks.case import Call, LeftOutError
from benchmarks.cases import CASES
from benchmarks.timing import time_calls, warm_up


def describe(error: BaseException) -> str:
    """One line about an exception."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, LeftOutError):
        return first
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {first}"[:300]


def os_threads() -> int:
    """How many threads the operating system has for this process."""
    return len(list(Path("/proc/self/task").iterdir()))


class Worker:
    """Holds the call that is being timed."""

    def __init__(self, case: str, competitor: str) -> None:
        self.case = CASES[case]
        self.set_up = self.case.competitors[competitor]
        self.device = torch_device()
        self.call: Call | None = None

    def answer(self, command: str, *args: Any) -> dict[str, Any]:
        """Do what the parent asks."""
        if command == "prepare":
            row, seconds = args
            self.call = self.set_up(self.case.rows[row])
            return {"seconds": warm_up(self.call, seconds, self.device)}
        if command == "time":
            assert self.call is not None
            start, busy, own = time.perf_counter(), machine.busy_s(), time.process_time()
            seconds = time_calls(self.call, args[0], self.device)
            passed = time.perf_counter() - start
            others = max(0.0, machine.busy_s() - busy - (time.process_time() - own))
            return {"seconds": seconds, "passed_s": passed, "others_s": others, "threads": os_threads()}
        self.call = None
        gc.collect()
        return {}


def serve(worker: Worker, commands: TextIO, answers: TextIO) -> None:
    """Answer commands until there are no more."""
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in commands:
        try:
            answer = worker.answer(*json.loads(line))
        except Exception as error:
            worker.call = None
            answer = {"error": describe(error)}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Serve standard input, and keep standard output for the answers."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(Worker(*sys.argv[1:3]), sys.stdin, answers)


if __name__ == "__main__":
    main()
