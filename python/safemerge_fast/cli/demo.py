"""`safemerge-fast demo`."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from .options import terminal_options
from .outcome import say_report
from .terminal import Terminal

if TYPE_CHECKING:
    from rich.table import Table

    from ..report.report import Report


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    metavar="DIR",
    help="Keep all models here.  [default: a temporary directory, removed at the end]",
)
@terminal_options
def command(*, terminal: Terminal, output: str | None) -> None:
    """Make a small Llama quartet, analyse it, merge it and verify the output.

    Shows what a merge does without any model at hand: which modules left the safety subspace, and what became
    of them.
    """
    from ..demo import run_demo

    temporary = (
        tempfile.TemporaryDirectory(prefix="safemerge-demo-") if output is None else nullcontext(output)
    )
    with temporary as directory:
        with terminal.progress() as progress:
            demo = run_demo(directory, progress)
        terminal.result(demo.report.to_json, _modules(demo.report), demo.report.table())
        say_report(terminal, demo.report)
        steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in demo.seconds.items())
        terminal.say(f"verified {demo.verification.bytes_checked:,} bytes ({steps})")
    if output is None:
        terminal.say("the models are removed again; keep them with -o DIR")
    else:
        terminal.say(f"again by hand: {demo.report.configuration.command()} --overwrite")


def _modules(report: Report) -> Table:
    """A line per analysed module: ρ, what became of it, and why."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("module", no_wrap=True)
    table.add_column("ρ", justify="right")
    table.add_column("ρ_null", justify="right")
    table.add_column("decision")
    table.add_column("because", no_wrap=True)
    for tensor in sorted(report.tensors, key=lambda tensor: tensor.name):
        if tensor.analysed:
            table.add_row(
                tensor.name.removeprefix("model.").removesuffix(".weight"),
                "" if tensor.rho is None else f"{tensor.rho:.3f}",
                "" if tensor.rho_null is None else f"{tensor.rho_null:.3f}",
                "merged" if tensor.merged else "kept",
                tensor.reason.removeprefix("kept: ").removeprefix("merged: "),
                style="bold" if tensor.merged else None,
            )
    return table
