"""A report and the progress towards it on a terminal; plain text where there is none."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pytorch2jax._check._report import AGREES, DIFFERS, REFUSED, Report

_COLOURS = {AGREES: "green", DIFFERS: "bold red", REFUSED: "yellow"}


def _rich(name: str) -> Any:
    """A module of the package rich, if it is installed and this is a terminal."""
    if not sys.stdout.isatty():
        return None
    try:
        return importlib.import_module(f"rich.{name}")
    except ImportError:
        return None


def show(report: Report) -> None:
    """Print a report."""
    console = _rich("console")
    if console is None:
        print(report.to_text(), end="")
        return
    text = importlib.import_module("rich.text").Text(report.to_text())
    text.highlight_regex(r"\b\de-\d\d\b", _COLOURS[AGREES])
    for status in (DIFFERS, REFUSED):
        text.highlight_regex(rf"\b{status}\b", _COLOURS[status])
    text.highlight_regex(r"^pytorch2jax: .*", "bold")
    console.Console().print(text)


@contextmanager
def progress(title: str) -> Iterator[Callable[[str], None]]:
    """A function that says what comes next; on a terminal, a line that moves."""
    module = _rich("progress")
    if module is None:
        yield lambda what: None
        return
    columns = (module.SpinnerColumn(), module.TextColumn("{task.description}"), module.TimeElapsedColumn())
    with module.Progress(*columns, transient=True) as bar:
        task = bar.add_task(title)
        yield lambda what: bar.update(task, description=f"{title}: {what}")
