"""Draws ρ per layer and module type beside chance, with intervals, threshold and decisions: PNG or SVG."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..analysis.score import Score
from ..errors import AnalysisError, OutputError
from ..pairing.module import modules_of_rows
from ..pairing.row import Row
from ..printable import plot_label
from .order import natural, ordered_types

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "check_plot", "write_plot"]

FORMATS = ("png", "svg")
"""File name extensions that a plot can have."""

_MERGED, _KEPT, _CHANCE, _INK = "#b4470f", "#4a6d8c", "#8b9098", "#1d1f23"

# More panels than this are no figure any more; the types with the most modules are drawn.
_MOST_PANELS = 20


def check_plot(path: str | Path) -> None:
    """Finds out before any long work whether a plot could be written.

    Raises:
        OutputError: The extension is none of FORMATS, or the directory does not exist.
        AnalysisError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lstrip(".").lower() not in FORMATS:
        raise OutputError(f"cannot plot to {path}: its name should end in .png or .svg")
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
    data = _render(_figure(rows, scores, threshold, title), path.suffix.lstrip(".").lower())
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _figure(rows: Sequence[Row], scores: Mapping[str, Score], threshold: float, title: str) -> Figure:
    """A panel per module type, all with the same axes."""
    # The object interface: pyplot would choose a display and keep global state.
    from matplotlib.figure import Figure

    types: dict[str, dict[str | None, list[Score]]] = {}
    undefined = 0
    for module in modules_of_rows(rows):
        score = scores.get(module.name)
        if score is None or score.rho is None:
            undefined += score is not None
            continue
        types.setdefault(module.module_type, {}).setdefault(module.layer, []).append(score)
    layers = _layers(types)
    types = {name: types[name] for name in ordered_types(types)}
    drawn = types
    if len(types) > _MOST_PANELS:
        counts = {name: sum(map(len, groups.values())) for name, groups in types.items()}
        most = set(sorted(types, key=lambda name: -counts[name])[:_MOST_PANELS])
        drawn = {name: groups for name, groups in types.items() if name in most}
    columns = min(4, max(1, len(drawn)))
    lines = max(1, math.ceil(len(drawn) / columns))
    figure = Figure(figsize=(max(6.0, 3.0 * columns), 1.2 + 2.1 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for panel in panels[len(drawn) :]:
        panel.set_axis_off()
    for number, (name, groups) in enumerate(drawn.items()):
        _draw_panel(panels[number], groups, layers, threshold)
        count = [score for group in groups.values() for score in group]
        below = sum(score.rho is not None and score.rho < threshold for score in count)
        panels[number].set_title(
            f"{plot_label(name)}   {below} of {len(count)} below τ", fontsize=8.5, loc="left", color=_INK
        )
    if drawn:
        _label_axes(panels, layers, columns, len(drawn))
        _legend(figure, threshold, columns=4 if columns > 2 else 2)
    left_out = [
        *([f"{len(types) - len(drawn)} module types"] if len(drawn) < len(types) else []),
        *([f"{undefined} modules without ρ"] if undefined else []),
    ]
    heading = plot_label(title) + (f" (not drawn: {', '.join(left_out)})" if left_out else "")
    figure.suptitle(heading, fontsize=11, x=0.01, ha="left", color=_INK)
    return figure


def _layers(types: Mapping[str, Mapping[str | None, Sequence[Score]]]) -> dict[str | None, int]:
    """The place of each layer on the axis, in the order of the numbers in their names; no layer comes last."""
    names = {layer for groups in types.values() for layer in groups}
    ordered: list[str | None] = [*sorted((name for name in names if name is not None), key=natural)]
    return {name: place for place, name in enumerate([*ordered, *([None] if None in names else [])])}


def _draw_panel(
    axes: Axes,
    groups: Mapping[str | None, Sequence[Score]],
    layers: Mapping[str | None, int],
    threshold: float,
) -> None:
    """One point per layer with its interval; of several modules in a layer the median, and all as a line."""
    chance = sorted(
        (layers[layer], statistics.median(known))
        for layer, group in groups.items()
        if (known := [score.rho_null for score in group if score.rho_null is not None])
    )
    axes.plot(
        [place for place, _ in chance], [null for _, null in chance], color=_CHANCE, linewidth=1.1, zorder=1
    )
    axes.plot(
        [place for place, _ in chance],
        [null for _, null in chance],
        "_",
        color=_CHANCE,
        markersize=7,
        zorder=1,
    )
    axes.axhline(threshold, color=_INK, linestyle=(0, (4, 3)), linewidth=0.8, zorder=1)
    for layer, group in groups.items():
        place = layers[layer]
        rhos = [score.rho for score in group if score.rho is not None]
        middle = statistics.median(rhos)
        if len(group) == 1:
            low, high = group[0].rho_low, group[0].rho_high
            assert low is not None
            assert high is not None
        else:
            low, high = min(rhos), max(rhos)
        # Of a line through several modules, the part below the threshold is what is merged.
        split = min(max(threshold, low), high) if len(group) > 1 else (high if middle < threshold else low)
        axes.vlines(place, low, split, color=_MERGED, linewidth=1.2, alpha=0.8, zorder=2)
        axes.vlines(place, split, high, color=_KEPT, linewidth=1.2, alpha=0.8, zorder=2)
        merged = middle < threshold
        axes.plot(
            place,
            middle,
            "o" if merged else "s",
            color=_MERGED if merged else _KEPT,
            markersize=3.6,
            markeredgewidth=0,
            zorder=3,
        )


def _label_axes(panels: Any, layers: Mapping[str | None, int], columns: int, drawn: int) -> None:
    names = list(layers)
    step = max(1, math.ceil(len(names) / 8))
    places = range(0, len(names), step)
    numbers = [_number(names[place]) for place in places]
    for number, panel in enumerate(panels[:drawn]):
        panel.set_ylim(0, 1.02)
        panel.set_xlim(-0.7, len(names) - 0.3)
        panel.set_xticks(list(places), numbers)
        panel.tick_params(labelsize=7.5, length=2.5, color=_CHANCE)
        panel.grid(visible=True, axis="y", color="#ececea", linewidth=0.6)
        panel.set_axisbelow(True)
        for side, spine in panel.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_CHANCE)
        if number % columns == 0:
            panel.set_ylabel("ρ", fontsize=9)
        if number + columns >= drawn:
            # Shared axes have numbers in the last line only, which may be short.
            panel.tick_params(labelbottom=True)
            panel.set_xlabel("layer", fontsize=8.5)


def _number(layer: str | None) -> str:
    if layer is None:
        return "–"
    digits = len(layer) - len(layer.rstrip("0123456789"))
    return layer[len(layer) - digits :][-6:] if digits else plot_label(layer[-8:])


def _legend(figure: Figure, threshold: float, *, columns: int) -> None:
    from matplotlib.lines import Line2D

    figure.legend(
        handles=[
            Line2D(
                [],
                [],
                marker="o",
                color=_MERGED,
                linewidth=1.2,
                markersize=4,
                label="ρ < τ, interval or range",
            ),
            Line2D([], [], marker="s", color=_KEPT, linewidth=1.2, markersize=4, label="ρ ≥ τ, likewise"),
            Line2D([], [], marker="_", color=_CHANCE, linewidth=1.1, label="ρ_null, a random update"),
            Line2D([], [], color=_INK, linestyle=(0, (4, 3)), linewidth=0.8, label=f"τ = {threshold:g}"),
        ],
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=8,
    )


def _render(figure: Any, kind: str) -> bytes:
    import matplotlib

    data = io.BytesIO()
    # Text as paths and no date: the same scores give the same picture on every machine with these fonts.
    with matplotlib.rc_context({"svg.hashsalt": "safemerge-fast"}):
        figure.savefig(data, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    return data.getvalue()
