"""What converted things say of themselves, and what is said where new users stumble."""

from __future__ import annotations

import copy
import gzip
import inspect
import os
import pathlib
import pickle
import re
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

import pytorch2jax
from pytorch2jax import (
    ConversionError,
    InferenceError,
    OptionError,
    StateError,
    StructureError,
    compile_and_import_module,
    convert_pytnn_to_equinox,
    convert_pytnn_to_flax,
    convert_pytnn_to_jax,
    convert_pytnn_to_nnx,
    dtype_j2t,
    dtype_t2j,
    label_params,
    torch2jax,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Scorer(nn.Module):
    """Gives scores."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1000, 120)

    def forward(self, x, *, temperature=1.0, **extra):
        return self.fc(x) / temperature


def test_representations():
    text = "TorchModule(Scorer, 120k parameters, backend='torch')"
    module = convert_pytnn_to_nnx(Scorer())
    assert repr(module) == text
    assert str(convert_pytnn_to_equinox(Scorer())) == text
    assert repr(convert_pytnn_to_flax(Scorer())[0]()) == text

    class Inside(nnx.Module):
        def __init__(self):
            self.encoder = module

    assert f"encoder={text}" in repr(Inside())
    assert f"encoder={text}" in eqx.tree_pformat({"encoder": convert_pytnn_to_equinox(Scorer())}).replace(
        ": ", "="
    ).replace("'encoder'", "encoder")
    assert "xla" in repr(convert_pytnn_to_nnx(Scorer(), backend="xla"))


def test_names_signatures_and_docstrings():
    apply, params = convert_pytnn_to_jax(Scorer())
    assert apply.__name__ == "Scorer"
    assert str(inspect.signature(apply)) == "(params, x, *, temperature=1.0, rng=None, train=False, **extra)"
    assert "Gives scores." in apply.__doc__
    assert "Gives scores." in convert_pytnn_to_flax(Scorer())[0].__doc__
    assert "torch_call[Scorer]" in str(jax.make_jaxpr(apply)(params, jnp.ones(1000)))
    assert "jit_Scorer" in jax.jit(apply).lower(params, jnp.ones(1000)).as_text()

    def halve(x):
        """Half of it."""
        return x / 2

    converted = torch2jax(halve)
    for convert in (convert_pytnn_to_nnx, convert_pytnn_to_equinox):
        module = convert(Scorer())
        assert "Gives scores." in module.__doc__
        assert "convert_pytnn_to" in type(module).__doc__
    signature = inspect.signature(convert_pytnn_to_nnx(Scorer()))
    assert str(signature).startswith("(x, *, temperature=1.0, ")
    assert inspect.signature(type(convert_pytnn_to_nnx(Scorer())))
    assert repr(converted) == f"TorchFunction({halve.__qualname__}, backend='torch')"
    assert repr(torch2jax(nn.Linear(1, 1), backend="xla")) == "TorchFunction(Linear, backend='xla')"
    assert copy.deepcopy(converted) is converted
    assert (converted.__name__, converted.__doc__) == ("halve", "Half of it.")
    assert str(inspect.signature(converted)) == "(x)"


@torch2jax
def pickled_by_name(x):
    return x + 1


class Holder:
    @torch2jax
    def shifted(self, x):
        return x + 2


def test_what_torch2jax_returns_is_like_a_function():
    assert pickle.loads(pickle.dumps(pickled_by_name)) is pickled_by_name
    assert Holder().shifted(jnp.ones(2)).tolist() == [3.0, 3.0]
    assert jax.jit(pickled_by_name)(jnp.ones(2)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_a_call_is_named_in_the_compiled_program_of_another_function(backend):
    apply, params = convert_pytnn_to_jax(Scorer(), backend=backend)
    loss = jax.jit(jax.grad(lambda p, x: apply(p, x).sum()))
    text = loss.lower(params, jnp.ones(1000, jnp.float32)).compile().as_text()
    names = re.findall(r'op_name="([^"]*)"', text)
    assert any("jvp(Scorer)" in name or "jvp(jit(Scorer))" in name for name in names), names


def test_a_call_in_torchs_profiler_has_torchs_operators_inside():
    apply, params = convert_pytnn_to_jax(Scorer())
    step = jax.jit(apply)
    jax.block_until_ready(step(params, jnp.ones(1000, jnp.float32)))
    with torch.profiler.profile() as profile:
        jax.block_until_ready(step(params, jnp.ones(1000, jnp.float32)))
    block = next(event for event in profile.events() if event.name == "torch_call[Scorer]")
    assert any(child.name.startswith("aten::") for child in block.cpu_children)


@pytest.mark.exhaustive  # starting JAX's profiler takes a while
def test_a_call_in_jaxs_profiler(tmp_path):
    apply, params = convert_pytnn_to_jax(Scorer())
    step = jax.jit(apply)
    jax.block_until_ready(step(params, jnp.ones(1000, jnp.float32)))
    with jax.profiler.trace(tmp_path, create_perfetto_trace=True):
        jax.block_until_ready(step(params, jnp.ones(1000, jnp.float32)))
    (trace,) = tmp_path.rglob("perfetto_trace.json.gz")
    assert "torch_call[Scorer]" in gzip.decompress(trace.read_bytes()).decode()


def test_tabulate_has_a_row_for_each_submodule():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.linear(x))

    encoder, _ = convert_pytnn_to_flax(nn.Sequential(Block(), nn.ReLU(), nn.Linear(3, 2)))

    class Outer(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(2)(encoder(name="encoder")(x))

    def rows(**options):
        wide = {"width": 200, "force_terminal": False}
        table = Outer().tabulate(jax.random.key(0), jnp.ones((2, 3)), console_kwargs=wide, **options)
        cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in table.splitlines() if line[:1] == "│"]
        assert "Total Parameters: 39 (160 B)" in table
        return [tuple(row) for row in cells if all(row)]

    submodules = [("0", "Block"), ("0/linear", "Linear"), ("0/norm", "BatchNorm1d"), ("1", "ReLU"), ("2", "Linear")]
    inside = [(f"encoder/{path}", name) for path, name in submodules]
    assert rows() == [("encoder", "Sequential"), *inside, ("Dense_0", "Dense")]
    assert rows(compute_flops=True) == rows()
    assert rows(depth=1) == [("encoder", "Sequential"), ("Dense_0", "Dense")]


def test_names_that_collide_in_a_signature():
    class Odd(nn.Module):
        def forward(self, params, /, x):
            return x

    assert str(inspect.signature(convert_pytnn_to_jax(Odd())[0])) == "(params, *args, rng=None, train=False, **kwargs)"


def test_dir_lists_the_interface_alone():
    assert set(dir(pytorch2jax)) == {*pytorch2jax.__all__, "__version__"}


PROGRAM = """
import jax
import torch
import pytorch2jax as p

apply, params = p.convert_pytnn_to_jax(torch.nn.Linear(2, 3))
p.convert_pytnn_to_jax(torch.nn.Linear(2, 3).forward, backend="xla")
state_dict: dict[str, torch.Tensor] = p.params_to_state_dict(torch.nn.Linear(2, 3), params)
array: jax.Array = p.t2j(torch.ones(2))
apply_, params_, state = p.convert_pytnn_to_jax(torch.nn.BatchNorm1d(3), with_state=True)
out, new_state = apply_(params_, state, 1)
new_state["running_mean"]
apply_, params_ = p.convert_pytnn_to_jax(torch.nn.BatchNorm1d(3), with_state=True)  # wrong
module, state = p.convert_pytnn_to_equinox(torch.nn.BatchNorm1d(3))  # wrong
p.params_from_state_dict(torch.nn.Linear(2, 3), {})["weight"]
p.torch2jax(torch.sin, backend="jaxx")
p.convert_pytnn_to_nnx(torch.nn.Linear(2, 3), backend="jaxx")
p.load_params(3, params)
"""


@pytest.mark.exhaustive  # mypy reads torch and JAX for it
def test_types_of_a_users_program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "program.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    found = [line.split(":")[1] for line in run.stdout.splitlines() if "error" in line and line.startswith("program")]
    wrong = [
        str(i) for i, line in enumerate(PROGRAM.splitlines(), 1) if any(w in line for w in ("jaxx", "(3,", "wrong"))
    ]
    assert found == wrong, run.stdout


# -- stumbles --------------------------------------------------------------------------------------------------------


def test_a_class_for_a_module():
    with pytest.raises(ConversionError, match=r"got the class `Scorer`: pass an instance, `Scorer\(...\)`"):
        convert_pytnn_to_jax(Scorer)


def test_a_traced_mode():
    apply, params = convert_pytnn_to_jax(Scorer())
    with pytest.raises(OptionError, match=r"`train` has to be a Python bool.*static_argnames=\"train\""):
        jax.jit(lambda p, x, train: apply(p, x, train=train))(params, jnp.ones(1000), True)


def test_parameters_in_the_place_of_variables():
    module, params = convert_pytnn_to_flax(Scorer())
    with pytest.raises(Exception, match=r'no collection "params"|`apply\(\{"params": params\}'):
        module().apply(params, jnp.ones(1000))


def test_arguments_come_before_parameters():
    apply, params = convert_pytnn_to_jax(Scorer().float())
    with pytest.raises(
        InferenceError, match=r"Inputs: args.0: float\d\d\[2, 7\]; and 2 parameters and buffers"
    ) as info:
        apply(params, jnp.ones((2, 7)))
    assert len(str(info.value)) < 800
    with pytest.raises(InferenceError, match=r"Inputs: args.0: float64\[1\], .* and 8 more"):
        torch2jax(lambda *args: args[0] @ args[0][0])(*[jnp.ones(1)] * 20)


def test_models_on_the_meta_device():
    with torch.device("meta"):
        model = Scorer()
    with pytest.raises(
        ConversionError, match=r"fc.weight: is on torch's meta device and has no values: load the weights"
    ):
        convert_pytnn_to_jax(model)


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_state_that_nobody_asked_for(backend):
    """The keyword is the adapter's own, and nobody is told to do what was done."""
    model, x = nn.BatchNorm1d(3).double(), jnp.ones((4, 3))
    apply, params = convert_pytnn_to_jax(model, backend=backend)
    with pytest.raises(StateError, match=r"`with_state=True` to get them back, or call with `train=False`\."):
        apply(params, x, train=True)
    apply, params = convert_pytnn_to_jax(model, backend=backend, prefix="jax_")
    with pytest.raises(StateError, match=r"or call with `jax_train=False`\."):
        apply(params, x, jax_train=True)
    with pytest.raises(StateError, match=r"or call with `inference=True`\."):
        convert_pytnn_to_equinox(model, backend=backend)(x, inference=False)

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.n += 1
            return x

    apply, params = convert_pytnn_to_jax(Counts(), backend=backend)
    with pytest.raises(StateError, match=r"with_state=True` to get them back\."):
        apply(params, x)


def test_patterns_that_are_none():
    params = {"encoder": {"norm": {"bias": 0.0}}}
    for pattern in ("encoder/norm", r"encoder\..*", "^encoder"):
        with pytest.raises(
            StructureError, match=r"A pattern is a dotted path.*`encoder`, `encoder.norm.bias`, `\*bias`"
        ):
            label_params(params, {pattern: "a"}, "b")


def test_pickling_linen_modules():
    with pytest.raises(ConversionError, match="pickle: Scorer: expected something that can be pickled"):
        pickle.dumps(convert_pytnn_to_flax(Scorer())[0]())
    with pytest.raises(ConversionError, match="pickle: Scorer: expected something that can be pickled"):
        pickle.dumps(convert_pytnn_to_flax(Scorer())[0])


def test_functions_that_want_int32(monkeypatch):
    with jax.enable_x64(False):
        args = jnp.eye(2), jnp.array([1, 2], jnp.int32), jnp.ones((2, 1))
        with pytest.raises(InferenceError, match=r"widen_ints=False"):
            torch2jax(torch.linalg.lu_solve)(*args)
        np.testing.assert_array_equal(torch2jax(torch.linalg.lu_solve, widen_ints=False)(*args), np.ones((2, 1)))


def test_a_part_of_a_converted_module_is_replaced():
    m = convert_pytnn_to_nnx(Scorer())
    with pytest.raises(ConversionError, match=r"TorchModule.fc: .*Replace it in the torch module before"):
        m.fc = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(AttributeError, match=r"Its parameters are `params\['fc'\]`"):
        m.fc  # noqa: B018
    m.note = "attributes of other names are as ever"
    assert m.note.startswith("attributes")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return convert_pytnn_to_flax(Scorer())[0]()(x)

    assert Model().init_with_output(jax.random.key(0), jnp.ones(1000, jnp.float32))[0].shape == (120,)


# -- as wrap-torch2jax has it ------------------------------------------------------------------------------------------


def test_shapes_alone_in_any_containers():
    x = jnp.ones((10, 2))
    fn = lambda x: (x.sum(0), x.sum())  # noqa: E731
    for shapes in (((2,), ()), [(2,), ()], [torch.Size([2]), torch.Size([])]):
        out = torch2jax(fn, output_shapes=shapes)(x)
        assert type(out) is type(shapes)
        np.testing.assert_array_equal(out[0], [10, 10])
        assert out[1] == 20
    assert torch2jax(lambda x: x.sum(), output_shapes=())(x) == 20
    values, places = torch2jax(
        lambda x: torch.max(x, 1),
        x,
        output_shapes=(jax.ShapeDtypeStruct((10,), x.dtype), jax.ShapeDtypeStruct((10,), jnp.int64)),
    )(x)
    assert (values.shape, places.dtype) == ((10,), jnp.int64)


def test_dtypes_that_are_there_already():
    assert dtype_t2j(jnp.float32) == jnp.float32
    assert dtype_t2j(np.dtype("int8")) == np.dtype("int8")
    assert dtype_j2t(torch.bfloat16) is torch.bfloat16


def test_old_keywords_and_the_module():
    np.testing.assert_array_equal(torch2jax(torch_fn=torch.neg, use_zeros=False)(jnp.ones(2)), [-1, -1])
    with pytest.raises(OptionError, match="expected `fn` or `torch_fn`, got both"):
        torch2jax(torch.neg, torch_fn=torch.neg)
    assert compile_and_import_module() is pytorch2jax


@pytest.mark.parametrize("value", [jnp.array(True), "no"])
def test_a_flag_of_equinox_that_is_no_bool(value):
    module = convert_pytnn_to_equinox(nn.Dropout())
    with pytest.raises(OptionError, match="`inference` has to be a Python bool"):
        module(jnp.ones(3), inference=value)
    with pytest.raises(OptionError, match='`inference` has to be a Python bool.*static_argnames="inference"'):
        jax.jit(lambda x, flag: module(x, inference=flag))(jnp.ones(3), True)


class ReadsValues(nn.Module):
    def forward(self, x):
        assert x.min().item() > 0.5, "only positive inputs"
        return x * 2


def test_advice_fits_the_failure():
    apply, params = convert_pytnn_to_jax(ReadsValues(), example_args=(jnp.ones((5, 3)),))
    with pytest.raises(InferenceError, match=r"reads values.*not specs.*of the shapes of the call"):
        jax.jit(apply)(params, -jnp.ones((7, 3)))
    apply, params = convert_pytnn_to_jax(nn.Linear(3, 2).double())
    for args, kwargs in (((jnp.ones((2, 4)),), {}), ((jnp.ones((2, 3)),), {"mask": None}), ((), {})):
        with pytest.raises(InferenceError, match="Check the arguments") as info:
            apply(params, *args, **kwargs)
        assert "example_args" not in str(info.value)
    apply, params = convert_pytnn_to_jax(ReadsValues(), output_shapes=(5, 4))
    with pytest.raises(Exception, match=r"as declared with `output_shapes`, got .*Declare that") as info:
        jax.jit(apply)(params, jnp.ones((5, 3)))
    with pytest.raises(OptionError, match=r"example_args=\(x,\)"):
        convert_pytnn_to_jax(ReadsValues(), example_args=jnp.ones(3))
    with pytest.raises(ConversionError, match=r"got the class `Scorer`: pass an instance"):
        torch2jax(Scorer)


@pytest.mark.parametrize(
    ("convert", "wanted", "unwanted"),
    [
        (lambda m: convert_pytnn_to_equinox(m, with_state=False), "`inference=True`", "train"),
        (convert_pytnn_to_nnx, "`rngs=nnx.Rngs", "new key"),
    ],
    ids=["equinox", "nnx"],
)
def test_what_a_random_model_asks_for(convert, wanted, unwanted):
    module = convert(nn.Dropout())
    options = {"inference": False} if "inference" in wanted else {"train": True}
    with pytest.raises(StateError, match=wanted) as info:
        module(jnp.ones(3), **options)
    assert unwanted not in str(info.value)


@pytest.mark.parametrize(
    ("params", "rules"), [({"a": jnp.ones(1)}, ["a"]), ({"a": jnp.ones(1)}, {("a", "b"): "x"}), (3, {"a": "x"})]
)
def test_labels_of_other_types(params, rules):
    with pytest.raises(StructureError, match="label_params: (rules|params): expected"):
        label_params(params, rules, "rest")


def test_no_dtype_is_no_dtype():
    for convert in (dtype_j2t, dtype_t2j):
        with pytest.raises(StructureError, match="got None"):
            convert(None)


def test_specs_and_shapes_of_other_types():
    specs = convert_pytnn_to_jax(nn.Linear(2, 2).double(), out_specs="data")
    with pytest.raises(OptionError, match=r"out_specs: expected a .*PartitionSpec\('data'\)"):
        specs[0](specs[1], jnp.ones((2, 2)))
    f = torch2jax(lambda x: x[:2], output_shapes=(np.int64(2),))
    assert f(jnp.ones(3)).shape == (2,)
