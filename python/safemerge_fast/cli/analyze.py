"""`safemerge-fast analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from ..recipes.safemerge.settings import AnalysisSettings, SafemergeSettings, precision_of
from .options import output_file, settings_options, terminal_options
from .terminal import Terminal


def _plot_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuses an extension that no plot has."""
    from ..report.plot import FORMATS

    if value is not None and value.suffix.lstrip(".").lower() not in (*FORMATS, "html"):
        raise click.BadParameter(
            f"the name should end in .png, .svg or .html, not {value.suffix or 'nothing'!r}"
        )
    return value


@click.command("analyze")
@settings_options(AnalysisSettings)
@settings_options(SafemergeSettings, only=("threshold", "select", "per_type", "granularity", "on_undefined"))
@click.option(
    "-o",
    "--output",
    type=output_file,
    metavar="FILE",
    help="Write the scores for merge --scores: as JSON, or as a table if the name ends in .parquet.",
)
@click.option(
    "--html",
    "html_file",
    type=output_file,
    metavar="FILE",
    help="Write the report as one HTML file: figures, a slider for the rule, all modules; needs no network.",
)
@click.option("--csv", "csv_file", type=output_file, metavar="FILE", help="Write the scores as a table.")
@click.option(
    "--plot",
    "plot_file",
    type=output_file,
    callback=_plot_file,
    metavar="FILE",
    help="Draw ρ per layer and module type as .png or .svg (needs matplotlib); .html is what --html writes.",
)
@terminal_options
def command(
    *,
    terminal: Terminal,
    output: Path | None,
    csv_file: Path | None,
    html_file: Path | None,
    plot_file: Path | None,
    threshold: float,
    select: str,
    per_type: bool,
    granularity: Literal["module", "layer"],
    on_undefined: Literal["merge", "keep"],
    **values: Any,
) -> None:
    """Measure how far each module's fine-tuning update left the safety subspace.

    ρ is the cosine of V·Vᵀ·Δ and Δ, with V what alignment changed and Δ what fine-tuning changed; low means
    that the update left the subspace. ρ_null is what a random update would have. The rule (--threshold, --select, …)
    decides nothing yet: the tables say what it would merge, and what others would.
    """
    from ..analysis.rounding import rounding_warning
    from ..analysis.table import names_parquet, require_parquet
    from ..decision import uncertified
    from ..decision.outlook import cautions, outlook
    from ..pairing.coverage import coverage_of
    from ..pairing.module import modules_of_rows
    from ..pairing.rows import pair
    from ..recipes.role_check import refuse_or_warn
    from ..recipes.roles import access_of, open_roles
    from ..recipes.safemerge.evidence import PartialFile, ScoreLog
    from ..recipes.safemerge.rule import checked_rule
    from ..recipes.safemerge.scoring import judge_scores, score_models, wrong_before_measuring
    from ..report.html.analysis import AnalysisPage
    from ..report.html.page import write_pieces
    from ..report.overview import Layers, rule_table, type_table
    from ..report.plot import check_plot, write_plot

    rule = checked_rule(
        threshold=threshold,
        select=select,
        per_type=per_type,
        granularity=granularity,
        on_undefined=on_undefined,
    )
    html_file, plot_file = _page_and_plot(html_file, plot_file)
    if plot_file is not None:
        check_plot(plot_file)
    if output is not None and names_parquet(output):
        require_parquet()
    for file in (output, csv_file, html_file):
        if file is not None:
            _check_directory(file)
    settings = AnalysisSettings(**values)
    roles = {"base": settings.base, "aligned": settings.aligned, "finetuned": settings.finetuned}
    models = open_roles(roles, access_of(settings))
    pairing = pair(models, include=settings.include, exclude=settings.exclude)
    warnings = refuse_or_warn(
        wrong_before_measuring(models, pairing, force=settings.force), force=settings.force
    )
    partial = None if output is None else PartialFile(output)
    log = None
    if partial is not None:
        log = ScoreLog(
            partial, models, delta_reference=settings.delta_reference, precision=precision_of(settings)
        )
    with terminal.progress() as progress:
        scores = score_models(
            models, pairing.rows, AnalysisSettings(**values, progress=progress), rule, log=log
        )
    if output is not None:
        scores.save(output)
    if partial is not None:
        partial.remove()
    if csv_file is not None:
        _write(csv_file, scores.to_csv())
    # After the writing: what was measured in an hour is not lost, and merge --scores judges it again.
    found = judge_scores(models, scores.modules, settings.delta_reference)
    warnings += refuse_or_warn(found.wrong, force=settings.force)
    if plot_file is not None:
        write_plot(plot_file, pairing.rows, scores.modules, threshold=threshold)
    modules = list(modules_of_rows(pairing.rows))
    found_by_rules = outlook(modules, scores.modules, rule)
    terminal.result(
        scores.to_json,
        type_table(modules, scores.modules, found_by_rules[0]),
        Layers(modules, scores.modules),
        rule_table(found_by_rules),
    )
    idle = () if rule.idle is None else (rule.idle,)
    terminal.say_some("note", [*pairing.notes, *idle], rest="-v prints them all")
    rounding = (rounding_warning(name, score) for name, score in scores.modules.items())
    said = [
        *(warning.message for warning in warnings),
        *(text for text in (uncertified(pairing.rows, scores.modules, rule),) if text is not None),
        *cautions(modules, scores.modules, rule),
        *(text for text in rounding if text is not None),
    ]
    if html_file is not None:
        page = AnalysisPage(models, pairing, scores, settings, rule, SafemergeSettings, said, output)
        write_pieces(html_file, page.pieces())
    terminal.say_some("warning", said, rest="-v prints them all")
    terminal.say(coverage_of(pairing.rows).sentence())
    terminal.say(f"{len(scores.modules)} modules analysed on {scores.device} in {scores.seconds:.1f} s")
    for file in (output, csv_file, html_file, plot_file):
        if file is not None:
            terminal.say(f"wrote {file}")


def _page_and_plot(html_file: Path | None, plot_file: Path | None) -> tuple[Path | None, Path | None]:
    """The report and the plot to write; a plot that ends in .html is the report."""
    if plot_file is None or plot_file.suffix.lower() != ".html":
        return html_file, plot_file
    if html_file is not None:
        raise click.UsageError("--plot with a name in .html is the same as --html; give one of them")
    return plot_file, None


def _check_directory(file: Path) -> None:
    """Finds out before the work whether there is a directory to write to."""
    from ..errors import OutputError

    if not file.absolute().parent.is_dir():
        raise OutputError(f"cannot write {file}: the directory {file.absolute().parent} does not exist")


def _write(file: Path, text: str) -> None:
    from ..errors import OutputError

    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror}") from error
