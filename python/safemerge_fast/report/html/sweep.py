"""The page of a sweep: candidates in the plane of two metrics, and in a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...printable import printable
from ..environment import versions
from .head import head, sentences, version_fact
from .page import compose

__all__ = ["Candidate", "Metric", "sweep_page"]


@dataclass(frozen=True, slots=True)
class Metric:
    """What candidates are judged by.

    Attributes:
        name: Its name.
        maximise: Whether more is better.
    """

    name: str
    maximise: bool = True


@dataclass(frozen=True, slots=True)
class Candidate:
    """One output that a sweep made and judged, or a model that stands beside them for comparison.

    Attributes:
        name: Its name.
        metrics: Values by the metrics' names; those that are not known are left out.
        settings: What it was made with.
        control: Whether it is there for comparison only.
        pareto: Whether no other candidate beats it in all metrics.
        command: What makes it again, if anything does.
        problem: Why it could not be made or judged, if so.
    """

    name: str
    metrics: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    control: bool = False
    pareto: bool = False
    command: str | None = None
    problem: str | None = None


def sweep_page(
    candidates: Sequence[Candidate],
    metrics: Sequence[Metric],
    *,
    title: str,
    facts: Mapping[str, Any] | None = None,
    warnings: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> Iterator[bytes]:
    """The page, in pieces.

    Args:
        candidates: All of them, controls and failures too.
        metrics: What they were judged by, at least one; the most important ones first.
        title: The page's title.
        facts: What else to say of the sweep, by name.
        warnings: What to mistrust, in sentences.
        notes: What else a person should know.
    """
    document = {
        **head("sweep", title, {**(facts or {}), **version_fact(versions())}, None),
        "warnings": sentences(warnings),
        "notes": sentences(notes),
        "sweep": {
            "metrics": [{"name": metric.name, "maximise": metric.maximise} for metric in metrics],
            "candidates": [_record(candidate, metrics) for candidate in candidates],
        },
    }
    judged = sum(candidate.problem is None for candidate in candidates)
    return compose(document, title=title, summary=f"{judged} of {len(candidates)} candidates were judged.")


def _record(candidate: Candidate, metrics: Sequence[Metric]) -> dict[str, Any]:
    values = (candidate.metrics.get(metric.name) for metric in metrics)
    return {
        "name": candidate.name,
        "values": [value if value is not None and math.isfinite(value) else None for value in values],
        "settings": {str(name): printable(str(value)) for name, value in candidate.settings.items()},
        "control": candidate.control,
        "pareto": candidate.pareto,
        "command": candidate.command,
        "problem": candidate.problem,
    }
