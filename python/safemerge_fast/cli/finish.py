"""`safemerge-fast finish`: a planned job becomes an output."""

from __future__ import annotations

from typing import Any

import click

from ..recipes.shared_job import FinishSettings, finish_job
from .options import settings_options, terminal_options
from .outcome import say_outcome
from .terminal import Terminal


@click.command("finish")
@click.argument("output", metavar="OUT")
@settings_options(FinishSettings)
@terminal_options
def command(*, terminal: Terminal, output: str, **values: Any) -> None:
    """Put the output OUT together from what `safemerge-fast work` prepared.

    Runs in the directory where it was planned. Exits with 5 and names the files that are missing, if any are: prepare
    those and finish again. What `merge` would have written is then at OUT, byte for byte.
    """
    with terminal.progress() as progress:
        report = finish_job(FinishSettings(output=output, progress=progress, **values))
    say_outcome(terminal, report)
