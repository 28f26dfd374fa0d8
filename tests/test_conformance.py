"""Torch's own database of operators: a part of what `make conformance` runs, and the report's complaints."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from conformance import exceptions, families, report
from conformance.exceptions import Known

ROOT = pathlib.Path(__file__).resolve().parent.parent


BACKENDS = ("torch", "xla")


def run_conformance(backend, output, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "conformance.run", *arguments, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "PYTORCH2JAX_CONFORMANCE_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing unexpected" in done.stdout
    return report.read(output)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("backend", "shard", "at_least"), [("torch", "3/60", 150), ("xla", "5/120", 75)])
def test_some_operators(backend, shard, at_least, tmp_path):
    results = run_conformance(backend, tmp_path, "--shard", shard, "--samples", "1", "--processes", "1")
    assert sum(outcome["passed"] for outcome in report.outcomes(results)) > at_least
    assert "| second order |" in (tmp_path / report.MARKDOWN_NAME).read_text()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_results_in_the_repository_are_as_expected(backend, tmp_path):
    folder = ROOT / "conformance" / ("" if backend == "torch" else backend)
    for name in (report.JSON_NAME, report.MARKDOWN_NAME):
        shutil.copy(folder / name, tmp_path)
    results = run_conformance(backend, tmp_path, "--report")
    assert len(results["operators"]) > 600
    assert (tmp_path / report.MARKDOWN_NAME).read_text() == (folder / report.MARKDOWN_NAME).read_text()


def run_program(program):
    """In a process of its own, because torch's tests change its settings."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def found(verdict, *, samples=report.SAMPLES):
    outcome = {"operator": "sin", "check": "reverse", "dtype": "float64", "passed": 1, "refused": 0, "failed": 0}
    outcome |= {verdict: 1, "message": "WrongError: output"}
    return {"made_with": {"samples": samples, "versions": {}}, "operators": {"sin": {"outcomes": [outcome]}}}


@pytest.fixture
def known(monkeypatch):
    def set_known(*entries):
        monkeypatch.setattr(exceptions, "KNOWN", entries)
        monkeypatch.setattr(report, "KNOWN", entries)

    return set_known


@pytest.mark.parametrize("verdict", ["refused", "failed"])
def test_what_has_no_reason_is_unexpected(known, verdict):
    known(Known(verdict, "A reason.", ("cos",)), Known(verdict, "A reason.", ("sin",), ("vmap",)))
    assert report.complaints(found(verdict))[0] == f"sin, reverse, float64: {verdict}: WrongError: output"
    known(Known(verdict, "A reason.", ("sin",), ("reverse",), ("float64",)))
    assert report.complaints(found(verdict)) == []
    assert "A reason." in report.markdown(found(verdict))


def test_a_refusal_is_no_reason_to_fail(known):
    known(Known("refused", "A reason.", ("sin",)))
    assert "failed: WrongError" in report.complaints(found("failed"))[0]


def test_a_reason_that_is_no_longer_needed_is_unexpected(known):
    known(Known("failed", "A reason.", ("sin", "cos")))
    assert report.complaints(found("passed")) == ["sin: no longer failed (A reason.): take it out of the exceptions"]
    assert report.complaints(found("passed", samples=report.SAMPLES - 1)) == []


def test_an_interpreter_that_ends_is_unexpected(known):
    known()
    results = {"made_with": {"samples": 1}, "operators": {"sin": {"ended": "the process ended with -11"}}}
    assert report.complaints(results) == ["sin: the process ended with -11"]


def test_single_precision_has_a_tolerance_for_each_family(known, monkeypatch):
    known()
    monkeypatch.setattr(families, "TOLERANCES", {"views": 1e-7, "linalg": 1e-5})
    results = found("passed")
    results["operators"]["sin"] |= {"families": ["linalg", "views"], "error": 2e-5}
    assert report.complaints(results) == ["sin: 2e-05 from torch, more than linalg may be"]
    results["operators"]["sin"] |= {"error": 5e-6}
    assert report.complaints(results) == []


def test_what_is_not_tried_has_a_reason(known):
    known(Known("skipped", "It takes hours.", ("sin",), dtypes=("float64",)))
    assert exceptions.skipped("sin", "reverse", "float64")
    assert not exceptions.skipped("sin", "reverse", "complex128")
    assert not exceptions.skipped("cos", "reverse", "float64")


@pytest.mark.exhaustive
def test_the_oracle_is_the_derivative_that_finite_differences_agree_with():
    program = """
import torch
from conformance import oracle, samples
for call in samples.calls(samples.OPERATORS["scatter_reduce.prod"], torch.float64, 2, derivatives=True):
    torchs = oracle.Differentiable(call)
    assert oracle._distance(torchs._dual(), torchs._differences()) > 1  # torch's forward mode is wrong
    assert oracle._distance(torchs.forward(), torchs._differences()) < 1e-6
for call in samples.calls(samples.OPERATORS["as_strided_scatter"], torch.float64, 2, derivatives=True):
    torchs = oracle.Differentiable(call)
    assert oracle._distance(torchs._double_backward(), torchs._differences()) > 0.1  # and here its backward
    assert oracle._distance(torchs.forward(), torchs._differences()) < 1e-6
"""
    run_program(program)


@pytest.mark.exhaustive
def test_checks_can_fail():
    program = """
import jax, torch
jax.config.update("jax_enable_x64", True)
from conformance import worker, converted
assert all(o.passed and not o.failed for o in worker.check_operator("sin", 1))
converted.torch2jax = lambda fn, **how: __import__("pytorch2jax").torch2jax(lambda x: fn(x) + 1e-3 * x**2, **how)
failed = {o.check for o in worker.check_operator("sin", 1) if o.failed}
expected = {"forward", "reverse", "forward mode", "second order", "vmap", "vmap of gradients", "vmap twice"}
assert failed >= expected | {"vmap of jacrev", "vmap of jacfwd", "vmap of hessian"}, failed
"""
    run_program(program)
