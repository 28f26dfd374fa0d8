"""What a model consists of, and what it does in a call."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from pytorch2jax._check._modules import has_hooks
from pytorch2jax._check._report import Found
from pytorch2jax._check._subject import Subject
from pytorch2jax._params import flat_name, layout_of

WAY_TO_64_BITS = (
    'Turn 64-bit dtypes on (`jax.config.update("jax_enable_x64", True)`, or JAX_ENABLE_X64=1 on the command line), or '
    "convert the model and its arguments to single precision (`model.float()`, `x.float()`)."
)

_MAKES_PARAMETERS = LazyModuleMixin._infer_parameters

_HOOKS: dict[str, Callable[[Any], Any]] = {  # on modules, by kind
    "forward hooks": lambda module: module._forward_hooks,
    "forward pre-hooks": lambda module: _pre_hooks(module),
    "backward hooks": lambda module: module._backward_hooks or module._backward_pre_hooks,
}


def find_parts(found: Found, model: nn.Module) -> None:
    """Put into `found` what a module consists of."""
    layout = layout_of(model)
    own = dict(model.named_parameters())
    found.parameters = sum(math.prod(leaf.shape) for leaf in layout.params)
    found.parameter_bytes = sum(p.numel() * p.element_size() for p in own.values())
    found.dtypes = sorted({str(leaf.dtype).removeprefix("torch.") for leaf in layout.params})
    found.tied = [[flat_name(slot) for slot in leaf.slots] for leaf in layout.params if len(leaf.slots) > 1]
    found.frozen = [name for name, p in own.items() if not p.requires_grad]
    found.buffers = [".".join(leaf.path) for leaf in layout.state]


def find_hooks(found: Found, model: nn.Module) -> None:
    """Put into `found` which parts of a module have hooks before its first call, which may register some itself."""
    hooks = {kind: [name for name, m in model.named_modules() if of(m)] for kind, of in _HOOKS.items()}
    hooks["hooks on gradients"] = [name for name, p in model.named_parameters() if has_hooks(p)]
    found.hooks = {kind: names for kind, names in hooks.items() if names}


def _pre_hooks(module: Any) -> list[Any]:
    """Without the one with which lazy modules make their parameters."""
    return [h for h in module._forward_pre_hooks.values() if getattr(h, "__func__", h) is not _MAKES_PARAMETERS]


def find_in_call(found: Found, subject: Subject) -> None:
    """Put into `found` what the module has been seen to do in torch."""
    found.made = subject.made
    found.inputs = subject.described(subject.tensors, subject.names)
    found.outputs = subject.described(subject.outputs, subject.output_paths())
    if subject.changed:
        found.notes.append(f"attributes that a call changes, and that are put back: {', '.join(subject.changed[:5])}")
    if constants := subject.output_constants():
        found.notes.append(f"returns what is no array, to be left out under `jax.jit`: {', '.join(constants[:5])}")
    if subject.taken:
        found.notes.append(f"`forward` has arguments of its own named {' and '.join(subject.taken)}: pass `prefix=`")
    if wide := subject.in_double_precision():
        more = f" and {len(wide) - 1} more" if len(wide) > 1 else ""
        found.notes.append(f"double precision, rounded to single while `jax_enable_x64` is off: {wide[0]}{more}")


def find_out(found: Found, subject: Subject) -> None:
    """Put into `found` what the library finds out about the module."""
    try:
        converted = subject.converted("torch")
        call = subject.fill(subject.arrays())
        found.trained_buffers = [".".join(leaf.path) for leaf in converted.split_state(call)[0]]
        inferred = {"eval": converted.inferred(*call, train=False)}
    except Exception:
        return  # the cells say why
    with contextlib.suppress(Exception):  # here, too
        inferred["train"] = converted.inferred(*call, train=True)
    notes, evaluated = found.notes, inferred["eval"]
    if random := [mode for mode, known in inferred.items() if known.random]:
        notes.append(f"draws random numbers in {' and '.join(random)} mode: pass keys (`rng=`)")
    if any(known.host_random for known in inferred.values()):
        notes.append("draws numbers of NumPy's or Python's, which `backend=\"xla\"` refuses")
    if not evaluated.certain:
        notes.append("reads values: under `jax.jit` it is tried on made-up ones; pass `example_args=` for others")
    if evaluated.hand_written:
        notes.append("has gradients written by hand (`torch.autograd.Function`)")
    if evaluated.hooks:
        notes.append("has hooks on gradients, which act in reverse mode")
