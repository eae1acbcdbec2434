"""Draws ρ per layer and module type, with threshold and ρ_null: PNG, SVG or one self-contained HTML page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..analysis.score import Score
from ..errors import AnalysisError, OutputError
from ..pairing.module import modules_of_rows
from ..pairing.row import Row
from ..printable import plot_label, printable
from .expert_lines import ExpertLine, lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "check_plot", "write_plot"]

FORMATS = ("png", "svg", "html")
"""File name extensions that a plot can have."""

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.9rem; }}
th, td {{ padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left; }}
tr.below td {{ background: #fdecea; }}
</style>
</head>
<body>
<h1>{title}</h1>
{figure}
<table>
<thead><tr><th>module</th><th>module type</th><th>ρ</th><th>ρ_null</th><th>‖V‖</th><th>‖Δ‖</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</body>
</html>
"""


def check_plot(path: str | Path) -> None:
    """Finds out before any long work whether a plot could be written.

    Raises:
        OutputError: The extension is none of FORMATS, or the directory does not exist.
        AnalysisError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lstrip(".").lower() not in FORMATS:
        raise OutputError(f"cannot plot to {path}: its name should end in .png, .svg or .html")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"cannot plot to {path}: the directory {path.absolute().parent} does not exist")
    if find_spec("matplotlib") is None:
        raise AnalysisError("plotting needs matplotlib; install it with pip install safemerge-fast[plot]")


def write_plot(
    path: str | Path,
    rows: Sequence[Row],
    scores: Mapping[str, Score],
    *,
    threshold: float,
    title: str = "ρ per layer and module type",
) -> None:
    """Draws the scores and writes them to a file.

    Args:
        path: Where to; its extension chooses among FORMATS.
        rows: Rows of the pairing; those without ρ are left out of the drawing.
        scores: Scores by module name.
        threshold: τ, drawn as a line.
        title: The heading.

    Raises:
        OutputError: As check_plot, or the file cannot be written.
        AnalysisError: matplotlib is not installed.
    """
    check_plot(path)
    path = Path(path)
    figure = _figure(rows, scores, threshold, title)
    kind = path.suffix.lstrip(".").lower()
    if kind == "html":
        data = _page(rows, scores, threshold, title, _render(figure, "svg").decode()).encode()
    else:
        data = _render(figure, kind)
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _figure(rows: Sequence[Row], scores: Mapping[str, Score], threshold: float, title: str) -> Figure:
    """One line per module type over the layers, its ρ_null as short bars, the threshold dashed."""
    # The object interface: pyplot would choose a display and keep global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    series: dict[str, list[tuple[int, float, float | None]]] = {}
    order: dict[str, int] = {}
    for module in modules_of_rows(rows):
        score = scores.get(module.name)
        if score is None or score.rho is None:
            continue
        layer = _layer_number(module.layer, order)
        series.setdefault(module.module_type, []).append((layer, score.rho, score.rho_null))
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    markers = "osD^v<>pPX*h"
    for number, (module_type, points) in enumerate(series.items()):
        points.sort()
        layers = [point[0] for point in points]
        (line,) = axes.plot(
            layers,
            [point[1] for point in points],
            marker=markers[number % len(markers)],
            # The experts of one layer are points above each other, which no line can join.
            linestyle="-" if len(set(layers)) == len(layers) else "none",
            linewidth=1,
            markersize=5,
            label=plot_label(module_type),
        )
        known = [(layer, null) for layer, _, null in points if null is not None]
        axes.plot(
            [layer for layer, _ in known],
            [null for _, null in known],
            linestyle="none",
            marker="_",
            markersize=10,
            color=line.get_color(),
            alpha=0.6,
        )
    axes.plot([], [], linestyle="none", marker="_", markersize=10, color="grey", label="ρ_null")
    axes.axhline(threshold, color="black", linestyle="--", linewidth=1, label=f"τ = {threshold:g}")
    axes.set(title=plot_label(title), xlabel="layer", ylabel="ρ", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _layer_number(layer: str | None, order: dict[str, int]) -> int:
    """The number in a layer's name; layers without one follow in the order of appearance."""
    name = layer or ""
    match = re.search(r"(\d{1,9})$", name)
    return int(match[1]) if match else order.setdefault(name, len(order))


def _render(figure: Any, kind: str) -> bytes:
    import matplotlib

    data = io.BytesIO()
    # Text as paths and no date: the same scores give the same picture on every machine with these fonts.
    with matplotlib.rc_context({"svg.hashsalt": "safemerge-fast"}):
        figure.savefig(data, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return data.getvalue()


def _page(rows: Sequence[Row], scores: Mapping[str, Score], threshold: float, title: str, svg: str) -> str:
    """The drawing and a table of all scores in one file that loads nothing else."""
    table = []
    for line in lines(modules_of_rows(rows), scores):
        if isinstance(line, ExpertLine):
            table.append(_expert_line(line, threshold))
            continue
        score = scores[line.name]
        below = score.rho is not None and score.rho < threshold
        rho = f"{score.rho:.4f}" if score.rho is not None else _cell(score.undefined or "")
        null = f"{score.rho_null:.4f}" if score.rho_null is not None else ""
        cells = (
            _cell(line.name),
            _cell(line.module_type),
            rho,
            null,
            f"{score.v_norm:.4g}",
            f"{score.delta_norm:.4g}",
        )
        table.append(_line(cells, below=below))
    # Only the element itself: the XML declaration and doctype may not stand within a page.
    return _PAGE.format(title=_cell(title), figure=svg[svg.index("<svg") :], rows="\n".join(table))


def _expert_line(line: ExpertLine, threshold: float) -> str:
    """The experts of a layer in one line of the table; it is marked if any of them lies below the threshold."""
    null = "" if line.median_null is None else f"{line.median_null:.4f}"
    cells = (_cell(line.name), _cell(line.module_type), _cell(line.describe(threshold)), null, "", "")
    return _line(cells, below=any(rho < threshold for rho in line.rhos))


def _line(cells: Iterable[str], *, below: bool) -> str:
    opening = '<tr class="below">' if below else "<tr>"
    return opening + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _cell(text: str) -> str:
    return escape(printable(text))
