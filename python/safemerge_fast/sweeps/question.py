"""What one analysis is to settle for all candidates of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from ..analysis.question import Question
from ..analysis.score import Score
from ..pairing.module import Module

__all__ = ["Together"]


@dataclass(frozen=True, slots=True)
class Together:
    """Several questions as one: settled when all of them are."""

    questions: tuple[Question, ...]

    @property
    def is_local(self) -> bool:
        """Whether a module's own interval settles it for all of them."""
        return all(question.is_local for question in self.questions)

    def open_modules(self, modules: Sequence[Module], scores: Mapping[str, Score]) -> Set[str]:
        """Names of modules that any of them leaves open."""
        found: set[str] = set()
        for question in self.questions:
            found |= question.open_modules(modules, scores)
        return found
