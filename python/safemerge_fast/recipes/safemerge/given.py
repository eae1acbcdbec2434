"""Scores that somebody gives: an object, a file of analyze, or the report of an earlier merge."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ...analysis.score import Score
from ...analysis.scores import Scores, require_scores_of
from ...checkpoint.model import Model
from ...documents import RECORD, read_bytes
from ...errors import AnalysisError
from ...report.evidence import is_report, scores_of_report
from ...report.report import REPORT_FILE
from .scoring import require_finite

__all__ = ["given_scores", "name_of_scores", "needed_scores"]


def name_of_scores(scores: str | Scores) -> str:
    """What messages call scores."""
    return f"the scores {scores}" if isinstance(scores, str) else "the scores given"


def given_scores(scores: str | Scores, models: Mapping[str, Model], delta_reference: str) -> Scores:
    """Reads scores and refuses those of other models or of another definition of Δ.

    Args:
        scores: Scores; or a file that holds them, as JSON or Parquet, or a report, or the directory of a merge.
        models: The models given, by role.
        delta_reference: What Δ is to be taken against.

    Raises:
        AnalysisError: They cannot be read, or are not of these models.
    """
    found = scores if isinstance(scores, Scores) else _read(scores)
    require_scores_of(found, models, delta_reference, name_of_scores(scores))
    return found


def _read(name: str) -> Scores:
    file = os.path.join(name, REPORT_FILE) if os.path.isdir(name) else name
    data = read_bytes(file, AnalysisError, limit=RECORD, subject=f"the scores {file}")
    return scores_of_report(data, file) if is_report(data) else Scores.from_bytes(data, file)


def needed_scores(
    scores: Scores, names: Sequence[str], given: str | Scores, *, allow_nonfinite: bool
) -> dict[str, Score]:
    """Those of given scores that a job needs; there may be more.

    Args:
        scores: The scores.
        names: The modules that need one.
        given: What was given, for messages.
        allow_nonfinite: Whether a module may have none because values are not finite.

    Raises:
        AnalysisError: A module has none, or one says that values are not finite and that is not allowed.
    """
    if missing := [name for name in names if name not in scores.modules]:
        raise AnalysisError(
            f"{name_of_scores(given)} hold no score for {missing[0]}; "
            f"write them again with analyze and the same --include and --exclude"
        )
    reused = {name: scores.modules[name] for name in names}
    if not allow_nonfinite:
        for name, score in reused.items():
            require_finite(name, score)
    return reused
