"""The first half of the pipeline on its own: checkpoint → pairing → analysis, for scores to be reused."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ...analysis import analyze_rows
from ...analysis.scores import Score, Scores, describe_source
from ...checkpoint.model import Model
from ...pairing.rows import Row, pair
from ...progress import ProgressCallback, ProgressEvent
from .job import open_models, require_finite

__all__ = ["analyze", "device_name", "score_models", "score_rows"]


def analyze(
    base: str | os.PathLike[str],
    aligned: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    *,
    include: str | None = None,
    exclude: str | None = None,
    delta_reference: str = "aligned",
    device: str = "auto",
    allow_nonfinite: bool = False,
    progress: ProgressCallback | None = None,
) -> Scores:
    """Measures how far each module's update lies in the safety subspace; writes nothing.

    Args:
        base: As for merge.
        aligned: As for merge.
        finetuned: As for merge.
        include: As for merge.
        exclude: As for merge.
        delta_reference: As for merge.
        device: As for merge.
        allow_nonfinite: As for merge.
        progress: Called with ProgressEvents of the stage "analysis".

    Returns:
        The scores; their to_json is what merge takes as `scores`.

    Raises:
        SafemergeError: One of its subclasses: a model, the pairing or the analysis is at fault.
    """
    models = open_models(
        {"base": os.fspath(base), "aligned": os.fspath(aligned), "finetuned": os.fspath(finetuned)}
    )
    return score_models(
        models,
        pair(models, include=include, exclude=exclude).rows,
        delta_reference=delta_reference,
        device=device,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
    )


def score_models(
    models: Mapping[str, Model],
    rows: Sequence[Row],
    *,
    delta_reference: str = "aligned",
    device: str = "auto",
    allow_nonfinite: bool = False,
    progress: ProgressCallback | None = None,
) -> Scores:
    """Scores all rows of a pairing; arguments and errors as for score_rows."""
    started = time.perf_counter()
    modules: dict[str, Score] = {}
    total = sum(row.analysed for row in rows)
    tell = progress or (lambda event: None)
    # Loading torch takes a while before the first score is there.
    tell(ProgressEvent("analysis", 0, total, ""))
    for name, score in score_rows(
        models, rows, delta_reference=delta_reference, device=device, allow_nonfinite=allow_nonfinite
    ):
        modules[name] = score
        tell(ProgressEvent("analysis", len(modules), total, name))
    return Scores(
        modules=modules,
        delta_reference=delta_reference,
        sources={role: describe_source(model) for role, model in models.items()},
        device=device_name(device),
        seconds=time.perf_counter() - started,
    )


def score_rows(
    models: Mapping[str, Model],
    rows: Iterable[Row],
    *,
    delta_reference: str = "aligned",
    device: str = "auto",
    allow_nonfinite: bool = False,
) -> Iterator[tuple[str, Score]]:
    """Scores those of the rows that are to be analysed, one by one.

    Args:
        models: base, aligned and finetuned.
        rows: Rows of the pairing, e.g. those of one shard.
        delta_reference: What Δ is taken against.
        device: Where to compute.
        allow_nonfinite: Whether NaN and infinity in a model leave the module without ρ instead of failing.

    Yields:
        (tensor name, score).

    Raises:
        AnalysisError: The device is not there, or a tensor holds values that are not finite.
    """
    for name, score in analyze_rows(models, rows, delta_reference=delta_reference, device=device):
        if not allow_nonfinite:
            require_finite(name, score)
        yield name, score


def device_name(device: str) -> str:
    """The device that a choice like "auto" comes to, as torch names it."""
    from ...analysis.device import resolve_device

    return str(resolve_device(device))
