"""`safemerge-fast merge`."""

from __future__ import annotations

from typing import Any

import click

from ..recipes.safemerge.settings import SafemergeSettings
from .options import settings_options, terminal_options
from .outcome import preview_lines, say_outcome
from .terminal import Terminal


@click.command("merge")
@settings_options(SafemergeSettings)
@click.option("--dry-run", is_flag=True, help="Say what would be done, from headers alone; write nothing.")
@terminal_options
def command(*, terminal: Terminal, dry_run: bool, **values: Any) -> None:
    """Merge the modules that left the safety subspace with a safe model.

    Modules whose update has a low cosine ρ with the safety subspace become α·finetuned + (1-α)·safe;
    all other tensors stay the fine-tuned model's. The output loads like the fine-tuned model and carries a
    report: a checkpoint with adapters folded in, or an adapter if all that is merged are adapters.
    """
    if dry_run:
        from ..recipes.preview import preview

        outlook = preview(SafemergeSettings(**values))
        terminal.say_some("note", outlook.notes, rest="-v prints them all")
        terminal.say_some("warning", outlook.warnings, rest="-v prints them all")
        terminal.result(outlook.to_json, *preview_lines(outlook))
        return
    from ..recipes.run import carry_out

    with terminal.progress() as progress:
        report = carry_out(SafemergeSettings(**values, progress=progress))
    say_outcome(terminal, report)
