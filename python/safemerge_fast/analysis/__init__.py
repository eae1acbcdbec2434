"""Stage 3, analysis: a score for every module that is to be analysed. Imports torch only when there is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import AnalysisError
from ..pairing.module import Module, modules_of_rows
from .accelerator import device_name
from .precision import Precision
from .question import Question
from .score import Score
from .scores import DELTA_REFERENCES

if TYPE_CHECKING:
    from ..checkpoint.model import Model
    from ..pairing.operand import LowRank
    from ..pairing.row import Row

__all__ = ["analyze_rows", "low_rank_update"]

_NOTHING: Mapping[str, Score] = {}
_USUAL = Precision()


def analyze_rows(
    models: Mapping[str, Model],
    rows: Iterable[Row],
    *,
    known: Mapping[str, Score] = _NOTHING,
    delta_reference: str = "aligned",
    device: str = "auto",
    precision: Precision = _USUAL,
    question: Question | None = None,
) -> Iterator[tuple[str, Score]]:
    """Scores the modules of those of the rows that are to be analysed.

    Args:
        models: base, aligned and finetuned; others are sources of adapters.
        rows: Rows of the pairing; all of the model's unless the question is local.
        known: Scores that there are already. What they settle is not measured again.
        delta_reference: What Δ is taken against, "aligned" or "base".
        device: What analysis.device.resolve_device takes.
        precision: How ρ is measured, and how sure one wants to be.
        question: What is to be settled; None: nothing, so that one look at each module is enough.

    Returns:
        An iterator over (module name, score), in no particular order. A module comes again if a better score was
        needed: the last one holds.

    Raises:
        AnalysisError: An argument is not one of those above, a role is not given, or the device is not there.
    """
    if delta_reference not in DELTA_REFERENCES:
        raise AnalysisError(f"delta reference should be aligned or base, not {delta_reference!r}")
    for role in ("base", "aligned", "finetuned"):
        if role not in models:
            raise AnalysisError(f"the analysis needs the {role} model; give --{role}")
    analysed = list(modules_of_rows(rows))
    if precision.estimator == "exact":
        known = {name: score for name, score in known.items() if not score.columns}
    low_rank, dense = [], []
    for module in analysed:
        update = low_rank_update(module, delta_reference)
        if not update:
            dense.append(module)
        elif module.name not in known:
            low_rank.append((module, update))
    missing = [module for module in dense if module.name not in known]
    may_be_open = (
        precision.estimator != "exact"
        and question is not None
        and any(known[module.name].columns for module in dense if module.name in known)
    )
    if not (low_rank or missing or may_be_open):
        return iter(())
    # Now, so that a device that is not there is said before any work.
    resolved = device_name(device)

    def scores() -> Iterator[tuple[str, Score]]:
        found = dict(known)
        for name, score in _score_low_rank(models, low_rank) if low_rank else ():
            found[name] = score
            yield name, score
        exact = missing
        if precision.estimator != "exact":
            from .sketch import Sketches

            sketches = Sketches(
                models,
                delta_reference=delta_reference,
                precision=precision,
                decided=len(analysed),
                question=question,
                device=resolved,
            )
            yield from sketches.run(dense, analysed, found)
            exact = sketches.left if precision.estimator == "auto" else sketches.unknown
        if exact:
            yield from _score_exactly(models, exact, delta_reference, resolved)

    return scores()


def _score_exactly(
    models: Mapping[str, Model], modules: Iterable[Module], delta_reference: str, device: str
) -> Iterator[tuple[str, Score]]:
    """Scores modules through Gram matrices, one after the other."""
    from .cosine import Workspace, score_module
    from .device import resolve_device

    workspace = Workspace(resolve_device(device))
    for module in modules:
        yield (
            module.name,
            score_module(models, module, delta_reference=delta_reference, workspace=workspace),
        )


def low_rank_update(module: Module, delta_reference: str) -> tuple[LowRank, ...]:
    """The products that Δ is the sum of; none if it is anything else."""
    terms = module.terms
    finetuned = terms["finetuned"]
    operand = finetuned[0].operand
    if len(finetuned) > 1 or operand.rows is not None or operand.magnitude is not None:
        return ()
    if (
        delta_reference != "aligned"
        or (replace(finetuned[0], operand=replace(operand, low_rank=())),) != terms["aligned"]
    ):
        return ()
    return operand.low_rank


def _score_low_rank(
    models: Mapping[str, Model], modules: Iterable[tuple[Module, tuple[LowRank, ...]]]
) -> Iterator[tuple[str, Score]]:
    """Scores modules whose Δ is a sum of products, by the engine whatever the device: reading takes longest."""
    from .low_rank import score_low_rank
    from .threads import score_in_threads

    def score(module: tuple[Module, tuple[LowRank, ...]]) -> tuple[str, Score]:
        return module[0].name, score_low_rank(models, *module)

    return score_in_threads(score, modules)
