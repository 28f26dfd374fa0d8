"""The table of `test_transforms` and `test_orders` for the engine that translates: its rules are JAX's own."""

from __future__ import annotations

import jax
import pytest
import test_orders
import test_transforms
from cases import CASES, arrays, scalar

import pytorch2jax
from pytorch2jax import CaptureError

REFUSED = ("memory address", "reads a value")
ABOUT_TORCH = ("test_a_loop_is_said_once",)
SLOW = ("encoder", "lstm")  # to compile in second and third order


def converted(case):
    fn, _, inputs = case.build()
    return fn, pytorch2jax.torch2jax(fn, backend="xla"), inputs


@pytest.fixture(params=[c for c in CASES if c.name not in REFUSED], ids=str)
def case(request):
    fn, jax_fn, inputs = converted(request.param)
    return request.param, fn, jax_fn, inputs, arrays(inputs)


@pytest.fixture(params=[c for c in test_orders._SMOOTH if c.name not in REFUSED + SLOW], ids=str)
def problem(request):
    _, jax_fn, inputs = converted(request.param)
    return test_orders.problem_of(jax_fn, inputs)


def _takes(test, fixture):
    code = test.__code__
    return fixture in code.co_varnames[: code.co_argcount]


for _module, _fixture in ((test_transforms, "case"), (test_orders, "problem")):
    for _name, _test in vars(_module).items():
        if _name.startswith("test_") and _name not in ABOUT_TORCH and _takes(_test, _fixture):
            globals()[_name] = _test


@pytest.mark.parametrize("case", [c for c in CASES if c.name in REFUSED], ids=str)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_what_depends_on_values_is_refused(case):
    _, jax_fn, inputs = converted(case)
    with pytest.raises(CaptureError, match=r"cases.py:\d+ .*backend=\"torch\""):
        jax.jit(scalar(jax_fn))(*arrays(inputs))
