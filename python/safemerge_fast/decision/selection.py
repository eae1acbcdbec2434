"""How modules are selected: all whose statistic lies below a boundary, or those that rank lowest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ..analysis.score import Score
from ..errors import AnalysisError

__all__ = [
    "FORMS",
    "Below",
    "Bounds",
    "Fraction",
    "Lowest",
    "Ranked",
    "Selection",
    "Statistic",
    "parse_selection",
]

FORMS = "threshold|null:K|z:K|lowest:N|fraction:F"
"""What a selection may be written as."""


class Bounds(NamedTuple):
    """A number that is known to lie in an interval."""

    low: float
    value: float
    high: float

    @property
    def is_exact(self) -> bool:
        """Whether the number is known."""
        return self.low == self.high


class Statistic(Enum):
    """What a module is judged by; the value is what sentences call it."""

    RHO = "ρ"
    RATIO = "ρ/ρ_null"
    Z = "z"

    def bounds(self, score: Score) -> Bounds | None:
        """The statistic of a score.

        All three grow with ρ, so that the ends of its interval give the ends of theirs. ρ_null and its spread are taken
        as they stand.

        Args:
            score: The score.

        Returns:
            None where it is undefined.
        """
        if score.rho is None:
            return None
        low = score.rho if score.rho_low is None else score.rho_low
        high = score.rho if score.rho_high is None else score.rho_high
        if self is Statistic.RHO:
            return Bounds(low, score.rho, high)
        null, sd = score.rho_null, score.null_sd
        if not null or (self is Statistic.Z and not sd):
            return None
        if self is Statistic.RATIO or sd is None:
            return Bounds(low / null, score.rho / null, high / null)
        return Bounds(*(_log(rho / null) / sd for rho in (low, score.rho, high)))


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 0.0 else -math.inf


@dataclass(frozen=True, slots=True)
class Below:
    """All modules whose statistic lies strictly below a boundary."""

    statistic: Statistic
    boundary: float


@dataclass(frozen=True, slots=True)
class Lowest:
    """So many modules of lowest ρ."""

    number: int

    def count(self, candidates: int) -> int:
        """How many of the candidates are merged."""
        return min(self.number, candidates)


@dataclass(frozen=True, slots=True)
class Fraction:
    """A share of the modules, those of lowest ρ, to the nearest whole number."""

    share: float

    def count(self, candidates: int) -> int:
        """How many of the candidates are merged."""
        return math.floor(self.share * candidates + 0.5)


Ranked = Lowest | Fraction
Selection = Below | Lowest | Fraction


def parse_selection(text: str, threshold: float) -> Selection:
    """Reads a selection as a person writes it.

    Args:
        text: One of FORMS.
        threshold: τ, which "threshold" stands for.

    Raises:
        AnalysisError: It is none of them.
    """
    kind, sign, amount = text.partition(":")
    try:
        if kind == "threshold" and not sign:
            return Below(Statistic.RHO, threshold)
        if kind == "null" and 0.0 <= (limit := float(amount)) < math.inf:
            return Below(Statistic.RATIO, limit)
        if kind == "z" and math.isfinite(limit := float(amount)):
            return Below(Statistic.Z, limit)
        if kind == "lowest" and (number := int(amount)) >= 0:
            return Lowest(number)
        if kind == "fraction" and 0.0 <= (share := float(amount)) <= 1.0:
            return Fraction(share)
    except ValueError:
        pass
    raise AnalysisError(
        f"select should be threshold, null:K (K a number of at least 0), z:K (K a number), lowest:N (N a whole number) "
        f"or fraction:F (F from 0 to 1), not {text!r}"
    )
