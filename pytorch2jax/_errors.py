"""The library's own exceptions.

Every exception derives from `Pytorch2JaxError` and from the built-in exception that Python programmers
would expect in its place, so that both `except Pytorch2JaxError` and `except ValueError` work.
"""

from __future__ import annotations


class Pytorch2JaxError(Exception):
    """Base class of every error that this library raises on its own account."""

    def __str__(self) -> str:  # KeyError would show the repr of a long message
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class StructureError(Pytorch2JaxError, ValueError):
    """A pytree has another structure, or a leaf another shape, than the call expects."""


class MissingLeafError(StructureError, KeyError):
    """A params or state tree lacks a leaf that the model has."""


class LeafTypeError(Pytorch2JaxError, TypeError):
    """A leaf is of a type that the call cannot take."""


class DtypeError(Pytorch2JaxError, TypeError):
    """A dtype exists in one framework only, or a leaf has another dtype than the call expects."""


class NarrowingError(Pytorch2JaxError, OverflowError):
    """A 64-bit integer does not fit into the 32 bits that JAX has while `jax_enable_x64` is off."""


class DeviceError(Pytorch2JaxError, ValueError):
    """An array lies on a device, or on several devices, where torch cannot read it."""


class ExportError(Pytorch2JaxError, ValueError):
    """A program that calls torch was to be saved, or to run where torch is not."""


class ForkError(Pytorch2JaxError, RuntimeError):
    """A call in a process that was forked from one in which JAX was running, where JAX would hang."""


class OutputMismatchError(Pytorch2JaxError, ValueError):
    """The torch function returned something else than was declared or inferred."""


class InferenceError(Pytorch2JaxError, RuntimeError):
    """The output specs of a torch function could not be found out."""


class RandomnessError(Pytorch2JaxError, ValueError):
    """A model draws random numbers and got no key, or got something that is no key."""


class CaptureError(Pytorch2JaxError, RuntimeError):
    """A torch function cannot be translated to JAX (`backend="xla"`); the message says at which line of it."""


class StateError(Pytorch2JaxError, ValueError):
    """A forward pass changes state that the caller did not ask to get back."""


class UnsupportedTransformError(Pytorch2JaxError, NotImplementedError):
    """Torch has no rule, on any way that the library knows, for a derivative that was asked for."""


class OptionError(Pytorch2JaxError, ValueError):
    """An option of a call has a value that does not exist, or does not fit the other arguments."""


class ConversionError(Pytorch2JaxError, TypeError):
    """A torch module is of a kind that cannot be converted."""


class TorchCallError(Pytorch2JaxError, RuntimeError):
    """Torch raised an exception while JAX was running it; the original is the `__cause__`."""


class ReplicationWarning(UserWarning):
    """XLA runs the same torch call on each of several devices because nobody said how to split it."""


class NestingError(Pytorch2JaxError, RuntimeError):
    """JAX was called by a torch function while JAX was running that, where it could wait for itself for ever."""


class NarrowingWarning(UserWarning):
    """A JAX function gets 64-bit tensors of a torch program in 32 bits, and computes in 32 bits."""


class LoopWarning(UserWarning):
    """`jax.vmap` runs a torch function once for each example because `torch.vmap` cannot batch it."""


class BridgedWarning(UserWarning):
    """Operators without a JAX function run in torch, inside a program that is otherwise translated to JAX."""


class StatisticsWarning(UserWarning):
    """Parameters go back to torch, and the running statistics that belong to them do not."""
