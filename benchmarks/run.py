"""Measure the library beside torch, Flax, `wrap-torch2jax` and `jax.pure_callback`.

    make bench                                  # everything, about 20 minutes on two cores
    make bench BENCH_ARGS=--quick               # a trial of all cases, under 3 minutes; its numbers mean nothing
    make bench BENCH_ARGS='--case value-and-grad --case vmap'
    make bench BENCH_ARGS=--list

`make bench` first builds `.venv-bench`, from `constraints.txt` and `benchmarks/requirements.txt`; `python -m
benchmarks.run` runs in any environment and leaves out what is not installed there. `wrap-torch2jax` compiles a C++
extension at its first use, for which a compiler is needed.

It writes `results.json` (all samples), `results.md` (targets, tables) and plots to `benchmarks/results/cpu` or, where
JAX finds a GPU, `benchmarks/results/cuda`. With `--case` the other cases there are kept if machine and versions are
the same. A quick run writes to `build/benchmarks`.

How to read it: times depend on the machine, and on a shared one on the hour. The ratios in the tables are between two
that took turns within a second, in processes of their own; how and why is in `contest`. A competitor that cannot do
something, or fails at it, is a dash with a footnote.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import machine, report
from benchmarks.case import FULL, QUICK, Case, Entry, Rows, Settings
from benchmarks.cases import CASES
from benchmarks.contest import ROOT, measure, row_labels


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", choices=list(CASES), metavar="NAME", help="only this; repeatable")
    parser.add_argument("--list", action="store_true", help="show the cases")
    parser.add_argument("--quick", action="store_true", help="try all cases, two rows and two rounds of each")
    parser.add_argument("--launches", type=int, help="how often to start the processes of a case")
    parser.add_argument("--rounds", type=int, help="in how many rounds to measure, in each launch")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the report anew from its JSON")
    parser.add_argument("--output", type=Path, help="the folder to write to")
    return parser.parse_args()


def steps_of(case: Case, settings: Settings) -> int:
    """How many steps of progress a case reports."""
    return 1 if case.measure else settings.launches * len(row_labels(case, settings))


def run_case(case: Case, settings: Settings, progress: Any) -> Rows:
    """Measure one case. What fails is in its result."""

    def step(what: str) -> None:
        progress.set_postfix_str(what, refresh=False)
        progress.update()

    if case.measure is None:
        return measure(case, settings, step)
    try:
        rows = case.measure(settings)
    except Exception as error:
        rows = {case.title: {case.reference or case.name: Entry(error=f"{type(error).__name__}: {error}")}}
    step(case.name)
    return rows


def write(folder: Path, results: dict[str, Any], shown: list[Case]) -> None:
    """Write the Markdown and the plots, and print the tables; without matplotlib or rich, leave that out."""
    pictures: list[Path] = []
    try:
        from benchmarks import plots

        pictures = plots.draw(results["cases"], folder)
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed: no plots.")
    (folder / report.MARKDOWN_NAME).write_text(report.markdown(results, pictures))
    try:
        from benchmarks import terminal

        terminal.show({case.name: results["cases"][case.name] for case in shown if case.name in results["cases"]})
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed: no tables here.")
    print(f"Written to {folder}.")


def main() -> None:
    """Run cases and write the report, its JSON after each."""
    options = arguments()
    if options.list:
        for case in CASES.values():
            print(f"{case.name:20}{case.title}")
        return
    device = os.environ.setdefault("BENCHMARK_DEVICE", machine.device_kind())
    settings = QUICK if options.quick else FULL
    asked = {name: getattr(options, name) for name in ("launches", "rounds") if getattr(options, name)}
    settings = dataclasses.replace(settings, **asked)
    folder = options.output or ROOT / ("build/benchmarks" if options.quick else "benchmarks/results") / device
    chosen = [case for name, case in CASES.items() if not options.case or name in options.case]
    if options.report:
        write(folder, report.read(folder), chosen)
        return
    described = machine.describe(device)
    earlier = report.read(folder)
    kept = earlier["cases"] if earlier.get("machine") == described else {}
    results: dict[str, Any] = {"machine": described, "cases": kept}
    print(machine.in_words(described))
    with tqdm(total=sum(steps_of(case, settings) for case in chosen), unit="row", mininterval=1) as progress:
        for case in chosen:
            progress.set_postfix_str(case.name)
            results["cases"][case.name] = report.as_json(case, run_case(case, settings, progress))
            report.save(folder, results)
    write(folder, results, chosen)


if __name__ == "__main__":
    main()
