"""What a progress callback receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ProgressCallback", "ProgressEvent", "silent"]


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """How far one stage is.

    Attributes:
        stage: "analysis" (counted in modules), "merge" or "verify" (counted in bytes), "sweep" (counted in models).
        done: How much is done.
        total: How much there is to do.
        item: What is being worked on: a tensor or a file.
    """

    stage: str
    done: int
    total: int
    item: str


ProgressCallback = Callable[[ProgressEvent], None]
"""Called on the caller's own thread; what it raises stops the work."""


def silent(event: ProgressEvent) -> None:
    """Tells nobody."""
