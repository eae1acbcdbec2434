"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .terminal import Terminal

__all__ = [
    "analysis_options",
    "compose",
    "finite",
    "output_file",
    "resource_options",
    "role_options",
    "select",
    "size",
    "terminal_options",
    "threshold_option",
    "verbosity",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_VERBOSITY = "safemerge_fast.verbosity"


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of options that take a size such as 5GB."""
    from ..errors import PlanError
    from ..sizes import parse_size

    try:
        return None if value is None else parse_size(value)
    except PlanError as error:
        raise click.BadParameter(str(error)) from error


def select(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Callback of --select, which leaves the judgement to decision.Rule."""
    from ..decision import Rule
    from ..errors import AnalysisError

    try:
        return Rule(select=value).select
    except AnalysisError as error:
        raise click.BadParameter(str(error)) from error


def finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Callback of options that take a number: click's own ranges let NaN pass."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


def regular_expression(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Callback of options that take a regular expression."""
    try:
        re.compile(value or "")
    except re.error as error:
        raise click.BadParameter(f"{value!r} is not a regular expression: {error}") from error
    return value


def threshold_option(purpose: str) -> Callable[[_Function], _Function]:
    """--threshold, alias --tau."""
    return click.option(
        "--threshold",
        "--tau",
        "threshold",
        type=float,
        callback=finite,
        default=0.35,
        show_default=True,
        help=purpose,
    )


def compose(*decorators: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    """Applies decorators so that the first one's option comes first in the help."""

    def decorate(function: _Function) -> _Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def role_options(*, with_safe: bool) -> Callable[[_Function], _Function]:
    """--base, --aligned, --finetuned and, where asked for, --safe."""
    options = [
        click.option("--base", required=True, metavar="MODEL", help="The model before alignment."),
        click.option(
            "--aligned", required=True, metavar="MODEL", help="The aligned model that was fine-tuned."
        ),
        click.option(
            "--finetuned",
            required=True,
            metavar="MODEL",
            help="The fine-tuned model, to be repaired; or a LoRA adapter of the aligned one.",
        ),
    ]
    if with_safe:
        options.append(
            click.option(
                "--safe",
                metavar="MODEL",
                help="The safe model to merge with, or a LoRA adapter.  [default: the aligned one]",
            )
        )
    return compose(*options)


resource_options = compose(
    click.option(
        "--threads", type=click.IntRange(min=1), help="Worker threads.  [default: processors + 2, at most 16]"
    ),
    click.option(
        "--memory-budget",
        callback=size,
        metavar="SIZE",
        help="Most bytes for the merge's buffers and input windows, like 1GB.",
    ),
    click.option(
        "--read-backend",
        type=click.Choice(["auto", "mmap", "pread"]),
        help="Map inputs, or read them by position; auto maps all but network file systems.  [default: auto]",
    ),
)

analysis_options = compose(
    click.option(
        "--delta-reference",
        type=click.Choice(["aligned", "base"]),
        default="aligned",
        show_default=True,
        help="The model that the update Δ is taken against.",
    ),
    click.option(
        "--include",
        callback=regular_expression,
        metavar="REGEX",
        help="Analyse these tensors too, if they are 2-D and float.",
    ),
    click.option(
        "--exclude",
        callback=regular_expression,
        metavar="REGEX",
        help="Leave these tensors out of the analysis.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda[:N]|mps",
        help="Where the analysis computes.",
    ),
    click.option(
        "--allow-nonfinite",
        is_flag=True,
        help="Let NaN and infinity of the models through instead of refusing them.",
    ),
)
"""How scores are computed."""

output_file = click.Path(dir_okay=False, path_type=Path)
"""A file to write."""


def _remember_verbosity(ctx: click.Context, param: click.Parameter, value: int) -> int:
    # The group needs it when a command fails, and does not see the command's parameters.
    ctx.meta[_VERBOSITY] = value
    return value


_terminal_options = compose(
    click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document on stdout instead of a table."
    ),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors, and JSON if asked for."),
    click.option(
        "-v",
        "--verbose",
        count=True,
        callback=_remember_verbosity,
        is_eager=True,
        help="Print every warning and note; twice: a traceback with an error.",
    ),
    click.option(
        "--no-progress", is_flag=True, help="Show no progress bars, which only a terminal gets anyway."
    ),
)


def terminal_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --json, -q, -v and --no-progress, which the command receives as one argument `terminal`."""

    @functools.wraps(function)
    def run(*, as_json: bool, quiet: bool, verbose: int, no_progress: bool, **values: Any) -> Any:
        terminal = Terminal(as_json=as_json, quiet=quiet, verbose=verbose, no_progress=no_progress)
        return function(terminal=terminal, **values)

    return _terminal_options(run)


def verbosity(ctx: click.Context) -> int:
    """How many -v the command was given."""
    count: int = ctx.meta.get(_VERBOSITY, 0)
    return count
