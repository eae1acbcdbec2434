"""Which modules are merged: the rule, as somebody asks for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from ..analysis.score import Score
from ..errors import AnalysisError, SettingError
from ..pairing.module import Module, modules_of_rows
from ..pairing.row import Row
from .selection import Below, Lowest, Selection, parse_selection
from .verdicts import Unit, Verdict, judge, units_of

__all__ = ["Rule"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Which modules are merged.

    Attributes:
        threshold: With select "threshold", modules whose ρ is strictly below it are merged; from 0 to 1.
        select: "threshold"; "null:K", modules whose ρ/ρ_null is below K; "z:K", those whose z is; "lowest:N", the N
            modules (or layers) of lowest ρ; or "fraction:F", that share of them, to the nearest whole number. Equal ρ
            are taken in the order of their names.
        granularity: "module", or "layer": the mean over a layer's modules decides for all of them.
        on_undefined: "merge" or "keep" modules that have no ρ (V or Δ is zero), or no ρ_null or z where those decide.
        others: "keep" or "merge" tensors that are not analysed.
        per_type: Whether "lowest" and "fraction" are of each module type instead of all modules together; the others
            judge each module alone, and nothing changes.
        modules: Exactly the modules that are merged, whatever else is said here but for the others; or None.

    Raises:
        AnalysisError: A value is not one of those above.
    """

    threshold: float = 0.35
    select: str = "threshold"
    granularity: Literal["module", "layer"] = "module"
    on_undefined: Literal["merge", "keep"] = "merge"
    others: Literal["keep", "merge"] = "keep"
    per_type: bool = False
    modules: AbstractSet[str] | None = None

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
        parse_selection(self.select, self.threshold)
        if self.per_type and not isinstance(self.selection, Below) and self.granularity == "layer":
            raise AnalysisError(
                "per_type ranks modules among those of their type, but a layer has modules of many types; "
                "leave granularity at module"
            )

    @property
    def selection(self) -> Selection:
        """The selection, as data."""
        return parse_selection(self.select, self.threshold)

    @property
    def idle(self) -> str | None:
        """What was asked for and changes nothing, in a sentence; None if there is nothing such."""
        if not self.per_type or not isinstance(self.selection, Below):
            return None
        return (
            f"per_type changes nothing: select is {self.select}, which judges each module alone (null:K and z:K by its "
            f"own chance)"
        )

    @property
    def is_local(self) -> bool:
        """Whether a module's own score decides, so that it can be decided alone."""
        return self.modules is not None or (
            self.granularity == "module" and isinstance(self.selection, Below)
        )

    def units(self, modules: Sequence[Module]) -> list[Unit]:
        """Groups modules that share one decision."""
        return units_of(modules, by_layer=self.granularity == "layer")

    def verdicts(self, modules: Sequence[Module], scores: Mapping[str, Score]) -> list[Verdict]:
        """What the selection makes of modules that all have a score; a list of modules is not looked at."""
        return judge(self.selection, self.units(modules), scores, per_type=self.per_type)

    def merged(self, modules: Sequence[Module], scores: Mapping[str, Score]) -> set[str]:
        """Names of the modules that the rule merges; all must have a score, unless it lists modules."""
        if self.modules is not None:
            return {module.name for module in modules if module.name in self.modules}
        undefined = self.on_undefined == "merge"
        return {
            module.name
            for verdict in self.verdicts(modules, scores)
            if (undefined if verdict.bounds is None else verdict.merge)
            for module in verdict.unit.members
        }

    def open_modules(self, modules: Sequence[Module], scores: Mapping[str, Score]) -> set[str]:
        """Names of modules whose intervals do not settle what becomes of them; see analysis/question.py.

        Args:
            modules: The modules; all of them, unless the rule is local.
            scores: Their scores by name, as far as they are measured.

        Returns:
            Those whose ρ must be known better, or at all. A module whose ρ is exact is none of them: if its fate hangs
            on another's interval, that one's does as well.
        """
        if self.modules is not None:
            return set()
        missing = {module.name for module in modules if module.name not in scores}
        if missing and not self.is_local:
            # Ranks and means are not known before everything is measured.
            return missing | _inexact(modules, scores)
        known = [module for module in modules if module.name in scores] if missing else modules
        open_units = (verdict.unit for verdict in self.verdicts(known, scores) if not verdict.settled)
        return missing | {name for unit in open_units for name in _inexact(unit.members, scores)}

    def check_units(self, rows: Sequence[Row]) -> None:
        """Refuses to take more modules (or layers) than there are.

        Args:
            rows: All rows.

        Raises:
            SettingError: select asks for more.
        """
        selection = self.selection
        if not isinstance(selection, Lowest) or self.modules is not None:
            return
        units = self.units(list(modules_of_rows(rows)))
        most, what = len(units), "layers" if self.granularity == "layer" else "modules"
        if self.per_type:
            most = max(Counter(unit.module_type for unit in units).values(), default=0)
            what = "modules of any type"
        if selection.number > most:
            raise SettingError(
                f"select is {self.select}, but only {most} {what} are analysed; ask for at most {most}"
            )


def _inexact(modules: Sequence[Module], scores: Mapping[str, Score]) -> set[str]:
    """Names of modules whose ρ is known to an interval."""
    return {
        module.name
        for module in modules
        if (score := scores.get(module.name)) is not None and score.rho_low != score.rho_high
    }
