"""Tensors to arrays and back: values, dtypes, memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import pytorch2jax
from pytorch2jax import (
    DeviceError,
    DtypeError,
    LeafTypeError,
    NarrowingError,
    convert_to_jax,
    convert_to_pyt,
    dtype_j2t,
    dtype_t2j,
    j2t,
    t2j,
    torch2jax,
    tree_j2t,
    tree_t2j,
)

NAMES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
]
SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (2, 3, 4)]


def make(name, shape):
    values = torch.arange(max(1, int(np.prod(shape)))).remainder(4)[: int(np.prod(shape))].reshape(shape)
    return values.float().to(getattr(torch, name)) if "float8" in name else values.to(getattr(torch, name))


def bits(tensor):
    return tensor.reshape(-1).contiguous().view(torch.uint8) if tensor.numel() else tensor.numel()


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_map_both_ways(name):
    assert dtype_t2j(getattr(torch, name)) == jnp.dtype(name)
    assert dtype_j2t(jnp.dtype(name)) == getattr(torch, name)
    assert dtype_j2t(name) == getattr(torch, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_keeps_every_bit(name, shape):
    tensor = make(name, shape)
    array = t2j(tensor)
    assert array.dtype == jnp.dtype(name)
    assert array.shape == shape
    back = j2t(array)
    assert back.dtype == tensor.dtype
    assert torch.equal(torch.as_tensor(bits(back)), torch.as_tensor(bits(tensor)))


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_passes_through_a_jitted_call(name):
    array = t2j(make(name, (2, 3)))
    out = jax.jit(torch2jax(lambda x: x.view(-1)))(array)
    assert out.dtype == array.dtype
    np.testing.assert_array_equal(np.asarray(out), np.asarray(array).reshape(-1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)], ids=str)
def test_memory_is_shared_both_ways(name, shape):
    tensor = make(name, shape).clone()
    array = t2j(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    ours = jnp.array(array, copy=True)
    assert j2t(ours).data_ptr() == ours.unsafe_buffer_pointer()


def test_copies_are_copies():
    tensor = torch.arange(1000.0)
    array = t2j(tensor, copy=True)
    tensor.zero_()
    assert array.sum() == 499500
    written = j2t(array, copy=True).zero_()
    assert written.sum() == 0
    assert array.sum() == 499500


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[:, ::2],
        lambda t: t[1:, 1:],
        lambda t: t.flip(0),
        lambda t: t[0].expand(5, 6),
        lambda t: t.view(-1)[1:],  # not aligned to 64 bytes
        lambda t: t.requires_grad_(),
        lambda t: t.requires_grad_() * 2,
        lambda t: torch.nn.Parameter(t),
        lambda t: torch.complex(t, t).conj(),
        lambda t: torch.complex(t, t).conj().imag,  # a negative view
        lambda t: t.to(torch.float64)[::3].mT,
    ],
)
def test_awkward_tensors(view):
    tensor = view(torch.arange(24.0).reshape(4, 6))
    expected = tensor.detach().resolve_conj().resolve_neg().numpy().copy()
    np.testing.assert_array_equal(t2j(tensor), expected)
    np.testing.assert_array_equal(t2j(tensor, copy=True), expected)


def test_an_array_that_is_still_being_computed():
    x = jnp.ones((600, 600))
    y = jax.jit(lambda x: jnp.linalg.matrix_power(x / 600, 30))(x)
    assert torch.allclose(j2t(y), torch.full((600, 600), 1 / 600, dtype=torch.float64))


def test_narrowing_without_x64(x32):
    assert t2j(torch.tensor([1, -(2**31)])).dtype == jnp.int32
    assert t2j(torch.tensor([0.1], dtype=torch.float64)).dtype == jnp.float32
    assert t2j(torch.tensor([1j], dtype=torch.complex128)).dtype == jnp.complex64
    for tensor in (torch.tensor([2**31]), torch.tensor([2**32 + 5]), torch.tensor([2**33], dtype=torch.uint64)):
        with pytest.raises(NarrowingError, match=r"fit into 32 bits.*jax_enable_x64"):
            t2j(tensor)
    with pytest.raises(OverflowError):
        t2j(torch.tensor([2**40]))
    f = torch2jax(lambda x: x * 2)
    with pytest.raises(NarrowingError, match=r"args\.0.*int64"):
        f(np.array([2**40]))
    assert f(np.array([2**20])).dtype == jnp.int32


def test_an_integer_output_that_does_not_fit_is_an_error(x32):
    f = torch2jax(lambda x: x.long() * 2**20)
    assert f(jnp.array([3])).tolist() == [3 * 2**20]
    with pytest.raises(NarrowingError, match="output 0: expected values that fit"):
        f(jnp.array([2**20]))


def test_int32_reaches_torch_as_its_index_type(x32):
    seen = []

    def one_hot(i):
        seen.append(i.dtype)
        return torch.nn.functional.one_hot(i.long(), 4)

    i = jnp.array([0, 3])
    assert torch2jax(one_hot)(i).dtype == jnp.int32
    assert set(seen) == {torch.int64}
    seen.clear()
    torch2jax(one_hot, widen_ints=False)(i)
    assert set(seen) == {torch.int32}


def test_with_x64_int32_stays():
    assert torch2jax(lambda x: x)(jnp.array([1], dtype=jnp.int32)).dtype == jnp.int32


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ([1.0], "expected a torch.Tensor, got list"),
        (torch.ones(3).to_sparse(), "expected a dense tensor"),
        (torch.empty(3, device="meta"), "meta device"),
    ],
)
def test_what_t2j_refuses(bad, match):
    with pytest.raises(LeafTypeError, match=match):
        t2j(bad)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_dtypes_of_one_framework_only():
    with pytest.raises(DtypeError, match=r"complex32.*Shared dtypes"):
        t2j(torch.zeros(2, dtype=torch.complex32))
    with pytest.raises(DtypeError, match="int4"):
        j2t(jnp.zeros(2, dtype=jnp.int4))
    with pytest.raises(DtypeError, match="expected a torch dtype"):
        dtype_t2j("float32")
    with pytest.raises(TypeError):
        dtype_j2t("no dtype")


def test_what_j2t_refuses():
    with pytest.raises(LeafTypeError, match=r"got a tracer.*torch2jax"):
        jax.jit(lambda x: j2t(x))(jnp.ones(2))
    with pytest.raises(LeafTypeError, match="expected a JAX array, got str"):
        j2t("text")
    assert j2t([1.0, 2.0]).tolist() == [1.0, 2.0]


def test_the_device_error():
    class Spread:
        device_set = (0, 1)

    class Array:
        sharding = Spread()
        is_fully_replicated = False

    from pytorch2jax._transfer import on_one_device

    with pytest.raises(DeviceError, match=r"f: args.0: expected an array on one device, .* spread over 2.*device_put"):
        on_one_device("f", "args.0", Array())


def test_names_of_the_older_packages():
    tensor, array = torch.arange(3.0), jnp.arange(3.0)
    assert isinstance(convert_to_jax(tensor), jax.Array)
    assert isinstance(convert_to_pyt(array), torch.Tensor)
    assert convert_to_jax("x") == convert_to_pyt("x") == "x"
    tree = tree_t2j({"a": [tensor, None], "b": (1, tensor)})
    assert isinstance(tree["a"][0], jax.Array)
    assert tree["b"][0] == 1
    back = tree_j2t(tree)
    assert isinstance(back["b"][1], torch.Tensor)
    assert back["a"][1] is None
    assert pytorch2jax.Size is torch.Size


# -- found in use -----------------------------------------------------------------------------------------------


def test_zeros_without_memory_become_an_array():
    x, c = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    gradient = torch.autograd.grad(x.abs(), x, c, create_graph=True)[0]
    zeros = torch.autograd.grad(gradient.sum(), x)[0]
    assert zeros.data_ptr() == 0
    array = t2j(zeros)
    assert array.unsafe_buffer_pointer() != 0
    assert array.tolist() == [0.0, 0.0, 0.0]
