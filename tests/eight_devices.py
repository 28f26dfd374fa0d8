"""Runs a test file again in a process in which the host has eight devices."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

N = 8


def run_again(file: str, timeout_s: float, *options: str) -> None:
    """Run the tests of a file on eight devices, and fail if one of them does."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options, file],
        env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={N}"},
        cwd=pathlib.Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert "no tests ran" not in result.stdout
