"""`safemerge-fast keep`."""

from __future__ import annotations

import json
from typing import Any

import click

from ..sweeps.keep import KeepSettings, keep_candidate, kept_settings
from .options import settings_options, terminal_options
from .outcome import say_outcome
from .terminal import Terminal


@click.command("keep")
@click.argument("sweep", metavar="DIR")
@click.argument("name", metavar="NAME")
@settings_options(KeepSettings)
@terminal_options
def command(*, terminal: Terminal, sweep: str, name: str, **values: Any) -> None:
    """Make the model NAME of the sweep in DIR again, with the weights that were judged, and keep it.

    Prints the command that makes it without the sweep, and runs it. Refused if a model, the scores or this program are
    not what they were.
    """
    record = kept_settings(KeepSettings(sweep, name, **values))
    if record.command_name is not None:
        terminal.say(f"$ {record.command()}")
    else:
        fields = json.dumps(record.file_fields(), ensure_ascii=False)
        terminal.say(f"$ {record.command()}  # with {fields} in that file")
    with terminal.progress() as progress:
        report = keep_candidate(KeepSettings(sweep, name, **values, progress=progress))
    say_outcome(terminal, report)
