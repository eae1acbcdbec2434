"""The first two metrics of a sweep as a picture: candidates, controls, and the Pareto set joined by steps."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AnalysisError, OutputError
from ..printable import plot_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .report import SweepReport
    from .result import Result

__all__ = ["FORMATS", "check_drawing", "write_drawing"]

FORMATS = ("png", "svg")
"""File name extensions that a picture can have."""

_MARKERS = "osD^vPX*h<>p"
# More names than this would lie on each other.
_MOST_LABELS = 25


def check_drawing(path: Path) -> None:
    """Finds out before any long work whether a picture could be written.

    Raises:
        OutputError: The extension is none of FORMATS, or the directory does not exist.
        AnalysisError: matplotlib is not installed.
    """
    if path.suffix.lstrip(".").lower() not in FORMATS:
        raise OutputError(f"cannot plot to {path}: its name should end in .png or .svg")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"cannot plot to {path}: the directory {path.absolute().parent} does not exist")
    if find_spec("matplotlib") is None:
        raise AnalysisError("plotting needs matplotlib; install it with pip install safemerge-fast[plot]")


def write_drawing(path: Path, report: SweepReport) -> None:
    """Draws what came of a sweep and writes it to a file.

    Args:
        path: Where to; its extension chooses among FORMATS.
        report: The sweep.

    Raises:
        OutputError: As check_drawing, or the file cannot be written.
        AnalysisError: matplotlib is not installed.
    """
    check_drawing(path)
    import matplotlib

    data = io.BytesIO()
    kind = path.suffix.lstrip(".").lower()
    # No date: the same sweep gives the same picture.
    with matplotlib.rc_context({"svg.hashsalt": "safemerge-fast"}):
        _figure(report).savefig(
            data, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None
        )
    try:
        path.write_bytes(data.getvalue())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _figure(report: SweepReport) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    across, up = report.metrics[0], report.metrics[1] if len(report.metrics) > 1 else report.metrics[0]
    groups: dict[str, list[Result]] = {}
    for result in report.results:
        if result.metrics is not None and result.same_as is None:
            groups.setdefault(_group(result), []).append(result)
    # Candidates last: on top of the controls.
    for number, (label, members) in enumerate(
        sorted(groups.items(), key=lambda item: item[1][0].control is None)
    ):
        control = members[0].control is not None
        axes.plot(
            [_value(result, across.name) for result in members],
            [_value(result, up.name) for result in members],
            linestyle="none",
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=6 if control else 7,
            markerfacecolor="none" if control else None,
            color=f"C{number % 10}",
            label=plot_label(label),
        )
    front = set(report.pareto)
    names = [
        result
        for result in report.results
        if result.name in front and result.metrics is not None and result.same_as is None
    ]
    if len(report.metrics) == 2:
        # With more than two, what is undominated is no line in this plane.
        points = sorted({(_value(result, across.name), _value(result, up.name)) for result in names})
        # Between two points lies what both dominate: the step turns at the worse of the values across.
        axes.step(
            [point[0] for point in points],
            [point[1] for point in points],
            where="post" if across.direction == "min" else "pre",
            color="grey",
            linewidth=1,
            zorder=0,
            label="Pareto set",
        )
    for result in names[:_MOST_LABELS]:
        axes.annotate(
            plot_label(result.name),
            (_value(result, across.name), _value(result, up.name)),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_xlabel(_axis(across))
    axes.set_ylabel(_axis(up))
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _group(result: Result) -> str:
    if result.control is None:
        return result.recipe or "candidate"
    return f"{result.control.value} (control)"


def _axis(metric: Any) -> str:
    better = "more is better" if metric.direction == "max" else "less is better"
    return plot_label(f"{metric.name} ({better})")


def _value(result: Result, name: str) -> float:
    assert result.metrics is not None
    return result.metrics[name]
