"""A torch module as a Flax NNX module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import torch
from flax import nnx
from flax.nnx import reprlib

from pytorch2jax._errors import ConversionError, RandomnessError, StructureError
from pytorch2jax._module import ConvertedModule, FromTorch
from pytorch2jax._options import Backend
from pytorch2jax._params import leaf_in, nest


class Buffer(nnx.Variable[Any]):
    """A buffer of a torch module that training does not change."""


_MODE = "mode"  # the default of `train`: what `m.train()` and `m.eval()` have set


def convert_pytnn_to_nnx(
    model: torch.nn.Module | Callable[..., Any],
    *,
    rngs: nnx.Rngs | None = None,
    copy: bool = True,
    prefix: str = "",
    method: str | None = None,
    example_args: Sequence[Any] = (),
    example_kw: Mapping[str, Any] | None = None,
    output_shapes: Any = None,
    out_specs: Any = None,
    batch_axes: int | Sequence[int | None] | None = None,
    backend: Backend = "torch",
) -> TorchModule:
    """Turn a torch module into a Flax NNX module.

    Args:
        model: any `torch.nn.Module`, or a method of one. It is not changed, and changes to it later do not reach the
            result.
        rngs: where the module takes its random numbers from (the stream `dropout`) when a call passes none.
        copy: see `convert_pytnn_to_jax`.
        prefix: put in front of the keywords `train` and `rngs` of a call, for models whose `forward` has
            arguments of these names.
        method, example_args, example_kw, output_shapes, out_specs: see `convert_pytnn_to_jax`. With examples, the
            buffers that training changes are found by a run on fake tensors; without, they are the statistics of
            normalisations.
        batch_axes: the axis of the batch in the arguments of `forward`, for arrays that are sharded over devices;
            see `convert_pytnn_to_jax`. Without it, each device runs the model on the whole batch.
        backend: `"torch"` runs torch's kernels; `"xla"` translates the model to JAX operations, see `torch2jax`.

    Returns:
        An `nnx.Module`. It is called with what `forward` takes. Its attributes `params`, `batch_stats` and
        `buffers` are nested dicts by torch's names, of `nnx.Param`, `nnx.BatchStat` and `Buffer`. It starts in
        eval mode; `m.train()` and `m.eval()` change that, and `m(..., train=True)` overrides it for one call
        (`train=None`: each submodule's own flag at conversion). In train mode a call updates the statistics, and
        draws from `m(..., rngs=...)` (`nnx.Rngs`, a stream or a key) or from the `rngs` given here.

    Raises:
        ConversionError: the module is of a kind that cannot be converted.
        StateError, StructureError: in a call; the message says what to do.

    Example:
        >>> import jax.numpy as jnp, torch
        >>> from flax import nnx
        >>> m = convert_pytnn_to_nnx(torch.nn.Linear(3, 2))
        >>> m(jnp.ones((4, 3))).shape
        (4, 2)
        >>> gradient = nnx.grad(lambda m: m(jnp.ones((4, 3))).sum())(m)
        >>> gradient["params"]["bias"].get_value()
        Array([4., 4.], dtype=float32)
    """
    keywords = {"train": _MODE, "rngs": None}
    converted = ConvertedModule(
        model,
        copy=copy,
        prefix=prefix,
        keywords=keywords,
        method=method,
        example_args=example_args,
        example_kw=example_kw,
        output_shapes=output_shapes,
        out_specs=out_specs,
        batch_axes=batch_axes,
        backend=backend,
    )
    example = (tuple(example_args), dict(example_kw or {})) if example_args or example_kw else None
    return TorchModule(converted, example, rngs)


_RNGS = "`rngs=nnx.Rngs(0)`, to the conversion or to the call"


class TorchModule(nnx.Module):
    __doc__ = FromTorch("What `convert_pytnn_to_nnx` returns; see there.", ConvertedModule.doc)
    __signature__ = FromTorch(None, ConvertedModule.signature)

    def __init__(self, converted: ConvertedModule, example: tuple[Any, Any] | None, rngs: nnx.Rngs | None) -> None:
        kept, others = converted.split_state(example)
        params, state = converted.take_initial()
        self.torch_module = converted
        self.params = nnx.data(jax.tree.map(nnx.Param, params))
        self.batch_stats = nnx.data(nest(kept, (nnx.BatchStat(leaf_in(state, leaf)) for leaf in kept)))
        self.buffers = nnx.data(nest(others, (Buffer(leaf_in(state, leaf)) for leaf in others)))
        self.deterministic: bool | None = True
        self.rngs = nnx.data(None if rngs is None else self._stream(rngs).fork())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        options, kwargs = self.torch_module.split_keywords(kwargs)
        train = options["train"]
        if train == _MODE:
            train = None if self.deterministic is None else not self.deterministic
        source = self.rngs if options["rngs"] is None else options["rngs"]
        key = None if source is None else functools.partial(self._key, source)
        state = self._state()
        out, new_state = self.torch_module.apply(
            _values(self.params), _values(state), args, kwargs, rng=key, train=train, rng_argument=_RNGS
        )
        for leaf in self.torch_module.layout.state:
            variable, value = leaf_in(state, leaf), leaf_in(new_state, leaf)
            if value is not variable.get_value():
                variable.set_value(value)
        return out

    def __repr__(self) -> str:
        return f"TorchModule({self.torch_module!r})"

    def __nnx_repr__(self) -> Any:
        yield reprlib.Object(type="TorchModule", start=f"({self.torch_module!r}", end=")", same_line=True)

    def __setattr__(self, name: str, value: Any) -> None:
        converted = vars(self).get("torch_module")
        if converted is not None and name in converted.names:
            raise ConversionError(
                f"TorchModule.{name}: `{name}` is a part of the torch module {converted.name}, which runs in torch, "
                "where nothing else can be put in its place. Replace it in the torch module before you convert that "
                f"(`model.{name} = ...`; `torch.nn.Identity()` leaves it out), and call yours on what comes out. New "
                "values go into `params`."
            )
        if "." in name:
            raise StructureError(
                f"TorchModule.{name}: expected the name of an attribute, got a name of a torch `state_dict`. "
                "`params_from_state_dict(model, state_dict)` makes parameters of one, for "
                "`nnx.update(module, {'params': params})`."
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        converted = vars(self).get("torch_module")
        if converted is not None and name in converted.names:
            raise AttributeError(
                f"TorchModule.{name}: `{name}` is a part of the torch module {converted.name}. Its parameters are "
                f"`params[{name!r}]`."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def set_view(self, deterministic: bool | None = None) -> None:
        """For `nnx.view`: the module in train mode (`deterministic=False`) or in eval mode."""
        if deterministic is not None:
            self.deterministic = deterministic

    def _trees_of_torch(self, state: Any) -> tuple[Any, Any]:
        """The parameters and buffers, for the way back to torch."""
        return self.params, self._state() if state is None else state

    def _stream(self, rngs: nnx.Rngs) -> Any:
        try:
            return rngs.dropout
        except AttributeError:
            raise RandomnessError(
                f"{self.torch_module.name}: rngs: expected a stream `dropout`, or a default one, got only "
                f"{', '.join(rngs)}. Pass `nnx.Rngs(0)` or `nnx.Rngs(dropout=0)`."
            ) from None

    def _state(self) -> dict[str, Any]:
        """All buffers, in one nested dict of variables."""
        leaves = self.torch_module.layout.state
        found = [leaf_in(self.batch_stats, leaf) for leaf in leaves]
        return nest(leaves, (leaf_in(self.buffers, x) if v is None else v for v, x in zip(found, leaves, strict=True)))

    def _key(self, source: Any) -> Any:
        """A key from what the caller passed."""
        if isinstance(source, nnx.Rngs):
            return self._stream(source)()
        if isinstance(source, nnx.RngStream):
            return source()
        if hasattr(source, "dtype"):
            return source
        raise RandomnessError(
            f"{self.torch_module.name}: rngs: expected nnx.Rngs, one of its streams or a JAX key, got "
            f"{type(source).__name__}. Pass `rngs=nnx.Rngs(0)`."
        )


def _values(tree: Any) -> Any:
    return jax.tree.map(lambda v: v.get_value(), tree, is_leaf=lambda v: isinstance(v, nnx.Variable))
