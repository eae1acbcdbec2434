"""The command line: parsing and printing only; a file per command.

Data goes to stdout, everything else to stderr. Exit codes: 0; 1 unexpected; 2 usage; 3 input incompatible or
unsupported; 4 verification failed; 5 output; 130 interrupted.
"""

from __future__ import annotations

import atexit
import gc
import io
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

import click

from ..errors import SafemergeError
from .options import verbosity

__all__ = ["main"]

_COMMANDS = {
    "demo": "Makes a small quartet, merges it and verifies the output.",
    "inspect": "Shows what a checkpoint or an adapter holds; reads headers only.",
    "analyze": "Measures how far each module left the safety subspace.",
    "merge": "Merges the modules that left the safety subspace with a safe model.",
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

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; what goes wrong is said in one sentence on stderr."""
        return _guarded(ctx, lambda: super(_Commands, self).invoke(ctx))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


def _guarded(ctx: click.Context, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except KeyboardInterrupt:
        rest = (
            "; what is committed stays, continue with --resume"
            if ctx.invoked_subcommand in ("merge", "run")
            else ""
        )
        _complain(ctx, f"interrupted{rest}")
        code = 130
    except SafemergeError as error:
        _complain(ctx, str(error))
        code = error.exit_code
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        # click's own way out: usage errors, --help, a reader that closed the pipe.
        raise
    except Exception as error:
        hint = "" if verbosity(ctx) >= 2 else "; run with -vv for the traceback"
        _complain(ctx, f"unexpected {type(error).__name__}: {' '.join(str(error).split())}{hint}")
        code = 1
    ctx.exit(code)


def _complain(ctx: click.Context, message: str) -> None:
    """Writes the one line, after the traceback if that was asked for."""
    if verbosity(ctx) >= 2:
        traceback.print_exc(file=sys.stderr)
    click.echo(f"error: {message}", err=True)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Each command explains its options: safemerge-fast COMMAND --help.",
)
@click.version_option(None, "--version", package_name="safemerge-fast", message="safemerge-fast %(version)s")
def main() -> None:
    """Repairs the safety of fine-tuned language models by merging weights.

    A model is a checkpoint directory, a .safetensors file, or org/name[@revision] on the Hugging Face Hub. The
    fine-tuned and the safe one may be LoRA adapters of the aligned one, as PEFT saves them.
    """
    # Importing torch makes a hundred thousand objects that live as long as the process. Looking for garbage among
    # them, again and again and once more at the exit, would take a third of a second.
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that knows only ASCII gets "?" for ρ, not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
