"""The experts of a layer in one line: there may be hundreds of them, and nobody reads as many rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..analysis.score import Score
from ..pairing.module import Module

__all__ = ["ExpertLine", "expert_label", "is_of_expert", "lines"]

_EXPERTS = "experts."


@dataclass(frozen=True, slots=True)
class ExpertLine:
    """The matrices of one kind that the experts of one layer have.

    Attributes:
        layer: The layer, or None.
        module_type: "experts.gate_proj", …
        scores: Their scores.
    """

    layer: str | None
    module_type: str
    scores: tuple[Score, ...]

    @property
    def name(self) -> str:
        """A name for all of them."""
        return f"{f'{self.layer}, ' if self.layer else ''}{len(self.scores)} experts"

    @property
    def rhos(self) -> list[float]:
        """ρ of those that have one, the lowest first."""
        return sorted(score.rho for score in self.scores if score.rho is not None)

    @property
    def median_null(self) -> float | None:
        """Median ρ_null of those that have one."""
        known = [score.rho_null for score in self.scores if score.rho_null is not None]
        return statistics.median(known) if known else None

    def describe(self, threshold: float) -> str:
        """ρ in a few words: the median, the range, and how many lie below a threshold."""
        rhos = self.rhos
        if not rhos:
            return self.scores[0].undefined or ""
        below = sum(rho < threshold for rho in rhos)
        return (
            f"{statistics.median(rhos):.4f} ({rhos[0]:.4f} to {rhos[-1]:.4f}; {below} of {len(rhos)} below)"
        )


def is_of_expert(module_type: str) -> bool:
    """Whether a type of modules is one that experts have."""
    return module_type.startswith(_EXPERTS)


def expert_label(layer: str) -> str:
    """A short name for all experts of a layer, for a line of a table: `experts, layers.3`."""
    return f"experts, {'.'.join(layer.split('.')[-2:])}"


def lines(modules: Iterable[Module], scores: Mapping[str, Score]) -> Iterator[Module | ExpertLine]:
    """The modules that have a score, in their order; experts of one layer and kind where the first of them stands."""
    found = [module for module in modules if module.name in scores]
    experts: dict[tuple[str | None, str], list[Score]] = {}
    for module in found:
        if is_of_expert(module.module_type):
            experts.setdefault((module.layer, module.module_type), []).append(scores[module.name])
    for module in found:
        key = (module.layer, module.module_type)
        if key not in experts:
            if not is_of_expert(module.module_type):
                yield module
            continue
        group = experts.pop(key)
        yield ExpertLine(*key, tuple(group)) if len(group) > 1 else module
