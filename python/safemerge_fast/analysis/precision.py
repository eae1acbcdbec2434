"""How ρ is to be measured, and how sure one wants to be of what is decided by it."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import AnalysisError
from .scores import ESTIMATORS

__all__ = ["Precision"]


@dataclass(frozen=True, slots=True)
class Precision:
    """What an analysis may assume and must reach.

    Attributes:
        estimator: "auto": from random columns, and exactly where these do not settle the question; "sketch": from
            random columns alone, but for modules of which these say nothing; "exact": all modules exactly.
        failure: Probability that any interval of the run misses its ρ, over the seed.
        seed: Of the random columns.
        resolution: Relative half width of an interval from which on a module is decided by the estimate, if its
            interval does not settle the question; None: never.

    Raises:
        AnalysisError: A value is not one of those above.
    """

    estimator: str = "auto"
    failure: float = 1e-3
    seed: int = 0
    resolution: float | None = None

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise AnalysisError(f"estimator should be auto, sketch or exact, not {self.estimator!r}")
        if not 0.0 < self.failure < 1.0:
            raise AnalysisError(f"failure should be a probability between 0 and 1, not {self.failure}")
        if not 0 <= self.seed < 2**64:
            raise AnalysisError(f"seed should be a whole number from 0 to 2^64 - 1, not {self.seed}")
        if self.resolution is not None and not 0.0 < self.resolution < 1.0:
            raise AnalysisError(f"resolution should be between 0 and 1, not {self.resolution}")
