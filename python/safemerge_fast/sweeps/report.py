"""What came of a sweep: the Pareto set, the best candidate, and what controls say of candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..documents import write_document
from .candidates import Control
from .metrics import Metric, better
from .pareto import dominates, undominated
from .result import VERSION, Result
from .table import result_table

__all__ = ["SweepReport", "best_of"]

_LESSER = {
    Control.FINETUNED: "the fine-tuned model as it is",
    Control.SHRINK: "shrinking the update of every module, without a safe model,",
    Control.NO_SAFE: "shrinking the same modules, without the safe model,",
    Control.RANDOM: "a random choice of as many modules of each type",
}
"""What a repair should be better than."""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """A finished sweep.

    Attributes:
        directory: The sweep's directory, absolute.
        metrics: What was asked of the judge.
        results: What came of each model, in the order of judging.
        notes: What a person should know.
        kept: Names of the candidates that are still on disk.
    """

    directory: str
    metrics: tuple[Metric, ...]
    results: tuple[Result, ...]
    notes: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Result, ...]:
        """Those that could not be made or judged."""
        return tuple(result for result in self.results if result.failed is not None)

    @property
    def pareto(self) -> tuple[str, ...]:
        """Names of those, controls among them, that none is at least as good as in all and better than in some."""
        judged = self._judged()
        flags = undominated([self._gains(result) for result in judged])
        return tuple(result.name for result, kept in zip(judged, flags, strict=True) if kept)

    @property
    def best(self) -> str | None:
        """The candidate that is best by the first metric, and where that is equal by the next; None if all failed."""
        return best_of(self.metrics, self.results)

    @property
    def outdone(self) -> Mapping[str, tuple[str, ...]]:
        """Candidates for which a control is nowhere worse and somewhere better, with those controls."""
        judged = self._judged()
        controls = [result for result in judged if result.control is not None]
        found = {
            result.name: tuple(
                control.name for control in controls if dominates(self._gains(control), self._gains(result))
            )
            for result in judged
            if result.control is None
        }
        return {name: names for name, names in found.items() if names}

    def remarks(self) -> tuple[str, ...]:
        """What lesser means do as well as candidates, in sentences."""
        judged = self._judged()
        candidates = [result for result in judged if result.control is None]
        found = []
        for control, means in _LESSER.items():
            matched: list[str] = []
            compared = 0
            for candidate in candidates:
                rivals = [
                    rival
                    for rival in judged
                    if rival.control is control
                    and rival.beside in (None, candidate.same_as or candidate.name)
                ]
                compared += bool(rivals)
                if any(self._no_worse(rival, candidate) for rival in rivals):
                    matched.append(candidate.name)
            if matched:
                found.append(
                    f"{means} is in no metric worse than {len(matched)} of {compared} candidates, such as {matched[0]}"
                )
        return tuple(found)

    def table(self) -> Any:
        """The results as a rich table."""
        return result_table(self.metrics, self.results, pareto=self.pareto, best=self.best)

    def to_json(self) -> str:
        """Writes all of it as JSON."""
        document = {
            "version": VERSION,
            "directory": self.directory,
            "metrics": [
                {"name": metric.name, "path": metric.path, "direction": metric.direction}
                for metric in self.metrics
            ],
            "best": self.best,
            "pareto": self.pareto,
            "outdone": dict(self.outdone),
            "kept": self.kept,
            "notes": [*self.notes, *self.remarks()],
            "results": [msgspec.to_builtins(result) for result in self.results],
        }
        return write_document(document, levels=2)

    def _no_worse(self, one: Result, other: Result) -> bool:
        return all(a >= b for a, b in zip(self._gains(one), self._gains(other), strict=True))

    def _judged(self) -> list[Result]:
        return [result for result in self.results if result.metrics is not None]

    def _gains(self, result: Result) -> tuple[float, ...]:
        assert result.metrics is not None
        return tuple(metric.gain(result.metrics[metric.name]) for metric in self.metrics)


def best_of(metrics: Sequence[Metric], results: Sequence[Result]) -> str | None:
    """The candidate that is best by the first metric, where that is equal by the next; the earlier of equal ones."""
    best: Result | None = None
    for result in results:
        if result.control is not None or result.metrics is None:
            continue
        if best is None or better(metrics, result.metrics, best.metrics or {}):
            best = result
    return None if best is None else best.name
