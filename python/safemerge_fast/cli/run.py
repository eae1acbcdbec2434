"""`safemerge-fast run`."""

from __future__ import annotations

from pathlib import Path

import click

from .. import _engine
from .merge import say_merge
from .options import resource_options, terminal_options
from .terminal import Terminal

_METHODS = "\b\nMethods (docs/methods.md has their parameters):\n" + "\n".join(
    f"  {method.name:<17} {method.summary}" for method in _engine.methods()
)


@click.command("run", epilog=_METHODS)
@click.argument("recipe", metavar="CONFIG", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(), metavar="DIR", help="Output directory; new or empty."
)
@resource_options
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
    read_backend: str | None,
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
    from ..recipes.document import read_recipe
    from ..recipes.fold import FoldReport
    from ..recipes.run import carry_out
    from ..report.merge_report import MergeReport
    from ..sizes import format_size

    configuration = read_recipe(
        recipe,
        output=output,
        threads=threads,
        memory_budget=memory_budget,
        read_backend=read_backend,
        resume=resume,
        overwrite=overwrite,
    )
    with terminal.progress() as progress:
        report = carry_out(configuration, progress)
    if isinstance(report, MergeReport):
        say_merge(terminal, report)
        return
    if isinstance(report, FoldReport):
        done = f"folded: {report.changed} of {len(report.tensors)} tensors changed"
    else:
        done = f"merged: {report.merged} of {len(report.tensors)} tensors computed, the others copied,"
    terminal.say_some("note", report.notes, rest="-v prints them all")
    terminal.result(
        report.to_json,
        f"{done} in {report.output}, "
        f"{format_size(report.bytes_written)} in {len(report.shards)} file(s), {report.seconds['total']:.1f} s, "
        f"peak memory {format_size(report.peak_memory_bytes)}",
    )
