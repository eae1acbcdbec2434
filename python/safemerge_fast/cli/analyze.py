"""`safemerge-fast analyze`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..printable import printable
from ..recipes.safemerge.settings import AnalysisSettings, SafemergeSettings
from .options import output_file, settings_options, terminal_options
from .terminal import Terminal

if TYPE_CHECKING:
    from rich.table import Table

    from ..analysis.score import Score
    from ..pairing.row import Row


def _plot_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuses an extension that no plot has."""
    from ..report.plot import FORMATS

    if value is not None and value.suffix.lstrip(".").lower() not in FORMATS:
        raise click.BadParameter(
            f"the name should end in .png, .svg or .html, not {value.suffix or 'nothing'!r}"
        )
    return value


@click.command("analyze")
@settings_options(AnalysisSettings)
@settings_options(SafemergeSettings, only=("threshold",))
@click.option(
    "-o", "--output", type=output_file, metavar="FILE", help="Write the scores as JSON, for merge --scores."
)
@click.option("--csv", "csv_file", type=output_file, metavar="FILE", help="Write the scores as a table.")
@click.option(
    "--plot",
    "plot_file",
    type=output_file,
    callback=_plot_file,
    metavar="FILE",
    help="Draw ρ per layer and module type as .png, .svg or .html (needs matplotlib).",
)
@terminal_options
def command(
    *,
    terminal: Terminal,
    output: Path | None,
    csv_file: Path | None,
    plot_file: Path | None,
    threshold: float,
    **values: Any,
) -> None:
    """Measure how far each module's fine-tuning update left the safety subspace.

    ρ is the cosine of V·Vᵀ·Δ and Δ, with V what alignment changed and Δ what fine-tuning changed; low means
    that the update left the subspace. ρ_null is what a random update would have. The threshold draws the plot's
    line and counts modules below it in the table.
    """
    from ..analysis.rounding import rounding_warning
    from ..decision import Rule
    from ..pairing.coverage import coverage_of
    from ..pairing.rows import pair
    from ..recipes.role_check import refuse_or_warn
    from ..recipes.roles import access_of, open_roles
    from ..recipes.safemerge.scoring import judge_scores, score_models, wrong_before_measuring
    from ..report.plot import check_plot, write_plot

    if plot_file is not None:
        check_plot(plot_file)
    for file in (output, csv_file):
        if file is not None:
            _check_directory(file)
    settings = AnalysisSettings(**values)
    roles = {"base": settings.base, "aligned": settings.aligned, "finetuned": settings.finetuned}
    models = open_roles(roles, access_of(settings))
    pairing = pair(models, include=settings.include, exclude=settings.exclude)
    warnings = refuse_or_warn(
        wrong_before_measuring(models, pairing, force=settings.force), force=settings.force
    )
    with terminal.progress() as progress:
        scores = score_models(
            models, pairing.rows, AnalysisSettings(**values, progress=progress), Rule(threshold=threshold)
        )
    for file, write in ((output, scores.to_json), (csv_file, scores.to_csv)):
        if file is not None:
            _write(file, write())
    # After the writing: what was measured in an hour is not lost, and merge --scores judges it again.
    found = judge_scores(models, scores.modules, settings.delta_reference)
    warnings += refuse_or_warn(found.wrong, force=settings.force)
    if plot_file is not None:
        write_plot(plot_file, pairing.rows, scores.modules, threshold=threshold)
    terminal.result(scores.to_json, _table(pairing.rows, scores.modules, threshold))
    terminal.say_some("note", pairing.notes, rest="-v prints them all")
    rounding = (rounding_warning(name, score) for name, score in scores.modules.items())
    said = [*(warning.message for warning in warnings), *(text for text in rounding if text is not None)]
    terminal.say_some("warning", said, rest="-v prints them all")
    terminal.say(coverage_of(pairing.rows).sentence())
    terminal.say(f"{len(scores.modules)} modules analysed on {scores.device} in {scores.seconds:.1f} s")
    for file in (output, csv_file, plot_file):
        if file is not None:
            terminal.say(f"wrote {file}")


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


def _table(rows: Sequence[Row], scores: Mapping[str, Score], threshold: float) -> Table:
    """A line per module type."""
    from rich import box
    from rich.table import Table

    from ..pairing.module import modules_of_rows

    groups: dict[str, list[Score]] = {}
    for module in modules_of_rows(rows):
        if module.name in scores:
            groups.setdefault(module.module_type, []).append(scores[module.name])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    below = sum(score.rho is not None and score.rho < threshold for score in scores.values())
    table.add_column("module type", footer="all", no_wrap=True)
    for title, footer in (
        ("modules", str(len(scores))),
        (f"ρ < {threshold:g}", str(below)),
        ("median ρ", ""),
        ("lowest", ""),
        ("highest", ""),
        ("median ρ_null", ""),
    ):
        table.add_column(title, footer=footer, justify="right", no_wrap=True)
    for module_type, group in groups.items():
        known = [score.rho for score in group if score.rho is not None]
        table.add_row(
            printable(module_type),
            str(len(group)),
            str(sum(rho < threshold for rho in known)),
            _number(statistics.median(known) if known else None),
            _number(min(known, default=None)),
            _number(max(known, default=None)),
            _number(_median(score.rho_null for score in group)),
        )
    return table


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
