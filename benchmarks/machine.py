"""On what the benchmarks ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytorch2jax

PACKAGES = ("pytorch2jax", "jax", "torch", "flax", "optax", "transformers", "wrap-torch2jax")


def device_kind() -> str:
    """`cpu` or `cuda`: JAX's default backend, asked in another process, since asking takes hold of the device."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return "cuda" if done.stdout.split()[-1] == "gpu" else "cpu"


def processor() -> str:
    """The name of the CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_s() -> float:
    """Seconds that the cores have been busy, all together, since the machine was started; 0 where it is not known."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _idle, _wait, *rest = map(int, path.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def describe(device: str) -> dict[str, Any]:
    """The machine and the versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["pytorch2jax"] = pytorch2jax.__version__  # it may not be installed, only be there
    found = {
        "device": device,
        "processor": processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "versions": versions,
    }
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def in_words(machine: dict[str, Any]) -> str:
    """One paragraph about it."""
    parts = [machine["gpu"]] if "gpu" in machine else []
    parts += [f"{machine['processor']}, {machine['cores']} cores", f"Python {machine['python']}"]
    parts += [f"{name} {version}" for name, version in machine["versions"].items() if version]
    missing = [name for name, version in machine["versions"].items() if not version]
    return ", ".join(parts) + (f"; not installed: {', '.join(missing)}" if missing else "") + "."
