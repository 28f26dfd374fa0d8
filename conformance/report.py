"""What was found, as JSON and as Markdown, and what of it is unexpected."""

from __future__ import annotations

import collections
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch2jax
from conformance import families
from conformance.exceptions import BACKEND, KNOWN, reasons

FOLDER = Path(__file__).resolve().parent / ("" if BACKEND == "torch" else BACKEND)
JSON_NAME = "results.json"
MARKDOWN_NAME = "results.md"
SAMPLES = 2
"""At most so many for each check and dtype, unless somebody asks for another number."""

_VERDICTS = ("passed", "refused", "failed")

_HEAD = """# Torch's operators

{made_with}

The library (`backend="{backend}"`) on torch's own database of operators (`op_db`), with torch as the oracle:
{operators} operators and variants, {runs} runs of samples, of which {passed} passed. A run is one sample in one check
with one dtype. *Passed* is what agrees with torch, *refused* what ended with a clear error of the library's own,
*failed* the rest. Each sample runs outside of `jax.jit`, the first of each operator also inside. What torch itself
cannot do is not counted.

"""


def describe(samples: int, checks: Sequence[str] = ()) -> dict[str, Any]:
    """With what the results are made; `checks` are those that were chosen, if not all are made."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "torch")}
    versions = {"pytorch2jax": pytorch2jax.__version__, **versions, "Python": platform.python_version()}
    return {
        "backend": BACKEND,
        "versions": versions,
        "samples": samples,
        **({"checks": list(checks)} if checks else {}),
    }


def read(folder: Path) -> dict[str, Any]:
    """Earlier results, if there are any."""
    path = folder / JSON_NAME
    return json.loads(path.read_text()) if path.exists() else {"operators": {}}


def save(folder: Path, results: dict[str, Any]) -> None:
    """Write the results, an operator to a line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(answer)}" for name, answer in results["operators"].items()]
    made_with = json.dumps(results["made_with"])
    text = f'{{"made_with": {made_with}, "operators": {{\n' + ",\n".join(lines) + "\n}}\n"
    (folder / JSON_NAME).write_text(text)


def merged(before: dict[str, Any] | None, answer: dict[str, Any], checks: Sequence[str]) -> dict[str, Any]:
    """An operator's earlier answer with new outcomes of some checks."""
    if before is None or "ended" in answer or "ended" in before:
        return answer
    kept = [outcome for outcome in before["outcomes"] if outcome["check"] not in checks]
    return {
        "outcomes": kept + answer["outcomes"],
        "bridged": sorted({*before["bridged"], *answer["bridged"]}),
        "families": sorted({*before["families"], *answer["families"]}),
        "error": max(before["error"], answer["error"]),
        "seconds": round(before["seconds"] + answer["seconds"], 2),
    }


def outcomes(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All outcomes."""
    for answer in results["operators"].values():
        yield from answer.get("outcomes", ())


def verdict(outcome: dict[str, Any]) -> str:
    """The worst of what happened to the samples."""
    return "failed" if outcome["failed"] else "refused" if outcome["refused"] else "passed"


def complaints(results: dict[str, Any]) -> list[str]:
    """What is unexpected: outcomes without a reason and, if there are enough samples, reasons without an outcome."""
    found = [f"{name}: {answer['ended']}" for name, answer in results["operators"].items() if "ended" in answer]
    for name, answer in results["operators"].items():
        family = families.widest(answer.get("families", ()))
        if family is not None and answer["error"] > families.TOLERANCES[family]:
            found.append(f"{name}: {answer['error']} from torch, more than {family} may be")
    used: set[tuple[int, str]] = set()
    for outcome in outcomes(results):
        address, worst = (outcome["operator"], outcome["check"], outcome["dtype"]), verdict(outcome)
        known = reasons(*address)
        used |= {(KNOWN.index(k), outcome["operator"]) for k in known if k.verdict == worst}
        # With fewer samples, those that fail may not be among them.
        if (worst == "failed" and all(k.verdict != "failed" for k in known)) or (worst == "refused" and not known):
            found.append(f"{', '.join(address)}: {worst}: {outcome['message']}")
    everything = results["made_with"]["samples"] >= SAMPLES and not results["made_with"].get("checks")
    for number, entry in enumerate(KNOWN if everything else ()):
        for operator in entry.operators:
            tried = operator in results["operators"] and entry.verdict != "skipped"
            if tried and (number, operator) not in used:
                found.append(f"{operator}: no longer {entry.verdict} ({entry.reason}): take it out of the exceptions")
    return found


def markdown(results: dict[str, Any]) -> str:
    """The report."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    operators: dict[str, set[str]] = collections.defaultdict(set)
    for outcome in outcomes(results):
        counts[outcome["check"]].update({name: outcome[name] for name in _VERDICTS})
        operators[outcome["check"]].add(outcome["operator"])
    passed = sum(c["passed"] for c in counts.values())
    runs = sum(sum(c.values()) for c in counts.values())
    versions = results["made_with"]["versions"].items()
    made_with = ", ".join(f"{name} {version}" for name, version in versions)
    made_with += f"; at most {results['made_with']['samples']} samples of an operator for each check and dtype."
    numbers = {"operators": len(results["operators"]), "runs": runs, "passed": passed}
    lines = [_HEAD.format(made_with=made_with, backend=BACKEND, **numbers)]
    lines += ["| check | operators | passed | refused | failed |\n", "|---|---|---|---|---|\n"]
    for check, count in counts.items():
        cells = (check, len(operators[check]), *(count[name] for name in _VERDICTS))
        lines.append(f"| {' | '.join(map(str, cells))} |\n")
    return "".join([*lines, *_precision(results), *_bridged(results), *_reasons(results)])


def _precision(results: dict[str, Any]) -> Iterator[str]:
    """How far single precision is from torch's, for each family."""
    errors: dict[str | None, list[float]] = collections.defaultdict(list)
    for answer in results["operators"].values():
        if "families" in answer:
            errors[families.widest(answer["families"])].append(answer["error"])
    if BACKEND == "torch" or not errors:
        return
    yield "\n## Single precision\n\nThe kernels are XLA's, and round and add up in another order than torch's. "
    yield "A distance is relative to |y| + max|y| / 10, with torch's result y and its largest element (at least 1). An "
    yield "operator made of several families counts in the one with the widest tolerance. In double precision the "
    yield "tolerance is 1e-7 for all, derivatives included.\n\n"
    yield "| family | operators | tolerance | largest distance |\n|---|---|---|---|\n"
    for family, tolerance in sorted(families.TOLERANCES.items(), key=lambda item: (item[1], item[0])):
        if family in errors:
            yield f"| {family} | {len(errors[family])} | {tolerance:.0e} | {max(errors[family]):.1e} |\n"


def _bridged(results: dict[str, Any]) -> Iterator[str]:
    """Operators that the engine leaves to torch."""
    names = sorted({name for answer in results["operators"].values() for name in answer.get("bridged", ())})
    if names:
        yield f"\n## Run by torch\n\n{len(names)} operators have no JAX function, and torch runs them inside of "
        yield f"the compiled program: {', '.join(f'`{name}`' for name in names)}.\n"


def _reasons(results: dict[str, Any]) -> Iterator[str]:
    for name in ("refused", "failed", "skipped"):
        entries = [known for known in KNOWN if known.verdict == name]
        if not entries:
            continue
        yield f"\n## {name.capitalize()}, and why\n\n"
        for known in entries:
            where = ", ".join(known.checks) or "all checks"
            dtypes = f" ({', '.join(known.dtypes)})" if known.dtypes else ""
            yield f"- {known.reason} In {where}{dtypes}: {', '.join(f'`{o}`' for o in known.operators)}.\n"
    unexpected = complaints(results)
    if unexpected:
        yield "\n## Unexpected\n\n" + "".join(f"- {line}\n" for line in unexpected)
