"""Means over seeds, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from .results import Row

# Quantiles 0.975 of Student's t for 1, 2, ... degrees of freedom; the last one serves for more.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        half: Half the width of its 95 % interval by Student's t; infinite for one seed.
        seeds: How many seeds there are.
    """

    mean: float
    half: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does not hold 0."""
        return abs(self.mean) > self.half


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values and its interval."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.inf, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Interval(mean, _T[min(count - 2, len(_T) - 1)] * math.sqrt(variance / count), count)


def by_seed(rows: Iterable[Row], metric: str, tasks: Iterable[str]) -> dict[int, float]:
    """A metric by seed, as its mean over tasks: the fine-tunings of one seed share their aligned model.

    Seeds that lack a task are left out, since a mean over other tasks would not compare.
    """
    wanted = set(tasks)
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.task in wanted:
            found.setdefault(row.seed, {})[row.task] = row.value(metric)
    return {
        seed: math.fsum(values.values()) / len(values)
        for seed, values in sorted(found.items())
        if values.keys() == wanted
    }


def most_compared(rows: Iterable[Row]) -> tuple[str, ...]:
    """The tasks to average over: those that give most seeds, and of such the most tasks.

    A study that was cut short has some tasks for fewer seeds.
    """
    found: dict[int, set[str]] = {}
    for row in rows:
        found.setdefault(row.seed, set()).add(row.task)
    tasks = sorted(set().union(*found.values()))
    choices = [chosen for count in range(1, len(tasks) + 1) for chosen in combinations(tasks, count)]
    return max(
        choices, key=lambda chosen: (sum(has.issuperset(chosen) for has in found.values()), len(chosen))
    )


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """The mean of one minus the other over the seeds that both have; None if there is none."""
    both = sorted(one.keys() & other.keys())
    return interval([one[seed] - other[seed] for seed in both]) if both else None
