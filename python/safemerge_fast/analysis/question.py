"""What an analysis is to settle: an estimator measures no further than that needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Protocol

from ..pairing.module import Module
from .score import Score

__all__ = ["Question"]


class Question(Protocol):
    """Which modules a rule would merge, asked of intervals that hold their ρ."""

    @property
    def is_local(self) -> bool:
        """Whether a module's own interval settles it, so that no other need be known."""

    def open_modules(self, modules: Sequence[Module], scores: Mapping[str, Score]) -> Set[str]:
        """Names of modules whose intervals do not settle what becomes of them.

        Args:
            modules: The modules; all of them, unless the question is local.
            scores: Their scores by name, as far as they are measured. Those without ρ are settled.
        """
