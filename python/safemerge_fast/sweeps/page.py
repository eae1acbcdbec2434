"""The page of a sweep: what came of it, as report.html shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..recipes import recipes
from ..report.html.sweep import Candidate, Metric, sweep_page
from .report import SweepReport
from .result import Result

__all__ = ["report_page"]


def report_page(report: SweepReport) -> Iterator[bytes]:
    """The page, in pieces."""
    front = set(report.pareto)
    return sweep_page(
        [_candidate(result, result.name in front) for result in report.results],
        [Metric(metric.name, metric.direction == "max") for metric in report.metrics],
        title="Candidates of a sweep",
        facts={"directory": report.directory, "best candidate": report.best or "none"},
        warnings=report.remarks(),
        notes=report.notes,
    )


def _candidate(result: Result, pareto: bool) -> Candidate:
    settings: dict[str, Any] = {"what": result.what}
    if result.counts is not None:
        settings["merged"] = f"{result.counts[0]} of {result.counts[1]} modules"
    if result.same_as is not None:
        settings["same weights as"] = result.same_as
    return Candidate(
        result.name,
        result.metrics or {},
        settings=settings,
        control=result.control is not None,
        pareto=pareto,
        command=_command(result),
        problem=result.failed,
    )


def _command(result: Result) -> str | None:
    """What makes it again with the sweep out of the way, if a command does."""
    if result.settings is None or result.recipe is None or result.recipe not in recipes():
        return None
    settings = recipes()[result.recipe].settings.from_dict({**result.settings, "output": "OUT"})
    return str(settings.command()) if settings.command_name is not None else None
