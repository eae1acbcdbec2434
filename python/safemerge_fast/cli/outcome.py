"""Printing what came of a job, whatever the recipe, and what one that was not done would be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .terminal import Terminal

if TYPE_CHECKING:
    from ..recipes.preview import Preview
    from ..report.report import Report

__all__ = ["preview_lines", "say_outcome", "say_report"]


def say_outcome(terminal: Terminal, report: Report) -> None:
    """Prints a finished job: what was decided on stdout, notes and figures on stderr."""
    analysed = any(tensor.analysed for tensor in report.tensors)
    terminal.result(report.to_json, report.table() if analysed else _sentence(report))
    say_report(terminal, report)


def say_report(terminal: Terminal, report: Report) -> None:
    """Writes a finished job's notes, warnings, figures and next steps to stderr."""
    from ..report.report import REPORT_FILE
    from ..sizes import format_size

    terminal.say_some("note", report.notes, rest="-v prints them all")
    terminal.say_some(
        "warning",
        [warning.message for warning in report.warnings],
        rest=f"-v prints them all, {REPORT_FILE} lists them",
    )
    if report.coverage is not None:
        terminal.say(report.coverage.sentence())
    resumed = sum(shard.resumed for shard in report.shards)
    terminal.say(
        f"{report.merged} of {len(report.tensors)} tensors merged into {report.output}: "
        f"{format_size(report.bytes_written)} in {len(report.shards)} file(s)"
        f"{f', {resumed} of them there already' if resumed else ''}, {report.seconds['total']:.1f} s, "
        f"peak memory {format_size(report.peak_memory_bytes)}"
    )
    terminal.say_next(_next_steps(report))


def _sentence(report: Report) -> str:
    return (
        f"{report.recipe}: {report.changed} of {len(report.tensors)} tensors changed, the others copied, "
        f"in {report.output}"
    )


def _next_steps(report: Report) -> list[tuple[str, str]]:
    """What one does with an output: a word, and what to type."""
    from ..report.report import HTML_FILE, REPORT_FILE

    output = report.output
    page = any(file.name == HTML_FILE for file in report.files)
    load = (
        f'AutoModelForCausalLM.from_pretrained("{output}")'
        if report.adapter is None
        else f'PeftModel.from_pretrained(aligned_model, "{output}")'
    )
    return [
        ("report", f"{output}/{HTML_FILE if page else REPORT_FILE}"),
        ("verify", f"safemerge-fast verify {output}"),
        ("load", load),
        ("publish", f"hf upload YOUR_NAME/YOUR_MODEL {output}"),
    ]


def preview_lines(outlook: Preview) -> Iterator[Any]:
    """A dry run in words: what would be merged, then bytes, memory and room."""
    from ..printable import printable
    from ..report.tensors import module_table
    from ..sizes import format_size

    known = outlook.merged is not None
    if known:
        yield module_table(outlook.counts, outlook.experts)
    else:
        types = ", ".join(
            f"{count.analysed} {printable(count.module_type)}" for count in outlook.counts if count.analysed
        )
        yield f"{outlook.analysed} of {outlook.tensors} tensors would be analysed: {types}"
        yield f"analysis     {format_size(outlook.bytes_analysed)} of base, aligned and finetuned read"
    if outlook.coverage is not None:
        yield f"coverage     {outlook.coverage.sentence()}"
    at_most = "" if known else "at most "
    read, written = format_size(outlook.bytes_read), format_size(outlook.bytes_written)
    yield f"merge        {at_most}{read} read, {written} written"
    free, memory = format_size(outlook.free_bytes), format_size(outlook.memory_bytes)
    yield f"output       {outlook.files} file(s) in {printable(outlook.output)}, {free} free there"
    yield f"peak memory  about {memory}"
