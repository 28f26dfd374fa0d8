"""The library's own exceptions and warnings.

Eleven exceptions are public. Each derives from `Pytorch2JaxError` and from the built-in exception that Python
programmers would expect in its place, so that both `except Pytorch2JaxError` and `except ValueError` work. Those
after them are kinds of one of the eleven, for programs that tell the kinds apart; nobody has to know them.
"""

from __future__ import annotations


class Pytorch2JaxError(Exception):
    """Base class of every error that this library raises on its own account.

    The message names the call, the leaf or the option, what was expected, what came, and what to do.
    """

    def __str__(self) -> str:  # KeyError would show the repr of a long message
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class StructureError(Pytorch2JaxError, ValueError):
    """An argument does not fit the call: another structure, shape, dtype or type than expected.

    Most often `params` or `state` are not the tree that the conversion returned. The message names each leaf that
    is missing, that is not expected, or that differs, with the shape and dtype of both. Flat names of a
    `state_dict` become such a tree by `params_from_state_dict`.

    Leaves can also be of a type that neither JAX nor torch computes with, of a dtype that only one of the two has,
    or hold 64-bit integers that do not fit into the 32 bits that JAX has while `jax_enable_x64` is off.
    """


class OptionError(Pytorch2JaxError, ValueError):
    """An option has a value that does not exist, or that does not fit the other arguments.

    Examples are `backend="jaxx"`, `batch_axes` of an axis that an argument lacks, an `output_shapes` that is no
    tree of shapes, and keywords of other frameworks, such as `deterministic=`, that a model would swallow.
    """


class ConversionError(Pytorch2JaxError, TypeError):
    """A torch module or function is of a kind that cannot be converted.

    Examples are a class in the place of its instance, weights without values (on torch's meta device, or of lazy
    modules that never ran), quantised weights, and modules of one framework handed to another's converter.
    Pickling a converted Linen module is one, too: save the parameters instead, and convert again.
    """


class CaptureError(Pytorch2JaxError, RuntimeError):
    """A torch function cannot be translated to JAX (`backend="xla"`); the message says at which line of it.

    Translation follows torch operators, not values: a function that reads a number out of a tensor that it was
    given (`.item()`, `if tensor:`) cannot be followed. `backend="torch"` runs such functions.
    """


class InferenceError(Pytorch2JaxError, RuntimeError):
    """What a torch function returns could not be found out, or is something else than declared or found out.

    Under `jax.jit` the shapes and dtypes of outputs have to be known before any value is there, so the function is
    tried out: on tensors without values or, where it reads values, on made-up ones. A function that does not accept
    those needs `example_args=`, an eager call before, or `output_shapes=`.
    """


class StateError(Pytorch2JaxError, ValueError):
    """A call changes or draws something that a pure function has to be handed, and that was not handed to it.

    A model in train mode changes its running statistics: convert it with `with_state=True`, or pass the
    collections to be changed (`mutable=` in Linen). A model with dropout draws random numbers: pass a JAX key
    (`rng=`, `rngs=`).
    """


class UnsupportedTransformError(Pytorch2JaxError, NotImplementedError):
    """Torch has no rule, on any way that the library knows, for a derivative that was asked for.

    Examples are a forward-mode derivative through a hand-written `torch.autograd.Function` without `jvp`, and a
    second derivative of an operator whose backward pass cannot be differentiated. The message names the operator.
    """


class TorchCallError(Pytorch2JaxError, RuntimeError):
    """Torch raised an exception while JAX was running it; the original is the `__cause__`.

    Under `jax.jit` JAX wraps it into its own `JaxRuntimeError`, with the text of the original.
    """


class DeviceError(Pytorch2JaxError, ValueError):
    """An array, or a whole program, is where torch cannot read or run it.

    Examples are an array that is spread over devices by explicit axes without `out_specs=`, tensors on different
    devices in one call, and programs that call torch and are to be exported, or lowered for a TPU:
    `backend="xla"` programs can be.
    """


class DeadlockError(Pytorch2JaxError, RuntimeError):
    """A call would wait for itself for ever, and was refused before it began.

    It happens where a torch function that JAX runs calls JAX, and in a process that was forked from one in which
    JAX was running (PyTorch's `DataLoader` forks its workers: `multiprocessing_context="spawn"`).
    """


class MissingLeafError(StructureError, KeyError):
    """A params or state tree lacks a leaf that the model has."""


class LeafTypeError(StructureError, TypeError):
    """A leaf is of a type that the call cannot take."""


class DtypeError(StructureError, TypeError):
    """A dtype exists in one framework only, or a leaf has another dtype than the call expects."""


class NarrowingError(StructureError, OverflowError):
    """A 64-bit integer does not fit into the 32 bits that JAX has while `jax_enable_x64` is off."""


class OutputMismatchError(InferenceError, ValueError):
    """The torch function returned something else than was declared or inferred."""


class RandomnessError(StateError):
    """A model draws random numbers and got no key, or got something that is no key."""


class ExportError(DeviceError):
    """A program that calls torch was to be saved, or to run where torch is not."""


class ForkError(DeadlockError):
    """A call in a process that was forked from one in which JAX was running, where JAX would hang."""


class NestingError(DeadlockError):
    """JAX was called by a torch function while JAX was running that, where it could wait for itself for ever."""


class ReplicationWarning(UserWarning):
    """XLA runs the same torch call on each of several devices because nobody said how to split it."""


class NarrowingWarning(UserWarning):
    """A JAX function gets 64-bit tensors of a torch program in 32 bits, and computes in 32 bits."""


class LoopWarning(UserWarning):
    """`jax.vmap` runs a torch function once for each example because `torch.vmap` cannot batch it."""


class BridgedWarning(UserWarning):
    """Operators without a JAX function run in torch, inside a program that is otherwise translated to JAX."""


class StatisticsWarning(UserWarning):
    """Parameters go back to torch, and the running statistics that belong to them do not."""
