"""`safemerge-fast merge`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..plan.methods import weighing_methods
from .options import (
    analysis_options,
    compose,
    finite,
    resource_options,
    role_options,
    select,
    size,
    terminal_options,
    threshold_option,
)
from .terminal import Terminal

if TYPE_CHECKING:
    from ..recipes.safemerge.dry_run import Preview
    from ..report.merge_report import MergeReport

_decision_options = compose(
    threshold_option("τ: modules whose ρ is strictly below it are merged."),
    click.option(
        "--select",
        callback=select,
        metavar="threshold|lowest:N|fraction:F",
        default="threshold",
        show_default=True,
        help="Merge by the threshold, or the N (or the share F) of lowest ρ.",
    ),
    click.option(
        "--granularity",
        type=click.Choice(["module", "layer"]),
        default="module",
        show_default=True,
        help="Decide for each module, or for whole layers by their mean ρ.",
    ),
    click.option(
        "--on-undefined",
        type=click.Choice(["merge", "keep"]),
        default="merge",
        show_default=True,
        help="What to do with modules that have no ρ, because V or Δ is zero.",
    ),
    click.option(
        "--others",
        type=click.Choice(["keep", "merge"]),
        default="keep",
        show_default=True,
        help="What to do with tensors that are not analysed.",
    ),
    click.option(
        "--scores",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="Reuse what analyze wrote; torch is then not needed.",
    ),
)

_merge_options = compose(
    click.option(
        "--alpha",
        type=click.FloatRange(0.0, 1.0),
        callback=finite,
        default=0.8,
        show_default=True,
        help="α: weight of the fine-tuned update; the safe one gets 1-α.",
    ),
    click.option(
        "--method",
        type=click.Choice(weighing_methods()),
        default="linear",
        show_default=True,
        help="How tensors are merged; docs/methods.md explains each. All but linear and slerp merge updates of the "
        "aligned model.",
    ),
    click.option(
        "--density",
        type=click.FloatRange(0.0, 1.0),
        callback=finite,
        help="Share of each update's elements that is kept, for methods that make it sparse.  [default: 1]",
    ),
    click.option(
        "--seed", type=click.IntRange(min=0), help="Seed of methods that draw random numbers.  [default: 0]"
    ),
    click.option(
        "--parameters",
        metavar="NAME=VALUE,...",
        help="Further parameters of the method, like lambda=0.9,normalize=false.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
        default="auto",
        show_default=True,
        help="Output dtype of float tensors; auto keeps each one's own.",
    ),
    click.option(
        "--output-format",
        type=click.Choice(["auto", "adapter", "checkpoint"]),
        default="auto",
        show_default=True,
        help="What to write; auto is an adapter if finetuned (and safe, if given) are adapters.",
    ),
    click.option(
        "--adapter-rank",
        type=click.IntRange(min=1),
        metavar="N",
        help="Truncate a merged adapter to this rank.  [default: exact]",
    ),
    click.option(
        "--compat",
        type=click.Choice(["peft-linear"]),
        help="Combine adapters as PEFT's linear combination does, which has cross terms.  [default: exact]",
    ),
    click.option(
        "--max-shard-size",
        callback=size,
        metavar="SIZE",
        help="Most bytes per file, like 5GB.  [default: the fine-tuned model's files]",
    ),
)

_run_options = compose(
    resource_options,
    click.option(
        "--dry-run", is_flag=True, help="Say what would be done, from headers alone; write nothing."
    ),
    click.option("--resume", is_flag=True, help="Continue an unfinished merge in the output."),
    click.option("--overwrite", is_flag=True, help="Replace what the output holds."),
)


@click.command("merge")
@role_options(with_safe=True)
@click.option(
    "-o", "--output", required=True, type=click.Path(), metavar="DIR", help="Output directory; new or empty."
)
@_decision_options
@_merge_options
@analysis_options
@_run_options
@terminal_options
def command(*, terminal: Terminal, dry_run: bool, **values: Any) -> None:
    """Merge the modules that left the safety subspace with a safe model.

    Modules whose update has a low cosine ρ with the safety subspace become α·finetuned + (1-α)·safe;
    all other tensors stay the fine-tuned model's. The output loads like the fine-tuned model and carries a
    report: a checkpoint with adapters folded in, or an adapter if all that is merged are adapters.
    """
    if values["resume"] and values["overwrite"]:
        raise click.UsageError(
            "--resume continues an output and --overwrite starts it anew; give one of them."
        )
    from ..recipes.safemerge.configuration import MergeConfiguration

    configuration = MergeConfiguration(**{**values, "read_backend": values["read_backend"] or "auto"})
    if dry_run:
        from ..recipes.safemerge.dry_run import preview

        outlook = preview(configuration)
        _say_notes(terminal, outlook.notes)
        terminal.result(outlook.to_json, *_preview_lines(outlook))
        return
    from ..recipes.safemerge.merge import run_merge

    with terminal.progress() as progress:
        report = run_merge(configuration, progress)
    say_merge(terminal, report)


def say_merge(terminal: Terminal, report: MergeReport) -> None:
    """Prints what came of a merge."""
    terminal.result(report.to_json, report.table())
    say_report(terminal, report)


def say_report(terminal: Terminal, report: MergeReport) -> None:
    """Writes a finished merge's notes, warnings and figures to stderr."""
    from ..sizes import format_size

    _say_notes(terminal, report.notes)
    terminal.say_some(
        "warning",
        [warning.message for warning in report.warnings],
        rest="-v prints them all, safemerge_report.json lists them",
    )
    resumed = sum(bool(shard["resumed"]) for shard in report.shards)
    terminal.say(
        f"{report.merged} of {len(report.tensors)} tensors merged into {report.output}: "
        f"{format_size(report.bytes_written)} in {len(report.shards)} file(s)"
        f"{f', {resumed} of them there already' if resumed else ''}, {report.seconds['total']:.1f} s, "
        f"peak memory {format_size(report.peak_memory_bytes)}"
    )


def _say_notes(terminal: Terminal, notes: Sequence[str]) -> None:
    terminal.say_some("note", notes, rest="-v prints them all")


def _preview_lines(outlook: Preview) -> Iterator[Any]:
    """A dry run in words: what would be merged, then bytes, memory and room."""
    from ..report.merge_report import module_table
    from ..sizes import format_size

    known = outlook.merged is not None
    if known:
        yield module_table(outlook.counts)
    else:
        types = ", ".join(
            f"{count.analysed} {count.module_type}" for count in outlook.counts if count.analysed
        )
        yield f"{outlook.analysed} of {outlook.tensors} tensors would be analysed: {types}"
        yield f"analysis     {format_size(outlook.bytes_analysed)} of base, aligned and finetuned read"
    at_most = "" if known else "at most "
    read, written = format_size(outlook.bytes_read), format_size(outlook.bytes_written)
    yield f"merge        {at_most}{read} read, {written} written"
    free, memory = format_size(outlook.free_bytes), format_size(outlook.memory_bytes)
    yield f"output       {outlook.files} file(s) in {outlook.output}, {free} free there"
    yield f"peak memory  about {memory}"
