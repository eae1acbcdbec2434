"""`safemerge-fast verify`."""

from __future__ import annotations

import click

from .options import finite, terminal_options
from .terminal import Terminal


@click.command("verify")
@click.argument("output", metavar="OUT")
@click.option(
    "--sample",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    callback=finite,
    default=1.0,
    show_default=True,
    help="Share of the bytes to compare.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Worker threads.  [default: processors + 2, at most 16]"
)
@terminal_options
def command(*, terminal: Terminal, output: str, sample: float, threads: int | None) -> None:
    """Evaluate the plan of the merged model OUT again and compare every byte of its weights.

    The models that OUT was made from must still be where they were. Exits with 4 if anything differs.
    """
    from ..recipes.verification import verify
    from ..sizes import format_size

    with terminal.progress() as progress:
        report = verify(output, sample=sample, threads=threads, progress=progress)
    share = "" if report.bytes_checked == report.bytes_total else f" of {format_size(report.bytes_total)}"
    terminal.result(
        report.to_json,
        f"verified: {format_size(report.bytes_checked)}{share} in {report.files} file(s) of {report.output} "
        f"are what the plan says ({report.seconds:.1f} s)",
    )
