"""The parent's side: worker processes that take turns.

Every competitor has a process of its own, and a round lets each of them work while the others sleep. In one process
they would change each other's times: torch in the main thread and torch in XLA's callback thread have an OpenMP team
each, and with more threads than cores libgomp's barriers switch from spinning to sleeping, for both. Measured on two
cores with a transformer encoder, torch's own step took 12 to 18 % longer in a process where another thread had run
torch as well; two processes with the same work, taking turns, differed by 0 to 2 %.

A process keeps a bias of its own as long as it lives, of up to 10 % (where its memory lies, which threads share a
core). Hence each case is launched several times and the rounds of all launches are pooled. What is compared are
ratios within a round, because the speed of a shared machine drifts from round to round.

Other programs do more than take their share: an OpenMP team with a thread for each core spins until the slowest has
got its turn, and torch then takes ten times as long. A round in which others took much of the cores' time is therefore
repeated, up to a limit; what remains is in the report.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.case import Case, Entry, Rows, Settings
from benchmarks.machine import cores

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT_S = 120.0
BUSY = 0.08  # of the time of the cores taken by other programs: the round is repeated
PAUSE_S = 2.0


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The user's environment; ninja of this Python's environment can be found, and XLA takes GPU memory as needed."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1", **extra}
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", "")))
    return environment


class WorkerFailedError(Exception):
    """A worker process answered with an error, died, or took too long."""


class WorkerProcess:
    """A running `benchmarks.worker`."""

    def __init__(self, case: Case, competitor: str) -> None:
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", case.name, competitor],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env=child_environment(case.environment),
            start_new_session=True,
        )
        self._started = False
        self.dead = False

    def ask(self, *command: Any, limit_s: float) -> dict[str, Any]:
        """Send a command and return the answer."""
        if not self._started:
            self._receive(START_LIMIT_S)
            self._started = True
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # where the process has died `_receive` finds out how
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._receive(limit_s)
        if "error" in answer:
            raise WorkerFailedError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process, and those that it has started to compile."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()
        self.dead = True

    def _receive(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        line = self._process.stdout.readline() if ready else b""
        if line:
            return json.loads(line)
        if not ready:
            text = f"took longer than {limit_s:.0f} s"
        else:
            self._log.seek(0)
            lines = self._log.read().strip().splitlines()
            text = f"the process ended with exit code {self._process.wait()}: {lines[-1] if lines else ''}"[:300]
        self.close()
        raise WorkerFailedError(text)


class Contest:
    """One launch of a case: its workers, started together and used in turn."""

    def __init__(self, case: Case, competitors: Iterable[str]) -> None:
        self.case = case
        self.workers = {name: WorkerProcess(case, name) for name in competitors}

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            if not worker.dead:
                worker.close()

    def ask(self, name: str, *command: Any) -> dict[str, Any]:
        """Ask one worker, starting it again if it has died."""
        if self.workers[name].dead:
            self.workers[name] = WorkerProcess(self.case, name)
        return self.workers[name].ask(*command, limit_s=self.case.limit_s)

    def measure_row(self, row: str, settings: Settings, failed: set[str]) -> dict[str, Entry]:
        """Prepare all competitors, let them take turns, and release what they hold."""
        tallies = {name: Tally() for name in self.workers if name not in failed}
        for name, tally in tallies.items():
            try:
                seconds = self.ask(name, "prepare", row, settings.warm_up_s)["seconds"]
                tally.calls = max(1, round(settings.round_s / seconds))
            except WorkerFailedError as error:
                tally.error = str(error)
        disturbed = 0
        while any(len(tally.times) < settings.rounds for tally in tallies.values() if not tally.error):
            others = self.run_round(tallies, disturbed)
            if others > BUSY and disturbed < settings.repeats:
                disturbed += 1
                for tally in tallies.values():
                    tally.times = tally.times[:-1]
                time.sleep(PAUSE_S)
        for name in tallies:
            if not self.workers[name].dead:
                with contextlib.suppress(WorkerFailedError):  # the next row starts it again
                    self.ask(name, "release")
        return {name: tally.entry(settings.rounds) for name, tally in tallies.items()}

    def run_round(self, tallies: dict[str, Tally], repeated: int) -> float:
        """Let each that has not failed work once; returns what share of the cores other programs took meanwhile."""
        names = [name for name, tally in tallies.items() if not tally.error]
        turn = repeated + max(len(tallies[name].times) for name in names)
        passed = others = 0.0
        for name in rotated(names, turn):
            tally = tallies[name]
            try:
                time_ = self.ask(name, "time", tally.calls)
            except WorkerFailedError as error:
                tally.error = str(error)
                continue
            tally.times.append(time_)
            passed += time_["passed_s"]
            others += time_["others_s"]
        return others / (passed * cores()) if passed else 0.0


@dataclass
class Tally:
    """What one competitor has done for one row in one launch."""

    calls: int = 0
    times: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    def entry(self, rounds: int) -> Entry:
        """As an entry of the table, with one sample for each round."""
        if self.error:
            return Entry((None,) * rounds, self.error)
        details = {
            "calls_per_round": self.calls,
            "os_threads": max(t["threads"] for t in self.times),
            "passed_s": sum(t["passed_s"] for t in self.times),
            "others_s": sum(t["others_s"] for t in self.times),
        }
        return Entry(tuple(t["seconds"] for t in self.times), None, details)


def rotated(names: list[str], by: int) -> list[str]:
    """The names, another one first each time."""
    by %= max(1, len(names))
    return names[by:] + names[:by]


def measure(case: Case, settings: Settings, step: Callable[[str], None]) -> Rows:
    """Measure a case; `step` is told what was done, once for each row of each launch."""
    rows: Rows = {}
    labels = row_labels(case, settings)
    failed: dict[str, set[str]] = {row: set() for row in labels}
    for _ in range(settings.launches):
        useful = [name for name in case.competitors if any(name not in names for names in failed.values())]
        with Contest(case, useful) as contest:
            for row in labels:
                measured = contest.measure_row(row, settings, failed[row])
                failed[row] |= {name for name, entry in measured.items() if entry.error}
                known = rows.setdefault(row, {})
                for name, entry in measured.items():
                    known[name] = joined(known[name], entry) if name in known else entry
                step(f"{case.name}: {row}")
    return rows


def row_labels(case: Case, settings: Settings) -> list[str]:
    """The rows that are measured with these settings."""
    labels = list(case.rows)
    return labels[: case.quick_rows] if settings.quick else labels


def joined(first: Entry, second: Entry) -> Entry:
    """The rounds of two launches."""
    details = dict(second.details)
    for name in ("passed_s", "others_s"):
        if name in first.details:
            details[name] = details.get(name, 0.0) + first.details[name]
    return Entry(first.samples + second.samples, second.error, details)
