"""Stage 4, decision: scores and a rule give keep or merge for every module, with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from .analysis.scores import Score
from .checkpoint.model import FLOATS
from .errors import AnalysisError, SettingError
from .pairing.module import Module, modules_of, modules_of_rows
from .pairing.row import Row

__all__ = ["Decision", "Rule", "decide", "decision_of"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Which modules are merged.

    Attributes:
        threshold: With select "threshold", modules whose ρ is strictly below it are merged; from 0 to 1.
        select: "threshold"; "lowest:N", the N modules (or layers) of lowest ρ; or "fraction:F", that share of
            them, to the nearest whole number. Equal ρ are taken in the order of their names.
        granularity: "module", or "layer": the mean ρ of a layer's modules decides for all of them.
        on_undefined: "merge" or "keep" modules that have no ρ (V or Δ is zero).
        others: "keep" or "merge" tensors that are not analysed.
        inclusive: Whether a ρ that equals the threshold is below it, as Safe LoRA has it.

    Raises:
        AnalysisError: A value is not one of those above.
    """

    threshold: float = 0.35
    select: str = "threshold"
    granularity: str = "module"
    on_undefined: str = "merge"
    others: str = "keep"
    inclusive: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise AnalysisError(f"threshold should be a number from 0 to 1, as ρ is, not {self.threshold}")
        for field, value, allowed in (
            ("granularity", self.granularity, ("module", "layer")),
            ("on_undefined", self.on_undefined, ("merge", "keep")),
            ("others", self.others, ("keep", "merge")),
        ):
            if value not in allowed:
                raise AnalysisError(f"{field} should be {allowed[0]} or {allowed[1]}, not {value!r}")
        self.count(0)

    @property
    def is_local(self) -> bool:
        """Whether a module's own score decides, so that a shard can be decided alone."""
        return self.select == "threshold" and self.granularity == "module"

    def check_units(self, rows: Sequence[Row]) -> None:
        """Refuses to take more modules (or layers) than there are.

        Args:
            rows: All rows.

        Raises:
            SettingError: select asks for more.
        """
        units = len(_units(list(modules_of_rows(rows)), self))
        kind, _, text = self.select.partition(":")
        if kind == "lowest" and int(text) > units:
            what = "layers" if self.granularity == "layer" else "modules"
            raise SettingError(
                f"select is {self.select}, but only {units} {what} are analysed; ask for at most {units}"
            )

    def count(self, candidates: int) -> int | None:
        """How many of the candidates are merged; None where the threshold says which.

        Raises:
            AnalysisError: select is malformed.
        """
        kind, _, text = self.select.partition(":")
        try:
            if kind == "threshold" and not text:
                return None
            if kind == "lowest" and int(text) >= 0:
                return min(int(text), candidates)
            if kind == "fraction" and 0.0 <= float(text) <= 1.0:
                return math.floor(float(text) * candidates + 0.5)
        except ValueError:
            pass
        raise AnalysisError(
            f"select should be threshold, lowest:N (N a whole number) or fraction:F (F from 0 to 1), "
            f"not {self.select!r}"
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one module, or to a tensor without any, and why, in words for the report."""

    merge: bool
    reason: str


def decide(rows: Sequence[Row], scores: Mapping[str, Score], rule: Rule) -> dict[str, Decision]:
    """Decides for every row.

    Args:
        rows: The rows to decide for; all of the model's unless the rule is local.
        scores: Scores by module name; must hold every module.
        rule: The rule.

    Returns:
        One decision per module, and one per row that has none, by name, in the rows' order.

    Raises:
        AnalysisError: A module has no score.
    """
    analysed = list(modules_of_rows(rows))
    for module in analysed:
        if module.name not in scores:
            raise AnalysisError(
                f"there is no score for {module.name}; analyse again with the same --include and --exclude"
            )
    units = _units(analysed, rule)
    verdicts = _verdicts(units, scores, rule)
    unit_of = {module.name: unit for unit, members in units.items() for module in members}
    needed: set[str] = set()
    if rule.others == "merge":
        needed = {"finetuned", "safe" if any(row.has("safe") for row in rows) else "aligned"}
    decisions: dict[str, Decision] = {}
    for row in rows:
        if row.analysed:
            decisions.update((module.name, verdicts[unit_of[module.name]]) for module in modules_of(row))
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


def _units(analysed: Sequence[Module], rule: Rule) -> dict[str, list[Module]]:
    """Groups modules that share one decision."""
    units: dict[str, list[Module]] = {}
    for module in analysed:
        unit = module.layer if rule.granularity == "layer" and module.layer is not None else module.name
        units.setdefault(unit, []).append(module)
    return units


def _verdicts(
    units: Mapping[str, Sequence[Module]], scores: Mapping[str, Score], rule: Rule
) -> dict[str, Decision]:
    """Decides for each unit by the mean ρ of its modules that have one."""
    rhos: dict[str, float] = {}
    verdicts: dict[str, Decision] = {}
    for unit, members in units.items():
        known = [rho for module in members if (rho := scores[module.name].rho) is not None]
        if known:
            rhos[unit] = math.fsum(known) / len(known)
            continue
        why = scores[members[0].name].undefined
        merge = rule.on_undefined == "merge"
        verdicts[unit] = Decision(merge, f"{'merged' if merge else 'kept'}: ρ is undefined, {why}")
    count = rule.count(len(rhos))
    if count is None:
        lowest = {
            unit
            for unit, rho in rhos.items()
            if rho < rule.threshold or (rule.inclusive and rho == rule.threshold)
        }
    else:
        lowest = set(sorted(rhos, key=lambda unit: (rhos[unit], unit))[:count])
    for unit, rho in rhos.items():
        merge = unit in lowest
        subject = "ρ" if len(units[unit]) == 1 else f"mean ρ of {unit}"
        if count is None:
            left, right = _digits(rho, rule.threshold)
            below, above = ("≤", ">") if rule.inclusive else ("<", "≥")
            test = f"{subject} {left} {below if merge else above} {right}"
        else:
            test = (
                f"{subject} {rho:.3g} {'is' if merge else 'is not'} among the {count} lowest of {len(rhos)}"
            )
        verdicts[unit] = Decision(merge, test if merge else f"kept: {test}")
    return verdicts


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
