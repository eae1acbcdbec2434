"""`safemerge-fast verify`."""

from __future__ import annotations

from typing import Any

import click

from ..printable import printable
from ..recipes.verify import VerifySettings, verify_output
from .options import settings_options, terminal_options
from .terminal import Terminal


@click.command("verify")
@click.argument("output", metavar="OUT")
@settings_options(VerifySettings)
@terminal_options
def command(*, terminal: Terminal, output: str, **values: Any) -> None:
    """Evaluate the plan of the merged model OUT again and compare every byte of its weights.

    All other files are compared with the report's digests, and files that are not in it are named. The models that OUT
    was made from must still be where they were. Exits with 4 if anything differs.
    """
    from ..sizes import format_size

    with terminal.progress() as progress:
        report = verify_output(VerifySettings(output=output, progress=progress, **values))
    share = "" if report.bytes_checked == report.bytes_total else f" of {format_size(report.bytes_total)}"
    terminal.result(
        report.to_json,
        f"verified: {format_size(report.bytes_checked)}{share} in {report.files} file(s) of "
        f"{printable(report.output)} are what the plan says ({report.seconds:.1f} s)",
    )
