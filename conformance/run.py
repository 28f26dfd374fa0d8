"""Run the library on torch's own database of operators, with torch as the oracle.

    make conformance                                       # everything; half an hour on two free cores
    make conformance CONFORMANCE_ARGS='--shard 2/8'        # a part; the others are kept
    make conformance CONFORMANCE_ARGS='--check "vmap twice"'
    make conformance CONFORMANCE_ARGS=--missing            # go on where a run was stopped
    make conformance CONFORMANCE_ARGS='--operator linalg.svd --operator dropout --samples 50'
    make conformance CONFORMANCE_ARGS=--report             # check nothing, write the report anew

It writes `conformance/results.json` (an outcome for each operator, check and dtype) and `conformance/results.md`. It
ends with an error if something failed that is not in `conformance/exceptions.py`, or if something is there and works.

Each operator is checked by a process that its parent watches: a crash of the interpreter, or more than three minutes,
is the failure of that operator alone. Which samples are taken says `samples.calls`, what is checked `checks.CHECKS`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conformance import report

ROOT = Path(__file__).resolve().parent.parent
_TIMEOUT_S = 180
_SAVED_EVERY = 20
_OPERATORS_PER_PROCESS = 100  # XLA's executables add up


class Worker:
    """A process that checks operators."""

    def __init__(self, count: int, checks: Sequence[str] = ()) -> None:
        command = [sys.executable, "-m", "conformance.worker", str(count), *checks]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]
        self.operators: list[str] = json.loads(self._process.stdout.readline())["operators"]
        self.n_checked = 0

    def check(self, operator: str) -> dict[str, Any]:
        """The answer for an operator; where there is none, how the process ended."""
        timer = threading.Timer(_TIMEOUT_S, self._process.kill)
        timer.start()
        line = ""
        with contextlib.suppress(BrokenPipeError):
            print(operator, file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        timer.cancel()
        self.n_checked += 1
        if line:
            return json.loads(line)
        return {"ended": f"the process ended with {self._process.wait()} (-9: after {_TIMEOUT_S} s)"}

    def close(self) -> None:
        """Let the process end."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def check_all(
    operators: list[str], start: Callable[[], Worker], n_processes: int, keep: Callable[[str, dict[str, Any]], None]
) -> None:
    """Check operators in several processes.

    Args:
        operators: their names.
        start: makes a worker.
        n_processes: how many.
        keep: is called with each name and answer, by one thread at a time.
    """
    lock = threading.Lock()
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for operator in operators:
        waiting.put(operator)

    def work() -> None:
        worker = None
        with contextlib.suppress(queue.Empty):
            while True:
                operator = waiting.get_nowait()
                worker = worker or start()
                answer = worker.check(operator)
                with lock:
                    keep(operator, answer)
                    progress.set_postfix_str(operator, refresh=False)
                    progress.update()
                if "ended" in answer or worker.n_checked == _OPERATORS_PER_PROCESS:
                    worker.close()
                    worker = None
        if worker is not None:
            worker.close()

    with tqdm(total=len(operators), unit="operator", mininterval=1) as progress:
        threads = [threading.Thread(target=work) for _ in range(n_processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def names() -> list[str]:
    """All operators. This process does not import torch's tests, which change its settings."""
    worker = Worker(0)
    worker.close()
    return worker.operators


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m conformance.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operator", action="append", metavar="NAME", help="only this; repeatable")
    parser.add_argument("--check", action="append", default=[], metavar="NAME", help="only this; repeatable")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="only every Nth operator, from the Ith on")
    parser.add_argument("--missing", action="store_true", help="only operators without a result yet")
    parser.add_argument("--samples", type=int, default=report.SAMPLES, help="at most so many for each check and dtype")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="check nothing; write the report anew from its JSON")
    parser.add_argument("--output", type=Path, default=report.FOLDER, help="the folder to write to")
    return parser.parse_args()


def chosen(options: argparse.Namespace, everything: list[str]) -> list[str]:
    """The operators to check."""
    if options.operator:
        unknown = set(options.operator) - set(everything)
        if unknown:
            raise SystemExit(f"--operator: expected names from torch's database, got {', '.join(sorted(unknown))}.")
        return list(options.operator)
    index, count = map(int, options.shard.split("/"))
    return everything[index - 1 :: count]


def main() -> None:
    """Check operators and write the report."""
    options = arguments()
    results = report.read(options.output)
    if not options.report:
        everything = names()
        operators = chosen(options, everything)
        if results.get("made_with") != report.describe(options.samples):  # else other checks and operators are kept
            results = {"made_with": report.describe(options.samples, options.check), "operators": {}}
        answers = results["operators"]
        if options.missing:
            operators = [name for name in operators if name not in answers]

        kept = itertools.count(1)

        def keep(name: str, answer: dict[str, Any]) -> None:
            answers[name] = report.merged(answers.get(name), answer, options.check) if options.check else answer
            if next(kept) % _SAVED_EVERY == 0:
                report.save(options.output, results)

        check_all(operators, lambda: Worker(options.samples, options.check), options.processes, keep)
        results["operators"] = {name: answers[name] for name in everything if name in answers}
        report.save(options.output, results)
    (options.output / report.MARKDOWN_NAME).write_text(report.markdown(results))
    complaints = report.complaints(results)
    print("\n".join(complaints) or "Nothing unexpected.")
    print(f"Written to {options.output}.")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
