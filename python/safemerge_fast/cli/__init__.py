"""The command line: parsing and printing only; a file per command.

Data goes to stdout, everything else to stderr. Exit codes: 0; 1 unexpected; 2 usage; 3 input incompatible or
unsupported; 4 verification failed; 5 output; 6 some of a sweep's models failed; 130 interrupted.
"""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import click

from .. import interruption
from ..errors import SafemergeError
from ..printable import MOST_OF_A_MESSAGE, printable
from .options import verbosity

__all__ = ["main"]

_Result = TypeVar("_Result")

_COMMANDS = {
    "demo": "Makes a small quartet, merges it and verifies the output.",
    "check": "Says which tensors of a model an adapter changes, how and by how much.",
    "inspect": "Shows what a checkpoint or an adapter holds; reads headers only.",
    "analyze": "Measures how far each module left the safety subspace.",
    "merge": "Merges the modules that left the safety subspace with a safe model.",
    "plan": "Does what merge does up to the plan, for workers on other machines.",
    "work": "Prepares a share of a planned job's files.",
    "finish": "Puts a planned job's output together from what workers prepared.",
    "sweep": "Makes candidates over rules, α and recipes, and has each judged, with controls beside them.",
    "keep": "Makes a candidate of a sweep again, to be kept.",
    "judge": "Judges a model quickly: refusals, and a held-out text's loss.",
    "run": "Makes what a YAML file says: a recipe, or a merge in mergekit's format.",
    "verify": "Evaluates an output's plan again and compares every byte.",
}


class _Commands(click.Group):
    """Imports a command when it is used, and turns errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which a newcomer meets them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the module of a command and returns its click command."""
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f".{cmd_name}", __name__).command
        return command

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Runs the command line, as click does it, but that each error is one line that begins with `error:`.

        Returns:
            The exit code, if standalone_mode is false; else the process ends with it.
        """
        run: Callable[..., Any] = super().main
        interruption.expect_nothing()
        try:
            result = run(*args, standalone_mode=False, **extra)
            # The code of ctx.exit; commands return nothing.
            code = result if isinstance(result, int) else 0
        except click.ClickException as error:
            _usage(error)
            code = error.exit_code
        except _Stopped:
            _say("interrupted")
            code = interruption.EXIT_CODE
        if standalone_mode:
            sys.exit(code)
        return code

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parses the group's own options."""
        return _stoppable(lambda: super(_Commands, self).make_context(*args, **extra))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuses arguments that neither a report nor a plan could name."""
        for word in args:
            if any("\ud800" <= character <= "\udfff" for character in word):
                raise click.UsageError(f"the argument {printable(word)} is not UTF-8; rename what it names")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; what goes wrong is said in one sentence on stderr."""
        return _stoppable(lambda: _guarded(ctx, lambda: super(_Commands, self).invoke(ctx)))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


class _Stopped(Exception):  # noqa: N818
    """An interruption where nobody could say it better; click would print an empty line of its own."""


def _stoppable(run: Callable[[], _Result]) -> _Result:
    try:
        return run()
    except KeyboardInterrupt as interrupt:
        raise _Stopped from interrupt


def _guarded(ctx: click.Context, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except KeyboardInterrupt:
        _complain(ctx, interruption.message())
        code = interruption.EXIT_CODE
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        # click's own way out: usage errors, --help, a reader that closed the pipe.
        raise
    except Exception as error:
        if interruption.was_received():
            # A library that was loading made an error of its own of it.
            _complain(ctx, interruption.message())
            code = interruption.EXIT_CODE
        elif isinstance(error, SafemergeError):
            _complain(ctx, str(error))
            code = error.exit_code
        else:
            hint = "" if verbosity(ctx) >= 2 else "; run with -vv for the traceback"
            _complain(ctx, f"unexpected {type(error).__name__}: {' '.join(str(error).split())}{hint}")
            code = 1
    ctx.exit(code)


def _complain(ctx: click.Context, message: str) -> None:
    """Writes the one line, after the traceback if that was asked for."""
    if verbosity(ctx) >= 2:
        for line in traceback.format_exc().splitlines():
            click.echo(printable(line), err=True)
    _say(message)


def _usage(error: click.ClickException) -> None:
    """Says what is wrong with the arguments, and where to read of them."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    message = " ".join(error.format_message().split()).rstrip(".")
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    _say(f"{message}; see {ctx.command_path} --help" if ctx is not None else message)


def _say(message: str) -> None:
    interruption.said()
    click.echo(f"error: {printable(message, MOST_OF_A_MESSAGE)}", err=True)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Each command explains its options: safemerge-fast COMMAND --help.",
)
@click.version_option(None, "--version", package_name="safemerge-fast", message="safemerge-fast %(version)s")
def main() -> None:
    """Merges fine-tuned language models with safe ones, to bring back safety that fine-tuning eroded.

    A model is a checkpoint directory, a .safetensors file, or org/name[@revision] on the Hugging Face Hub. The
    fine-tuned and the safe one may be LoRA adapters of the aligned one, as PEFT saves them.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that knows only ASCII gets "?" for ρ, not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
