"""What rules would merge, before one is chosen: modules, their share of the update, and what speaks against a rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..analysis.rounding import ROUNDING_WARNING
from ..analysis.score import Score
from ..pairing.module import Module
from .rule import Rule

__all__ = ["Outcome", "cautions", "outcome", "outlook", "shrinks_all"]

_THRESHOLDS = (0.2, 0.35, 0.5, 0.7)
_RATIOS = (0.5, 0.75, 1.0, 1.5)
_DISTANCES = (-3.0, 0.0, 3.0)

_NEARLY_ALL = 0.95
"""Share of ‖Δ‖² from which on a rule merges nearly everything."""

_NEAR = 0.05
"""Relative distance of ρ from ρ_null that is none, where its spread is not known."""

_DEVIATIONS = 2.0
"""Distance in standard deviations of chance that is none."""

_MANY = 0.5
"""Share of the modules from which on something is said of all."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rule merges.

    Attributes:
        rule: The rule.
        merged: How many modules.
        modules: Of how many.
        share: Their share of ‖Δ‖², summed over all modules; None where that is zero.
    """

    rule: Rule
    merged: int
    modules: int
    share: float | None

    @property
    def option(self) -> str:
        """The rule as one types it."""
        if self.rule.modules is not None:
            return "--modules"
        words = [
            f"--threshold {self.rule.threshold:g}"
            if self.rule.select == "threshold"
            else f"--select {self.rule.select}"
        ]
        words += ["--per-type"] if self.rule.per_type and self.rule.idle is None else []
        words += ["--granularity layer"] if self.rule.granularity == "layer" else []
        return " ".join(words)


def outcome(modules: Sequence[Module], scores: Mapping[str, Score], rule: Rule) -> Outcome:
    """What a rule would merge.

    Args:
        modules: The modules, all of which have a score.
        scores: Scores by module name.
        rule: The rule.
    """
    chosen = rule.merged(modules, scores)
    total, merged = [], []
    for module in modules:
        square = scores[module.name].delta_norm ** 2
        if math.isfinite(square):
            total.append(square)
            if module.name in chosen:
                merged.append(square)
    whole = math.fsum(total)
    return Outcome(rule, len(chosen), len(modules), math.fsum(merged) / whole if whole > 0.0 else None)


def outlook(modules: Sequence[Module], scores: Mapping[str, Score], rule: Rule) -> list[Outcome]:
    """What the rule would merge, and others in its place: several thresholds, and several limits by chance.

    Args:
        modules: The modules, all of which have a score.
        scores: Scores by module name.
        rule: The rule that is chosen.

    Returns:
        The chosen one first. Limits by z are left out where no score has a spread of chance.
    """
    plain = replace(rule, per_type=False, granularity="module", select="threshold", modules=None)
    others = [replace(plain, threshold=threshold) for threshold in _THRESHOLDS]
    others += [replace(plain, select=f"null:{limit:g}") for limit in _RATIOS]
    if any(scores[module.name].null_sd is not None for module in modules):
        others += [replace(plain, select=f"z:{limit:g}") for limit in _DISTANCES]
    found = [outcome(modules, scores, each) for each in (rule, *others)]
    return [found[0], *(each for each in found[1:] if each.option != found[0].option)]


def shrinks_all(found: Outcome) -> str | None:
    """Says in one sentence that a rule merges nearly everything, or returns None."""
    if found.share is None or found.share < _NEARLY_ALL:
        return None
    return (
        f"{found.option} merges {found.merged} of {found.modules} modules with {found.share:.1%} of ‖Δ‖², which is "
        f"close to merging everything; without a safe model that only shrinks the fine-tuning to α of itself"
    )


def cautions(modules: Sequence[Module], scores: Mapping[str, Score], rule: Rule) -> list[str]:
    """What speaks against a rule on these scores, in sentences; mostly nothing.

    Args:
        modules: The modules, all of which have a score.
        scores: Scores by module name.
        rule: The rule.
    """
    known = [score for module in modules if (score := scores[module.name]).rho is not None]
    found = []
    rounded = sum(score.v_rounding >= ROUNDING_WARNING for score in known)
    if known and rounded >= _MANY * len(known):
        found.append(
            f"in {rounded} of {len(known)} modules V is to a large part rounding of the checkpoints' dtypes, so that ρ "
            f"and any rule on it say little; use the checkpoints in the precision they were trained in"
        )
    chance = sum(map(_is_chance, known))
    if known and chance >= _MANY * len(known):
        found.append(
            f"ρ of {chance} of {len(known)} modules is about what a random update would have (ρ_null), so that a rule "
            f"on it mostly selects by the shape of modules"
        )
    if said := shrinks_all(outcome(modules, scores, rule)):
        found.append(said)
    return found


def _is_chance(score: Score) -> bool:
    """Whether ρ says nothing that chance would not."""
    if score.ratio is None:
        return False
    if score.z is not None:
        return abs(score.z) < _DEVIATIONS
    return abs(score.ratio - 1.0) < _NEAR
