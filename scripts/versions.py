"""Run `make test`'s tests on the lowest versions that `pyproject.toml` declares, on middle ones, and on the newest.

    make versions                                             # all of them; gigabytes, and an hour
    make versions VERSIONS_ARGS='--only lowest newest'
    make versions VERSIONS_ARGS='tests/test_calls.py -x'      # what it does not know goes to pytest
    make versions VERSIONS_ARGS='--write'                     # and put the table into the documentation

Each environment has a Python of its own and the torch that pip finds for it, which on Linux is a CUDA build of several
gigabytes. The environments (`.venv-lowest` and so on) stay for the next time. What is not under test (pytest,
transformers) has the newest versions that go with the others.

It prints a table of the versions and of what came of the tests, and ends with an error if they failed somewhere.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "versions.md"
TESTED = ("torch", "jax", "flax", "equinox", "optax", "numpy")
SHOWN = ("torch", "jax", "flax", "equinox", "optax", "numpy")

_MIDDLE = {"torch": "2.14.1", "jax": "0.11.2", "flax": "0.12.10", "equinox": "0.13.5", "optax": "0.2.8"}
_VERSIONS = """
import importlib.metadata as metadata, json, sys
print(json.dumps({name: metadata.version(name) for name in sys.argv[1:]}))
"""
_BEGIN, _END = "<!-- versions: written by `make versions VERSIONS_ARGS=--write` -->", "<!-- /versions -->"


class Environment(NamedTuple):
    """What an environment is made of.

    python: the version of Python.
    pins: exact versions; of everything else it has the newest ones that go with them.
    """

    name: str
    python: str
    pins: dict[str, str]


class Outcome(NamedTuple):
    """What came of an environment."""

    environment: Environment
    versions: dict[str, str]
    passed: bool
    summary: str


def lower_bounds() -> dict[str, str]:
    """The lowest version of each package that `pyproject.toml` allows, where it says one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return dict(match.groups() for line in lines if (match := re.match(r"([\w-]+)>=([\w.]+)", line)))


def environments() -> list[Environment]:
    """The environments, from old to new."""
    bounds = lower_bounds()
    lowest = {name: bounds[name] for name in TESTED} | {"jaxlib": bounds["jax"]}
    return [
        Environment("lowest", "3.11", lowest),
        Environment("middle", "3.12", _MIDDLE | {"jaxlib": _MIDDLE["jax"]}),
        Environment("newest", "3.13", {}),
    ]


def interpreter(version: str) -> str | None:
    """The path of a Python of this version: on the search path, or one of pyenv's."""
    found = shutil.which(f"python{version}")
    works = found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0
    if works:  # pyenv puts commands there for versions that it does not choose
        return found
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    paths = sorted(root.glob(f"versions/{version}.*/bin/python"))
    return str(paths[-1]) if paths else None


def requirement(environment: Environment, package: str) -> str:
    """What pip is asked for: a package, by its version where that is pinned."""
    version = environment.pins.get(package)
    return package if version is None else f"{package}=={version}"


def build(environment: Environment, folder: Path) -> Path:
    """Make an environment, unless it is there already; returns its interpreter."""
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = json.dumps([environment, (ROOT / "pyproject.toml").read_text()])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    base = interpreter(environment.python)
    if base is None:
        raise FileNotFoundError(f"there is no Python {environment.python}")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet"]
    # Torch first: other packages, which ask for any torch, then take this one.
    subprocess.run([*install, requirement(environment, "torch")], check=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirement(environment, package) for package in environment.pins))
        file.flush()
        subprocess.run([*install, "--constraint", file.name, "--editable", f"{ROOT}[all,dev]"], check=True)
    stamp.write_text(wanted)
    return python


def run(environment: Environment, pytest_args: list[str]) -> Outcome:
    """Run the tests in an environment."""
    print(f"{environment.name}: installing", flush=True)
    try:
        python = build(environment, ROOT / f".venv-{environment.name}")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        return Outcome(environment, {}, False, f"could not be installed: {error}")
    found = subprocess.run([python, "-c", _VERSIONS, *SHOWN], capture_output=True, text=True, check=True)
    print(f"{environment.name}: testing", flush=True)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not exhaustive", *pytest_args]
    tests = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert tests.stdout is not None
    last = ""
    for line in tests.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return Outcome(environment, json.loads(found.stdout), tests.wait() == 0, re.sub(r" in [\d.]+s.*", "", last))


def table(outcomes: list[Outcome], date: datetime.date) -> str:
    """Versions and outcomes in Markdown, a row for each environment."""
    rows = [("", "Python", *SHOWN, "`make test`", "on"), ("---",) * (len(SHOWN) + 4)]
    for outcome in outcomes:
        versions = (outcome.versions.get(name, "-").split("+")[0] for name in SHOWN)
        environment = outcome.environment
        rows.append((environment.name, environment.python, *versions, outcome.summary.strip("= "), str(date)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write(text: str, new: str) -> str:
    """The text of the page with another table."""
    before, found, rest = text.partition(_BEGIN)
    _, also_found, after = rest.partition(_END)
    if not (found and also_found):
        raise ValueError(f"expected {_BEGIN!r} and {_END!r} in docs/versions.md")
    return f"{before}{_BEGIN}\n{new}\n{_END}{after}"


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is meant for pytest."""
    parser = argparse.ArgumentParser(prog="python scripts/versions.py", description=(__doc__ or "").splitlines()[0])
    names = [environment.name for environment in environments()]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="only these environments")
    parser.add_argument("--write", action="store_true", help="put the table into the documentation")
    return parser.parse_known_args()


def main() -> int:
    """Run everything that is asked for; the exit status."""
    options, pytest_args = arguments()
    outcomes = [run(environment, pytest_args) for environment in environments() if environment.name in options.only]
    found = table(outcomes, datetime.date.today())
    print(f"\n{found}")
    if options.write:
        PAGE.write_text(write(PAGE.read_text(), found))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
