"""A torch function as a graph: one run on fake tensors that writes down each operator."""

from __future__ import annotations

import functools
import gc
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pytorch2jax._autograd_functions import custom_functions
from pytorch2jax._errors import CaptureError, Pytorch2JaxError
from pytorch2jax._holders import forget
from pytorch2jax._internals import fake_tensor_mode, is_functorch_active, operators_on_functions
from pytorch2jax._torch_state import forked_generators
from pytorch2jax.xla._control_flow import handlers
from pytorch2jax.xla._decompositions import FUNCTIONS, INSTEAD_OF_DETACHING, batch_norm_with_cumulative_average
from pytorch2jax.xla._dtype_rules import NoKernelError
from pytorch2jax.xla._graph import Graph, pruned
from pytorch2jax.xla._hand_written import record_function
from pytorch2jax.xla._hooks import HOOKS, refused, refusing_module_hooks
from pytorch2jax.xla._internals import cumulative_batch_norms, is_followed_by_autograd
from pytorch2jax.xla._recorder import Recorder
from pytorch2jax.xla._recurrent import LAYERS

Call = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


def capture(
    name: str,
    call: Call,
    inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
    *,
    active: bool = False,
    keeps: bool = False,
) -> Graph:
    """The graph of a function for inputs of these shapes and dtypes.

    Args:
        name: the function's name, for messages.
        call: flat tensors in, flat tensors out.
        inputs: shapes and dtypes of the inputs.
        active: whether they require gradients, for functions that differentiate inside.
        keeps: whether the function keeps tensors. Those of the capture, which have no values, are taken away from it.

    Raises:
        CaptureError: the function does what no graph can: it depends on values, or leaves torch.
    """
    recorder = Recorder(name, active=active)
    try:
        with torch.inference_mode(False), torch.enable_grad(), forked_generators(host=True):
            return _recorded(recorder, call, inputs, active=active)
    finally:
        if keeps:
            seen = recorder.seen()
            del recorder
            gc.collect()
            forget([t for ref in seen if (t := ref()) is not None])


def _recorded(
    recorder: Recorder, call: Call, inputs: Sequence[tuple[tuple[int, ...], torch.dtype]], *, active: bool
) -> Graph:
    with fake_tensor_mode():
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in inputs]
        if active:  # and are no leaves, so that the function may write to them
            tensors = [t.requires_grad_() * 1 if t.is_floating_point() or t.is_complex() else t for t in tensors]
        taken = [recorder.take(tensor) for tensor in tensors]
        recorder.arguments += tensors
        try:
            with (
                operators_on_functions(handlers(recorder)),
                custom_functions(functools.partial(record_function, recorder)),
                cumulative_batch_norms(batch_norm_with_cumulative_average),
                refusing_module_hooks(recorder.name),
                _Instead(recorder),
                recorder,
            ):
                outputs = call(tensors)
                results = tuple(recorder.var_of(t) for t in outputs)
            recorder.check_constants()
            equations = pruned(recorder.equations, results)
            recorder.check_functions(equations)
        except Pytorch2JaxError:
            raise
        except Exception as error:
            raise _not_captured(recorder.name, error) from error
    return Graph(tuple(taken), recorder.constants, equations, results)


class _Instead(TorchFunctionMode):
    """Calls others for some of torch's functions."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOOKS:
            raise refused(self._recorder.name, func.__name__)
        if func in LAYERS and not (self._recorder.differentiates or is_followed_by_autograd(args)):
            return LAYERS[func](*args, **(kwargs or {}))
        if func in _DETACHING_IN_PLACE and not is_functorch_active():
            self._recorder.detach(args[0])  # which no operator does
        if func == _SET_DATA and not is_functorch_active():
            return self._recorder.exchange(*args)
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


_DETACHING_IN_PLACE = frozenset({torch.detach_, torch.Tensor.detach_})
_SET_DATA = vars(torch._C.TensorBase)["data"].__set__
_INSTEAD = {**INSTEAD_OF_DETACHING, **FUNCTIONS}


_TORCH, _OURS = Path(torch.__file__).parent, Path(__file__).parent.parent


def _not_captured(name: str, error: Exception) -> CaptureError:
    """What to say where fake tensors cannot follow: at which line of the model, and what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(Path(f.filename).is_relative_to(p) for p in (_TORCH, _OURS))]
    where = f" at {own[-1].filename}:{own[-1].lineno} (`{own[-1].line}`)" if own else ""
    reason = str(error).strip().split("\n")[0]
    if isinstance(error, NoKernelError):
        return CaptureError(
            f"{name}: expected dtypes that torch has a kernel for, got others{where}: {reason}. Convert an argument "
            "(`x.to(dtype)`)."
        )
    if any("distributions" in Path(f.filename).parts for f in frames):
        reason += " Distributions look at their arguments unless they are made with `validate_args=False`."
    return CaptureError(
        f"{name}: expected a function that can be written down without its values, got {type(error).__name__}{where}: "
        f"{reason} A graph has one course for all values: without `.item()`, `if tensor:`, shapes that depend on "
        'values, NumPy. Use `backend="torch"`, which runs it as it is.'
    )
