"""What `make versions` asks pip for and prints; it is too much to run here."""

from __future__ import annotations

import datetime
import importlib.util
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def versions():
    spec = importlib.util.spec_from_file_location("versions", ROOT / "scripts" / "versions.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["versions"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["versions"]


def test_the_lowest_versions_are_those_of_the_project(versions):
    bounds = versions.lower_bounds()
    lowest = versions.environments()[0]
    assert lowest.pins == {name: bounds[name] for name in versions.TESTED} | {"jaxlib": bounds["jax"]}
    assert versions.requirement(lowest, "torch") == f"torch=={bounds['torch']}"
    assert versions.requirement(lowest, "pytest") == "pytest"


def test_the_middle_is_between_the_lowest_and_the_newest(versions):
    lowest, middle, newest = versions.environments()
    assert [e.name for e in (lowest, middle, newest)] == ["lowest", "middle", "newest"]
    assert not newest.pins
    for name in ("torch", "jax", "flax", "equinox", "optax"):
        assert _numbers(lowest.pins[name]) < _numbers(middle.pins[name])


def _numbers(version):
    return tuple(map(int, version.split(".")))


def test_the_interpreter(versions):
    here = ".".join(map(str, sys.version_info[:2]))
    assert versions.interpreter(here)
    assert versions.interpreter("3.99") is None


def test_the_table(versions):
    lowest, _, newest = versions.environments()
    found = dict.fromkeys(versions.SHOWN, "1.0") | {"torch": "2.10+cu1"}
    outcomes = [versions.Outcome(lowest, found, True, "3 passed"), versions.Outcome(newest, {}, False, "1 failed")]
    table = versions.table(outcomes, datetime.date(2026, 1, 2))
    header, rule, first, second = ([c.strip() for c in line.strip("| ").split("|")] for line in table.splitlines())
    assert header[:2] == ["Python", "torch"]  # the first cell is empty
    assert len(rule) == len(first) == len(second) == len(versions.SHOWN) + 4
    assert first[:3] == ["lowest", "3.11", "2.10"]
    assert first[-2:] == ["3 passed", "2026-01-02"]
    assert second[2] == "-"


def test_the_table_goes_into_the_readme(versions):
    text = (ROOT / "docs" / "versions.md").read_text()
    new = versions.write(text, "| new |")
    assert "| new |" in new
    assert versions.write(new, "| again |") == versions.write(text, "| again |")
    with pytest.raises(ValueError, match="docs/versions.md"):
        versions.write("nothing", "| new |")
