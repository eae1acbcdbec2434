"""`safemerge-fast run`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import size, terminal_options
from .terminal import Terminal


@click.command("run")
@click.argument("recipe", metavar="CONFIG", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(), metavar="DIR", help="Output directory; new or empty."
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Worker threads.  [default: processors + 2, at most 16]"
)
@click.option(
    "--memory-budget", callback=size, metavar="SIZE", help="Most bytes for the engine's buffers, like 1GB."
)
@click.option("--resume", is_flag=True, help="Continue an unfinished run in the output.")
@click.option("--overwrite", is_flag=True, help="Replace what the output holds.")
@terminal_options
def command(
    *,
    terminal: Terminal,
    recipe: Path,
    output: str,
    threads: int | None,
    memory_budget: int | None,
    resume: bool,
    overwrite: bool,
) -> None:
    """Make what the YAML file CONFIG says: a recipe, or a merge as mergekit's configurations say it.

    With the field `merge_method` it is in mergekit's format: models or slices, base_model, parameters, dtype,
    tokenizer_source. Else its field `recipe` is one of:

    \b
    fold       Folds a LoRA adapter into the checkpoint it was trained on, exactly and without torch;
               what PEFT calls merge_and_unload. Fields: model, adapter; dtype, max_shard_size,
               allow_nonfinite.
    safemerge  What the command merge does. Fields: the names of its flags, with _ for -.

    Paths in CONFIG are relative to the working directory.
    """  # noqa: D301 (click reads the \b)
    if resume and overwrite:
        raise click.UsageError(
            "--resume continues an output and --overwrite starts it anew; give one of them."
        )
    from ..pipeline.configuration import MergeConfiguration
    from ..recipes.document import read_recipe

    configuration = read_recipe(
        recipe,
        output=output,
        threads=threads,
        memory_budget=memory_budget,
        resume=resume,
        overwrite=overwrite,
    )
    if isinstance(configuration, MergeConfiguration):
        from .merge import merge_and_say

        merge_and_say(terminal, configuration)
        return
    from ..recipes.fold import FoldConfiguration, FoldReport, run_fold
    from ..recipes.mergekit.execution import MergekitReport, run_mergekit
    from ..sizes import format_size

    report: FoldReport | MergekitReport
    with terminal.progress() as progress:
        if isinstance(configuration, FoldConfiguration):
            report = run_fold(configuration, progress)
            done = f"folded: {report.changed} of {len(report.tensors)} tensors changed"
        else:
            report = run_mergekit(configuration, progress)
            done = f"merged: {report.merged} of {len(report.tensors)} tensors computed, the others copied,"
    terminal.say_some("note", report.notes, rest="-v prints them all")
    terminal.result(
        report.to_json,
        f"{done} in {report.output}, "
        f"{format_size(report.bytes_written)} in {len(report.shards)} file(s), {report.seconds['total']:.1f} s, "
        f"peak memory {format_size(report.peak_memory_bytes)}",
    )
