"""The looks of the analysis, and what failures they share."""

from __future__ import annotations

import pytest

from safemerge_fast.analysis.schedule import LOOKS, failure_at, looks_of


@pytest.mark.parametrize(
    ("shape", "looks"),
    [
        ((64, 64), 0),
        ((128, 4096), 0),
        ((256, 1536), 1),
        ((1536, 256), 1),
        ((1536, 8960), 2),
        ((4096, 14336), 3),
        ((8192, 28672), 4),
    ],
)
def test_a_look_is_taken_while_it_costs_less_than_half_of_the_exact_one(
    shape: tuple[int, int], looks: int
) -> None:
    assert looks_of(*shape) == looks
    for number, (columns, tests) in enumerate(LOOKS):
        assert (number < looks) == (6 * columns + 8 * tests <= 1.5 * min(shape))


@pytest.mark.parametrize("sides", [1, 2])
def test_all_looks_together_stay_below_the_failure(sides: int) -> None:
    total = sum(failure_at(look, 1e-3, 70_000, sides) for look in range(40)) * 70_000 * sides
    assert 0.999e-3 < total <= 1e-3
