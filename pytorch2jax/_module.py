"""A torch module as a pure function of its parameters and buffers: what the adapters have in common."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Unpack, overload

import jax
import numpy as np
import torch
from torch import nn

from pytorch2jax._arguments import parameters_of, take_apart
from pytorch2jax._bound import BoundFunction
from pytorch2jax._engines import run as run_program
from pytorch2jax._errors import ConversionError, DeviceError, InferenceError, OptionError, RandomnessError
from pytorch2jax._function import TorchFunction
from pytorch2jax._inference import Inferred
from pytorch2jax._options import (
    Backend,
    ConverterOptions,
    Examples,
    Options,
    checked_backend,
    normalised_shapes,
    shapes_key,
)
from pytorch2jax._params import (
    Leaf,
    arrays_of,
    check_module,
    check_shapes,
    flatten,
    is_dense,
    layout_of,
    nest,
    own_tensors,
    unwrapped,
)
from pytorch2jax._rng import seed_from_key
from pytorch2jax._sharding import run_on_shards, splitting, whole_shapes
from pytorch2jax._skeleton import Skeleton, hooks_of


@overload
def convert_pytnn_to_jax(
    model: nn.Module | Callable[..., Any], *, with_state: Literal[False] = False, **options: Unpack[ConverterOptions]
) -> tuple[Callable[..., Any], dict[str, Any]]: ...


@overload
def convert_pytnn_to_jax(
    model: nn.Module | Callable[..., Any], *, with_state: Literal[True], **options: Unpack[ConverterOptions]
) -> tuple[Callable[..., tuple[Any, dict[str, Any]]], dict[str, Any], dict[str, Any]]: ...


@overload
def convert_pytnn_to_jax(
    model: nn.Module | Callable[..., Any], *, with_state: bool, **options: Unpack[ConverterOptions]
) -> tuple[Any, ...]: ...


def convert_pytnn_to_jax(
    model: nn.Module | Callable[..., Any],
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
) -> tuple[Any, ...]:
    """Turn a torch module into a pure JAX function and its parameters.

    Args:
        model: any `nn.Module`, or a method of one. It is not changed, and changes to it later do not reach the
            function.
        with_state: `True` makes the buffers (running statistics and the like) an argument and a result.
            `False` keeps them, at their present values, inside the function.
        copy: `True` copies the parameters, so that torch can no longer reach them. `False` shares memory
            with `model`: conversion takes no time and no memory, and when torch trains `model` further, in
            place, the JAX arrays change with it, against what JAX promises of arrays. Use it when the
            torch module is not used again.
        prefix: put in front of the names `train` and `rng` of the function's own keywords, for models whose
            `forward` has arguments of these names: with `prefix="jax_"` the function's own are `jax_train`
            and `jax_rng`, and `train` reaches `forward`.
        method: the method that a call runs in the place of `forward`, by its name: `method="encode"`. A bound
            method instead of the module does the same: `convert_pytnn_to_jax(model.encode)`.
        example_args, example_kw: optional arguments like those of later calls: tensors, arrays or
            `jax.ShapeDtypeStruct`. A model that reads values is tried on them where it is traced under `jax.jit`,
            and not on made-up ones, which it may not accept.
        output_shapes: what a call returns, as for `torch2jax`: for models that can run on no values but real ones.
        out_specs: how the outputs are sharded, for arguments that are sharded along explicit axes of a mesh, as for
            `torch2jax`; such calls change no buffers.
        batch_axes: the axis of the batch in the arguments of `forward`, for arrays that are sharded over devices;
            see `torch2jax`. Without it, each device runs the model on the whole batch.
        backend: `"torch"` runs torch's kernels; `"xla"` translates the model to JAX operations, see `torch2jax`.

    Returns:
        `(apply, params)`, with `apply(params, *args, rng=None, train=False, **kwargs)` returning what the
        module returns; or with `with_state=True` `(apply, params, state)`, with
        `apply(params, state, *args, ...)` returning `(out, new_state)`.

        `params` and `state` are nested dicts by module path with torch's leaf names, arrays in torch's
        layout: `{"encoder": {"weight": ..., "bias": ...}}`. Tied weights are one leaf, whose gradient is the
        sum. Frozen parameters are leaves too; `trainable_mask` tells them apart. `train=False` means
        `model.eval()`, `True` means `model.train()`, `None` keeps each submodule's own flag. `rng` is a JAX
        key, from which dropout and the like draw. While `jax_enable_x64` is off, 64-bit parameters are
        32-bit arrays, and 64-bit again inside of torch.

    Raises:
        ConversionError: the module is of a kind that cannot be converted; the message says why.
        OptionError: `batch_axes` do not fit the arguments, or an output; in `apply`.
        StructureError: `params` or `state` is not what the conversion returned.
        StateError: the module draws random numbers and got no `rng`; or the call changes buffers, and the function
            was converted without `with_state`.
        See `torch2jax` for what a call may raise besides.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from torch import nn
        >>> apply, params = convert_pytnn_to_jax(nn.Linear(3, 2))
        >>> jax.jit(apply)(params, jnp.ones((4, 3))).shape
        (4, 2)
        >>> jax.grad(lambda p: apply(p, jnp.ones((4, 3))).sum())(params)["bias"]
        Array([4., 4.], dtype=float32)
    """
    keywords = {"rng": None, "train": False}
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

    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        options, kwargs = converted.split_keywords(kwargs)
        return converted.apply(params, None, args, kwargs, **options)[0]

    def apply_with_state(params: Any, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        options, kwargs = converted.split_keywords(kwargs)
        return converted.apply(params, state, args, kwargs, **options)

    params, state = converted.take_initial()
    if with_state:
        converted.describe(apply_with_state, "params", "state")
        return apply_with_state, params, state
    converted.describe(apply, "params")
    return apply, params


class ConvertedModule:
    """A torch module as a function `(params, state, args, kwargs) -> (out, new_state)`; adapters wrap it.

    Args:
        model: the module.
        copy: whether to copy its parameters and buffers.
        keywords: the names and defaults of the adapter's own keyword arguments.
        prefix: what the user wants in front of these names.
        method: the name of the method that runs in the place of `forward`, or None; see `convert_pytnn_to_jax`.
        example_args, example_kw, output_shapes, out_specs, batch_axes, backend: as for `torch2jax`.
    """

    def __init__(
        self,
        model: Any,
        *,
        copy: bool,
        keywords: Mapping[str, Any],
        prefix: str = "",
        method: str | None = None,
        example_args: Sequence[Any] = (),
        example_kw: Mapping[str, Any] | None = None,
        output_shapes: Any = None,
        out_specs: Any = None,
        batch_axes: Any = None,
        backend: str = "torch",
    ) -> None:
        model, method = _model_and_method(model, method)
        model = _checked(unwrapped(model)[0], backend)
        run = _method_of(model, method)
        self.name = type(model).__name__ if method is None else f"{type(model).__name__}.{method}"
        self._parameters = parameters_of(run)
        _check_keywords(f"{type(model).__name__}.{method or 'forward'}", self._parameters or (), keywords, prefix)
        self._accepted = None if self._parameters is None else frozenset(p.name for p in self._parameters)
        own_doc = run.__doc__ if method is not None else type(model).__doc__
        self._doc = inspect.cleandoc(own_doc or "")
        self._keywords = {f"{prefix}{name}": (name, default) for name, default in keywords.items()}
        tables = (model._modules.items(), model._parameters.items(), model._buffers.items())
        # Of the torch module's own submodules, parameters and buffers, save those that an adapter has, too.
        self.names = frozenset(name for table in tables for name, _ in table) - _ADAPTERS_OWN
        self.layout = layout_of(model)
        # The path and the class of each submodule, for tables of them.
        self.submodules = tuple((tuple(k.split(".")), type(m).__name__) for k, m in model.named_modules() if k)
        self._params: list[jax.Array] | None = arrays_of(model, self.layout.params, copy=copy)
        self._state = arrays_of(model, self.layout.state, copy=True)
        self._params_order = _Order("params", self.layout.params)
        self._state_order = _Order("state", self.layout.state)
        self._given = {plain: given for given, (plain, _) in self._keywords.items()}
        self._eval_mode = eval_mode = (
            f"{self._given['train']}=False" if "train" in self._given else f"{self._given['inference']}=True"
        )
        call = Skeleton(model, (*self.layout.params, *self.layout.state), method, eval_mode)
        own = own_tensors("params", self.layout.params, self._params)
        own += own_tensors("state", self.layout.state, self._state)
        split = splitting(self.name, batch_axes, None)
        if not isinstance(example_args, (tuple, list)):
            raise OptionError(
                f"{self.name}: example_args: expected a tuple of arguments, got {type(example_args).__name__}. For one "
                "argument: `example_args=(x,)`."
            )
        examples = Examples.of(tuple(example_args), dict(example_kw or {}))
        backend = checked_backend(self.name, backend)
        options = Options(splitting=split, dtypes=examples.dtypes, backend=backend)
        self._function = TorchFunction(self.name, call, identity=call, own=own, options=options)
        self._output_shapes, self._out_specs = output_shapes, out_specs
        if examples.positions:
            self._check_on(examples)

    def _check_on(self, examples: Examples) -> None:
        """Find out what the module does on the examples, in eval mode, and keep them to try it on."""
        params, state = self.initial()
        self._function.keep_examples(examples)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.apply(params, state, args, kwargs, rng=lambda: jax.random.key(0), train=False)[0]

        if self._out_specs is None:
            examples.check(call)

    def __deepcopy__(self, memo: dict[int, Any]) -> ConvertedModule:
        return self  # it has no state of its own

    def __reduce__(self) -> Any:
        raise ConversionError(
            f"pickle: {self.name}: expected something that can be pickled, got a converted module, which holds a torch "
            "module and compiled programs. Save its parameters (orbax, safetensors), and convert the model again."
        )

    def initial(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters and state as they were at conversion."""
        assert self._params is not None
        return nest(self.layout.params, self._params), self.initial_state()

    def take_initial(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same, without keeping the parameters alive here."""
        params, state = self.initial()
        self._params = None
        return params, state

    def initial_state(self) -> dict[str, Any]:
        """The buffers as they were at conversion."""
        return nest(self.layout.state, self._state)

    def split_keywords(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The adapter's own keyword arguments, by their plain names, and those for `forward`."""
        options = {name: kwargs.get(given, default) for given, (name, default) in self._keywords.items()}
        rest = {name: value for name, value in kwargs.items() if name not in self._keywords}
        if rest and not _OTHERS.isdisjoint(rest):
            self._check_foreign(rest)
        return options, rest

    def _check_foreign(self, kwargs: Mapping[str, Any]) -> None:
        """Raise for keywords of other frameworks that would do nothing in `forward`."""
        for name in kwargs:
            if name in _OTHERS and self._accepted is not None and name not in self._accepted:
                meant = _meant(name, kwargs[name], self._given)
                takes = ", ".join(self._keywords)
                raise OptionError(
                    f"{self.name}: `{name}`: expected a keyword that `forward` names, or one of the converted module's "
                    f"own ({takes}), got one of another framework, which would do nothing.{meant}"
                )

    def __repr__(self) -> str:
        sizes = sum(math.prod(leaf.shape) for leaf in self.layout.params)
        return f"{self.name}, {_in_words(sizes)} parameters, backend={self._function.options.backend!r}"

    def signature(self, *leading: str) -> inspect.Signature:
        """How a converted function is called, for `help` and editors: what `forward` takes, and the keywords here."""
        kinds = inspect.Parameter
        rest = self._parameters
        taken = {p.name for p in rest or ()} | set(self._keywords)
        if rest is None or not taken.isdisjoint(leading) or any(p.kind is kinds.POSITIONAL_ONLY for p in rest):
            rest = (kinds("args", kinds.VAR_POSITIONAL), kinds("kwargs", kinds.VAR_KEYWORD))
        own = [kinds(given, kinds.KEYWORD_ONLY, default=d) for given, (_, d) in self._keywords.items()]
        variable = [p for p in rest if p.kind is kinds.VAR_KEYWORD]
        first = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in leading]
        return inspect.Signature([*first, *(p for p in rest if p not in variable), *own, *variable])

    def doc(self) -> str:
        """The torch module's docstring, for what it is converted to."""
        return f"{self!r}\n\n{self._doc}".rstrip()

    def describe(self, function: Any, *leading: str, skips: bool = False) -> None:
        """Give a function, or a class, the name, the signature and the docstring of the torch module."""
        function.__name__ = function.__qualname__ = self.name
        function.__doc__ = self.doc()
        if not skips:
            function.__signature__ = self.signature(*leading)

    def split_state(self, call: tuple[Any, Any] | None) -> tuple[list[Leaf], list[Leaf]]:
        """The buffers that training changes, and the others.

        Args:
            call: the args and kwargs of an example call, on which a forward pass in train mode tells what it
                writes to (on fake tensors), or None. What normalisations keep counts in any case, also where
                such a pass is not possible (a batch of one).
        """
        leaves = self.layout.state
        statistics = {leaf for leaf in leaves if leaf.statistic}
        if call is not None and len(statistics) < len(leaves):
            statistics |= self._written_in_training(*call)
        return [leaf for leaf in leaves if leaf in statistics], [leaf for leaf in leaves if leaf not in statistics]

    def _written_in_training(self, args: Any, kwargs: Any) -> set[Leaf]:
        try:
            _, program = self._bind(*self.initial(), args, kwargs, True)
        except InferenceError:
            return set()
        n_params = len(self.layout.params)
        return {self.layout.state[i - n_params] for i in program.inferred.changed if i >= n_params}

    def inferred(self, args: Any, kwargs: Any, *, train: bool) -> Inferred:
        """What is known of a call like this before it runs; errors as those of the call."""
        return self._bind(*self.initial(), args, kwargs, train)[1].inferred

    def copied_bytes(self, args: Any, kwargs: Any) -> int:
        """How many bytes a call in eval mode copies between the frameworks: what torch writes to, and its outputs."""
        _, program = self._bind(*self.initial(), args, kwargs, False)
        copied = [program.in_specs[i] for i in program.copied_inputs]
        outputs = [] if program.computes_in_place else list(program.out_specs)
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in (*copied, *outputs))

    def _bind(
        self,
        params: Any,
        state: Any,
        args: Any,
        kwargs: Any,
        train: bool | None,
        local: Callable[[Any], Any] = whole_shapes,
    ) -> tuple[list[Any], BoundFunction]:
        """The program for a call, and its inputs: parameters, state if it is given, and arguments."""
        own = self._params_order.values(self.name, params)
        if state is not None:
            own += self._state_order.values(self.name, state)
        arguments = take_apart(self.name, args, kwargs)
        if self._output_shapes is None:
            return [*own, *arguments.arrays], self._function.bind(own, arguments, variant=train)
        shapes = local(normalised_shapes(self.name, self._output_shapes, arguments.arrays))
        program = self._function.bind(
            own, arguments, variant=train, output_shapes=shapes, output_key=shapes_key(shapes)
        )
        return [*own, *arguments.arrays], program

    def apply(
        self,
        params: Any,
        state: Any,
        args: Any,
        kwargs: Any,
        *,
        rng: Any,
        train: bool | None,
        rng_argument: str = "`rng=jax.random.key(...)`, a new key for each call",
    ) -> tuple[Any, Any]:
        """Call the module; with `state=None` on the buffers that it had at conversion.

        Args:
            params, state: nested dicts.
            args, kwargs: what `forward` gets.
            rng: a JAX key, or a function that gives one and is called where one is needed, or None.
            train: which mode the module is in; None for the mode of each submodule at conversion.
            rng_argument: how a user of the adapter passes a key, for messages.

        Returns:
            What the module returned, and the new state.
        """
        if type(train) is not bool:
            train = self.checked_flag("train", train)
        if self._out_specs is None:
            return self._apply(params, state, args, kwargs, rng, train, rng_argument)
        return self._apply_on_shards(params, state, args, kwargs, rng, train, rng_argument), state

    def _apply_on_shards(
        self, params: Any, state: Any, args: Any, kwargs: Any, rng: Any, train: bool | None, rng_argument: str
    ) -> Any:
        """What the module returns, computed on each shard of what is sharded along explicit axes of a mesh."""

        def run(leading: Any, kwargs: Any, *local: Any) -> Any:
            params, state, *args = leading
            out, new = self._apply(params, state, tuple(args), kwargs, rng, train, rng_argument, *local)
            if new is not state:
                raise DeviceError(
                    f"{self.name}: out_specs: expected a call that changes no buffer, which each device would change "
                    "in its own way, got one that does. Call it in eval mode, or convert with `batch_axes` and use "
                    "automatic axes (`AxisType.Auto`), where the new statistics are the mean."
                )
            return out

        return run_on_shards(self.name, run, (params, state, *args), kwargs, self._out_specs)

    def _apply(
        self,
        params: Any,
        state: Any,
        args: Any,
        kwargs: Any,
        rng: Any,
        train: bool | None,
        rng_argument: str,
        local: Callable[[Any], Any] = whole_shapes,
    ) -> tuple[Any, Any]:
        inputs, program = self._bind(params, state, args, kwargs, train, local)
        values = list(inputs)
        # Of a model whose outputs are declared, it may not be known whether it draws; a call without a key finds out.
        if program.inferred.random and not (rng is None and program.is_guess):
            if rng is None:
                raise RandomnessError(
                    f"{self.name}: the model draws random numbers, expected a JAX key, got none. Pass {rng_argument}."
                    + (f" With `{self._eval_mode}` dropout does nothing." if train else "")
                )
            seed = seed_from_key(self.name, rng() if callable(rng) else rng)
            program = program.with_seed(seed.shape[0], shared=True)
            inputs.insert(0, seed)
        out, changed = program.rebuild(run_program(program, *inputs))
        if state is None or not changed:
            return out, state
        first, end = len(self.layout.params), len(self.layout.params) + len(self.layout.state)
        return out, nest(self.layout.state, [changed.get(i, values[i]) for i in range(first, end)])

    def checked_flag(self, name: str, value: Any) -> bool | None:
        """A flag of the adapter's, `train` or `inference`, which may be None or a number of NumPy's.

        Raises:
            OptionError: it is something else.
        """
        if value is None:
            return None
        if isinstance(value, (int, np.bool_)):
            return bool(value)
        given = self._given.get(name, name)
        message = (
            f"{self.name}: `{given}` has to be a Python bool (or None, for the mode of each submodule), got "
            f"{type(value).__name__}."
        )
        if isinstance(value, jax.core.Tracer):
            message += f' Under `jax.jit` it is a static argument: `jax.jit(f, static_argnames="{given}")`.'
        raise OptionError(message)


class FromTorch:
    """A class attribute of an adapter's modules, which on an instance tells of the torch module inside.

    Args:
        of_class: the value on the class.
        of_instance: gives the value on an instance, of its `torch_module`.
    """

    def __init__(self, of_class: Any, of_instance: Callable[[ConvertedModule], Any]) -> None:
        self._of_class, self._of_instance = of_class, of_instance

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self._of_class if instance is None else self._of_instance(instance.torch_module)


class _Order:
    """Takes the leaves of a nested dict in a fixed order; at once where it is built as we build it."""

    def __init__(self, root: str, leaves: Sequence[Leaf]) -> None:
        self._root = root
        self._leaves = leaves
        self._treedef: Any
        positions, self._treedef = jax.tree.flatten(nest(leaves, range(len(leaves))))
        self._positions = sorted(range(len(leaves)), key=positions.__getitem__)

    def values(self, call: str, tree: Any) -> list[Any]:
        found, treedef = jax.tree.flatten(tree)
        if treedef == self._treedef:
            values = [found[i] for i in self._positions]
        else:
            values = flatten(call, self._root, self._leaves, tree)
        return check_shapes(call, self._root, self._leaves, values)


def _checked(model: nn.Module, backend: str) -> nn.Module:
    """The module, if it is of a kind that can be converted."""
    check_module("convert", model)
    for name, module in model.named_modules():
        if any(map(nn.parameter.is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise ConversionError(
                f"convert: {name or type(model).__name__}: a lazy module has no parameters yet. Run the model once "
                "on an example input, then convert it."
            )
        _check_tensors(name, module)
        _check_hooks(name, module, backend)
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic")):
            raise ConversionError(
                f"convert: {name or type(model).__name__}: a quantised module ({type(module).__name__}) has packed "
                "integer weights, which JAX cannot hold. Convert the model as it was before quantisation."
            )
    return model


def _check_hooks(name: str, module: nn.Module, backend: str) -> None:
    """Raise where a parameter has hooks that nobody would call."""
    for param_name, param in module._parameters.items():
        if param is None:
            continue
        where = f"convert: {name + '.' if name else ''}{param_name}"
        if param._post_accumulate_grad_hooks:
            raise ConversionError(
                f"{where}: expected a parameter that torch does not train, got one with a hook that runs when its "
                "`.grad` is there (`register_post_accumulate_grad_hook`), which in JAX never is. Remove the hook, and "
                "have optax do what it does."
            )
        if backend != "torch" and hooks_of(param):
            raise ConversionError(
                f"{where}: expected gradients without hooks, which JAX computes without torch, got a parameter with a "
                'hook (`register_hook`). Remove it, and change the gradient in JAX, or use `backend="torch"`, which '
                "calls it."
            )


def _check_tensors(name: str, module: nn.Module) -> None:
    """Raise where a module has parameters that JAX cannot hold, or one that torch itself stumbles over.

    Buffers of such kinds stay in the module, as constants.
    """
    for tensor_name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and tensor.is_meta:
            raise ConversionError(
                f"convert: {name + '.' if name else ''}{tensor_name}: is on torch's meta device and has no values: "
                "load the weights first (`load_state_dict(..., assign=True)`), or make the model without "
                "`torch.device('meta')`."
            )
    for tensor_name, tensor in module._parameters.items():
        if tensor is not None and not is_dense(tensor):
            kind = "nested tensor" if tensor.is_nested else type(tensor).__name__
            kind = f"{kind} of layout {tensor.layout}" if tensor.layout != torch.strided else kind
            raise ConversionError(
                f"convert: {name + '.' if name else ''}{tensor_name}: expected a dense parameter, got a {kind}, which "
                "JAX cannot hold. Keep its values in a dense parameter, and make it of them in `forward`."
            )
    if "training" in module._parameters or "training" in module._buffers:
        raise ConversionError(
            f"convert: {name or type(module).__name__}: expected the attribute `training` to be the module's mode, got "
            "a parameter or buffer of that name, with which torch's own `train()` and `eval()` fail. Give it another "
            "name."
        )


_ADAPTERS_OWN = {"params", "batch_stats", "buffers", "rngs", "deterministic", "torch_module"}  # attributes

_OTHERS = frozenset({"deterministic", "training", "is_training", "inference", "use_running_average", "train"})
"""How the frameworks call the flag that tells training from inference."""


def _meant(name: str, value: Any, own: Mapping[str, str]) -> str:
    """The converted module's own way to say what a flag of another framework says."""
    if type(value) is not bool:
        return ""
    train = value if "train" in name else not value
    if "train" in own:
        return f" Pass `{own['train']}={train}`."
    return f" Pass `{own['inference']}={not train}`." if "inference" in own else ""


def _model_and_method(model: Any, method: Any) -> tuple[Any, str | None]:
    """A module, and the name of the method to run; of a bound method of a module, these two.

    Raises:
        OptionError: `method` is no method of the module.
    """
    if inspect.ismethod(model) and isinstance(model.__self__, nn.Module):
        if method is not None:
            raise OptionError(
                f"convert: method: expected one method, got the bound method `{model.__name__}` and {method!r}. Pass "
                "the module and `method=`, or the bound method alone."
            )
        model, method = model.__self__, model
    if method is None or isinstance(method, str):
        return model, None if method in (None, "forward", "__call__") else method
    if not (inspect.ismethod(method) or inspect.isfunction(method)):
        raise OptionError(f"convert: method: expected the name of a method, or the method, got {method!r}.")
    owner = getattr(method, "__self__", model)
    if owner is not model:
        raise OptionError(
            f"convert: method: expected a method of the module that is converted, got `{method.__name__}` of another "
            f"{type(owner).__name__}. Pass its name."
        )
    name = _name_of_method(model, getattr(method, "__func__", method))
    return model, None if name in ("forward", "__call__") else name


def _name_of_method(model: Any, function: Any) -> str:
    """Under which name a module has a function as a method; its own name may be another's by now."""
    own = getattr(function, "__name__", "")
    names = {name for cls in type(model).__mro__ for name in vars(cls)} | set(vars(model))
    for name in sorted(names, key=lambda name: (name != own, name)):
        found = inspect.getattr_static(model, name, None)
        if getattr(found, "__func__", found) is function:
            return name
    raise OptionError(
        f"convert: method: expected a method that {type(model).__name__} has, got {own or function!r}, which it has "
        "under no name (a method of a parent class that it overrides, or a function from elsewhere). Give the module "
        "a method that calls it."
    )


def _method_of(model: nn.Module, method: str | None) -> Callable[..., Any]:
    if method is None:
        return model.forward
    found = getattr(model, method, None)
    if not callable(found) or isinstance(found, nn.Module):
        what = f"the submodule `{method}`, which is converted as `model.{method}`" if callable(found) else repr(method)
        raise OptionError(f"convert: method: expected a method of {type(model).__name__}, got {what}.")
    run: Callable[..., Any] = found
    return run


def _in_words(n: int) -> str:
    """A large number, to three digits: `109M`."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}" if n < 999.5 * size else f"{n // size}{unit}"
    return str(n)


def _check_keywords(name: str, parameters: Iterable[inspect.Parameter], keywords: Iterable[str], prefix: str) -> None:
    """Raise where a method has an argument with the name of one of the adapter's own."""
    taken = {p.name for p in parameters} & {f"{prefix}{name}" for name in keywords}
    if taken:
        names = ", ".join(sorted(taken))
        raise ConversionError(
            f"convert: {name} has arguments that the converted function needs for "
            f"itself: {names}. Convert with another prefix for these, such as `prefix='jax_'`; then `jax_"
            f"{sorted(taken)[0]}` is the function's own, and `{sorted(taken)[0]}` reaches `forward`."
        )
