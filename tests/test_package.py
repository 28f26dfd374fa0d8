"""Imports, lifetime, documentation: what the package does as a package."""

from __future__ import annotations

import ast
import doctest
import gc
import importlib
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
import weakref

import jax
import jax.numpy as jnp
import pytest
import torch

import pytorch2jax
from pytorch2jax import _versions

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pytorch2jax"


def run(program, **env):
    """Run a program in a process of its own, outside of the checkout."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
"""

ONLY_JAX_AND_TORCH = """
import jax.numpy as jnp, torch
import pytorch2jax
assert not {"flax", "equinox", "optax", "transformers"} & set(sys.modules)
apply, params = pytorch2jax.convert_pytnn_to_jax(torch.nn.Linear(2, 2))
apply(params, jnp.ones(2))
try:
    pytorch2jax.convert_pytnn_to_flax
except ImportError as error:
    print(error)
"""


def test_without_flax():
    done = run(HIDE.format(hidden=("flax", "equinox", "optax", "transformers")) + ONLY_JAX_AND_TORCH)
    assert done.returncode == 0, done.stderr
    assert "pip install 'pytorch2jax[flax]'" in done.stdout


@pytest.mark.exhaustive
def test_the_test_without_flax_can_fail():
    done = run(HIDE.format(hidden=()) + ONLY_JAX_AND_TORCH)
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stdout
    hidden = run(HIDE.format(hidden=("torch",)) + ONLY_JAX_AND_TORCH)
    assert hidden.returncode != 0


GLOBALS = """
import os, sys, warnings, threading, logging, torch, jax
import jax.experimental.buffer_callback
def settings():
    return (
        dict(jax.config.values), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist(), torch.backends.mkldnn.enabled,
        torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled(), dict(os.environ),
        list(warnings.filters), logging.root.level, sys.excepthook, threading.active_count(), sys.getrecursionlimit(),
    )
before = settings()
import pytorch2jax
{more}
after = settings()
assert before == after, [(b, a) for b, a in zip(before, after) if a != b]
assert not jax._src.xla_bridge.backends_are_initialized()
"""


def test_importing_changes_no_setting():
    done = run(GLOBALS.format(more=""))
    assert done.returncode == 0, done.stderr
    changed = run(GLOBALS.format(more="torch.set_num_threads(1 + torch.get_num_threads())"))
    assert changed.returncode != 0


# -- versions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "version"), [("torch", "2.9.1+cpu"), ("jax", "0.8.0")])
def test_versions_that_are_too_old_are_refused_in_one_sentence(package, version):
    done = run(f"import {package}\n{package}.__version__ = {version!r}\nimport pytorch2jax")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: pytorch2jax needs {package} "), done.stderr
    assert f"found {package} {version}: install a newer one" in last


def test_versions_between_releases_are_taken():
    done = run("import jax, torch\njax.__version__ = torch.__version__ = '3.0.0.dev1+cpu'\nimport pytorch2jax")
    assert done.returncode == 0, done.stderr


def test_the_lowest_versions_are_those_that_the_project_declares():
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = dict(re.match(r"(\w+)>=([\d.]+)", line).groups() for line in lines)
    for package, lowest in (("torch", _versions.TORCH), ("jax", _versions.JAX)):
        numbers = [int(n) for n in declared[package].split(".")]
        assert [*numbers, 0, 0][: len(lowest)] == list(lowest)


# -- the house ---------------------------------------------------------------------------------------------

ORDER = [
    "_versions",
    "_errors",
    "_internals",
    "_forks",
    "_dtypes",
    "_transfer",
    "_containers",
    "_trees",
    "_nesting",
    "_profiling",
    "_torch_state",
    "_threads",
    "_composite",
    "_plain_kernels",
    "_control_flow",
    "_destination",
    "_autograd_functions",
    "_tracking",
    "_questions",
    "_holders",
    "_inference",
    "_buffers",
    "_hand_written",
    "_program",
    "_rng",
    "_arguments",
    "_sharding",
    "_options",
    "_bound",
    "_ffi",
    "_bridge",
    "_transforms",
    "_tape",
    "_eager",
    "_partition",
    "_primitive",
    "_engines",
    "_function",
    "_params",
    "_weights",
    "_attributes",
    "_stand_in",
    "_skeleton",
    "_module",
    "_jax_program",
    "_jax_call",
    "_reverse",
    "_jax_module",
    "_wrap",
    "compat",
]
ADAPTERS = {name: {"_errors", "_jax_module", "_module", "_options", "_params"} for name in ("flax", "equinox")}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def ours(path):
    return {m.removeprefix("pytorch2jax.") for m in imported(path) if m.startswith("pytorch2jax.")}


def test_every_module_has_its_place():
    assert {p.stem for p in PACKAGE.glob("*.py")} == {*ORDER, "__init__", "__main__"}


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_down_the_list(name):
    assert ours(PACKAGE / f"{name}.py") <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_know_the_modules_and_their_own_framework(adapter):
    for path in (PACKAGE / adapter).glob("*.py"):
        foreign = {m for m in ours(path) if not m.startswith(f"{adapter}.")}
        assert foreign <= ADAPTERS[adapter]


def test_the_engine_that_translates_knows_nobody_who_calls_it():
    above = {"_module", "_options", "_reverse", "_jax_module", "_jax_call", "_jax_program", "compat"}
    for path in (PACKAGE / "xla").rglob("*.py"):
        assert not {m for m in ours(path) if m in above or m.split(".")[0] in ADAPTERS}, path


PRIVATE = re.compile(r"^(jax|torch|flax)(\..*)?\._|^jax\.interpreters|^jax\.extend|^jax\.experimental")


@pytest.mark.parametrize("path", [p for p in PACKAGE.rglob("*.py") if p.name != "_internals.py"], ids=lambda p: p.stem)
def test_private_names_live_in_one_file(path):
    assert not [m for m in imported(path) if PRIVATE.match(m)]


# What runs code that is hidden in data, or made of text, and what opens files that may hold such data.
_RUNNING = {"eval", "exec", "compile", "__import__", "execfile"}
_UNPICKLING = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy"}
_LOADING = {"load", "loads", "Unpickler", "load_state_dict_from_url", "fromfile", "loadtxt", "memmap", "read_pickle"}


def hazards(source):
    """Where a program runs text, imports a module that unpickles, or loads a file."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [alias.name for alias in node.names]
            modules = {name.split(".")[0] for name in ([module] if module else names)}
            found += sorted(modules & _UNPICKLING)
            found += sorted(set(names) & _LOADING) if module else []
        elif isinstance(node, ast.Name) and node.id in _RUNNING:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and node.attr in _LOADING:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            found.append(node.arg)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_nothing_unpickles_or_runs_text(path):
    assert hazards(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import marshal as m",
        "from pickle import loads",
        "torch.load(file)",
        "f = torch.load",
        "from torch import load",
        "np.load(file, allow_pickle=True)",
        "torch.jit.load(file)",
        "eval(text)",
        "exec(text)",
        "run = eval",
        "__import__(name)",
        "torch.hub.load(name)",
    ],
)
def test_what_unpickles_or_runs_text_is_found(source):
    assert hazards(source)


def test_other_names_are_no_hazard():
    assert hazards("import json\nmodel.eval()\nre.compile(text)\nmodel.load_state_dict(weights)") == []


# -- lifetime ----------------------------------------------------------------------------------------------


def test_wrapped_functions_are_freed():
    class Function:
        def __init__(self):
            self.weight = torch.ones(1000)

        def __call__(self, x):
            return torch.sin(x) * self.weight[0]

    def use():
        function = Function()
        f, x = pytorch2jax.torch2jax(function), jnp.ones(3)
        f(x)
        jax.jit(f)(x)
        jax.grad(lambda x: f(x).sum())(x)
        jax.jit(jax.vmap(jax.grad(lambda x: f(x).sum())))(jnp.ones((2, 3)))
        return weakref.ref(function)

    alive = use()
    gc.collect()
    jax.clear_caches()
    gc.collect()
    assert alive() is None


def test_converted_modules_and_their_weights_are_freed():
    model = torch.nn.Linear(3, 3)
    apply, params = pytorch2jax.convert_pytnn_to_jax(model)
    x = jnp.ones(3, jnp.float32)
    apply(params, x)
    jax.jit(apply)(params, x)
    skeleton = weakref.ref(apply.__closure__[0].cell_contents)
    weight, original = weakref.ref(params["weight"]), weakref.ref(model)
    del params, model
    gc.collect()
    assert weight() is None
    assert original() is None
    del apply
    jax.clear_caches()
    gc.collect()
    assert skeleton() is None


# -- documentation -------------------------------------------------------------------------------------------


def public_modules():
    for info in pkgutil.walk_packages(pytorch2jax.__path__, "pytorch2jax."):
        yield importlib.import_module(info.name)


@pytest.mark.parametrize("module", list(public_modules()), ids=lambda m: m.__name__)
def test_doctests(module, x32):
    torch.manual_seed(0)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", [n for n in pytorch2jax.__all__ if n != "Size"])
def test_public_names_are_documented(name):
    value = getattr(pytorch2jax, name)
    assert value.__doc__
    if callable(value) and not isinstance(value, type):
        for heading in ("Args:", "Returns:", "Example:"):
            assert heading in value.__doc__, heading


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_the_documentation_run(block, x32, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("documentation_block")  # a real module, because dataclasses look theirs up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block, "a block of the documentation", "exec"), module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_of_the_documentation_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_version_stands_in_the_changelog():
    assert f"## {pytorch2jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
