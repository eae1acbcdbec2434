"""Keep or merge for every module and tensor, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache

from ..analysis.score import Score
from ..checkpoint.model import FLOATS
from ..errors import AnalysisError
from ..pairing.module import Module, modules_of, modules_of_rows
from ..pairing.row import Row
from .rule import Rule
from .selection import Below, Statistic
from .verdicts import Verdict, statistic_of

__all__ = ["Decision", "decide", "decision_of", "uncertified"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one module, or to a tensor without any, and why, in words for the report."""

    merge: bool
    reason: str


def decide(rows: Sequence[Row], scores: Mapping[str, Score], rule: Rule) -> dict[str, Decision]:
    """Decides for every row.

    Args:
        rows: The rows to decide for; all of the model's unless the rule is local.
        scores: Scores by module name; must hold every module, unless the rule lists modules.
        rule: The rule.

    Returns:
        One decision per module, and one per row that has none, by name, in the rows' order.

    Raises:
        AnalysisError: A module has no score, or no score has what the rule judges by.
    """
    analysed = list(modules_of_rows(rows))
    made = _listed(analysed, rule.modules) if rule.modules is not None else _judged(analysed, scores, rule)
    needed: set[str] = set()
    if rule.others == "merge":
        needed = {"finetuned", "safe" if any(row.has("safe") for row in rows) else "aligned"}
    decisions: dict[str, Decision] = {}
    for row in rows:
        if row.analysed:
            decisions.update((module.name, made[module.name]) for module in modules_of(row))
        else:
            decisions[row.name] = _unanalysed(row, needed, rule)
    return decisions


def decision_of(row: Row, decisions: Mapping[str, Decision]) -> Decision:
    """What happens to a row: its own decision, or what its modules' come to.

    Args:
        row: The row.
        decisions: What decide returns.
    """
    if not row.analysed or row.slices is None:
        return decisions[row.name]
    made = [decisions[module.name].merge for module in modules_of(row)]
    return Decision(any(made), f"{sum(made)} of {len(made)} matrices of experts merged")


def uncertified(rows: Sequence[Row], scores: Mapping[str, Score], rule: Rule) -> str | None:
    """Says in one sentence that intervals do not settle all decisions, or returns None.

    Args:
        rows: All rows.
        scores: Scores by module name, of every module.
        rule: The rule.
    """
    names = rule.open_modules(list(modules_of_rows(rows)), scores)
    if not names:
        return None
    first = min(names)
    score = scores[first]
    many = f"{len(names)} decisions are not certified, such as" if len(names) > 1 else "not certified is"
    return (
        f"{many} that for {first}, whose ρ is only known to lie from {score.rho_low:.4g} to {score.rho_high:.4g}: the "
        f"estimate decided; --estimator auto without --resolution measures on until it is certain"
    )


def _listed(analysed: Sequence[Module], names: AbstractSet[str]) -> dict[str, Decision]:
    merged, kept = Decision(True, "listed"), Decision(False, "kept: not listed")
    return {module.name: merged if module.name in names else kept for module in analysed}


def _judged(analysed: Sequence[Module], scores: Mapping[str, Score], rule: Rule) -> dict[str, Decision]:
    """Decides by the rule's selection."""
    for module in analysed:
        if module.name not in scores:
            raise AnalysisError(
                f"there is no score for {module.name}; analyse again with the same --include and --exclude"
            )
    _require_statistic(analysed, scores, rule)
    decisions: dict[str, Decision] = {}
    for verdict in rule.verdicts(analysed, scores):
        decision = _explained(verdict, scores, rule)
        decisions.update((module.name, decision) for module in verdict.unit.members)
    return decisions


def _require_statistic(analysed: Sequence[Module], scores: Mapping[str, Score], rule: Rule) -> None:
    """Refuses scores that cannot answer: those of early versions have no spread of chance, and so no z."""
    if statistic_of(rule.selection) is not Statistic.Z:
        return
    known = [score for module in analysed if (score := scores[module.name]).rho is not None]
    if known and all(score.null_sd is None for score in known):
        raise AnalysisError(
            f"select is {rule.select}, but no score has null_sd, which z is in units of; write them again with analyze"
        )


def _explained(verdict: Verdict, scores: Mapping[str, Score], rule: Rule) -> Decision:
    """A verdict in words."""
    unit, bounds, selection = verdict.unit, verdict.bounds, rule.selection
    statistic = statistic_of(selection)
    if bounds is None:
        merge = rule.on_undefined == "merge"
        first = scores[unit.members[0].name]
        why = f"ρ is undefined, {first.undefined}"
        if first.rho is not None:
            why = (
                f"{statistic.value} is undefined, there is no {'ρ_null' if not first.rho_null else 'null_sd'}"
            )
        return Decision(merge, f"{'merged' if merge else 'kept'}: {why}")
    subject = statistic.value if len(unit.members) == 1 else f"mean {statistic.value} of {unit.name}"
    if isinstance(selection, Below):
        left, right = _digits(bounds.value, selection.boundary)
        test = f"{subject} {left} {'<' if verdict.merge else '≥'} {right}"
    else:
        assert verdict.ranking is not None
        kind = "" if verdict.ranking.module_type is None else f" {verdict.ranking.module_type}"
        test = (
            f"{subject} {bounds.value:.3g} {'is' if verdict.merge else 'is not'} among the {verdict.ranking.count} "
            f"lowest of {verdict.ranking.size}{kind}"
        )
    if not verdict.settled:
        test += (
            f" (not certified: within {bounds.low:.4g} to {bounds.high:.4g})"
            if not bounds.is_exact
            else " (not certified: others' intervals reach across it)"
        )
    return Decision(verdict.merge, test if verdict.merge else f"kept: {test}")


def _digits(rho: float, threshold: float) -> tuple[str, str]:
    """Writes both numbers with as few digits as still show which one is smaller."""
    right = f"{threshold:.15g}"
    for digits in range(3, 17):
        left = f"{rho:.{digits}g}"
        if (float(left) < threshold) == (rho < threshold):
            return left, right
    return repr(rho), repr(threshold)


def _unanalysed(row: Row, needed: set[str], rule: Rule) -> Decision:
    """Decides for a tensor that has no score."""
    # Where adapters leave a tensor alone, all roles have the same one, and there is nothing to merge.
    if (
        rule.others == "merge"
        and row.dtype in FLOATS
        and all(row.has(role) for role in needed)
        and (any(map(row.is_elsewhere, needed)) or len({row.terms[role] for role in needed}) > 1)
    ):
        return Decision(True, f"{row.reason}: not analysed, merged with the others")
    return _kept(row.reason)


@cache
def _kept(reason: str) -> Decision:
    return Decision(False, f"{reason}: not analysed")
