"""The table of torch models that every converter is tested on, and one interface to all converters."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import linen, nnx
from torch import nn

import pytorch2jax


class Residual(nn.Module):
    """A small convolutional network with batch normalisation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm1(self.stem(x)).relu()
        x = x + self.norm2(self.conv(x)).relu()
        return self.head(x.mean((2, 3)))


class StochasticDepth(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Linear(4, 4)

    def forward(self, x):
        if not self.training:
            return x + self.block(x)
        keep = (torch.rand(x.shape[0], 1) < 0.5).to(x.dtype)
        return x + self.block(x) * keep / 0.5


class MovingAverage(nn.Module):
    """A buffer that training changes, and no normalisation of torch's own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        y = self.linear(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)  # a new tensor, not a write
            self.steps += 1
        return y - self.mean


class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 5)
        self.again = self.encode
        self.decode_bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return F.linear(self.again(x).tanh(), self.encode.weight.T, self.decode_bias)


class Collections(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(3), torch.randn(3)])
        self.table = nn.ParameterDict({"a": torch.randn(3), "x/y": torch.randn(3)})
        self.plain = torch.full((3,), 0.5)
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("none", None)

    def forward(self, x, options):
        y = x * self.weights[0] + self.weights[1] * self.table["a"] + self.table["x/y"] * self.plain
        return {"y": torch.where(self.flag, y, -y) * options["scale"], "items": [y.sum(), None]}


class Potential(nn.Module):
    """Forces of an energy: the gradient with respect to the parameters is second order."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        energy = self.net(x).sum()
        return energy, -torch.autograd.grad(energy, x, create_graph=True)[0]


class Branches(nn.Module):
    """Reads a value and branches on it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x) * 2 if x.abs().max().item() < 1e6 else x


class ChangesItsArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, batch):
        batch["x"] = self.linear(batch["x"])
        batch["x"].add_(1.0)
        return batch


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(x).float()


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.linear.register_forward_hook(lambda module, args, out: out * 2)
        self.linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def forward(self, x):
        return self.linear(x)


class SetsItsOwnMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()  # frozen statistics, as in detection models
        return self

    def forward(self, x):
        return self.norm(x)


def floats(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ints(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0))


def _attention():
    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)

        def forward(self, x, mask=None):
            return self.attention(x, x, x, key_padding_mask=mask)

    return SelfAttention()


def _transformer():
    return nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True)


def _encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _scripted():
    return torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def _huggingface(name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**config))
        return model

    return make


_TEXT = {"vocab_size": 13, "max_position_embeddings": 16}
_LLAMA = {
    **_TEXT,
    **dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1),
}
_BERT = {
    **_TEXT,
    **dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2),
}
_VIT = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)
_IDS = {"input_ids": ints(13, 2, 5)}


@dataclasses.dataclass(frozen=True)
class Row:
    """A model with its arguments.

    args, kwargs: tensors, and containers of them.
    rtol: of outputs and gradients in float32, relative to the largest value of each leaf.
    """

    name: str
    make: Callable[[], nn.Module]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    rtol: float = 2e-5

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.make()


_X, _IMAGES, _SEQUENCE = floats(4, 3), floats(2, 1, 6, 6), floats(2, 5, 8)

MODELS = [
    Row("linear", lambda: nn.Linear(3, 2), (_X,)),
    Row("bilinear", lambda: nn.Bilinear(3, 3, 2), (_X, floats(4, 3, seed=1))),
    Row("embedding bag", lambda: nn.EmbeddingBag(7, 4), (ints(7, 3, 5),)),
    Row("convolution", lambda: nn.Conv1d(3, 4, 2), (floats(2, 3, 6),)),
    Row("transposed convolution", lambda: nn.ConvTranspose2d(1, 2, 3, stride=2), (_IMAGES,)),
    Row("residual", Residual, (_IMAGES,)),
    Row("dropout", lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 2)), (_X,)),
    Row("rrelu", lambda: nn.Sequential(nn.Linear(3, 8), nn.RReLU()), (_X,)),
    Row("group norm", lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)), (_IMAGES,)),
    Row("instance norm", lambda: nn.InstanceNorm2d(1, affine=True, track_running_stats=True), (_IMAGES,)),
    Row("lstm", lambda: nn.LSTM(8, 4, 2, batch_first=True, dropout=0.3, bidirectional=True), (_SEQUENCE,)),
    Row("gru", lambda: nn.GRU(8, 4, batch_first=True), (_SEQUENCE,)),
    Row("attention", _attention, (_SEQUENCE,), {"mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])}),
    Row("encoder", _encoder, (_SEQUENCE,)),
    Row("transformer", _transformer, (_SEQUENCE, floats(2, 3, 8, seed=1))),
    Row("weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (_X,)),
    Row("old weight norm", lambda: nn.utils.weight_norm(nn.Linear(3, 2)), (_X,)),
    Row("spectral norm", lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), (_X,)),
    Row("orthogonal", lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), (_X,)),
    Row("stochastic depth", StochasticDepth, (floats(6, 4),)),
    Row("moving average", MovingAverage, (_X,)),
    Row("tied", TiedAutoencoder, (_X,)),
    Row("collections", Collections, (_X,), {"options": {"scale": 2.0}}),
    Row("potential", Potential, (_X,)),
    Row("branches", Branches, (_X,)),
    Row("changes its arguments", ChangesItsArguments, ({"x": _X},)),
    Row("autocast", Autocast, (_X,), rtol=2e-2),
    Row("hooks", Hooked, (_X,)),
    Row("sets its own mode", SetsItsOwnMode, (_X,)),
    Row("compiled", lambda: torch.compile(nn.Linear(3, 2)), (_X,)),
    Row("data parallel", lambda: nn.DataParallel(nn.Linear(3, 2)), (_X,)),
    Row("scripted", _scripted, (_X,)),
    Row("bert", _huggingface("BertModel", **_BERT), kwargs=_IDS),
    Row(
        "gpt2",
        _huggingface("GPT2LMHeadModel", vocab_size=13, n_positions=16, n_embd=8, n_layer=2, n_head=2),
        kwargs={**_IDS, "use_cache": False},
    ),
    Row("llama", _huggingface("LlamaForCausalLM", **_LLAMA), kwargs={**_IDS, "use_cache": False}),
    Row(
        "t5",
        _huggingface(
            "T5ForConditionalGeneration",
            vocab_size=13,
            d_model=8,
            d_kv=4,
            d_ff=16,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        kwargs={**_IDS, "labels": ints(13, 2, 4), "use_cache": False},
    ),
    Row("vit", _huggingface("ViTModel", **_VIT), (floats(2, 3, 8, 8),)),
    Row(
        "resnet",
        _huggingface("ResNetModel", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"),
        (floats(2, 3, 16, 16),),
    ),
    Row(
        "whisper",
        _huggingface(
            "WhisperModel",
            vocab_size=13,
            num_mel_bins=4,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_source_positions=4,
            max_target_positions=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        (floats(2, 4, 8),),
        {"decoder_input_ids": ints(13, 2, 3), "use_cache": False},
    ),
    Row(
        "clip",
        _huggingface("CLIPModel", text_config={**_BERT, "eos_token_id": 12}, vision_config=_VIT, projection_dim=4),
        kwargs={**_IDS, "pixel_values": floats(2, 3, 8, 8)},
    ),
    Row(
        "mamba",
        _huggingface("MambaModel", vocab_size=13, hidden_size=8, state_size=4, num_hidden_layers=2),
        kwargs={**_IDS, "use_cache": False},
    ),
    Row(
        "mixture of experts",
        _huggingface("MixtralForCausalLM", **_LLAMA, num_local_experts=2, num_experts_per_tok=1),
        kwargs={**_IDS, "use_cache": False},
        rtol=1e-4,
    ),
]


# -- one interface to the converters ---------------------------------------------------------------------------


class Converter:
    """What a converter makes of a model: `params`, and a way to call it.

    Attributes:
        backend: the engine that it converts for.
    """

    backend = "torch"

    def key_for_torch(self, key: Any) -> Any:
        """The key from which torch draws when `key` is passed to the call."""
        return key


class JaxConverter(Converter):
    """`convert_pytnn_to_jax`."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.apply, self.params, self.state = pytorch2jax.convert_pytnn_to_jax(
            model, with_state=True, backend=self.backend
        )

    def call(self, params: Any, args: Any, kwargs: Any, *, key: Any = None, train: bool = False) -> tuple[Any, Any]:
        """The output and the new state, as nested dicts of all buffers."""
        return self.apply(params, self.state, *args, rng=key, train=train, **kwargs)


class LinenConverter(Converter):
    """`convert_pytnn_to_flax`."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        module, self.params = pytorch2jax.convert_pytnn_to_flax(model, backend=self.backend)
        self.module = module()
        variables = self.module.init(jax.random.key(0), *args, **kwargs)
        self.collections = {name: tree for name, tree in variables.items() if name != "params"}

    def key_for_torch(self, key: Any) -> Any:
        class Asks(linen.Module):
            def __call__(self) -> Any:
                return self.make_rng("dropout")  # Linen derives it from the module's path

        return Asks().apply({}, rngs={"dropout": key})

    def call(self, params: Any, args: Any, kwargs: Any, *, key: Any = None, train: bool = False) -> tuple[Any, Any]:
        variables = {"params": params, **self.collections}
        rngs = None if key is None else {"dropout": key}
        out, update = self.module.apply(variables, *args, train=train, mutable=["batch_stats"], rngs=rngs, **kwargs)
        return out, merged({**self.collections, **update})


class NnxConverter(Converter):
    """`convert_pytnn_to_nnx`."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        module = pytorch2jax.convert_pytnn_to_nnx(model, example_args=args, example_kw=kwargs, backend=self.backend)
        self.graph, params, self.others = nnx.split(module, nnx.Param, ...)
        self.params = nnx.to_pure_dict(params).get("params", {})

    def call(self, params: Any, args: Any, kwargs: Any, *, key: Any = None, train: bool = False) -> tuple[Any, Any]:
        others = jax.tree.map(lambda x: x, self.others)  # variables of this trace
        module = nnx.merge(self.graph, nnx.State({"params": jax.tree.map(nnx.Param, params)}), others)
        out = module(*args, rngs=key, train=train, **kwargs)
        return out, merged(nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param))))


class EquinoxConverter(Converter):
    """`convert_pytnn_to_equinox`."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.module, self.state = pytorch2jax.convert_pytnn_to_equinox(model, with_state=True, backend=self.backend)
        self.params = self.module.params

    def call(self, params: Any, args: Any, kwargs: Any, *, key: Any = None, train: bool = False) -> tuple[Any, Any]:
        module = eqx.tree_at(lambda m: m.params, self.module, params)
        leaves, treedef = jax.tree.flatten(self.state)
        state = jax.tree.unflatten(treedef, leaves)
        out, state = module(*args, state=state, key=key, inference=not train, **kwargs)
        return out, state.get(module.state_index)


CONVERTERS = [JaxConverter, LinenConverter, NnxConverter, EquinoxConverter]


def merged(collections: dict[str, Any]) -> dict[str, Any]:
    """The nested dicts of several collections as one."""
    flat = {}
    for tree in collections.values():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            flat[tuple(k.key for k in path)] = leaf
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


# -- comparisons -----------------------------------------------------------------------------------------------


def to_jax(tree: Any) -> Any:
    """Copies of all tensors as arrays."""
    return jax.tree.map(lambda t: pytorch2jax.t2j(t, copy=True) if isinstance(t, torch.Tensor) else t, tree)


def copied(tree: Any) -> Any:
    """Copies of all tensors; floating point ones require gradients, through a node that may be written to."""
    return jax.tree.map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, tree)


def output_leaves(out: Any) -> list[Any]:
    """The arrays or tensors in an output of any container type."""
    if type(out) is dict:  # jax.jit returns dicts with sorted keys
        out = {key: out[key] for key in sorted(out)}
    return [x for x in torch.utils._pytree.tree_leaves(out) if hasattr(x, "dtype")]


def loss(out: Any) -> Any:
    """A scalar that depends on everything inexact in an output, the same in torch and in JAX."""
    total = 0.0
    for x in output_leaves(out):
        if isinstance(x, torch.Tensor):
            if x.is_floating_point():
                weights = torch.arange(x.numel()).cos().reshape(x.shape)
                total = total + (x.float().sin() * weights).sum()
        elif jnp.issubdtype(x.dtype, jnp.inexact):
            weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
            total = total + (jnp.sin(x.astype(jnp.float32)) * weights).sum()
    return total


def assert_close(actual: Any, expected: Any, rtol: float, what: str, floor: float = 1e-3) -> None:
    """Compare relative to the largest value, or to `floor` if that is larger; exact for integers and bools."""
    a, e = np.asarray(actual), expected.detach().numpy() if isinstance(expected, torch.Tensor) else np.asarray(expected)
    assert a.shape == e.shape, what
    if a.dtype.kind in "biu":
        np.testing.assert_array_equal(a, e, err_msg=what)
        return
    scale = max(floor, float(np.max(np.abs(e), initial=0.0)))
    np.testing.assert_allclose(a / scale, e / scale, rtol=0, atol=rtol, err_msg=what)
