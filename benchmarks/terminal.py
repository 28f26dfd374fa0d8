"""The results as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES
from benchmarks.report import Cells, target_rows
from benchmarks.targets import outcomes


def show(cases: dict[str, Any]) -> None:
    """Print the tables of these cases, and the targets that they have."""
    console = Console()
    for name in (name for name in CASES if name in cases):
        cells = Cells(name, cases[name])
        table = Table(cases[name]["unit"], title=cases[name]["title"], title_justify="left")
        for entry in cells.names:
            table.add_column(entry, justify="right")
        for label, row in cases[name]["rows"].items():
            table.add_row(cells.label(label), *(cells.cell(row, n, quartiles=False) for n in cells.names))
        console.print(table)
        if note := cells.busy_note():
            console.print(note, style="yellow")
        for i, note in enumerate(cells.notes, 1):
            console.print(f"[{i}] {note}", markup=False, highlight=False)
    if found := outcomes(cases):
        table = Table("target", "at most", "measured", "", title="Targets", title_justify="left")
        for row in target_rows(found):
            table.add_row(*row, style=None if row[-1] == "met" else "yellow")
        console.print(table)
