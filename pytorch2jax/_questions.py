"""What no mode of torch's sees of a function: after which exact types it asks, and whether it seeds generators.

To `isinstance`, fake tensors and the tensors of a call are what they stand for. But `type(x) is torch.Tensor` is false
for fake ones, and `type(weight) is nn.Parameter` for those that stand for parameters. Nobody is told of such a question
when it is asked, so that it is looked for in the code that runs.
"""

from __future__ import annotations

import cProfile
import dis
import functools
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import torch

_TRUSTED = tuple(str(Path(str(file)).parent) for file in (torch.__file__, jax.__file__, __file__))
_NEAR = 12  # instructions, from the question to the comparison
_COMPARING = frozenset({"IS_OP", "COMPARE_OP", "CONTAINS_OP"})


_SEEDING = frozenset({"manual_seed", "seed", "set_state"})


class Question(NamedTuple):
    """A comparison of a tensor's type.

    where: file and line.
    of_parameters: whether with `Parameter`, and not with `Tensor`.
    """

    where: str
    of_parameters: bool


class CodeThatRuns:
    """Within this context, the code that this thread runs is noted, as a profiler does. Another profiler has a break.

    seeds: whether it has set the state of one of torch's generators.
    autocasts: whether it has turned autocast on or off.
    """

    def __init__(self) -> None:
        self.seeds = self.autocasts = False
        self._codes: set[types.CodeType] = set()
        self._before: Any = None

    def __enter__(self) -> CodeThatRuns:
        self._before = sys.getprofile()
        if isinstance(self._before, cProfile.Profile):
            self._before.disable()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if isinstance(self._before, cProfile.Profile):
            sys.setprofile(None)
            self._before.enable()
        else:
            sys.setprofile(self._before)

    def _note(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self._codes.add(frame.f_code)
        elif event == "c_call" and argument is torch.set_autocast_enabled:
            self.autocasts = True
        elif event == "c_call" and argument.__name__ in _SEEDING:
            self.seeds |= isinstance(getattr(argument, "__self__", None), torch.Generator)

    def questions(self) -> list[Question]:
        """The questions in the code that ran; that of torch and jax is not looked at."""
        return [question for code in self._codes for question in _questions_in(code)]


@functools.lru_cache(maxsize=4096)
def _questions_in(code: types.CodeType) -> tuple[Question, ...]:
    names = {*code.co_names, *code.co_freevars}
    if not names & {"type", "__class__"} or not names & {"Tensor", "Parameter"}:
        return ()
    if code.co_filename.startswith(_TRUSTED):
        return ()
    found = []
    instructions = list(dis.get_instructions(code))
    for index, instruction in enumerate(instructions):
        if instruction.argval not in ("type", "__class__") or not instruction.opname.startswith("LOAD_"):
            continue
        following = instructions[index + 1 : index + 1 + _NEAR]
        end = next((k for k, i in enumerate(following) if i.opname in _COMPARING), None)
        if end is None:
            continue
        operands = [*following[:end], *instructions[max(index - 1, 0) : index]]
        compared = {i.argval for i in operands if i.opname.startswith("LOAD_")} & {"Tensor", "Parameter"}
        if compared:
            line = getattr(instruction.positions, "lineno", None) or code.co_firstlineno
            found.append(Question(f"{code.co_filename}:{line}", compared == {"Parameter"}))
    return tuple(found)
