"""What a call leaves on a module: nothing. The oracle is the module's whole state, as an independent walk sees it."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from cases import some
from torch import nn

from pytorch2jax import convert_pytnn_to_jax, t2j
from pytorch2jax._skeleton import Skeleton


def state_of(value, path="", found=None, seen=None):
    """Everything that is reachable, by its address; apart from the mode, which each call sets."""
    found, seen = ({}, {}) if found is None else (found, seen)
    if id(value) in seen or isinstance(value, (type, str, bytes, torch.Tensor)):
        found[path] = f"{type(value).__name__} at {id(value)}"
        return found
    seen[id(value)] = value
    inside = {}
    if isinstance(value, dict):
        inside |= {f"[{k!r}]": v for k, v in value.items()}
    elif isinstance(value, (list, tuple, collections.deque)):
        inside |= {f"[{i}]": v for i, v in enumerate(value)}
    elif isinstance(value, (set, np.ndarray)):
        found[f"{path}[*]"] = str(value)
    names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
    inside |= {f".{n}": getattr(value, n) for n in names if hasattr(value, n) and n != "training"}
    found[path] = f"{type(value).__name__} of {list(inside)}" if inside else repr(value)
    for name, item in inside.items():
        state_of(item, path + name, found, seen)
    return found


class Slotted:
    __slots__ = ("calls", "last")

    def __init__(self):
        self.calls = 0


class Log(list):
    def append(self, item):
        raise AssertionError("nobody but the module itself calls this")


class Leaves(nn.Module):
    """Does something to each kind of container; what it returns tells how often that has happened."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.inner = nn.ModuleDict({"a": nn.Linear(3, 3)})
        self.log, self.seen, self.recent = Log(), set(), collections.deque(maxlen=2)
        self.counter, self.default = collections.Counter(), collections.defaultdict(list)
        self.ordered = collections.OrderedDict(a=1, b=2)
        self.slotted, self.array = Slotted(), np.zeros(2)
        self.nested = {"list": [[], ()], "user": collections.UserDict()}

    def forward(self, x):
        list.append(self.log, len(self.log))
        self.seen.add(len(self.seen))
        self.recent.append(object())
        self.counter["calls"] += 1
        self.default[self.counter["calls"]].append(1)
        self.ordered["a"] = self.ordered.pop("a") + 1
        self.slotted.calls += 1
        self.slotted.last = x
        self.array[0] += 1
        self.nested["list"][0].append(1)
        self.nested["user"][len(self.nested["user"])] = 1
        self.layer.register_forward_hook(lambda module, inputs, out: out + 1)
        self.inner["a"].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
        self.layer.calls = getattr(self.layer, "calls", 0) + 1
        counts = [len(self.log), len(self.seen), len(self.recent), self.counter["calls"], len(self.default)]
        counts += [sum(self.ordered.values()), self.slotted.calls, self.array[0], len(self.nested["list"][0])]
        counts += [len(self.nested["user"]), self.layer.calls]
        return self.inner["a"](self.layer(x)), torch.tensor([float(c) for c in counts])


CALLS = {
    "eager": lambda f, x: f(x),
    "jit": lambda f, x: jax.jit(f)(x),
    "grad": lambda f, x: (jax.grad(lambda x: f(x)[0].sum())(x), f(x))[1],
    "vmap": lambda f, x: [y[0] for y in jax.vmap(f)(x[None])],
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,))[0],
}


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_every_call_finds_the_module_as_the_first_one(backend, monkeypatch):
    made = []
    begin = Skeleton.__init__
    monkeypatch.setattr(Skeleton, "__init__", lambda self, *args: (made.append(self), begin(self, *args))[1])
    torch.manual_seed(0)
    model = Leaves()
    before = state_of(model)
    apply, params = convert_pytnn_to_jax(model, backend=backend)
    private = state_of(made[0]._module)
    x = torch.ones(2, 3)
    for _ in range(2):
        for call in CALLS.values():
            y, counts = call(lambda x: apply(params, x), t2j(x))
            np.testing.assert_array_equal(counts, [1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 1])
            assert state_of(made[0]._module) == private
    assert state_of(model) == before
    np.testing.assert_allclose(y, model(x)[0].detach(), rtol=1e-6)


def text(name, **config):
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 16, "attn_implementation": "eager"}
    model_class = getattr(transformers, f"{name}Model")
    return model_class(model_class.config_class(**(sizes | config))), torch.arange(5)[None]


def vision():
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[4, 8], num_attention_heads=[1, 2],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], attn_implementation="eager",
    )  # fmt: skip
    return transformers.SegformerModel(config), torch.rand(1, 3, 16, 16)


ARCHITECTURES = {
    "Bert": lambda: text("Bert"),
    "Llama": lambda: text("Llama", num_key_value_heads=2),
    "Mixtral": lambda: text("Mixtral", num_key_value_heads=2, num_local_experts=2),
    "GPT2": lambda: text("GPT2", n_embd=8, n_layer=2, n_head=2, n_positions=16),
    "Segformer": vision,
}


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize("backend", ["torch", "xla"])
@pytest.mark.parametrize("name", some(ARCHITECTURES, ["Bert", "Segformer"]))
def test_recorders_of_hidden_states_and_attentions(name, backend):
    """They are hooks that transformers registers in a first call."""
    torch.manual_seed(0)
    model, x = ARCHITECTURES[name]()
    wanted = {"output_hidden_states": True, "output_attentions": True}
    wanted |= {} if name == "Segformer" else {"use_cache": False}
    apply, params = convert_pytnn_to_jax(model.eval(), backend=backend)
    expected = model(x, **wanted)

    def run(params):
        out = apply(params, t2j(x), **wanted)
        return out.last_hidden_state, tuple(out.hidden_states), tuple(out.attentions)

    def loss(params):
        return sum((jnp.sin(leaf) ** 2).sum() for leaf in jax.tree.leaves(run(params)))

    theirs = (expected.last_hidden_state, *expected.hidden_states, *expected.attentions)
    sum((leaf.sin() ** 2).sum() for leaf in theirs).backward()
    compiled, gradient = jax.jit(run), jax.grad(loss)
    for _ in range(5):
        for ours in (run(params), compiled(params)):
            for a, e in zip(jax.tree.leaves(ours), theirs, strict=True):
                np.testing.assert_allclose(a, e.detach(), rtol=1e-4, atol=1e-5)
        found = gradient(params)
        for path, param in model.named_parameters():
            leaf = found
            for part in path.split("."):
                leaf = leaf[part]
            by_torch = torch.zeros_like(param) if param.grad is None else param.grad
            np.testing.assert_allclose(leaf, by_torch, rtol=1e-3, atol=1e-5 * max(1.0, float(by_torch.abs().max())))
