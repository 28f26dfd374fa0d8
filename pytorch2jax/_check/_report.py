"""What `check` found, and how it looks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

AGREES, RAN, DIFFERS, REFUSED, NOT_APPLICABLE = "agrees", "ran", "differs", "refused", "not applicable"
RUNS = (AGREES, RAN)  # what says that it works


@dataclasses.dataclass
class Cell:
    """What came of one transformation with one engine.

    Attributes:
        status: `"agrees"` with torch; `"ran"`, where values were not compared; `"differs"`; `"refused"`, which is an
            error; or `"not applicable"`.
        error: the largest difference from torch, relative to the largest value.
        tolerance: what counts as agreement.
        reason: why it is as it is, and the way out, where that needs to be said.
    """

    status: str
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""

    def short(self) -> str:
        """The cell in a few characters."""
        if self.status == RAN:
            return "ran, not compared"
        return f"{self.error:.0e}" if self.status == AGREES else self.status


@dataclasses.dataclass
class Found:
    """What the model consists of, and what it does in a call.

    Attributes:
        parameters, parameter_bytes: how many numbers, and how many bytes.
        dtypes: of the parameters.
        tied: groups of names that are one parameter.
        frozen: names of parameters with `requires_grad=False`.
        buffers: names of buffers.
        trained_buffers: those that training changes.
        made: names of parameters and buffers that the model does not have before its first call.
        hooks: by kind (`"forward hooks"`), the names of the submodules or parameters that have some; `""` is the model.
        inputs, outputs: addresses, dtypes and shapes.
        notes: randomness, values that are read, attributes that change, hand-written gradients, double precision.
    """

    parameters: int = 0
    parameter_bytes: int = 0
    dtypes: list[str] = dataclasses.field(default_factory=list)
    tied: list[list[str]] = dataclasses.field(default_factory=list)
    frozen: list[str] = dataclasses.field(default_factory=list)
    buffers: list[str] = dataclasses.field(default_factory=list)
    trained_buffers: list[str] = dataclasses.field(default_factory=list)
    made: list[str] = dataclasses.field(default_factory=list)
    hooks: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    inputs: list[str] = dataclasses.field(default_factory=list)
    outputs: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Cost:
    """What one computation costs with one engine.

    Attributes:
        what: `"forward"` or `"value and gradient"`.
        seconds: a call, the median of several.
        ratio: the median of the ratios to torch's time in the same round.
        compile_seconds: the first call, with tracing and compilation.
        peak_bytes: by how much the memory of the process grew in a call at most; None where the system does not tell.
        copied_bytes: how much one call copies between the frameworks; None where that is not known.
    """

    what: str
    seconds: float
    ratio: float
    compile_seconds: float
    peak_bytes: int | None
    copied_bytes: int | None

    def short_ratio(self) -> str:
        """The ratio in a few characters."""
        return f"{self.ratio:.2f}" if self.ratio >= 0.1 else f"{self.ratio:.1g}"


@dataclasses.dataclass
class Report:
    """What `check` returns.

    Attributes:
        model: the name of the torch class.
        found: what the model consists of.
        works: cells, by engine and by transformation.
        bridged, loops: what is said of operators that run in torch inside of `backend="xla"`, and of batches that are
            loops.
        torch_seconds: what torch itself takes, by computation.
        costs: by engine.
        busy: why times are rough figures, where the machine had other things to do.
        advice: which engine to take, and what would make the model faster.
        is_complete: False where it was interrupted.
    """

    model: str
    found: Found = dataclasses.field(default_factory=Found)
    works: dict[str, dict[str, Cell]] = dataclasses.field(default_factory=dict)
    bridged: list[str] = dataclasses.field(default_factory=list)
    loops: list[str] = dataclasses.field(default_factory=list)
    torch_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    costs: dict[str, list[Cost]] = dataclasses.field(default_factory=dict)
    busy: str = ""
    advice: list[str] = dataclasses.field(default_factory=list)
    is_complete: bool = True

    @property
    def differs(self) -> bool:
        """Whether anything came out differently from torch."""
        return any(cell.status == DIFFERS for cells in self.works.values() for cell in cells.values())

    def to_json(self) -> str:
        """The report as JSON, with the names of the attributes."""
        data = dataclasses.asdict(self)
        for cells in data["works"].values():
            for cell in cells.values():
                if cell["error"] is not None and not math.isfinite(cell["error"]):
                    cell["error"] = str(cell["error"])  # JSON has no NaN
        return json.dumps(data, indent=2, allow_nan=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The report from what `to_json` wrote, after it has been parsed."""
        data = dict(data)
        data["found"] = Found(**data["found"])
        data["works"] = {e: {k: Cell(**c) for k, c in cells.items()} for e, cells in data["works"].items()}
        data["costs"] = {e: [Cost(**c) for c in costs] for e, costs in data["costs"].items()}
        return cls(**data)

    def to_text(self) -> str:
        """The report as plain text."""
        parts = [self._title(), "", *self._facts(), ""]
        for title, header, rows in self._tables():
            parts += [title, *_aligned([header, *rows]), ""]
        parts += [line for _, line in self._remarks()]
        return "\n".join(parts).rstrip() + "\n"

    def to_markdown(self) -> str:
        """The report as Markdown."""
        parts = [f"## {self._title()}", "", *(f"- {fact}" for fact in self._facts()), ""]
        for title, header, rows in self._tables():
            parts += [f"**{title}**", "", _row(header), _row(["---"] * len(header)), *map(_row, rows), ""]
        parts += [f"- {line}" for _, line in self._remarks()]
        return "\n".join(parts).rstrip() + "\n"

    def _title(self) -> str:
        return f"pytorch2jax: {self.model}" + ("" if self.is_complete else " (interrupted: what was found until then)")

    def _facts(self) -> list[str]:
        found = self.found
        size = f"{found.parameters:,} numbers, {_bytes(found.parameter_bytes)}, {', '.join(found.dtypes) or 'none'}"
        facts = [f"parameters: {size}"] if found.parameters or self.is_complete else []
        facts += [f"tied: {' = '.join(names)}" for names in found.tied]
        if found.frozen:
            facts.append(f"frozen: {_some(found.frozen)}")
        if found.buffers:
            changed = f"; training changes {_some(found.trained_buffers)}" if found.trained_buffers else ""
            facts.append(f"buffers: {_some(found.buffers)}{changed}")
        if found.made:
            facts.append(f"made by the first call, here that of a copy: {_some(found.made)}")
        facts += [f"{kind}: {_some([name or 'the model' for name in names])}" for kind, names in found.hooks.items()]
        facts += [f"in: {_some(found.inputs)}", f"out: {_some(found.outputs)}"] if found.inputs or found.outputs else []
        return facts + found.notes

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        engines = list(self.works)
        rows = list(dict.fromkeys(row for cells in self.works.values() for row in cells))
        works = [[row, *(self._cell(engine, row) for engine in engines)] for row in rows]
        tables = [("largest difference from torch", ["", *engines], works)] if rows else []
        costs = [
            [
                cost.what,
                engine,
                _time(self.torch_seconds[cost.what]),
                f"{cost.short_ratio()}x",
                _time(cost.compile_seconds),
                "under 4 kB" if cost.peak_bytes == 0 else _bytes(cost.peak_bytes),  # which is a page
                _bytes(cost.copied_bytes),
            ]
            for engine, found in self.costs.items()
            for cost in found
        ]
        header = ["", "engine", "torch", "beside torch", "first call", "memory", "copied"]
        title = "what it costs" + (f"; rough figures: {self.busy}" if self.busy else "")
        return [*tables, (title, header, costs)] if costs else tables

    def _cell(self, engine: str, row: str) -> str:
        cell = self.works[engine].get(row)
        return "" if cell is None else cell.short()

    def _remarks(self) -> list[tuple[str, str]]:
        remarks: dict[tuple[str, str], list[str]] = {}
        for engine, cells in self.works.items():
            for row, cell in cells.items():
                if cell.reason:
                    remarks.setdefault((engine, cell.reason), []).append(row)
                elif cell.status == DIFFERS:
                    said = f"differs from torch by {cell.error:.1e}, expected {cell.tolerance:.0e} at most"
                    remarks.setdefault((engine, said), []).append(row)
        lines = [("reason", f"{engine}, {', '.join(rows)}: {said}") for (engine, said), rows in remarks.items()]
        lines += [("note", line) for line in (*self.bridged, *self.loops)]
        return lines + [("advice", line) for line in self.advice]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _some(names: Sequence[str], n: int = 4) -> str:
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return (", ".join(names[:n]) or "nothing") + more


def _bytes(n: int | None) -> str:
    if n is None:
        return "not measured"
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} B"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds >= 1
        else f"{1e3 * seconds:.3g} ms"
        if seconds >= 1e-3
        else f"{1e6 * seconds:.3g} µs"
    )
