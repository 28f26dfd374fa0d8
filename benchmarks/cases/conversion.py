"""What importing and converting cost; every sample comes from a fresh process."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.bridges import torch_device
from benchmarks.case import FLAX, OURS, OURS_XLA, TORCH, WRAP, Case, Entry, Rows, Settings
from benchmarks.contest import ROOT, child_environment

LIMIT_S = 180.0

IMPORT_TIME = """
import json, sys, time
{before}
start = time.perf_counter()
{statement}
print(json.dumps(time.perf_counter() - start))
"""

CONVERT = """
import json, sys, time
from pathlib import Path

import jax
import torch

{imports}
device = {device!r}

def memory_mib():
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10

jax.block_until_ready(jax.numpy.zeros(1))
with torch.no_grad():
    layers = [torch.nn.Linear(2048, 2048, device=device) for _ in range({layers})]
model = torch.nn.Sequential(*layers)
start = time.perf_counter()
{convert}
print(json.dumps([time.perf_counter() - start, memory_mib()]))
"""
LAYERS = 72  # of 4.2 million parameters each
CONVERSIONS = {
    TORCH: ("", "pass"),
    f"{OURS}, copy=False": (
        "from pytorch2jax import convert_pytnn_to_jax",
        "jax.block_until_ready(convert_pytnn_to_jax(model, copy=False)[1])",
    ),
    f"{OURS}, copy=True": (
        "from pytorch2jax import convert_pytnn_to_jax",
        "jax.block_until_ready(convert_pytnn_to_jax(model, copy=True)[1])",
    ),
}


def run_python(code: str) -> Any:
    """What a fresh Python prints last, as JSON."""
    environment = child_environment({})
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(programs: Mapping[str, str], rounds: int) -> dict[str, list[Any] | str]:
    """What each program prints in each round, or why one failed."""
    found: dict[str, list[Any] | str] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            samples = found[name]
            if isinstance(samples, list):
                try:
                    samples.append(run_python(program))
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    found[name] = str(error)[:300]
    return found


def entries(found: Mapping[str, list[Any] | str]) -> dict[str, Entry]:
    """The same as entries of a table."""
    return {
        name: Entry(error=samples) if isinstance(samples, str) else Entry(tuple(samples))
        for name, samples in found.items()
    }


def measure_imports(settings: Settings) -> Rows:
    """Seconds for each import, with jax and torch loaded before."""
    both = "import jax, torch"
    programs = {
        "jax": IMPORT_TIME.format(before="", statement="import jax"),
        TORCH: IMPORT_TIME.format(before="import jax", statement="import torch"),
        OURS: IMPORT_TIME.format(before=both, statement="import pytorch2jax"),
        f"{OURS}.flax": IMPORT_TIME.format(before=f"{both}, flax", statement="import pytorch2jax.flax"),
        WRAP: IMPORT_TIME.format(before=both, statement="import wrap_torch2jax"),
    }
    return {"import": entries(in_turn(programs, 1 if settings.quick else 9))}


@functools.cache
def converted(layers: int, rounds: int) -> dict[str, list[Any] | str]:
    """Seconds and MiB for each way to convert a model of so many layers."""
    programs = {
        name: CONVERT.format(device=torch_device(), layers=layers, imports=imports, convert=convert)
        for name, (imports, convert) in CONVERSIONS.items()
    }
    return in_turn(programs, rounds)


def measure_conversion(settings: Settings, which: int) -> Rows:
    """Seconds (`which` 0) or MiB (1) for each way to convert."""
    layers = 8 if settings.quick else LAYERS
    found = converted(layers, 1 if settings.quick else 3)
    chosen = {n: s if isinstance(s, str) else [sample[which] for sample in s] for n, s in found.items()}
    if which == 0:
        del chosen[TORCH]  # which converts nothing
    return {f"{layers * 2048 * 2049 / 1e6:.0f} million parameters": entries(chosen)}


COMPILE_TIME = """
import json, time
import jax
from benchmarks import models
from benchmarks.bridges import BRIDGES
apply, params, x = BRIDGES[{bridge!r}](models.BERT, False)
jax.block_until_ready(jax.numpy.zeros(1))
step = jax.jit(jax.value_and_grad(lambda params, x: (apply(params, x) ** 2).sum()))
start = time.perf_counter()
step.lower(params, x).compile()
print(json.dumps(time.perf_counter() - start))
"""


def measure_compiling(settings: Settings) -> Rows:
    """Seconds from the first call of a jitted value and gradient to a compiled program."""
    programs = {name: COMPILE_TIME.format(bridge=name) for name in (OURS, OURS_XLA, FLAX)}
    return {"BERT-base": entries(in_turn(programs, 1 if settings.quick else 3))}


COMPILE = Case(
    "compile",
    "From call to compiled",
    "s",
    "Tracing, translating and compiling the value and gradient of BERT-base, each in fresh processes.",
    measure=measure_compiling,
    reference=FLAX,
)
IMPORT = Case(
    "import",
    "Import time",
    "s",
    "Each in fresh processes, on top of jax and torch (and of flax, for the adapter).",
    measure=measure_imports,
    reference=None,
)
CONVERSION_TIME = Case(
    "conversion-time",
    "Converting a large model: time",
    "s",
    "`convert_pytnn_to_jax` on a stack of linear layers.",
    measure=functools.partial(measure_conversion, which=0),
    reference=f"{OURS}, copy=True",
)
CONVERSION_MEMORY = Case(
    "conversion-memory",
    "Converting a large model: peak memory",
    "MiB",
    "The highest resident memory of a process that builds the model and converts it (on a GPU: device memory in use), "
    "against one that only builds it.",
    measure=functools.partial(measure_conversion, which=1),
)
