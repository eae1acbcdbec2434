"""How many columns a sketch has at each look, when the next look is taken, and how the failures are shared out."""

from __future__ import annotations

__all__ = ["LOOKS", "failure_at", "looks_of"]

LOOKS = ((32, 16), (96, 64), (288, 128), (864, 256))
"""Columns and tests after each look, in all: three times the columns give intervals of less than half the width."""

# Operations per element of a matrix: a column takes 2 in each of ΔΩ, Vᵀ(…) and V(…), a test column 2 more in ΔᵀKP. The
# exact ρ takes 3 for each row or column of the smaller Gram matrix. A look may leave the question open, so that it is
# worth half of that. Of small matrices the algebra of the look takes as long as the exact ρ, so that this holds for the
# first look as well.
_COLUMN, _TEST, _EXACT = 6.0, 8.0, 3.0
_WORTH = 0.5


def looks_of(d_out: int, d_in: int) -> int:
    """How many of the looks are taken before the exact ρ is no dearer than the next; 0 for a small matrix.

    Args:
        d_out: Rows of the matrix.
        d_in: Columns of it.
    """
    worth = _WORTH * _EXACT * min(d_out, d_in)
    return sum(_COLUMN * columns + _TEST * tests <= worth for columns, tests in LOOKS)


def failure_at(look: int, failure: float, modules: int, sides: int = 1) -> float:
    """The probability with which the interval of one module at one look may miss to one side.

    A look has half of what those before it have left, so that all looks of all modules together stay below the
    failure of the whole run, whatever they have to do with one another.

    Args:
        look: From 0.
        failure: Of the whole run.
        modules: How many are decided.
        sides: 1 where a module is decided wrongly by a miss to one side only (a threshold), 2 where by either (a rank).
    """
    return failure / (modules * sides) * 0.5 ** (look + 1)
