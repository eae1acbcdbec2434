"""The analysis on its own: checkpoint → pairing → analysis, for scores to be reused."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ...analysis import analyze_rows
from ...analysis.accelerator import device_name
from ...analysis.question import Question
from ...analysis.roles import RoleFindings, judge_roles
from ...analysis.score import Score
from ...analysis.scores import Scores, describe_source
from ...checkpoint.adapter import Adapter
from ...checkpoint.model import Model
from ...errors import AnalysisError
from ...pairing.coverage import why_nothing_is_analysed
from ...pairing.module import modules_of_rows
from ...pairing.row import Row
from ...pairing.rows import Pairing, pair
from ...progress import ProgressCallback, ProgressEvent, silent
from ..role_check import incomplete_model, refuse_or_warn, same_models
from ..roles import access_of, open_roles
from .evidence import ScoreLog
from .settings import AnalysisSettings, precision_of

__all__ = [
    "analyze_settings",
    "judge_scores",
    "require_finite",
    "score_models",
    "wrong_before_measuring",
]


def analyze_settings(settings: AnalysisSettings) -> Scores:
    """Measures how far each module's update lies in the safety subspace; writes nothing.

    Args:
        settings: What to measure.

    Returns:
        The scores; their to_json is what merge takes as `scores`.

    Raises:
        SafemergeError: One of its subclasses: a model, its role, the pairing or the analysis is at fault.
    """
    roles = {"base": settings.base, "aligned": settings.aligned, "finetuned": settings.finetuned}
    models = open_roles(roles, access_of(settings))
    pairing = pair(models, include=settings.include, exclude=settings.exclude)
    refuse_or_warn(wrong_before_measuring(models, pairing, force=settings.force), force=settings.force)
    scores = score_models(models, pairing.rows, settings)
    found = judge_scores(models, scores.modules, settings.delta_reference)
    refuse_or_warn(found.wrong, force=settings.force)
    return scores


def wrong_before_measuring(models: Mapping[str, Model], pairing: Pairing, *, force: bool) -> tuple[str, ...]:
    """What looks wrong of the roles before anything is measured, in sentences; force as same_models takes it."""
    nothing = () if any(row.analysed for row in pairing.rows) else (why_nothing_is_analysed(pairing.rows),)
    return (*same_models(models, force=force), *incomplete_model(models, pairing.unused), *nothing)


def judge_scores(
    models: Mapping[str, Model], scores: Mapping[str, Score], delta_reference: str
) -> RoleFindings:
    """What scores, by tensor name, say of the roles."""
    return judge_roles(
        scores, delta_reference=delta_reference, adapter=isinstance(models["finetuned"], Adapter)
    )


def score_models(
    models: Mapping[str, Model],
    rows: Sequence[Row],
    settings: AnalysisSettings,
    question: Question | None = None,
    known: Mapping[str, Score] | None = None,
    log: ScoreLog | None = None,
) -> Scores:
    """Scores all modules of a pairing, until the question is settled; without one, by one look at each.

    Args:
        models: The models by role.
        rows: Rows of the pairing.
        settings: What to measure, and how.
        question: What is to be settled.
        known: Scores that there are already.
        log: What an earlier run measured, and where scores are kept while they are measured.
    """
    started = time.perf_counter()
    tell: ProgressCallback = settings.progress or silent
    names = [module.name for module in modules_of_rows(rows)]
    found = dict(known or {})
    if log is not None:
        found |= {name: log.known[name] for name in names if name in log.known}
    if not settings.allow_nonfinite:
        for name, score in found.items():
            require_finite(name, score)
    tell(ProgressEvent("analysis", len(found), len(names), ""))
    sources = {role: describe_source(model) for role, model in models.items()}
    precision = precision_of(settings)
    for name, score in analyze_rows(
        models,
        rows,
        known=dict(found),
        delta_reference=settings.delta_reference,
        device=settings.device,
        precision=precision,
        question=question,
    ):
        if not settings.allow_nonfinite:
            require_finite(name, score)
        if log is not None:
            log.append(name, score)
        found[name] = score
        tell(ProgressEvent("analysis", len(found), len(names), name))
    for model in models.values():
        model.headers.check_unchanged()
    modules = {name: found[name] for name in names}
    sampled = any(score.columns for score in modules.values())
    return Scores(
        modules=modules,
        delta_reference=settings.delta_reference,
        sources=sources,
        device=device_name(settings.device),
        seconds=time.perf_counter() - started,
        estimator=precision.estimator,
        failure=precision.failure if sampled else None,
        seed=precision.seed if sampled else None,
    )


def require_finite(name: str, score: Score) -> None:
    """Raises AnalysisError if a module has no score because a model holds NaN or infinity."""
    if score.nonfinite:
        raise AnalysisError(
            f"{name} cannot be scored: {score.undefined}; repair that checkpoint, or pass --allow-nonfinite "
            f"to go on without its ρ"
        )
