"""Fixtures: 64-bit JAX by default, because torch is the oracle in float64; `x32` turns it off for a test.

The tests run on JAX's default device. `PYTORCH2JAX_TEST_DEVICE=cuda` (or `cpu`) chooses one: no device, no tests.
"""

from __future__ import annotations

import ctypes
import gc
import os

import jax
import pytest
import torch

from pytorch2jax import use_tape
from pytorch2jax._tape import TAPE

_PLATFORMS = {"cpu": "cpu", "cuda": "cuda,cpu"}
_DEVICE = os.environ.get("PYTORCH2JAX_TEST_DEVICE")

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""Gives memory that is free back to the system, where the C library can."""

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)
if _DEVICE is not None:
    jax.config.update("jax_platforms", _PLATFORMS[_DEVICE])
    if _DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("PYTORCH2JAX_TEST_DEVICE=cuda: torch finds no CUDA device")


def pytest_report_header():
    return f"on {_DEVICE or 'the default device'} (PYTORCH2JAX_TEST_DEVICE)"


@pytest.fixture
def x32():
    """JAX as it comes, without 64-bit dtypes."""
    with jax.enable_x64(False):
        yield


@pytest.fixture(params=["tape", pytest.param("recomputed", marks=pytest.mark.exhaustive)])
def tape(request):
    """With the tape and without it, for tests of gradients of first order."""
    with use_tape(request.param == "tape"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _caches_of_one_file():
    """What a file has compiled is not kept for the others: memory stays where it is."""
    yield
    jax.clear_caches()
    gc.collect()
    if _trim is not None:
        _trim(0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _empty_tape():
    """Graphs whose backward pass another test never asked for are not this test's."""
    TAPE.clear()


@pytest.fixture(autouse=True)
def _torch_state_is_left_alone():
    """No call of the library may leave torch's flags changed."""

    def flags() -> tuple[object, ...]:
        return (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled,
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch._C._functorch._is_vmap_fallback_enabled(),
        )

    before = flags()
    yield
    assert flags() == before
