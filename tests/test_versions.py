"""What `make versions` asks pip for; it is too much to run here."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).resolve().parent.parent / "scripts" / "versions.py"


@pytest.fixture(scope="module")
def versions():
    spec = importlib.util.spec_from_file_location("versions", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lowest_versions_are_those_of_the_project(versions):
    bounds = versions.lower_bounds()
    assert {*versions.TESTED, "torch"} <= set(bounds)
    pins = [line.split("==") for line in versions.lowest("torch==1.2.3")]
    assert len({name for name, _ in pins}) == len(pins)
    assert dict(pins).items() >= {name: bounds[name] for name in versions.TESTED}.items()
    assert dict(pins)["jaxlib"] == bounds["jax"]
    assert dict(pins)["torch"] == "1.2.3"
    assert "pytest" in dict(pins)


def test_torch_is_asked_for_by_an_exact_version_first(versions):
    for wanted in (versions.lowest, versions.newest):
        assert wanted(versions.pinned("torch"))[0].startswith("torch==")


def test_the_table(versions):
    old, new = dict.fromkeys(versions.SHOWN, "1.0"), dict.fromkeys(versions.SHOWN, "2.10")
    outcomes = [versions.Outcome("lowest", old, True, "3 passed"), versions.Outcome("newest", new, False, "1 failed")]
    header, *rows = versions.table([*outcomes, versions.Outcome("none", {}, False, "not installed")]).splitlines()
    assert header.split() == [*versions.SHOWN, "tests"]
    assert rows[0].split() == ["lowest", *["1.0"] * len(versions.SHOWN), "3", "passed"]
    assert rows[2].split()[:2] == ["none", "-"]
