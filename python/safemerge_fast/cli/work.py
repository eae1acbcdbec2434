"""`safemerge-fast work`: one worker's share of a planned job."""

from __future__ import annotations

from typing import Any

import click

from ..printable import printable
from ..recipes.shared_job import WorkSettings, work_at_job
from .options import settings_options, terminal_options
from .terminal import Terminal


@click.command("work")
@click.argument("output", metavar="OUT")
@settings_options(WorkSettings)
@terminal_options
def command(*, terminal: Terminal, output: str, **values: Any) -> None:
    """Prepare a share of the files of OUT, which `safemerge-fast plan` planned.

    Shares may be prepared in any order, at once, twice, and again after a failure: a file that is there already is left
    alone, and of two that were made one is taken. Nothing has a visible name before `finish`.
    """
    from ..sizes import format_size

    with terminal.progress() as progress:
        worked = work_at_job(WorkSettings(output=output, progress=progress, **values))
    where = printable(worked.output)
    if worked.complete:
        terminal.result(worked.to_json, f"{where} is complete already; nothing to do")
        return
    there = f", {len(worked.found)} there already" if worked.found else ""
    terminal.result(
        worked.to_json,
        f"prepared: {len(worked.prepared)} file(s) of {where}, {format_size(worked.bytes_written)}{there} "
        f"({worked.seconds:.1f} s)",
    )
