"""The wheel: what is in it, and that it works where there is no source tree."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import pytorch2jax

ROOT = pathlib.Path(__file__).resolve().parent.parent

PROGRAM = """
import pathlib, sys
import equinox, flax.linen, jax, jax.numpy as jnp, torch
from flax import nnx
import pytorch2jax
from pytorch2jax import (
    convert_pytnn_to_equinox, convert_pytnn_to_flax, convert_pytnn_to_jax, convert_pytnn_to_nnx, params_to_state_dict
)

assert pathlib.Path(pytorch2jax.__file__).is_relative_to(sys.prefix), pytorch2jax.__file__
model, x = torch.nn.Linear(3, 2), jnp.arange(6.0).reshape(2, 3)
apply, params = convert_pytnn_to_jax(model)
expected = apply(params, x)
grads = jax.jit(jax.grad(lambda p: apply(p, x).sum()))(params)
assert jnp.allclose(grads["weight"], x.sum(0)), grads
Linear, variables = convert_pytnn_to_flax(model)
others = [
    Linear().apply(Linear().init(jax.random.key(0), x), x),
    convert_pytnn_to_nnx(model)(x),
    convert_pytnn_to_equinox(model)(x),
]
assert all(jnp.allclose(other, expected) for other in others)
assert set(params_to_state_dict(model, params)) == {"weight", "bias"}
print(pytorch2jax.__version__)
"""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def builder(folder):
    """An interpreter that has the build backend: this one, or one in an environment of its own."""
    if importlib.util.find_spec("setuptools") and int(importlib.metadata.version("setuptools").split(".")[0]) >= 77:
        return sys.executable
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "setuptools>=77"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"setuptools cannot be had: {done.stderr[-300:]}")
    return python


pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    python = builder(folder / "builder")
    return build(python, folder, os.environ)


def build(python, folder, environment):
    """A wheel of a copy of what is needed for it, since setuptools writes next to the sources."""
    source = folder / "source"
    for name in ("pytorch2jax", "native"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source]
    run(*command, env=environment)
    shutil.rmtree(source)
    (found,) = folder.glob("*.whl")
    return found


def extensions_in(wheel):
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("pytorch2jax/_native.c")]


def test_without_a_compiler_there_is_no_extension_in_the_wheel(tmp_path):
    wheel = build(builder(tmp_path / "builder"), tmp_path, {**os.environ, "CC": "false", "CXX": "false"})
    assert not extensions_in(wheel)


def test_what_is_in_the_wheel(wheel):
    assert wheel.name.startswith(f"pytorch2jax-{pytorch2jax.__version__}-cp3")
    names = set(zipfile.ZipFile(wheel).namelist()) - set(extensions_in(wheel))
    assert len(extensions_in(wheel)) == bool(shutil.which("g++"))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pytorch2jax").rglob("*.py")}
    metadata = f"pytorch2jax-{pytorch2jax.__version__}.dist-info"
    assert {"pytorch2jax/flax/_linen.py", "pytorch2jax/equinox/__init__.py"} <= modules
    assert names == {
        *modules,
        "pytorch2jax/_native.pyi",
        "pytorch2jax/py.typed",
        *(f"{metadata}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt")),
    }


def test_the_wheel_works_without_the_source_tree(wheel, tmp_path):
    """In an empty environment, which finds the wheel's dependencies, and nothing else, in this one's folder."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (packages,) = (tmp_path / "env").glob("lib/*/site-packages")
    # A folder that a .pth file names is searched. Such files in it, as of an editable install, do nothing.
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    out = run(python, "-I", "-W", "ignore", tmp_path / "program.py", cwd=tmp_path / "elsewhere")
    assert out.split()[-1] == pytorch2jax.__version__
