"""A torch module as an Equinox module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Unpack, overload

import equinox as eqx
import torch
import wadler_lindig

from pytorch2jax._errors import StateError
from pytorch2jax._module import ConvertedModule, FromTorch
from pytorch2jax._options import Backend, ConverterOptions


@overload
def convert_pytnn_to_equinox(
    model: torch.nn.Module | Callable[..., Any],
    *,
    with_state: Literal[False] = False,
    **options: Unpack[ConverterOptions],
) -> TorchModule: ...


@overload
def convert_pytnn_to_equinox(
    model: torch.nn.Module | Callable[..., Any], *, with_state: Literal[True], **options: Unpack[ConverterOptions]
) -> tuple[TorchModule, eqx.nn.State]: ...


@overload
def convert_pytnn_to_equinox(
    model: torch.nn.Module | Callable[..., Any], *, with_state: bool, **options: Unpack[ConverterOptions]
) -> Any: ...


def convert_pytnn_to_equinox(
    model: torch.nn.Module | Callable[..., Any],
    *,
    with_state: bool = False,
    copy: bool = True,
    prefix: str = "",
    method: str | None = None,
    example_args: Sequence[Any] = (),
    example_kw: Mapping[str, Any] | None = None,
    output_shapes: Any = None,
    out_specs: Any = None,
    batch_axes: int | Sequence[int | None] | None = None,
    backend: Backend = "torch",
) -> Any:
    """Turn a torch module into an Equinox module.

    Args:
        model: any `torch.nn.Module`, or a method of one. It is not changed, and changes to it later do not reach the
            result.
        with_state: `True` puts the buffers (running statistics and the like) into an `eqx.nn.State`. `False`
            keeps them, at their present values, inside the module.
        copy: see `convert_pytnn_to_jax`.
        prefix: put in front of the keywords `key`, `state` and `inference` of a call, for models whose `forward`
            has arguments of these names.
        method, example_args, example_kw, output_shapes, out_specs: see `convert_pytnn_to_jax`.
        batch_axes: the axis of the batch in the arguments of `forward`, for arrays that are sharded over devices;
            see `convert_pytnn_to_jax`. Without it, each device runs the model on the whole batch.
        backend: `"torch"` runs torch's kernels; `"xla"` translates the model to JAX operations, see `torch2jax`.

    Returns:
        An `eqx.Module`, or with `with_state=True` `(module, eqx.nn.State)`. Its array leaves are the parameters, in
        the field `params`, a nested dict by torch's names. It is called with what `forward` takes, and with
        `key=` for dropout; with state, also with `state=` (or the state as the last positional argument), and
        then returns `(out, new_state)`. It starts with `inference=True`, which `eqx.nn.inference_mode` changes for
        a whole model and `m(..., inference=False)` for one call. A module whose field `inference` is None
        keeps each submodule's own flag at conversion.

    Raises:
        ConversionError: the module is of a kind that cannot be converted.
        StateError, StructureError: in a call; the message says what to do.

    Example:
        >>> import equinox as eqx, jax.numpy as jnp, torch
        >>> m = convert_pytnn_to_equinox(torch.nn.Linear(3, 2))
        >>> eqx.filter_jit(m)(jnp.ones((4, 3))).shape
        (4, 2)
        >>> eqx.filter_grad(lambda m: m(jnp.ones((4, 3))).sum())(m).params["bias"]
        Array([4., 4.], dtype=float32)
    """
    keywords = {"key": None, "state": None, "inference": None}
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
    params, state = converted.take_initial()
    if not with_state:
        return TorchModule(params, None, converted)
    return eqx.nn.make_with_state(TorchModule)(params, state, converted)


class TorchModule(eqx.Module):
    __doc__ = FromTorch("What `convert_pytnn_to_equinox` returns; see there.", ConvertedModule.doc)

    params: dict[str, Any]
    inference: bool | None
    state_index: eqx.nn.StateIndex[Any] | None
    torch_module: ConvertedModule = eqx.field(static=True)

    def __init__(self, params: dict[str, Any], state: dict[str, Any] | None, converted: ConvertedModule) -> None:
        self.params = params
        self.inference = True
        self.state_index = None if state is None else eqx.nn.StateIndex(state)
        self.torch_module = converted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        options, kwargs = self.torch_module.split_keywords(kwargs)
        state = options["state"]
        if state is None and args and isinstance(args[-1], eqx.nn.State):
            args, state = args[:-1], args[-1]
        inference = self.inference if options["inference"] is None else options["inference"]
        if type(inference) is not bool:
            inference = self.torch_module.checked_flag("inference", inference)
        train = None if inference is None else not inference
        old = None if self.state_index is None else self._checked(state).get(self.state_index)
        argument = "`key=jax.random.key(...)`, a new key for each call"
        out, new = self.torch_module.apply(
            self.params, old, args, kwargs, rng=options["key"], train=train, rng_argument=argument
        )
        if self.state_index is None:
            return out
        return out, state if new is old else state.set(self.state_index, new)

    def __repr__(self) -> str:
        return f"TorchModule({self.torch_module!r})"

    def __pdoc__(self, **kwargs: Any) -> Any:
        return wadler_lindig.TextDoc(repr(self))

    def _trees_of_torch(self, state: Any) -> tuple[Any, Any]:
        """The parameters and buffers, for the way back to torch."""
        if self.state_index is None and state is None:
            return self.params, self.torch_module.initial_state()
        if isinstance(state, eqx.nn.State) and self.state_index is not None:
            state = state.get(self.state_index)
        return self.params, state

    def _checked(self, state: Any) -> eqx.nn.State:
        if not isinstance(state, eqx.nn.State):
            raise StateError(
                f"{self.torch_module.name}: state: expected the eqx.nn.State that the conversion returned, got "
                f"{type(state).__name__}. Call `out, state = module(x, state=state)`."
            )
        return state
