"""The analysis on its own: checkpoint → pairing → analysis, for scores to be reused."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from ...analysis import analyze_rows
from ...analysis.scores import Score, Scores, describe_source
from ...checkpoint.model import Model
from ...errors import AnalysisError
from ...pairing.module import modules_of_rows
from ...pairing.row import Row
from ...pairing.rows import pair
from ...progress import ProgressCallback, ProgressEvent, silent
from ..roles import access_of, open_roles
from .settings import AnalysisSettings

__all__ = [
    "analyze_settings",
    "device_name",
    "require_finite",
    "score_models",
    "score_rows",
]


def analyze_settings(settings: AnalysisSettings) -> Scores:
    """Measures how far each module's update lies in the safety subspace; writes nothing.

    Args:
        settings: What to measure.

    Returns:
        The scores; their to_json is what merge takes as `scores`.

    Raises:
        SafemergeError: One of its subclasses: a model, the pairing or the analysis is at fault.
    """
    roles = {"base": settings.base, "aligned": settings.aligned, "finetuned": settings.finetuned}
    models = open_roles(roles, access_of(settings))
    rows = pair(models, include=settings.include, exclude=settings.exclude).rows
    return score_models(models, rows, settings)


def score_models(models: Mapping[str, Model], rows: Sequence[Row], settings: AnalysisSettings) -> Scores:
    """Scores all modules of a pairing."""
    started = time.perf_counter()
    tell: ProgressCallback = settings.progress or silent
    modules: dict[str, Score] = {}
    total = sum(1 for _ in modules_of_rows(rows))
    # Loading torch takes a while before the first score is there.
    tell(ProgressEvent("analysis", 0, total, ""))
    sources = {role: describe_source(model) for role, model in models.items()}
    for name, score in score_rows(
        models,
        rows,
        delta_reference=settings.delta_reference,
        device=settings.device,
        allow_nonfinite=settings.allow_nonfinite,
    ):
        modules[name] = score
        tell(ProgressEvent("analysis", len(modules), total, name))
    for model in models.values():
        model.headers.check_unchanged()
    return Scores(
        modules=modules,
        delta_reference=settings.delta_reference,
        sources=sources,
        device=device_name(settings.device),
        seconds=time.perf_counter() - started,
    )


def score_rows(
    models: Mapping[str, Model],
    rows: Iterable[Row],
    *,
    known: Container[str] = (),
    delta_reference: str = "aligned",
    device: str = "auto",
    allow_nonfinite: bool = False,
) -> Iterator[tuple[str, Score]]:
    """Scores the modules of those of the rows that are to be analysed, one by one.

    Args:
        models: base, aligned and finetuned.
        rows: Rows of the pairing.
        known: Names of modules that have a score already.
        delta_reference: What Δ is taken against.
        device: Where to compute.
        allow_nonfinite: Whether NaN and infinity in a model leave the module without ρ instead of failing.

    Yields:
        (module name, score).

    Raises:
        AnalysisError: The device is not there, or a tensor holds values that are not finite.
    """
    for name, score in analyze_rows(
        models, rows, known=known, delta_reference=delta_reference, device=device
    ):
        if not allow_nonfinite:
            require_finite(name, score)
        yield name, score


def require_finite(name: str, score: Score) -> None:
    """Raises AnalysisError if a module has no score because a model holds NaN or infinity."""
    if score.nonfinite:
        raise AnalysisError(
            f"{name} cannot be scored: {score.undefined}; repair that checkpoint, or pass --allow-nonfinite "
            f"to go on without its ρ"
        )


def device_name(device: str) -> str:
    """The device that a choice like "auto" comes to, as torch names it."""
    from ...analysis.device import resolve_device

    return str(resolve_device(device))
