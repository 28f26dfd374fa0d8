"""What is known before torch runs: specs, writes, randomness; and where torch has to run for it."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections import OrderedDict, namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from pytorch2jax import (
    InferenceError,
    LeafTypeError,
    NarrowingError,
    OutputMismatchError,
    convert_pytnn_to_jax,
    t2j,
    torch2jax,
)

Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Result:
    value: torch.Tensor
    loss: torch.Tensor | None = None
    name: str = "result"


def real(tensor):
    return not isinstance(tensor, torch._subclasses.FakeTensor)


def test_nothing_runs_for_eval_shape_and_tracing():
    runs = []

    def fn(x):
        runs.append(real(x))
        return (x @ x.T).sum(0)

    f = torch2jax(fn)
    out = jax.eval_shape(f, jax.ShapeDtypeStruct((3, 1000), jnp.float32))
    assert (out.shape, out.dtype) == ((3,), jnp.float32)
    jax.make_jaxpr(jax.grad(lambda x: f(x).sum()))(jnp.ones((3, 4)))
    jax.jit(f).lower(jnp.ones((3, 4))).compile()
    assert runs == [False, False]  # once for each spec, on fake tensors


def test_inferred_once_for_each_spec():
    traces = []

    def fn(x, flag=False):
        if not real(x):
            traces.append((tuple(x.shape), flag))
        return x * 2

    f = torch2jax(fn)
    for _ in range(3):
        f(jnp.ones(2))
        f(jnp.ones(3))
        f(jnp.ones(2), flag=True)
        jax.jit(f)(jnp.ones(2))
        jax.grad(lambda x: f(x).sum())(jnp.ones(2))
    assert traces == [((2,), False), ((3,), False), ((2,), True)]


def test_no_retrace_when_called_again():
    f = torch2jax(torch.sin)
    jitted = jax.jit(lambda x: f(x) + 1)
    x = jnp.ones(3)
    jitted(x)
    jitted(x + 1)
    jitted(x + 2)
    assert jitted._cache_size() == 1
    # Two wrappers of the same function are the same program.
    assert str(jax.make_jaxpr(torch2jax(torch.sin))(x)) == str(jax.make_jaxpr(f)(x))
    eqns = [jax.make_jaxpr(g)(x).eqns[0].params["program"] for g in (f, torch2jax(torch.sin), torch2jax(torch.cos))]
    assert eqns[0] == eqns[1]
    assert hash(eqns[0]) == hash(eqns[1])
    assert eqns[0] != eqns[2]


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: (x, [x * 2, {"k": x.sum()}]), lambda x: (x, [x * 2, {"k": x.sum()}])),
        (lambda x: Pair(x, x + 1), lambda x: Pair(x, x + 1)),
        (lambda x: OrderedDict(b=x, a=x * 2), lambda x: OrderedDict(b=x, a=x * 2)),
        (lambda x: x.shape[0], lambda x: 3),
        (lambda x: (2.5, True, 1j), lambda x: (2.5, True, 1j)),
        (lambda x: x.detach().numpy() * 2, lambda x: x * 2),
        (lambda x: (x, None), lambda x: (x, None)),
        (lambda x: [], lambda x: []),
        (lambda x: x.sum().item() * 2, lambda x: x.sum() * 2),
        (lambda x: torch.nonzero(x)[:, 0], lambda x: jnp.arange(1, 3)),
    ],
)
def test_output_structures(fn, expected):
    x = jnp.arange(3.0)
    for f in (torch2jax(fn), jax.jit(torch2jax(fn)) if "nonzero" not in fn.__code__.co_names else torch2jax(fn)):
        out, wanted = f(x), expected(x)
        assert jax.tree.structure(out) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, out, wanted)


def test_named_results_of_torch_and_dataclasses_pass_through_jit():
    x = jnp.array([[3.0, 1.0], [2.0, 5.0]])
    out = jax.jit(torch2jax(lambda x: x.max(dim=1)))(x)
    assert out.values.tolist() == [3.0, 5.0]
    assert out.indices.tolist() == [0, 1]
    result = jax.jit(torch2jax(lambda x: Result(x * 2)))(x)
    assert isinstance(result, Result)
    assert result.loss is None
    assert result.name == "result"
    np.testing.assert_array_equal(result.value, x * 2)
    gradient = jax.grad(lambda x: torch2jax(lambda x: Result(x * 2, x.sum()))(x).loss)(x)
    np.testing.assert_array_equal(gradient, jnp.ones((2, 2)))


def test_hugging_face_outputs_pass_through_jit():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = BertModel(config).eval()
    apply, params = convert_pytnn_to_jax(model)
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    out = jax.jit(lambda p, i: apply(p, input_ids=i, output_hidden_states=True))(params, jnp.asarray(ids))
    expected = model(torch.from_numpy(ids), output_hidden_states=True)
    assert out.__class__ is type(expected)
    assert out.keys() == expected.keys()
    np.testing.assert_allclose(out.last_hidden_state, expected.last_hidden_state.detach(), rtol=1e-5, atol=1e-6)
    assert len(out.hidden_states) == 3


def test_static_values_in_either_place():
    seen = []

    def fn(x, n, *, mode="a", dtype=None, options=None):
        seen.append((type(n), n, mode, dtype, options))
        return (x * n).to(dtype or x.dtype)

    f = torch2jax(fn)
    x = jnp.ones(2)
    assert f(x, 2).tolist() == [2.0, 2.0]
    assert f(x, 2.0, mode="b").tolist() == [2.0, 2.0]
    assert f(x, True, dtype=torch.int32).dtype == jnp.int32
    assert f(x, -0.0, dtype=jnp.float32).dtype == jnp.float32
    assert np.signbit(f(x, -0.0)).all()
    assert not np.signbit(f(x, 0.0)).any()
    f(x, 1, options={"k": [None, 3]})
    assert (float, 2.0, "b", None, None) in seen
    assert (bool, True, "a", torch.int32, None) in seen
    assert seen[-1] == (int, 1, "a", None, {"k": [None, 3]})


def test_containers_that_the_function_changes_are_its_own():
    def fn(items, table):
        items.append(items.pop(0) * 2)
        table["new"] = table.pop("old")
        return items[-1] + table["new"]

    f = torch2jax(fn)
    items, table = [jnp.ones(2)], {"old": jnp.ones(2)}
    for _ in range(2):
        assert f(items, table).tolist() == [3.0, 3.0]
    assert len(items) == 1
    assert list(table) == ["old"]


@pytest.mark.parametrize("reads", [False, True])
def test_declared_functions_run_on_no_real_values_before_they_are_called(reads):
    runs = []

    def fn(x):
        runs.append(type(x).__name__)
        if reads:
            float(x.sum())
        return x * 2, x.sum()

    shapes = (jax.ShapeDtypeStruct((3,), jnp.float64), torch.zeros((), dtype=torch.float64))
    f = torch2jax(fn, output_shapes=shapes)
    compiled = jax.jit(f).lower(jnp.ones(3)).compile()
    assert runs == ["FakeTensor"]
    doubled, total = compiled(jnp.ones(3))
    assert runs == ["FakeTensor", "Tensor"]
    assert doubled.tolist() == [2.0] * 3
    assert total == 3
    # Where fake tensors do not follow, nothing is known about writes: inputs are copied.
    shapes = jax.ShapeDtypeStruct((3,), jnp.float64)
    g = torch2jax(lambda x: x.add_(1 + (float(x.detach().sum() * 0) if reads else 0)), output_shapes=shapes)
    a = jnp.ones(3)
    np.testing.assert_array_equal(jax.jit(g)(a), a + 1)
    np.testing.assert_array_equal(a, 1.0)
    assert jax.grad(lambda x: g(x).sum())(a).tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("declared", "match"),
    [
        (jax.ShapeDtypeStruct((4,), jnp.float64), r"output: expected (torch.)?float64\[4\].*got (torch.)?float64\[3\]"),
        (jax.ShapeDtypeStruct((3,), jnp.float32), r"output: expected (torch.)?float32\[3\].*got (torch.)?float64\[3\]"),
        ((jax.ShapeDtypeStruct((3,), jnp.float64),) * 2, r"expected .*tuple\(Tensor, Tensor\).* got|got tuple\(Tensor"),
    ],
)
@pytest.mark.parametrize("reads", [False, True])
def test_a_result_that_differs_from_its_declaration(declared, match, reads):
    f = torch2jax(lambda x: x * (2 + (float(x.sum() * 0) if reads else 0)), output_shapes=declared)
    with pytest.raises(OutputMismatchError, match=match):
        f(jnp.ones(3))
    with pytest.raises(jax.errors.JaxRuntimeError if reads else OutputMismatchError, match=match):
        jax.jit(f)(jnp.ones(3))


@pytest.mark.parametrize("reads", [False, True])
def test_a_declaration_is_compared_leaf_by_leaf(reads):
    """In whatever containers, and with the 32 bits that JAX has of 64; the containers that come back are its own."""

    def fn(x):
        return torch.max(x * (1 + (float(x.sum() * 0) if reads else 0)), 0)

    struct = jax.ShapeDtypeStruct
    with jax.enable_x64(False):
        x = jnp.asarray([[1.0, 5.0], [2.0, 3.0]])
        specs = struct((2,), jnp.float32), struct((2,), jnp.int32)
        for declared in (specs, list(specs)):
            f = torch2jax(fn, output_shapes=declared)
            for call in (f, jax.jit(f)):
                out = call(x)
                assert type(out) is type(declared)
                np.testing.assert_array_equal(out[0], [2, 5])
                np.testing.assert_array_equal(out[1], [1, 0])
                assert out[1].dtype == jnp.int32
        shift = lambda x: int(x.sum() * 0) if reads else 0  # noqa: E731
        big = torch2jax(lambda x: x.long() * (2**40 + shift(x)), output_shapes=struct((), jnp.int32))
        with pytest.raises(NarrowingError):
            big(jnp.ones(()))


@pytest.mark.parametrize("reads", [False, True])
def test_keys_of_declared_dicts_come_in_any_order(reads):
    def fn(x):
        return {"y": x * (1 + (float(x.detach().sum() * 0) if reads else 0)), "s": x.sum(), "n": [x[0], x[:2]]}

    struct = jax.ShapeDtypeStruct
    parts = {
        "n": (struct((), jnp.float64), struct((2,), jnp.float64)),
        "s": struct((), jnp.float64),
        "y": struct((3,), jnp.float64),
    }
    for declared in (parts, dict(reversed(parts.items()))):
        f = torch2jax(fn, output_shapes=declared)
        for call in (f, jax.jit(f)):
            out = call(jnp.arange(3.0))
            assert (out["s"], out["y"].tolist(), type(out["n"])) == (3, [0, 1, 2], tuple)
            assert out["n"][1].tolist() == [0, 1]
        assert jax.grad(lambda x: f(x)["y"].sum() + 2 * f(x)["s"])(jnp.arange(3.0)).tolist() == [3] * 3  # noqa: B023


def test_declarations_that_are_none():
    with pytest.raises(LeafTypeError, match="output_shapes.*expected an object with `shape` and `dtype`"):
        torch2jax(lambda x: x, output_shapes="float32")(jnp.ones(3))


def test_a_named_output_in_the_message():
    f = torch2jax(lambda x: {"a": x, "b": [x]}, output_shapes={"a": jnp.ones(3), "b": [jnp.ones(2)]})
    with pytest.raises(OutputMismatchError, match=r"output\['b'\]\[0\]"):
        f(jnp.ones(3))


def test_a_shape_that_depends_on_values_is_caught_at_run_time():
    f = torch2jax(lambda x: x[x > 0])
    assert f(jnp.array([1.0, 2.0])).shape == (2,)
    with pytest.raises(OutputMismatchError, match="depends on values"):
        f(jnp.array([1.0, -2.0]))


def test_real_runs_use_the_values_at_hand():
    seen = []

    def fn(x):
        seen.append(x.tolist() if real(x) else None)
        return x * int(x.sum().item() > 0)

    torch2jax(fn)(jnp.array([5.0]))
    assert seen == [None, [5.0], [5.0]]  # fake, then the argument itself, then the call
    seen.clear()
    f = torch2jax(fn, jnp.array([7.0]))
    assert seen == [None, [7.0]]  # the example
    seen.clear()
    jax.jit(f)(jnp.array([5.0]))
    assert seen == [[5.0]]


def test_real_runs_see_the_weights_as_they_were_converted():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            if self.linear.weight.sum().item() != 4.0:
                raise ValueError("other weights")
            return self.linear(x)

    model = Reads()
    nn.init.ones_(model.linear.weight)
    apply, params = convert_pytnn_to_jax(model)
    jax.jit(apply).lower(params, jnp.ones((1, 2), jnp.float32))


def test_example_arguments():
    f = torch2jax(
        lambda x, y, k=1: x @ y * k, torch.ones(2, 3), jax.ShapeDtypeStruct((3, 4), jnp.float32), example_kw={"k": 2}
    )
    assert f(jnp.ones((5, 3)), jnp.ones((3, 1)), k=3).tolist() == [[9.0]] * 5
    with pytest.raises(InferenceError, match=r"args\.0: float32\[2, 3\]"):
        torch2jax(lambda x, y: x @ y, torch.ones(2, 3), torch.ones(2, 3))


def test_an_error_of_the_function_at_trace_time():
    def fn(x):
        raise KeyError("no such thing")

    with pytest.raises(
        InferenceError, match=r"fn: running it once.*KeyError: 'no such thing'.*(?s:.*)Check the arguments"
    ) as info:
        torch2jax(fn)(jnp.ones(2))
    assert isinstance(info.value.__cause__, KeyError)
    assert isinstance(info.value, RuntimeError)


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0])
def test_outputs_that_are_no_tensors(value):
    with pytest.raises(LeafTypeError, match=r"output\[1\]: expected tensors, numbers, strings or None"):
        torch2jax(lambda x: (x, value))(jnp.ones(2))


def test_sparse_outputs_are_refused():
    with pytest.raises(LeafTypeError, match="output: expected a dense tensor, got layout torch.sparse_coo"):
        torch2jax(lambda x: x.to_sparse())(jnp.ones((2, 2)))


@pytest.mark.parametrize("value", [object(), "text"])
def test_arguments(value):
    f = torch2jax(lambda x, y: x)
    np.testing.assert_array_equal(f(jnp.ones(2), value), jnp.ones(2))
    with pytest.raises(LeafTypeError, match=r"args\.1: expected an array or a hashable Python value, got bytearray"):
        f(jnp.ones(2), bytearray(b"x"))


def test_numpy_arrays_and_tensors_are_arrays_too():
    f = torch2jax(torch.add)
    assert f(np.ones(2), torch.ones(2, dtype=torch.float64)).tolist() == [2.0, 2.0]
    assert f(np.float64(1.0), jnp.ones(2)).tolist() == [2.0, 2.0]


def test_writes_to_batch_statistics_are_seen():

    norm = nn.BatchNorm1d(3)
    _, _, state = convert_pytnn_to_jax(norm, with_state=True)
    assert set(state) == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_autocast_around_the_first_call_keeps_no_fake_tensors(backend):
    linear = torch.nn.Linear(3, 3)
    x = torch.ones(3)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch2jax(lambda x: linear(x), backend=backend)(t2j(x))
        theirs = linear(x).detach()
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs.float(), atol=1e-2)


# -- found in use -----------------------------------------------------------------------------------------------


def test_a_cache_of_the_user_is_not_filled_with_fake_tensors():
    cache = {}

    def f(x):
        if x.shape not in cache:
            cache[x.shape] = (torch.arange(x.shape[0]).to(x.dtype),)
        return x + cache[x.shape][0]

    assert torch2jax(f)(jnp.ones(3)).tolist() == [1.0, 2.0, 3.0]
    assert f(torch.ones(3)).tolist() == [1.0, 2.0, 3.0]


def test_an_lru_cache_is_not_filled_with_fake_tensors():
    @functools.lru_cache
    def positions(n):
        return torch.arange(n)

    f = torch2jax(lambda x: x + positions(x.shape[0]))
    assert f(jnp.ones(3)).tolist() == [1.0, 2.0, 3.0]
    assert positions(3).tolist() == [0, 1, 2]


def test_a_cache_that_cannot_be_emptied_is_an_error():
    class Keeper:
        mask = None

    keeper = Keeper()

    def f(x):
        if keeper.mask is None:
            keeper.mask = torch.arange(3.0)
        return x * keeper.mask

    with pytest.raises(InferenceError, match="keeps tensors from one call to the next"):
        torch2jax(f)(jnp.ones(3))


@pytest.mark.exhaustive
def test_after_torch_has_forbidden_to_set_its_flags():
    """As `torch.testing` does. Every call was then tried on made-up values, and second order failed."""
    program = """
import jax, jax.numpy as jnp, torch
torch.backends.disable_global_flags()
from pytorch2jax import torch2jax
f = torch2jax(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q))
calls = []
g = torch2jax(lambda x: calls.append(type(x).__name__) or torch.linalg.cholesky(x))
assert jax.eval_shape(g, jnp.eye(3)).shape == (3, 3)
assert calls == ["FakeTensor"], calls
assert jax.jacfwd(jax.grad(lambda q: f(q).sum()))(jnp.ones((1, 2, 3))).shape == (1, 2, 3, 1, 2, 3)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
