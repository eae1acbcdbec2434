"""What a selection makes of modules, and whether the intervals of their ρ settle it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..analysis.score import Score
from ..pairing.module import Module
from .selection import Below, Bounds, Selection, Statistic

__all__ = ["Ranking", "Unit", "Verdict", "judge", "statistic_of", "units_of"]


@dataclass(frozen=True, slots=True)
class Unit:
    """Modules that share one decision: mostly one, or those of a layer.

    Attributes:
        name: The module's name, or the layer's.
        members: The modules.
    """

    name: str
    members: tuple[Module, ...]

    @property
    def module_type(self) -> str:
        """The type of its modules, where there is one of them."""
        return self.members[0].module_type

    def bounds(self, statistic: Statistic, scores: Mapping[str, Score]) -> Bounds | None:
        """The mean of its modules' statistics, of those that have one; None if none has."""
        if len(self.members) == 1:
            return statistic.bounds(scores[self.members[0].name])
        known = [
            bounds for module in self.members if (bounds := statistic.bounds(scores[module.name])) is not None
        ]
        if not known:
            return None
        return Bounds(*(math.fsum(column) / len(known) for column in zip(*known, strict=True)))


@dataclass(frozen=True, slots=True)
class Ranking:
    """Among whom a unit was ranked.

    Attributes:
        count: How many of them are merged.
        size: How many there are.
        module_type: The type that they share; None if they are all units.
    """

    count: int
    size: int
    module_type: str | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a unit.

    Attributes:
        unit: The unit.
        bounds: Its statistic; None where it is undefined, which decides nothing.
        merge: Whether the selection takes it, by the value of the statistic.
        settled: Whether it does so wherever in their intervals the numbers lie.
        ranking: Among whom it was ranked, if it was.
    """

    unit: Unit
    bounds: Bounds | None
    merge: bool = False
    settled: bool = True
    ranking: Ranking | None = None


def units_of(modules: Iterable[Module], *, by_layer: bool) -> list[Unit]:
    """Groups modules that share one decision.

    Args:
        modules: The modules.
        by_layer: Whether those of a layer do; a module outside of all layers stands for itself.
    """
    if not by_layer:
        return [Unit(module.name, (module,)) for module in modules]
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(module.name if module.layer is None else module.layer, []).append(module)
    return [Unit(name, tuple(members)) for name, members in groups.items()]


def statistic_of(selection: Selection) -> Statistic:
    """What a selection judges by."""
    return selection.statistic if isinstance(selection, Below) else Statistic.RHO


def judge(
    selection: Selection, units: Sequence[Unit], scores: Mapping[str, Score], *, per_type: bool
) -> list[Verdict]:
    """Says what a selection makes of units.

    Args:
        selection: The selection.
        units: The units.
        scores: The scores of all their modules.
        per_type: Whether units are ranked among those of their own module type.

    Returns:
        A verdict for each unit, in their order.
    """
    statistic = statistic_of(selection)
    found = [unit.bounds(statistic, scores) for unit in units]
    if isinstance(selection, Below):
        limit = selection.boundary
        return [
            Verdict(unit, bounds)
            if bounds is None
            else Verdict(unit, bounds, bounds.value < limit, not bounds.low < limit <= bounds.high)
            for unit, bounds in zip(units, found, strict=True)
        ]
    verdicts = [Verdict(unit, None) for unit in units]
    pools: dict[str | None, list[tuple[int, str, Bounds]]] = {}
    for place, (unit, bounds) in enumerate(zip(units, found, strict=True)):
        if bounds is not None:
            pool = pools.setdefault(unit.module_type if per_type else None, [])
            pool.append((place, unit.name, bounds))
    for module_type, candidates in pools.items():
        ranking = Ranking(selection.count(len(candidates)), len(candidates), module_type)
        for (place, _, bounds), (merge, settled) in zip(
            candidates,
            _ranked([(name, bounds) for _, name, bounds in candidates], ranking.count),
            strict=True,
        ):
            verdicts[place] = Verdict(units[place], bounds, merge, settled, ranking)
    return verdicts


def _ranked(candidates: Sequence[tuple[str, Bounds]], count: int) -> list[tuple[bool, bool]]:
    """Whether each candidate is among the lowest, equal values in the order of names; and whether that is settled.

    A candidate is in for sure if fewer than `count` others can come before it: those whose lower end does. It is out
    for sure if at least as many must: those whose upper end does.
    """
    values = sorted((bounds.value, name) for name, bounds in candidates)
    lows = sorted((bounds.low, name) for name, bounds in candidates)
    highs = sorted((bounds.high, name) for name, bounds in candidates)
    decided = []
    for name, bounds in candidates:
        # Its own lower end lies before its upper one, unless they are the same.
        may_precede = bisect_left(lows, (bounds.high, name)) - (bounds.low < bounds.high)
        must_precede = bisect_left(highs, (bounds.low, name))
        decided.append(
            (
                bisect_left(values, (bounds.value, name)) < count,
                may_precede < count or must_precede >= count,
            )
        )
    return decided
