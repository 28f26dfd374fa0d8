"""What was measured, as JSON, as Markdown and as a table in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.case import SCALES, Case, Rows
from benchmarks.cases import CASES
from benchmarks.contest import BUSY
from benchmarks.targets import Outcome, others_share, outcomes
from benchmarks.timing import paired_ratio, spread

JSON_NAME = "results.json"
MARKDOWN_NAME = "results.md"
HEAD = """# Benchmarks

{machine}

Cells are medians over rounds in which the competitors, each in a process of its own, take turns. In brackets are the
quartiles. Ratios (×) to the column in italics are medians of the ratios within a round: on a shared machine they mean
more than the times.
"""


def as_json(case: Case, rows: Rows) -> dict[str, Any]:
    """The result of a case: all samples in seconds or MiB, and their summaries."""
    shown: dict[str, dict[str, Any]] = {}
    for label, entries in rows.items():
        reference = entries[case.reference].samples if case.reference in entries else ()
        shown[label] = {}
        for name, entry in entries.items():
            found: dict[str, Any] = {"samples": list(entry.samples), "error": entry.error, **entry.details}
            known = [s for s in entry.samples if s is not None]
            if known:
                found["spread"] = spread(known)._asdict()
            ratio = paired_ratio(entry.samples, reference)
            if ratio:
                found["ratio"] = ratio._asdict()
            shown[label][name] = found
    return {"title": case.title, "unit": case.unit, "reference": case.reference, "rows": shown}


def number(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


class Cells:
    """The cells of one case's table, and its footnotes."""

    def __init__(self, name: str, result: dict[str, Any]) -> None:
        self.result = result
        self.reference = result["reference"]
        self.names = list(dict.fromkeys(entry for row in result["rows"].values() for entry in row))
        self.notes: list[str] = []
        self._threads = name in ("mixed", "shards")

    def label(self, row: str) -> str:
        """The label of a row, with a mark where other programs disturbed its measurement."""
        return f"{row} †" if others_share(self.result["rows"][row]) > BUSY else row

    def busy_note(self) -> str | None:
        """What that mark means, where there is one."""
        share = max(map(others_share, self.result["rows"].values()), default=0.0)
        if share <= BUSY:
            return None
        return f"† Other programs took up to {share:.0%} of the cores' time meanwhile: measure it on a quiet machine."

    def note(self, text: str) -> str:
        """The mark of a footnote."""
        if text not in self.notes:
            self.notes.append(text)
        return f"[{self.notes.index(text) + 1}]"

    def cell(self, row: dict[str, Any], name: str, *, quartiles: bool = True) -> str:
        """Median, quartiles and ratio; a dash and a footnote where there is nothing."""
        entry = row.get(name)
        if entry is None:
            return ""
        if entry["error"] or "spread" not in entry:
            why = entry["error"] or "nothing measured"
            return f"– {self.note(f'{name}: {why}')}"
        scale = SCALES[self.result["unit"]]
        median, low, high = (number(entry["spread"][k] * scale) for k in ("median", "low", "high"))
        text = f"{median} [{low}–{high}]" if quartiles else median
        if name != self.reference and "ratio" in entry:
            text += f" {entry['ratio']['median']:.2f}×"
        if self._threads:
            text += f" ({entry['os_threads']} threads)"
        return text


def markdown_case(name: str, result: dict[str, Any]) -> str:
    """A section with the table of one case."""
    cells = Cells(name, result)
    heads = [f"*{n}*" if n == cells.reference else n for n in cells.names]
    rounds = max((len(entry["samples"]) for row in result["rows"].values() for entry in row.values()), default=0)
    about = f"{CASES[name].about} Rounds: {rounds}."
    lines = [f"## {result['title']}", "", about, "", f"| {result['unit']} | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(heads) + 1) + "|")
    for label, row in result["rows"].items():
        lines.append(f"| {cells.label(label)} | " + " | ".join(cells.cell(row, n) for n in cells.names) + " |")
    if note := cells.busy_note():
        lines += ["", note]
    if cells.notes:
        lines += ["", *(f"[{i}] {note}  " for i, note in enumerate(cells.notes, 1))]
    return "\n".join(lines) + "\n"


def verdict(outcome: Outcome) -> str:
    """In a word or two."""
    return "not measured" if outcome.measured is None else "met" if outcome.met else "not met"


def target_rows(found: list[Outcome]) -> list[list[str]]:
    """What, target, measured, verdict."""
    rows = []
    for outcome in found:
        target, sign = outcome.target, "×" if outcome.target.against else ""
        measured = "–" if outcome.measured is None else f"{outcome.measured:.2f}{sign}{' †' * outcome.disturbed}"
        against = f" {target.against}" if target.against else ""
        rows.append([target.what, f"≤ {target.at_most:g}{sign}{against}", measured, verdict(outcome)])
    return rows


def markdown(report: dict[str, Any], pictures: list[Path]) -> str:
    """The whole report."""
    cases = report["cases"]
    parts = [HEAD.format(machine=machine.in_words(report["machine"]))]
    if found := outcomes(cases):
        disturbed = any(outcome.disturbed for outcome in found)
        lines = ["## Targets", "", "| what | target | measured | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in target_rows(found)]
        lines += ["", "† Other programs were at work while this was measured."] if disturbed else []
        parts.append("\n".join(lines) + "\n")
    parts += [f"![{picture.stem.replace('_', ' ')}]({picture.name})\n" for picture in pictures]
    parts += [markdown_case(name, cases[name]) for name in CASES if name in cases]
    return "\n".join(parts)


def read(folder: Path) -> dict[str, Any]:
    """An earlier report; empty where there is none."""
    path = folder / JSON_NAME
    return json.loads(path.read_text()) if path.exists() else {}


def save(folder: Path, report: dict[str, Any]) -> None:
    """Write the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_NAME).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
