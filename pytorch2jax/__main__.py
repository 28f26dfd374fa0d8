"""`python -m pytorch2jax check module:factory`: a report on a model from the command line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pytorch2jax._check import Report, checked
from pytorch2jax._check._machine import noticed_interrupts
from pytorch2jax._errors import OptionError, Pytorch2JaxError

_INTERRUPTED = 130  # what shells say of a program that Ctrl-C has ended


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments, or None for those of the process.

    Returns:
        The exit status: 0; 1 where something differs from torch; 2 where the model could not be made or run; 130 after
        Ctrl-C, if nothing differs until then.
    """
    parser = argparse.ArgumentParser(prog="python -m pytorch2jax")
    command = parser.add_subparsers(dest="command", required=True).add_parser("check", help="what works, what it costs")
    command.add_argument(
        "factory",
        nargs="?",
        help="module:function or file.py:function, which returns a model, or (model, args), or (model, args, kwargs)",
    )
    command.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the report as JSON")
    command.add_argument("--markdown", nargs="?", const="-", metavar="FILE", help="write the report as Markdown")
    command.add_argument("--no-timing", action="store_true", help="do not measure what it costs")
    options = parser.parse_args(argv)
    if options.factory is None:
        command.error("expected a factory (module:function), before `--json` and `--markdown`, which may name a file")
    try:
        return _check(options)
    except (Pytorch2JaxError, _UsageError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("check: interrupted before there was a model.", file=sys.stderr)
        return _INTERRUPTED


def _check(options: argparse.Namespace) -> int:
    for file in (options.json, options.markdown):
        if file not in (None, "-") and not Path(file).parent.is_dir():
            raise _UsageError(f"check: {file}: expected a file in a folder that exists.")
    quiet = "-" in (options.json, options.markdown)
    with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext(), noticed_interrupts() as look:
        model, args, kwargs = _made(options.factory)
        look()
    try:
        with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
            report = checked(model, args, kwargs, timing=not options.no_timing)
    except OptionError as error:
        if kwargs or not (len(args) == 1 and isinstance(args[0], Mapping)):
            raise
        raise _UsageError(f"{error} (For keyword arguments: `return model, (), {{...}}`.)") from error
    _write(options.json, report.to_json() + "\n")
    _write(options.markdown, report.to_markdown())
    if report.differs:
        return 1
    return 0 if report.is_complete else _INTERRUPTED


class _UsageError(Exception):
    """The command does not name a model."""


def _made(text: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model and its arguments, from the function that a command names."""
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise _UsageError(f"check: expected module:function or file.py:function, got {text!r}.")
    try:
        factory = getattr(_module(where), name)
        made = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:  # whatever somebody else's code raises; a status of 1 would say that something differs
        raise _UsageError(f"check: {text}: {type(error).__name__}: {error}") from error
    parts = made if isinstance(made, (tuple, list)) else (made,)
    model, args, kwargs = (*parts, *((), {})[len(parts) - 1 :]) if len(parts) <= 3 else (None, (), {})
    if not isinstance(model, nn.Module) or not isinstance(kwargs, dict):
        raise _UsageError(
            f"check: {text}: expected a function that returns a torch module, or (model, args) or (model, args, "
            f"kwargs), got {type(made).__name__}."
        )
    return model, tuple(args) if isinstance(args, (tuple, list)) else (args,), kwargs


def _module(where: str) -> Any:
    sys.path.insert(0, os.getcwd())
    if not where.endswith(".py"):
        return importlib.import_module(where)
    file = Path(where)
    sys.path.insert(0, str(file.resolve().parent))  # for what it imports, as for a program
    spec = importlib.util.spec_from_file_location(f"{file.stem} (checked)", file)  # no module that there may be
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _write(file: str | None, text: str) -> None:
    if file == "-":
        print(text, end="")
    elif file is not None:
        try:
            Path(file).write_text(text)
        except OSError as error:
            raise _UsageError(f"check: {file}: expected a file that can be written, got {error}") from error


__all__ = ["Report", "main"]

if __name__ == "__main__":
    sys.exit(main())
