"""All cases, in the order of the report. A new one is a `Case` in a file of this folder, listed here."""

from __future__ import annotations

from benchmarks.case import Case
from benchmarks.cases.batching import PER_EXAMPLE_GRADS, VMAP
from benchmarks.cases.calls import ARGUMENTS_EAGER, ARGUMENTS_JITTED, DECLARED, SIZES_EAGER, SIZES_JITTED
from benchmarks.cases.conversion import COMPILE, CONVERSION_MEMORY, CONVERSION_TIME, IMPORT
from benchmarks.cases.gradients import FORWARD, VALUE_AND_GRAD
from benchmarks.cases.loops import SCAN
from benchmarks.cases.threads import MIXED, SHARDS
from benchmarks.cases.training import FROZEN, TRAINING

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        ARGUMENTS_JITTED,
        ARGUMENTS_EAGER,
        SIZES_JITTED,
        SIZES_EAGER,
        DECLARED,
        FORWARD,
        VALUE_AND_GRAD,
        FROZEN,
        TRAINING,
        VMAP,
        PER_EXAMPLE_GRADS,
        SCAN,
        MIXED,
        SHARDS,
        COMPILE,
        IMPORT,
        CONVERSION_TIME,
        CONVERSION_MEMORY,
    )
}
