"""Programs of the engine that translates, saved by `jax.export` and run where torch is not."""

from __future__ import annotations

import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import one_in, some
from models import MODELS
from torch import nn
from torch._higher_order_ops import scan

from pytorch2jax import CaptureError, ExportError, convert_pytnn_to_jax, torch2jax
from pytorch2jax.xla._symbolic import sizes_to_try

pytestmark = pytest.mark.usefixtures("x32")

LOAD = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "pytorch2jax"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import jax, jax.export, numpy as np
saved = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
arrays = dict(np.load(sys.argv[2]))
out = saved.call({k: v for k, v in arrays.items() if k != "x"}, arrays["x"])
assert "torch" not in sys.modules
np.save(sys.argv[3], np.asarray(out))
"""


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)).eval()


def converted(net):
    apply, params = convert_pytnn_to_jax(net, backend="xla")
    flat = {".".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    treedef = jax.tree.structure(params)
    names = list(flat)

    def call(flat, x):
        return apply(jax.tree.unflatten(treedef, [flat[name] for name in names]), x)

    return call, flat


def spec(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@pytest.mark.parametrize("symbolic", [False, True])
def test_a_saved_program_runs_without_torch(tmp_path, symbolic):
    net = model()
    call, params = converted(net)
    x = torch.randn(6, 4)
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 4"), np.float32) if symbolic else spec(jnp.ones((6, 4)))
    exported = jax.export.export(jax.jit(call))(jax.tree.map(spec, params), shape)
    program, data, out = tmp_path / "program", tmp_path / "data.npz", tmp_path / "out.npy"
    program.write_bytes(exported.serialize())
    np.savez(data, x=x.numpy(), **{k: np.asarray(v) for k, v in params.items()})
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(program), str(data), str(out)],
        env={**os.environ, "PYTHONPATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(out), net(x).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platforms", [("cpu",), ("cuda",), ("tpu",), ("cpu", "cuda", "tpu")])
def test_it_lowers_for_each_platform(platforms):
    call, params = converted(model())
    exported = jax.export.export(jax.jit(jax.grad(lambda p, x: call(p, x).sum())), platforms=platforms)(
        jax.tree.map(spec, params), spec(jnp.ones((6, 4)))
    )
    assert exported.platforms == platforms


def test_one_program_for_all_batch_sizes_and_lengths():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    call, params = converted(layer)
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, t, 8"), np.float32)
    exported = jax.export.export(jax.jit(call))(jax.tree.map(spec, params), shape)
    for b, t in ((1, 1), (3, 7), (2, 20)):
        x = torch.randn(b, t, 8)
        got = exported.call(params, jnp.asarray(x.numpy()))
        np.testing.assert_allclose(got, layer(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_model_that_does_other_things_for_other_sizes_is_refused():
    f = torch2jax(lambda x: x * 2 if x.shape[0] > 8 else x.sin(), backend="xla")
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b"), np.float32)
    with pytest.raises(CaptureError, match="the same operators at all sizes of b"):
        jax.export.export(jax.jit(f))(shape)


def exported_for_all(f, *shapes, constraints=(), args=()):
    """`f` as a program for any size, `b` and `t`; a shape is a string as JAX has it."""
    scope = jax.export.SymbolicScope(constraints)
    specs = [jax.ShapeDtypeStruct(jax.export.symbolic_shape(s, scope=scope), np.float32) for s in shapes]
    return jax.export.export(jax.jit(f))(*args, *specs)


def check_at_other_sizes(f, *shapes, sizes=((2, 3), (4, 9), (33, 20)), **options):
    program = exported_for_all(torch2jax(f, backend="xla"), *shapes, **options)
    for b, t in sizes:
        rng = np.random.default_rng(0)
        arrays = [rng.normal(size=eval(f"({s},)", {"b": b, "t": t})).astype(np.float32) for s in shapes]
        expected = f(*[torch.from_numpy(a.copy()) for a in arrays])
        got = program.call(*arrays)
        assert got.dtype == jax.dtypes.canonicalize_dtype(str(expected.dtype).removeprefix("torch."))
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6 * max(1, float(expected.abs().max())))


TABLE = torch.linspace(-1, 1, 3000).reshape(1, 1000, 3)
FUNCTIONS = {
    "arange": lambda x: x + torch.arange(x.shape[1]),
    "arange with a step": lambda x: x + torch.arange(3, 3 + 2 * x.shape[1], 2) * torch.arange(1.0, x.shape[1] + 1),
    "linspace": lambda x: x * torch.linspace(0, 1, x.shape[1]),
    "last of each row": lambda x: x[torch.arange(x.shape[0]), -1],
    "differences": lambda x: x[:, 1:] - x[:, :-1],
    "slices": lambda x: torch.cat([x[:, -2:], x[:, : x.shape[1] - 1], x[:, 1:]], 1),
    "a row from the end": lambda x: x[:, -2] + x[:, x.shape[1] - 1] + x[-1, 0],
    "a table": lambda x: x + torch.ones(1, 1000).cumsum(1)[:, : x.shape[1]],
    "deviations": lambda x: (x - x.mean(0)) / (x.std(0) + x.var(1, correction=0)[:, None] + 1),
    "a causal mask": lambda x: (x @ x.T).masked_fill(torch.ones(x.shape[0], x.shape[0]).tril() == 0, 0.5),
    "filled": lambda x: torch.full((x.shape[0], 2), 2.5) * torch.zeros(x.shape[0], 1) + x.new_ones(x.shape[0], 2),
    "cumsum": lambda x: x.cumsum(1).cumsum(0),
    "expand and repeat": lambda x: x[:, None].expand(-1, x.shape[0], -1).sum((0, 1)) + x[:1].repeat(x.shape[0], 1),
    "roll and flip": lambda x: x.roll(1, 0) + x.roll((1, -2), (0, 1)).flip(1),
    "flat": lambda x: torch.cat([x.flatten(), x.reshape(-1)]),
    "chunks": lambda x: sum(torch.stack([x, x, x, x], -1).chunk(2, -1)),
    "split": lambda x: x.split([1, x.shape[1] - 1], 1)[1],
    "narrow": lambda x: x.narrow(1, 1, x.shape[1] - 1),
    "topk": lambda x: x.topk(2, dim=1).values,
    "sort": lambda x: x.sort(dim=1, descending=True).indices,
    "softmax": lambda x: x.softmax(1) + x.log_softmax(0),
    "pad": lambda x: nn.functional.pad(x, (1, x.shape[0], 0, 2), value=2.0),
    "reflect": lambda x: nn.functional.pad(x[None], (1, 2), mode="reflect"),
    "replicate": lambda x: nn.functional.pad(x[None], (1, 2), mode="replicate"),
    "circular": lambda x: nn.functional.pad(x[None], (1, 2), mode="circular"),
    "nearest": lambda x: nn.functional.interpolate(x[:, None], scale_factor=2),
    "linear": lambda x: nn.functional.interpolate(x[:, None], scale_factor=2, mode="linear"),
    "linear to a size": lambda x: nn.functional.interpolate(x[:, None], size=7, mode="linear", align_corners=True),
    "one-hot": lambda x: (torch.arange(x.shape[0])[:, None] == torch.arange(3)) * x[:, :1],
    "eye": lambda x: x @ torch.eye(x.shape[1]),
    "diagonal": lambda x: (x.T @ x).diagonal() + torch.diag_embed(x).sum((0, 1)),
    "gather": lambda x: x.gather(1, torch.zeros(x.shape[0], 2, dtype=torch.int64)),
    "scatter": lambda x: torch.zeros_like(x).scatter_add(1, torch.ones(x.shape, dtype=torch.int64), x),
    "where": lambda x: torch.where(x > 0, x, x.shape[0]) / x.shape[1],
    "a size": lambda x: x.sum() * x.shape[0] - x.shape[1],
    "a size as a tensor": lambda x: torch.full((), x.shape[0]) + x.sum(),
    "norms": lambda x: nn.functional.layer_norm(x[..., None].expand(-1, -1, 4), (4,)) + x.norm(dim=1)[:, None, None],
    "extremes": lambda x: x.max(1).values + x.argmax(1) + x.amin(1),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(
        *(x[None, :, :, None] * torch.ones(4),) * 3, is_causal=True
    ),
    "embedding": lambda x: nn.functional.embedding(torch.arange(x.shape[1]), TABLE[0]) + x.mean(),
    "batch statistics": lambda x: nn.functional.batch_norm(x[:, None].expand(-1, 3, -1), None, None, training=True),
    "convolution": lambda x: nn.functional.conv1d(x[:, None], torch.ones(2, 1, 3), padding=1),
    "pooling": lambda x: nn.functional.max_pool1d(x[:, None], 3, 1, 1),
    "a function with a gradient of its own": lambda x: Tripled.apply(x)[:, 1:] + 1,
    "a write to a column": lambda x: written(x, (slice(None), 0), 0.0),
    "a write to a slice": lambda x: written(x, (slice(1, None), slice(None, -1)), x[:-1, 1:]),
    "a write to the last row": lambda x: written(x, (-1,), x[0]),
    "a write to every other of four": lambda x: written(x.new_zeros(4, *x.shape), (slice(None, None, 2),), x),
    "a read of a part that was written to": lambda x: reads_after_a_write(x),
}


class Tripled(torch.autograd.Function):
    """Its gradient is not that of its forward."""

    @staticmethod
    def forward(ctx, x):
        return x * x.shape[0]

    @staticmethod
    def backward(ctx, g):
        return g * 3 + g.shape[1]


def written(x, where, value):
    x = x.clone()
    x[where] = value
    return x


def reads_after_a_write(x):
    x = x.clone()
    column, inner = x[:, 1], x[1:, :-1]
    x.mul_(2)
    column += 1
    return column[1:, None] * inner


@pytest.mark.parametrize("name", one_in(2, [*FUNCTIONS]))
def test_an_operator_for_all_sizes(name):
    check_at_other_sizes(FUNCTIONS[name], "b, t")


@pytest.mark.parametrize(
    "name", ["differences", "a table", "deviations", "linear", "pooling", "topk", "a write to a slice", "gradient"]
)
def test_gradients_for_all_sizes(name):
    f = next(f for key, f in FUNCTIONS.items() if name in key)

    def gradient(x):
        x = x.requires_grad_()
        return torch.autograd.grad(f(x).square().sum(), x)[0]

    g = jax.grad(lambda x: (torch2jax(f, backend="xla")(x) ** 2).sum())
    program = exported_for_all(g, "b, t")
    for shape in ((2, 3), (4, 9), (33, 20)):
        x = torch.randn(shape)
        np.testing.assert_allclose(program.call(x.numpy()), gradient(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: nn.functional.pad(x, (0, x.shape[0] % 2)),
        lambda x: nn.functional.pad(x, (0, -x.shape[0] % 8)),
        lambda x: nn.functional.pad(x, (0, x.shape[0] % 3)),
        lambda x: x * min(x.shape[0], 12),
        lambda x: x * min(x.shape[0], 500),
        lambda x: x * max(x.shape[0], 8),
        lambda x: x[:300],
        lambda x: x[: x.shape[0] // 2],
        lambda x: x[::2],
        lambda x: x + 1 if x.shape[0] % 2 else x,
        lambda x: x + 1 if x.shape[0] % 3 else x,
        lambda x: x + 1 if x.shape[0] % 32 else x,
        lambda x: x + 1 if x.shape[0] > 500 else x,
        lambda x: x * math.sqrt(x.shape[0]),
        lambda x: torch.stack([x, x * 2, x * 3])[x.shape[0] % 3],
        lambda x: (x.sin(), x.cos())[x.shape[0] % 2] * x,
        lambda x: (lambda a, b: (a, b)[x.shape[0] % 2] * a)(x.sin(), x.cos()),
        lambda x: (x, x.shape[0]),
        lambda x: list(x[:20].split(1)) if x.shape[0] < 550 else [x],
        lambda x: x.detach() if x.shape[0] % 2 else x.clone(),
        lambda x: x * torch.tensor(list(range(x.shape[0]))),
    ],
)
def test_what_is_no_polynomial_in_the_sizes_is_refused(f):
    with pytest.raises(CaptureError, match=r"Give the program fixed sizes\."):
        exported_for_all(torch2jax(f, backend="xla"), "b")


def test_an_operator_that_needs_numbers_is_named():
    def f(x):
        return torch.hann_window(x.shape[0]) + x

    with pytest.raises(CaptureError, match=r"f: aten\.hann_window\.default: .*Give the program fixed sizes\."):
        exported_for_all(torch2jax(f, backend="xla"), "b")


def test_a_slice_over_the_end_of_a_table():
    f = torch2jax(lambda x: x + torch.ones(50)[: x.shape[0]], backend="xla")
    got = exported_for_all(f, "b").call(np.zeros(52, np.float32))
    np.testing.assert_array_equal(np.isnan(got), np.arange(52) >= 50)


def test_operators_that_torch_runs_have_no_symbolic_sizes():
    f = torch2jax(lambda x: torch.linalg.ldl_factor(x @ x.mT)[0], backend="xla")
    with pytest.raises(ExportError, match=r"linalg_ldl_factor.*cannot be exported"):
        exported_for_all(f, "b, 3, 3")


def test_what_is_said_of_sizes_helps():
    with pytest.raises(CaptureError, match=r"aten\.slice\.Tensor: .*'t - 4' >= '0' is inconclusive.*constraints"):
        check_at_other_sizes(lambda x: x[:, 4:], "b, t")
    check_at_other_sizes(lambda x: x[:, 4:], "b, t", sizes=((1, 5), (3, 9)), constraints=["t >= 4"])
    check_at_other_sizes(lambda x: x[:, : x.shape[1] - 4], "b, t", sizes=((1, 5), (3, 9)), constraints=["t >= 4"])


def test_a_function_for_some_sizes():
    def f(x):
        assert x.shape[0] <= 20
        return x + torch.arange(20)[: x.shape[0]]

    check_at_other_sizes(f, "b", sizes=((3, 0), (20, 0)))  # smaller sizes are tried
    check_at_other_sizes(f, "b", sizes=((3, 0), (8, 0)), constraints=["b <= 8"])
    with pytest.raises(CaptureError, match=r"(?s)an error at b = .*constraints"):
        exported_for_all(torch2jax(f, backend="xla"), "b", constraints=["b >= 30"])
    with pytest.raises(CaptureError, match="at least 4 sizes"):
        exported_for_all(torch2jax(f, backend="xla"), "b", constraints=["b <= 3"])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_two_symbols_have_the_same_size(n):
    tried = sizes_to_try("f", {s: (1, float("inf")) for s in "abc"[:n]})
    assert len(tried) == 2**n + 1 + n
    sizes = [{t[s] for t in tried} for s in "abc"[:n]]
    assert sum(map(len, sizes)) == len(set().union(*sizes)) == 4 * n
    for own in sizes:
        assert all(len({size % m for size in own}) > 1 and any(size % m == 0 for size in own) for m in (2, 3, 4, 8))


class Block(nn.Module):
    """A transformer with causal attention, written by hand."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Linear(3, 8), nn.Embedding(64, 8)
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("mask", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x):
        b, t, _ = x.shape
        h = self.tokens(x) + self.positions(torch.arange(t, device=x.device))
        q, k, v = (y.view(b, t, 2, 4).transpose(1, 2) for y in self.qkv(self.norm(h)).split(8, dim=2))
        scores = (q @ k.transpose(-2, -1)) * 0.5
        scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf")).softmax(-1)
        h = h + self.out((scores @ v).transpose(1, 2).contiguous().view(b, t, 8))
        return h[:, -1]


def images():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.GroupNorm(2, 4), nn.SiLU(), nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layer(x, x, tgt_mask=mask, tgt_is_causal=True)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(4, 4), nn.RNNCell(4, 4)])
        self.lstm = nn.LSTMCell(4, 4)

    def forward(self, x):
        return self.lstm(self.cells[1](self.cells[0](x)))[0]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Block, "b, t, 3"),
        (images, "b, 1, 8, 8"),
        pytest.param(Decoder, "b, t, 8", marks=pytest.mark.exhaustive),
        (Cell, "b, 4"),
        pytest.param(
            lambda: nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True), "b, t, 4", marks=pytest.mark.exhaustive
        ),
        (lambda: nn.MultiheadAttention(4, 2, batch_first=True), "b, t, 4"),
    ],
)
def test_a_model_for_all_sizes(make, shape):
    torch.manual_seed(0)
    net = make().eval()
    many = isinstance(net, nn.MultiheadAttention)
    call, params = converted(net) if not many else (None, None)
    if many:
        call = torch2jax(lambda x: net(x, x, x)[0], backend="xla")
    given = [] if many else [jax.tree.map(spec, params)]
    program = exported_for_all(call, shape, args=given)
    for b, t in ((2, 3), (5, 9), (1, 20)):
        x = torch.randn(eval(f"({shape})", {"b": b, "t": t}))
        with torch.no_grad():
            expected = net(x, x, x) if many else net(x)
        expected = expected if isinstance(expected, torch.Tensor) else expected[0]
        got = program.call(*([] if many else [params]), x.numpy())
        got = got if isinstance(got, jax.Array) else jax.tree.leaves(got)[0]
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", some(["bert", "gpt2", "vit"], ["vit"]))
def test_a_model_of_transformers_for_all_batch_sizes(name):
    net = next(row for row in MODELS if row.name == name).build().eval()
    kwargs = {"use_cache": False} if name == "gpt2" else {}
    call = torch2jax(lambda x: net(x, **kwargs)[0], backend="xla")
    shape, dtype = ("b, 3, 8, 8", np.float32) if name == "vit" else ("b, 5", np.int32)
    program = jax.export.export(jax.jit(call))(jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), dtype))
    for b in (1, 3, 9):
        x = torch.randn(b, 3, 8, 8) if name == "vit" else torch.randint(13, (b, 5))
        with torch.no_grad():
            expected = net(x, **kwargs)[0]
        np.testing.assert_allclose(program.call(x.numpy().astype(dtype)), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_control_flow_of_torchs_for_all_sizes():
    def fn(x):
        ys = scan(lambda carry, row: (carry + row, carry * row), x[0], x)[1]
        return torch.cond(x.sum() > 0, lambda y: y.sin() * y.shape[0], torch.cos, (ys,))

    program = exported_for_all(torch2jax(fn, backend="xla"), "b, 3")
    for x in (torch.ones(2, 3), torch.randn(5, 3), -torch.ones(4, 3)):
        carried = torch.cat([x[:1], x[0] + x.cumsum(0)[:-1]])
        expected = (carried * x).sin() * len(x) if x.sum() > 0 else (carried * x).cos()
        np.testing.assert_allclose(program.call(x.numpy()), expected, rtol=1e-5, atol=1e-6)


def test_calls_of_torch_cannot_be_saved():
    with pytest.raises(ExportError, match=r"sin: .*backend=\"xla\""):
        jax.export.export(jax.jit(torch2jax(torch.sin)))(spec(jnp.ones(3)))
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b"), np.float32)
    with pytest.raises(ExportError, match="symbolic sizes"):
        jax.export.export(jax.jit(torch2jax(torch.sin)))(shape)


@pytest.mark.exhaustive
def test_the_compilation_cache_knows_a_converted_model_again(tmp_path):
    program = """
import sys, jax, jax.numpy as jnp, torch
sys.path.insert(0, sys.argv[2])
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
from pytorch2jax import convert_pytnn_to_jax
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
apply, params = convert_pytnn_to_jax(net, backend="xla")
jax.jit(apply)(params, jnp.ones((3, 4)))
print(sum("cache_hits" in h for h in hits))
"""
    root = str(pathlib.Path(__file__).resolve().parent.parent)
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), root],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        counts.append(int(done.stdout))
    assert counts[0] == 0
    assert counts[1] > 0
