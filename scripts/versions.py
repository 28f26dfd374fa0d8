"""Run the tests on the lowest versions that `pyproject.toml` declares, and on the newest that the index offers.

    make versions                                             # all tests, on both; twice the time of `make test`
    make versions VERSIONS_ARGS='--only lowest'
    make versions VERSIONS_ARGS='tests/test_calls.py -x'      # what it does not know goes to pytest
    make versions VERSIONS_ARGS='--torch torch==2.11.0'       # where the index has a build of it for this machine

It makes `.venv-lowest` and `.venv-newest` and leaves them for the next time. Torch is installed first and by an exact
version, by default the one in `constraints.txt`, in both of them: any other request for it may fetch a CUDA build of
several gigabytes. What is not under test (pytest, transformers) has the versions in `constraints.txt` beside the lowest
versions, and the newest ones beside the newest.

It prints a table of the versions and of what came of the tests, and ends with an error if they failed somewhere.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTED = ("numpy", "jax", "flax", "equinox", "optax")
SHOWN = ("torch", "jax", "jaxlib", *(name for name in TESTED if name != "jax"))

_VERSIONS = """
import importlib.metadata as metadata, json, sys
print(json.dumps({name: metadata.version(name) for name in sys.argv[1:]}))
"""


class Outcome(NamedTuple):
    """What came of an environment."""

    name: str
    versions: dict[str, str]
    passed: bool
    summary: str


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is meant for pytest."""
    parser = argparse.ArgumentParser(prog="python scripts/versions.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["lowest", "newest"], help="only this environment")
    parser.add_argument("--torch", default=pinned("torch"), help="pip's requirement for torch (%(default)s)")
    return parser.parse_known_args()


def constraints() -> list[str]:
    """The lines of `constraints.txt` that pin something."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pinned(package: str) -> str:
    """The line of `constraints.txt` about a package."""
    return next(line for line in constraints() if line.startswith(f"{package}=="))


def lower_bounds() -> dict[str, str]:
    """The lowest version of each package that `pyproject.toml` allows, where it says one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return dict(match.groups() for line in lines if (match := re.fullmatch(r"([\w-]+)>=([\w.]+)", line)))


def lowest(torch: str) -> list[str]:
    """What pip may install at most: the lower bounds, and the usual versions of what is not under test."""
    bounds = lower_bounds()
    pins = {**{name: bounds[name] for name in TESTED}, "jaxlib": bounds["jax"]}
    others = [line for line in constraints() if line.split("==")[0] not in (*pins, "torch")]
    return [torch, *(f"{name}=={version}" for name, version in pins.items()), *others]


def newest(torch: str) -> list[str]:
    """The same for the newest versions: anything."""
    return [torch]


def build(folder: Path, torch: str, constraints: list[str]) -> Path:
    """Make an environment, unless it is there already; returns its interpreter."""
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = "\n".join([(ROOT / "pyproject.toml").read_text(), *constraints])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        subprocess.run([*install, torch], check=True)
        subprocess.run([*install, "--constraint", file.name, "--editable", f"{ROOT}[all,dev]"], check=True)
    stamp.write_text(wanted)
    return python


def run(name: str, torch: str, constraints: list[str], pytest_args: list[str]) -> Outcome:
    """Run the tests in an environment."""
    print(f"{name}: installing", flush=True)
    try:
        python = build(ROOT / f".venv-{name}", torch, constraints)
    except subprocess.CalledProcessError as error:
        return Outcome(name, {}, False, f"could not be installed: {error}")
    found = subprocess.run([python, "-c", _VERSIONS, *SHOWN], capture_output=True, text=True, check=True)
    print(f"{name}: testing", flush=True)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *pytest_args]
    tests = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert tests.stdout is not None
    last = ""
    for line in tests.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return Outcome(name, json.loads(found.stdout), tests.wait() == 0, last.strip("= "))


def table(outcomes: list[Outcome]) -> str:
    """Versions and outcomes, a row for each environment."""
    rows = [("", *SHOWN, "tests")]
    rows += [(o.name, *(o.versions.get(name, "-") for name in SHOWN), o.summary) for o in outcomes]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main() -> int:
    """Run everything that is asked for; the exit status."""
    options, pytest_args = arguments()
    kinds = {"lowest": lowest, "newest": newest}
    names = [options.only] if options.only else list(kinds)
    outcomes = [run(name, options.torch, kinds[name](options.torch), pytest_args) for name in names]
    print(f"\n{table(outcomes)}")
    bounds = lower_bounds()
    same = [n for o in outcomes if o.name == "newest" for n in TESTED if o.versions.get(n) == bounds[n]]
    if same:
        print(f"The newest version is the lowest one that pyproject.toml declares: {', '.join(same)}.")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
