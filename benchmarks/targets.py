"""What the library sets itself as a target, as ratios of times within one run."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from benchmarks.case import FLAX, OURS, OURS_DECLARED, OURS_XLA, TORCH, WRAP
from benchmarks.cases.training import TORCH_AND_HEAD
from benchmarks.contest import BUSY
from benchmarks.machine import cores
from benchmarks.models import BERT, CONV_NET, ENCODER, MLP, MLP_64, RESNET_4, RESNET_32
from benchmarks.timing import paired_ratio


class Target(NamedTuple):
    """At most so many times what another takes; at most so much, where there is no other."""

    what: str
    case: str
    row: str | None
    """None is the only row."""
    at_most: float
    against: str | None = TORCH
    entry: str = OURS


class Outcome(NamedTuple):
    """A target and what was measured; None where nothing was."""

    target: Target
    measured: float | None
    disturbed: bool

    @property
    def met(self) -> bool:
        """Whether it was measured and is not above the target."""
        return self.measured is not None and self.measured <= self.target.at_most


def _gradient(what: str, row: str, at_most: float) -> Target:
    return Target(f"value and gradient, {what}", "value-and-grad", row, at_most)


TARGETS = (
    *(
        Target(f"jitted call, {n} small argument{'s' * (n > 1)}", "arguments-jitted", str(n), 1.0, WRAP)
        for n in (1, 10, 100, 300)
    ),
    Target("eager call on 10 floats", "sizes-eager", "10", 0.25, WRAP),
    Target("eager addition on 10 million floats", "sizes-eager", "10 000 000", 1.1),
    _gradient("transformer encoder", ENCODER.name, 1.05),
    _gradient("BERT-base", BERT.name, 1.05),
    _gradient("ResNet-18, batch 4", RESNET_4.name, 1.2),
    _gradient("ResNet-18, batch 32", RESNET_32.name, 1.05),
    _gradient("small MLP", MLP.name, 1.8),
    Target("frozen extractor with a trainable JAX head", "frozen", ENCODER.name, 1.05, TORCH_AND_HEAD),
    Target("vmap of 64, MLP", "vmap", MLP_64.name, 1.2),
    Target("vmap of 64, conv net", "vmap", CONV_NET.name, 1.2),
    Target("jitted call that declares its output", "declared", "1 000", 1.2, OURS, OURS_DECLARED),
    Target("peak memory of converting with copy=False", "conversion-memory", None, 1.05, TORCH, f"{OURS}, copy=False"),
    Target('forward, encoder, backend="xla"', "forward", ENCODER.name, 0.65, TORCH, OURS_XLA),
    Target('value and gradient, encoder, backend="xla"', "value-and-grad", ENCODER.name, 0.85, TORCH, OURS_XLA),
    Target('value and gradient, small MLP, backend="xla"', "value-and-grad", MLP.name, 0.5, TORCH, OURS_XLA),
    Target('value and gradient, BERT-base, backend="xla"', "value-and-grad", BERT.name, 1.05, FLAX, OURS_XLA),
    Target("from call to compiled, BERT-base, in seconds", "compile", None, 20.0, None, OURS_XLA),
    Target("import beyond jax and torch, in seconds", "import", None, 0.15, None),
)


def others_share(row: dict[str, Any]) -> float:
    """What share of the cores' time other programs took while a row was measured."""
    passed, others = (sum(entry.get(key, 0.0) for entry in row.values()) for key in ("passed_s", "others_s"))
    return others / (passed * cores()) if passed else 0.0


def measured(target: Target, row: dict[str, Any]) -> float | None:
    """The median of the ratios (or of the samples) that a target is about."""
    if target.entry not in row:
        return None
    samples = row[target.entry]["samples"]
    if target.against is None:
        known = [s for s in samples if s is not None]
        return statistics.median(known) if known else None
    if target.against not in row:
        return None
    ratio = paired_ratio(samples, row[target.against]["samples"])
    return ratio.median if ratio else None


def outcomes(cases: dict[str, Any]) -> list[Outcome]:
    """All targets whose case was run."""
    found = []
    for target in (target for target in TARGETS if target.case in cases):
        rows = cases[target.case]["rows"]
        row = rows.get(target.row, {}) if target.row is not None else next(iter(rows.values()), {})
        found.append(Outcome(target, measured(target, row), others_share(row) > BUSY))
    return found
