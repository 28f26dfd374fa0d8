"""A torch module as a Flax Linen module."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import flax.core.meta
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import torch

from pytorch2jax._errors import ConversionError, MissingLeafError, StateError
from pytorch2jax._module import ConvertedModule
from pytorch2jax._options import Backend
from pytorch2jax._params import Leaf, Path, address, leaf_in, listed, nest

_PARAMS = "params"
_STATISTICS = "batch_stats"
_BUFFERS = "buffers"


def convert_pytnn_to_flax(
    model: torch.nn.Module | Callable[..., Any],
    *,
    copy: bool = True,
    prefix: str = "",
    method: str | None = None,
    example_args: Sequence[Any] = (),
    example_kw: Mapping[str, Any] | None = None,
    output_shapes: Any = None,
    out_specs: Any = None,
    batch_axes: int | Sequence[int | None] | None = None,
    backend: Backend = "torch",
) -> tuple[type[nn.Module], dict[str, Any]]:
    """Turn a torch module into a Flax Linen module class and its parameters.

    Args:
        model: any `torch.nn.Module`, or a method of one. It is not changed, and changes to it later do not reach the
            class.
        copy: see `convert_pytnn_to_jax`.
        prefix: put in front of the keyword `train`, for models whose `forward` has an argument of that name.
        method, example_args, example_kw, output_shapes, out_specs: see `convert_pytnn_to_jax`.
        batch_axes: the axis of the batch in the arguments of `forward`, for arrays that are sharded over devices;
            see `convert_pytnn_to_jax`. Without it, each device runs the model on the whole batch.
        backend: `"torch"` runs torch's kernels; `"xla"` translates the model to JAX operations, see `torch2jax`.

    Returns:
        `(module_class, params)`. `module_class()` takes no arguments, so that `module_class()(x)` works in
        the compact `__call__` of another module, as often as one likes. Its call takes what `forward` takes,
        and `train=False` besides (`True`, `False` or `None`, as for `convert_pytnn_to_jax`).

        Its variables are nested dicts by torch's names: the parameters in the collection `params`, the
        buffers that training changes (running statistics) in `batch_stats`, other buffers in `buffers`.
        `module_class().init(key, x)` returns torch's own values for all of them; the key is not used. It runs
        torch once, as it runs every module; inside `jax.jit` XLA drops that call, whose result nobody uses.
        `params` is the collection `params` of that. Where `apply` gets no `buffers`, it takes those that the
        model had at conversion. Statistics are
        updated with `train=True, mutable=["batch_stats"]`; dropout draws from `rngs={"dropout": key}`.

    Raises:
        ConversionError: the module is of a kind that cannot be converted.
        StateError, StructureError: in `apply`; the message says what to do.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, torch
        >>> Encoder, params = convert_pytnn_to_flax(torch.nn.Linear(3, 8))
        >>> class Classifier(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(2)(Encoder()(x))
        >>> model = Classifier()
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> sorted(variables["params"])
        ['Dense_0', 'Linear_0']
        >>> jax.jit(model.apply)(variables, jnp.ones((4, 3))).shape
        (4, 2)
    """
    converted = ConvertedModule(
        model,
        copy=copy,
        prefix=prefix,
        keywords={"train": False},
        method=method,
        example_args=example_args,
        example_kw=example_kw,
        output_shapes=output_shapes,
        out_specs=out_specs,
        batch_axes=batch_axes,
        backend=backend,
    )

    class Converted(_TorchModule):
        torch_module: ClassVar[ConvertedModule] = converted

    converted.describe(Converted, skips=True)
    return Converted, converted.initial()[0]


class _ConvertedClass(type(nn.Module)):  # type: ignore[misc]
    """The class of converted classes, by which pickle knows them; copies go by another way, and work."""


def _reduced(cls: Any) -> Any:
    """What pickle asks for where it comes to a class, or to an instance of it."""
    converted: ConvertedModule | None = getattr(cls, "torch_module", None)
    return cls.__qualname__ if converted is None else converted.__reduce__()


copyreg.pickle(_ConvertedClass, _reduced)


class _TorchModule(nn.Module, metaclass=_ConvertedClass):
    """What the classes that `convert_pytnn_to_flax` returns have in common.

    Variables are read and written through `self.scope`, because `self.param` refuses names that are
    attributes of a Linen module, and torch modules have submodules called `name` or `parent`.
    """

    torch_module: ClassVar[ConvertedModule]

    def __repr__(self) -> str:
        return f"TorchModule({self.torch_module!r})"

    @nn.nowrap
    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """As Linen's; with a reason where Linen takes a submodule called `params` for a mistake."""
        try:
            return super().apply(*args, **kwargs)
        except flax.errors.ApplyScopeInvalidVariablesStructureError as error:
            if all(leaf.path[0] != _PARAMS for leaf in self.torch_module.layout.params):
                raise
            raise ConversionError(
                f"{self.torch_module.name}: expected no submodule called `params`, which Linen's `apply` takes for a "
                "collection inside of a collection, got one. Rename it, call the module inside of another Linen "
                "module, or use `convert_pytnn_to_nnx` or `convert_pytnn_to_jax`."
            ) from error

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        options, kwargs = self.torch_module.split_keywords(kwargs)
        if self.is_initializing():
            self._initialise(args, kwargs)
        given = {collection: flax.core.meta.unbox(tree) for collection, tree in self.variables.items()}
        if _PARAMS not in given and self.torch_module.layout.params:
            raise MissingLeafError(
                f'{self.torch_module.name}: no collection "params" among {sorted(given)}: expected the variables that '
                '`init` returned, or `apply({"params": params}, ...)`.'
            )
        params = _own(self.torch_module.layout.params, given.get(_PARAMS, {}))
        state, places = self._state_from(given)

        def call(rng: Any) -> tuple[Any, Any]:
            argument = "`rngs={'dropout': jax.random.key(...)}`, a new key for each call"
            return self.torch_module.apply(params, state, args, kwargs, rng=rng, rng_argument=argument, **options)

        # What Linen itself falls back on in `init` is the key for the parameters.
        can_draw = self.has_rng("dropout") or (self.is_initializing() and self.has_rng(_PARAMS))
        rng = self.make_rng("dropout") if can_draw else None
        _note_submodules(self)
        out, new_state = call(rng)
        if not self.is_initializing():
            self._store(state, new_state, places)
        return out

    def _initialise(self, args: Any, kwargs: Any) -> None:
        assert self.scope is not None
        params, state = self.torch_module.initial()
        for name, subtree in params.items():
            self.scope.param(name, lambda _, tree=subtree: _copied(tree))
        statistics, buffers = self.torch_module.split_state((args, kwargs))
        for collection, chosen in ((_STATISTICS, statistics), (_BUFFERS, buffers)):
            for name, subtree in nest(chosen, (leaf_in(state, leaf) for leaf in chosen)).items():
                self.scope.variable(collection, name, lambda tree=subtree: _copied(tree))

    def _state_from(self, given: dict[str, Any]) -> tuple[dict[str, Any], dict[Path, str]]:
        """The buffers, and the collection in which each was found; those that never change may be missing."""
        initial = self.torch_module.initial()[1]
        leaves = self.torch_module.layout.state
        places: dict[Path, str] = {}
        values, missing = [], []
        for leaf in leaves:
            found = [c for c in (_STATISTICS, _BUFFERS) if leaf_in(given.get(c, {}), leaf) is not None]
            places[leaf.path] = found[0] if found else _STATISTICS
            values.append(leaf_in(given[found[0]] if found else initial, leaf))
            if not found and leaf.statistic:
                missing.append(leaf)
        if missing:
            raise MissingLeafError(
                f"{self.torch_module.name}: {listed([address(_STATISTICS, leaf) for leaf in missing])}: missing. "
                "Expected all variables that `init` returned, with the running statistics: "
                '`apply({"params": params, "batch_stats": batch_stats}, ...)`.'
            )
        return nest(leaves, values), places

    def _store(self, old: dict[str, Any], new: dict[str, Any], places: dict[Path, str]) -> None:
        assert self.scope is not None
        leaves = self.torch_module.layout.state
        changed = {places[leaf.path] for leaf in leaves if leaf_in(new, leaf) is not leaf_in(old, leaf)}
        for collection in sorted(changed):
            if not self.is_mutable_collection(collection):
                raise StateError(
                    f"{self.torch_module.name}: {collection}: changed by the forward pass, expected the collection to "
                    f"be mutable. Call `apply(..., mutable=['{collection}'])`, or with `train=False`."
                )
            here = [leaf for leaf in leaves if places[leaf.path] == collection]
            for name, subtree in nest(here, (leaf_in(new, leaf) for leaf in here)).items():
                self.scope.put_variable(collection, name, subtree)


class _Submodule(nn.Module):
    """A torch submodule as a row of `tabulate`, which wants a Linen module for each."""

    def __call__(self) -> tuple[()]:
        return ()


def _note_submodules(module: _TorchModule) -> None:
    """Add a row for each torch submodule, if this call is one of `tabulate`'s."""
    tables = nn.module._context.call_info_stack
    if not tables:
        return
    scope: Any = module.scope
    for path, class_name in module.torch_module.submodules:
        row = type(class_name, (_Submodule,), {})()
        index = tables[-1].get_call_index()
        where = ((*module.path, *path), row, scope.rngs, scope.mutable)
        call = nn.module._CallInfo(index, *where, method="__call__", args=(), kwargs={}, outputs=())
        tables[-1].calls.append(call)


def _own(leaves: tuple[Leaf, ...], tree: Any) -> dict[str, Any]:
    """The part of a collection that belongs to these leaves; a parent may share its scope with others."""
    names = {leaf.path[0] for leaf in leaves}
    own = {name: subtree for name, subtree in tree.items() if name in names}
    return own if own or not leaves else dict(tree)  # flat names of a state_dict, say, about which errors tell


def _copied(tree: Any) -> Any:
    """Copies, so that donating what `init` returned leaves the originals alone."""
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(tree)):
        raise StateError(
            "init: expected the converted weights, got deleted arrays: the params that the conversion returned "
            "were donated to a jitted function. Copy them before donating, or convert the model again."
        )
    return jax.tree.map(jnp.copy, tree)
