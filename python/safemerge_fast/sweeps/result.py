"""What came of one model of a sweep, as the log holds it."""

from __future__ import annotations

from typing import Any

import msgspec

from .candidates import Control

__all__ = ["VERSION", "Result"]

VERSION = 1
"""Version of the log and of the report."""


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of one model.

    Attributes:
        name: Its name.
        identity: A digest of what makes it what it is, the inputs apart.
        what: What it is, in a few words.
        control: Which control it is; None for a candidate.
        recipe: What made it; None for a model that was judged as it is.
        settings: The settings it was made with.
        model: Where a model lies that was judged as it is.
        drawn: The modules to merge, where a control names them itself.
        beside: The candidate that a control stands beside.
        merged: Of each module type, how many modules are merged and how many there are.
        same_as: The name of what has the same weights, and whose judgement this one shares.
        metrics: Numbers by name; None if there are none.
        failed: Why there are none, in a sentence.
        seconds: "make" and "judge".
        job: The identity of the job that made it: a digest of all that decides its weights.
    """

    name: str
    identity: str
    what: str
    control: Control | None = None
    recipe: str | None = None
    settings: dict[str, Any] | None = None
    model: str | None = None
    drawn: tuple[str, ...] | None = None
    beside: str | None = None
    merged: dict[str, tuple[int, int]] | None = None
    same_as: str | None = None
    metrics: dict[str, float] | None = None
    failed: str | None = None
    seconds: dict[str, float] = {}
    job: str | None = None

    @property
    def counts(self) -> tuple[int, int] | None:
        """How many modules are merged, and how many there are."""
        if self.merged is None:
            return None
        return sum(pair[0] for pair in self.merged.values()), sum(pair[1] for pair in self.merged.values())
