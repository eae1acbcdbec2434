"""The Pareto set: what nothing else is at least as good as in all and better than in some metrics."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["dominates", "undominated"]


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one is nowhere worse than the other and somewhere better; more is better."""
    return all(a >= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def undominated(points: Sequence[Sequence[float]]) -> list[bool]:
    """Says of each point whether no other dominates it; of equal points all or none are in the set."""
    # Who dominates a point stands before it in this order, and what it dominates is dominated by it too: it is enough
    # to compare with those that are in the set.
    order = sorted(range(len(points)), key=lambda place: tuple(points[place]), reverse=True)
    found: list[int] = []
    for place in order:
        if not any(dominates(points[other], points[place]) for other in found):
            found.append(place)
    kept = set(found)
    return [place in kept for place in range(len(points))]
