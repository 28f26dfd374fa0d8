"""A torch module without its tensors, into whose slots a call puts those that it was given.

It is a deep copy, so that what happens to the user's module does not reach it; and everything that a call sets in
it is put back, so that nothing stays in it between calls.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pytorch2jax._attributes import Container, Held, Snapshot
from pytorch2jax._errors import ConversionError, StateError
from pytorch2jax._inference import Surroundings
from pytorch2jax._internals import storage_address
from pytorch2jax._params import Leaf, Slots
from pytorch2jax._stand_in import StandIn, Values, stand_in
from pytorch2jax._trees import tensors_in


class Skeleton:
    """The private copy of a module, as a `TorchCallable`: its own tensors are parameters, then buffers.

    Args:
        model: the module.
        leaves: these tensors.
        method: the method that a call runs, or None for the module's own call, hooks included.
        eval_mode: the keyword argument of a call that asks for eval mode, for messages.
    """

    def __init__(
        self, model: nn.Module, leaves: Sequence[Leaf], method: str | None = None, eval_mode: str = ""
    ) -> None:
        self._eval_mode = eval_mode
        source = Slots(model)
        tensors = [source[leaf.slots[0]] for leaf in leaves]
        self._values = Values([".".join(leaf.path) for leaf in leaves])
        self._placeholders = [stand_in(t, self._values, i) for i, t in enumerate(tensors)]
        self._module, made_of, hooks = _copy_without(model, tensors, self._placeholders)
        self._run: Callable[..., Any] = self._module if method is None else getattr(self._module, method)
        self._snapshot: Snapshot | None = None
        held = Snapshot(self._module).tensors
        slots, others = Slots(self._module), _other_places(held, self._placeholders)
        own = {id(p) for p in self._placeholders}
        # What was computed from parameters before conversion, or shares their memory; `forward` may replace it, but not
        # use it. Of what shares memory with a buffer that holds if the caller passes the buffer.
        sources = {id(tensor): index for tensor, index in made_of}
        self._made_of = [(where, tensor, sources[id(tensor)]) for where, tensor, _ in held if id(tensor) in sources]
        self._attribute_tensors = [(where, tensor) for where, tensor, _ in held if id(tensor) not in own]
        # Modules that do more in `train()` and `eval()` than setting flags do so in each call.
        self._overrides = any(_overrides_mode(m) for m in self._module.modules())
        self._tables: list[list[tuple[Any, Any]]] = [
            [(slots.table(slot), slot.name) for slot in leaf.slots] + others[id(placeholder)]
            for leaf, placeholder in zip(leaves, self._placeholders, strict=True)
        ]
        self._first_slots = [(*slots.place(leaf.slots[0]), leaf.slots[0].name) for leaf in leaves]
        self._params = [i for i, t in enumerate(tensors) if isinstance(t, nn.Parameter)]
        self._is_param: _IsParam | None = None  # while nobody has asked
        self._hooks = [(i, found) for i, found in enumerate(hooks) if found]
        self._attributes = [(i, found) for i, t in enumerate(self._placeholders) if (found := _own_attributes(t))]
        # Buffers that a caller does not pass keep these values; parameters are always passed.
        self._held = [
            placeholder if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
            for tensor, placeholder in zip(tensors, self._placeholders, strict=True)
        ]
        self._constants: dict[torch.device, list[torch.Tensor]] = {}
        self._flags = {None: _training_flags(self._module)}
        self._source = [(".".join(leaf.path), weakref.ref(t)) for leaf, t in zip(leaves, tensors, strict=True)]
        self._leftovers: dict[tuple[type, int], Container] = {}
        self._lock = threading.RLock()
        self._depth = 0
        self._empty()

    def __call__(
        self, own: list[torch.Tensor], variant: Hashable, args: Any, kwargs: Any
    ) -> tuple[Any, list[torch.Tensor]]:
        self.hold(own, variant)
        out = self._run(*args, **kwargs)
        try:
            return out, [tables[0][0][tables[0][1]] for tables in self._tables]
        except KeyError:  # `del self.weight`; what comes in its place is a plain attribute, if it is no parameter
            return out, [*map(self._after, self._first_slots, own)]

    def _after(self, slot: tuple[nn.Module, Any, str], before: torch.Tensor) -> torch.Tensor:
        """The tensor that is in a slot after a call, or in an attribute of that name; else the one before."""
        module, table, name = slot
        found = table[name] if name in table else vars(module).get(name, before)
        return found if isinstance(found, torch.Tensor) else before

    def plain_function(self) -> None:
        return None

    def hold(self, own: list[torch.Tensor], variant: Hashable) -> None:
        self._values.tensors = own
        for index, attributes in self._attributes:
            vars(own[index]).update(attributes)
        if self._is_param is not None:
            for index in self._params:
                vars(own[index])["_is_param"] = self._is_param
        for index, hooks in self._hooks:
            _register(hooks, own[index])
        for tables, tensor in zip(self._tables, own, strict=True):
            for table, name in tables:
                table[name] = tensor
        self._set_mode(variant)

    def _set_mode(self, train: Any) -> None:
        if self._overrides and train is not None:
            for module, training in self._flags[None]:
                module.training = training
            self._module.train() if train else self._module.eval()
            return
        if train not in self._flags:
            if all(hasattr(module, "training") for module in self._module.modules()):
                self._module.train(train)
            self._flags[train] = _training_flags(self._module)
        for module, training in self._flags[train]:
            if module.training is not training:  # `forward` may have changed it
                module.training = training

    def exclusive(self) -> Skeleton:
        # The tensors stay in their slots until the derivatives are done: `torch.utils.checkpoint` runs parts
        # of `forward` again during backward.
        return self

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        try:
            self._depth -= 1
            if self._depth == 0:
                self._empty()
        finally:
            self._lock.release()

    def _empty(self) -> None:
        self._values.tensors = None
        for tables, placeholder in zip(self._tables, self._placeholders, strict=True):
            for table, name in tables:
                table[name] = placeholder
        for container in list(self._leftovers.values()):
            container.put_back()

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Find out which plain attributes and containers `forward` changes, to put them back after each call."""
        self._snapshot = Snapshot(self._module)
        before = {id(module) for module in self._module.modules()}
        marked, self._is_param = self._is_param, _IsParam()
        try:
            yield
        finally:
            self._is_param = self._is_param if self._is_param.asked else marked
            self._learn()
            self._snapshot = None
        made = [name for name, m in self._module.named_modules() if id(m) not in before and any(_tensors_of(m))]
        if made:
            raise StateError(
                f"{type(self._module).__name__}: {', '.join(made)}: made in `forward`, with parameters or buffers that "
                "JAX does not know of. Run the model once in torch on an example input, then convert it."
            )

    def _learn(self) -> None:
        for container in self._snapshot.changed() if self._snapshot else ():
            self._leftovers.setdefault((type(container), id(container.value)), container)

    def surroundings(self) -> Surroundings:
        return Surroundings(
            has_hooks=bool(self._hooks),
            n_own=len(self._tables),
            left_behind=self._left_behind,
            put_back=self._put_back,
            originals=self._originals,
            held=lambda: self._attribute_tensors,
            advice="pass `example_args=` with tensors or arrays (not specs) of the shapes of the call, or "
            "`output_shapes=`, when you convert it",
            quiet=self._eval_mode,
        )

    def _left_behind(self) -> list[tuple[str, torch.Tensor]]:
        changes = self._snapshot.changes() if self._snapshot else ()
        return [(path, tensor) for path, value in changes for tensor in tensors_in(value)]

    def _put_back(self) -> None:
        self._learn()
        self._empty()

    def _originals(self, n_given: int) -> list[tuple[str, torch.Tensor]]:
        """The tensors of the user's module, as far as they are still there, and what is made of them."""
        tensors = [(path, tensor) for path, ref in self._source if (tensor := ref()) is not None]
        return tensors + [(path, tensor) for path, tensor, source in self._made_of if source < n_given]

    def constants(self, device: torch.device) -> list[torch.Tensor]:
        if device not in self._constants:
            self._constants[device] = [t if isinstance(t, StandIn) else t.to(device) for t in self._held]
        return self._constants[device]


def _other_places(held: Sequence[Held], tensors: Sequence[torch.Tensor]) -> dict[int, list[tuple[Any, Any]]]:
    """The attributes, lists, dicts and objects besides the slots that hold a parameter or buffer, by its id."""
    places: dict[int, list[tuple[Any, Any]]] = {id(t): [] for t in tensors}
    for _, tensor, place in held:
        if id(tensor) in places and place is not None:  # in a tuple, a stand-in does
            places[id(tensor)].append(place)
    return places


def _overrides_mode(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval


def _training_flags(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(m, m.training) for m in module.modules() if hasattr(m, "training")]  # frozen TorchScript has none


class _IsParam:
    """What `isinstance(tensor, nn.Parameter)` looks at: true, and whether anybody has asked.

    Attributes of modules are set as if tensors were none: torch takes no parameter there that is made of another one.
    """

    asked = False

    def __bool__(self) -> bool:
        callers = (sys._getframe(1), sys._getframe(2))  # torch's `__instancecheck__` may be between
        if any(frame.f_code is nn.Module.__setattr__.__code__ for frame in callers):
            return False
        self.asked = True
        return True


class _NotedCopies(TorchFunctionMode):
    """Notes which copies are made of a module's tensors; copies the results of computations, too.

    The old `weight_norm` holds such results.

    Args:
        tensors: the parameters, then the buffers, of the module.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._storages = {storage_address(t): i for i, t in enumerate(tensors) if t.layout is torch.strided}
        self.made_of: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.__deepcopy__ or id(args[0]) in args[1]:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if not tensor.is_leaf:
            copied = memo[id(tensor)] = tensor.detach().clone()
            self.made_of.append((copied, -1))
            return copied
        copied = func(*args)
        if tensor.layout is torch.strided and (source := self._storages.get(storage_address(tensor))) is not None:
            self.made_of.append((copied, source))
        return copied


def _copy_without(
    model: nn.Module, tensors: Sequence[torch.Tensor], placeholders: Sequence[torch.Tensor]
) -> tuple[nn.Module, list[tuple[torch.Tensor, int]], list[list[Any]]]:
    """A deep copy of a module with placeholders for its tensors, what it holds that is made of these, and its hooks."""
    memo: dict[int, Any] = {id(t): p for t, p in zip(tensors, placeholders, strict=True)}
    try:
        with _NotedCopies(tensors) as noted:
            duplicate = copy.deepcopy(model, memo)
            for new, old in zip(duplicate.modules(), model.modules(), strict=True):
                _copy_slots(new, old, memo)
            for placeholder, tensor in zip(placeholders, tensors, strict=True):
                vars(placeholder).update(copy.deepcopy(_own_attributes(tensor), memo))
            hooks = [copy.deepcopy(hooks_of(tensor), memo) for tensor in tensors]
            return duplicate, noted.made_of, hooks
    except Exception as error:
        raise ConversionError(
            f"convert: {type(model).__name__}: expected a module that `copy.deepcopy` can copy, got "
            f"{type(error).__name__}: {error}. Remove what cannot be copied (locks, open files, generators) "
            "from its attributes."
        ) from error


def _tensors_of(module: nn.Module) -> Iterator[bool]:
    return (tensor is not None for table in (module._parameters, module._buffers) for tensor in table.values())


def _copy_slots(new: nn.Module, old: nn.Module, memo: dict[int, Any]) -> None:
    """What a module has in `__slots__`, which `nn.Module` forgets when it is copied."""
    for cls in type(old).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            descriptor = vars(cls).get(name)  # by its mangled name it would be another one's
            if inspect.ismemberdescriptor(descriptor) and hasattr(old, name):
                descriptor.__set__(new, copy.deepcopy(descriptor.__get__(old), memo))


_HOOKS = "_pytorch2jax_hooks"


def hooks_of(tensor: torch.Tensor) -> list[Any]:
    """What `register_hook` has registered on a tensor."""
    return list((tensor._backward_hooks or {}).values())


def _register(hooks: list[Any], tensor: torch.Tensor) -> None:
    """Have hooks act on the gradient of a tensor of a call, once."""
    if tensor.requires_grad and not hasattr(tensor, _HOOKS):
        setattr(tensor, _HOOKS, hooks)
        for hook in hooks:
            tensor.register_hook(hook)


def _own_attributes(tensor: torch.Tensor) -> dict[str, Any]:
    """The attributes that a user has given to a tensor: `parameter.scale = 2.0`."""
    return {name: value for name, value in vars(tensor).items() if not name.startswith("_")}
