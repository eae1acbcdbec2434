"""Options: those of a record of settings, made from its declarations, and those that all commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click

from ..addresses import is_url, shown_url
from ..errors import SettingError
from ..settings import Field, Kind, Settings, fields_of
from .terminal import Terminal

__all__ = ["output_file", "settings_options", "terminal_options", "verbosity"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_VERBOSITY = "safemerge_fast.verbosity"


class _OutputFile(click.Path):
    """A path on this machine; an address is none, though it could pass for one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuses addresses in one line."""
        if isinstance(value, str) and is_url(value):
            self.fail(
                f"{shown_url(value)} is no path on this machine, and nothing is written elsewhere", param, ctx
            )
        return super().convert(value, param, ctx)


output_file = _OutputFile(dir_okay=False, path_type=Path)
"""A file to write."""


class _Value(click.ParamType[Any]):
    """A value as its setting checks it; what the setting says is click's usage error."""

    def __init__(self, field: Field) -> None:
        self.name = field.setting.metavar or field.name
        self._field = field

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Reads what was typed; a default is checked already."""
        if not isinstance(value, str):
            return value
        try:
            return self._field.parsed(value)
        except SettingError as error:
            self.fail(str(error), param, ctx)


def settings_options(
    record: type[Settings],
    *,
    leave_out: Collection[str] = (),
    only: Collection[str] | None = None,
    may_lack: bool = False,
) -> Callable[[_Function], _Function]:
    """Adds an option for every setting of a record that has one.

    Args:
        record: The record.
        leave_out: Settings that the command gives itself.
        only: The settings to add, if not all of them.
        may_lack: Whether a setting that must be given may be left out here, since a file may hold it.
    """

    def decorate(function: _Function) -> _Function:
        for field in reversed(fields_of(record)):
            wanted = field.name not in leave_out and (only is None or field.name in only)
            if wanted and field.setting.on_command_line:
                function = _option(field, required=field.required and not may_lack)(function)
        return function

    return decorate


def _option(field: Field, *, required: bool) -> Callable[[_Function], _Function]:
    setting = field.setting
    name = f"--{field.name.replace('_', '-')}"
    names = [spelling for spelling in setting.names if not spelling.startswith("--")]
    aliases = [spelling for spelling in setting.names if spelling.startswith("--")]
    help_text = setting.help + (f"  [default: {setting.default}]" if setting.default else "")
    options: dict[str, Any] = {"help": help_text, "required": required}
    if field.is_flag and not field.choices:
        options |= {"is_flag": True, "default": False}
    elif field.is_flag:
        # A flag that may be followed by =WORD.
        options |= {
            "is_flag": False,
            "flag_value": True,
            "default": False,
            "type": _Value(field),
            "metavar": f"[={'|'.join(field.choices)}]",
        }
    else:
        if not field.required:
            # click takes a default of None for a value that was given.
            options |= {"default": field.default, "show_default": field.default is not None}
        options |= {
            "type": click.Choice(field.choices) if field.choices else _Value(field),
            "metavar": setting.metavar or _metavar(field),
        }
    return click.option(*names, name, *aliases, field.name, **options)


def _metavar(field: Field) -> str | None:
    if field.choices:
        return None
    if float in field.types:
        return "NUMBER"
    if int in field.types and str not in field.types:
        return "N"
    return {Kind.PATH: "FILE", Kind.MODEL: "MODEL", Kind.SIZE: "SIZE"}.get(field.setting.kind, "TEXT")


def _remember_verbosity(ctx: click.Context, param: click.Parameter, value: int) -> int:
    # The group needs it when a command fails, and does not see the command's parameters.
    ctx.meta[_VERBOSITY] = value
    return value


_TERMINAL_OPTIONS = (
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

    decorated: Callable[..., Any] = run
    for option in reversed(_TERMINAL_OPTIONS):
        decorated = option(decorated)
    return decorated


def verbosity(ctx: click.Context) -> int:
    """How many -v the command was given."""
    count: int = ctx.meta.get(_VERBOSITY, 0)
    return count
