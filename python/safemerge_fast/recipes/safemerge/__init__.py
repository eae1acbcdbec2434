"""SafeMERGE (arXiv 2503.17239): modules that left the safety subspace are merged with a safe model."""

from __future__ import annotations

from ..base import Recipe
from .job import SafemergeJob
from .settings import SafemergeSettings

__all__ = ["RECIPE"]

RECIPE = Recipe(
    name="safemerge",
    summary="What the command merge does: merges the modules that left the safety subspace with a safe model.",
    settings=SafemergeSettings,
    open=SafemergeJob,
)
