"""Programs of the engine that translates, saved by `jax.export` and run where torch is not."""

from __future__ import annotations

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
from torch import nn

from pytorch2jax import CaptureError, ExportError, convert_pytnn_to_jax, torch2jax

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


def test_calls_of_torch_cannot_be_saved():
    with pytest.raises(ExportError, match=r"sin: .*backend=\"xla\""):
        jax.export.export(jax.jit(torch2jax(torch.sin)))(spec(jnp.ones(3)))
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b"), np.float32)
    with pytest.raises(ExportError, match="symbolic sizes"):
        jax.export.export(jax.jit(torch2jax(torch.sin)))(shape)


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
