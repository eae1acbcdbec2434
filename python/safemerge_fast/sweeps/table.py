"""The results of a sweep as a table for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from ..printable import printable
from .candidates import Control
from .result import Result

if TYPE_CHECKING:
    from rich.table import Table

    from .metrics import Metric

__all__ = ["result_line", "result_table"]

_ARROWS = {"max": "↑", "min": "↓"}


def result_table(
    metrics: Sequence[Metric], results: Sequence[Result], *, pareto: Collection[str], best: str | None
) -> Table:
    """A line per model: lone controls, then each candidate with its own ones; ● marks the Pareto set."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("model", overflow="fold", min_width=12)
    table.add_column("merged", justify="right", no_wrap=True)
    for metric in metrics:
        table.add_column(
            f"{metric.name} {_ARROWS[metric.direction]}", justify="right", overflow="fold", min_width=6
        )
    front = set(pareto)
    for result in _in_order(results):
        counts = result.counts
        name = result.name
        if result.control is not None:
            # The line above says beside what.
            name = f"  {_label(result)}" if result.beside is not None else f"{name} (control)"
        if result.same_as is not None:
            name += f" = {result.same_as}"
        values = [
            "failed" if result.metrics is None else f"{result.metrics[metric.name]:.4g}" for metric in metrics
        ]
        table.add_row(
            "●" if result.name in front else "",
            printable(name),
            "" if counts is None else f"{counts[0]}/{counts[1]}",
            *values,
            style="bold" if result.name == best else None if result.control is None else "dim",
        )
    return table


def result_line(result: Result) -> str:
    """What came of one model, in a line."""
    if result.failed is not None:
        return f"{result.name} failed: {result.failed}"
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in (result.metrics or {}).items())
    if result.same_as is not None:
        return f"{result.name}: {metrics} (the same weights as {result.same_as})"
    seconds = sum(result.seconds.values())
    return f"{result.name}: {metrics} ({seconds:.1f} s)"


def _label(result: Result) -> str:
    """What a control is called below its candidate."""
    if result.control is Control.RANDOM:
        return f"random modules ({result.name.split('-')[1]})"
    return "no safe model" if result.control is Control.NO_SAFE else result.name


def _in_order(results: Sequence[Result]) -> list[Result]:
    beside: dict[str | None, list[Result]] = {}
    for result in results:
        beside.setdefault(result.beside, []).append(result)
    alone = sorted(beside.get(None, []), key=lambda result: result.control is None)
    return [line for result in alone for line in (result, *beside.get(result.name, ()))]
