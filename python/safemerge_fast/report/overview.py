"""What an analysis found, as tables for a terminal that are never wider than it is."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..analysis.score import Score
from ..decision.outlook import Outcome
from ..pairing.module import Module
from ..printable import printable
from .expert_lines import expert_label, is_of_expert

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

__all__ = ["Layers", "rule_table", "type_table"]

_NUMBER = re.compile(r"\d+$")

# Characters of a module type that a line has room for; longer ones take another.
_LONGEST = 24


def type_table(modules: Sequence[Module], scores: Mapping[str, Score], chosen: Outcome) -> Table:
    """A line per module type, and one for the experts of each layer.

    Args:
        modules: The modules, all of which have a score.
        scores: Scores by module name.
        chosen: What the chosen rule would merge.
    """
    merged = chosen.rule.merged(modules, scores)
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(module.module_type, []).append(module)
    experts: dict[str, list[Module]] = {}
    for module in modules:
        if module.layer is not None and is_of_expert(module.module_type):
            experts.setdefault(expert_label(module.layer), []).append(module)
    title = f"ρ < {chosen.rule.threshold:g}" if chosen.rule.select == "threshold" else "merged"
    table = _table("module type", footer="all")
    for name, footer in (
        ("modules", str(len(modules))),
        (title, str(len(merged))),
        ("lowest", ""),
        ("median", ""),
        ("highest", ""),
        ("ρ_null", ""),
    ):
        table.add_column(name, footer=footer, justify="right", no_wrap=True)
    for name, group in (*groups.items(), *experts.items()):
        rhos = _known(scores[module.name].rho for module in group)
        counts = len(group), sum(module.name in merged for module in group)
        # Experts by layer in brackets, since the types' lines have counted them already.
        cells = (f"({count})" if name in experts else str(count) for count in counts)
        table.add_row(
            printable(name),
            *cells,
            _number(min(rhos, default=None)),
            _number(statistics.median(rhos) if rhos else None),
            _number(max(rhos, default=None)),
            _number(_median(scores[module.name].rho_null for module in group)),
        )
    return table


def rule_table(outcomes: Iterable[Outcome]) -> Table:
    """What several rules would merge; the first is the one that was chosen."""
    table = _table("rule")
    table.add_column("modules", justify="right", no_wrap=True)
    table.add_column("of ‖Δ‖²", justify="right", no_wrap=True)
    for place, found in enumerate(outcomes):
        table.add_row(
            f"{found.option}{' (this one)' if place == 0 else ''}",
            str(found.merged),
            "" if found.share is None else f"{found.share:.1%}",
            style="bold" if place == 0 else "",
        )
    return table


@dataclass(frozen=True, slots=True)
class Layers:
    """Median ρ of each module type over the layers, as many of which share a column as the terminal's width demands.

    Attributes:
        modules: The modules, all of which have a score.
        scores: Scores by module name.
    """

    modules: Sequence[Module]
    scores: Mapping[str, Score]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table for each stack of layers, such as encoder and decoder."""
        stacks = self._stacks()
        for stack, types in stacks.items():
            if len(stacks) > 1:
                yield printable(stack or "outside of layers")
            yield _layer_table(types, options.max_width)

    def _stacks(self) -> dict[str, dict[str, dict[int, list[float]]]]:
        """ρ by stack, module type and number of the layer."""
        stacks: dict[str, dict[str, dict[int, list[float]]]] = {}
        for module in self.modules:
            rho = self.scores[module.name].rho
            if rho is None:
                continue
            layer = module.layer or ""
            number = _NUMBER.search(layer)
            stack = layer[: number.start()].rstrip(".") if number else layer
            types = stacks.setdefault(stack, {})
            place = int(number[0]) if number else 0
            types.setdefault(module.module_type, {}).setdefault(place, []).append(rho)
        return stacks


def _layer_table(types: Mapping[str, Mapping[int, Sequence[float]]], width: int) -> Table:
    numbers = sorted({number for layers in types.values() for number in layers})
    longest = min(max(len(name) for name in types), _LONGEST)
    spans = next(spans for spans in _spans(numbers) if longest + _width(spans) <= width or len(spans) == 1)
    table = _table("median ρ, layers")
    for span in spans:
        table.add_column(_title(span), justify="right", no_wrap=True)
    for name, layers in types.items():
        cells = (_median(rho for number in span for rho in layers.get(number, ())) for span in spans)
        table.add_row(printable(name), *("" if cell is None else f"{cell:.2f}" for cell in cells))
    return table


def _spans(numbers: Sequence[int]) -> Iterator[list[Sequence[int]]]:
    """The layers in ever longer spans."""
    for size in range(1, len(numbers) + 1):
        yield [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _title(span: Sequence[int]) -> str:
    return str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}"


def _width(spans: Iterable[Sequence[int]]) -> int:
    """What columns take, with the space between them."""
    return sum(max(len(_title(span)), 4) + 2 for span in spans)


def _table(first: str, footer: str | None = None) -> Table:
    """A table whose first column gives way where there is no room; its numbers never do."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_footer=footer is not None)
    table.add_column(first, footer=footer or "", overflow="fold", min_width=8)
    return table


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _median(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.median(known) if known else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
