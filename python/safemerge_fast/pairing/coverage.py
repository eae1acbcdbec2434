"""How much of a model is analysed, so that nobody takes a part for the whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from ..checkpoint.model import FLOATS
from ..printable import printable
from .row import Row

__all__ = ["Coverage", "coverage_of", "why_nothing_is_analysed"]

_REASONS = 6


class Coverage(msgspec.Struct, frozen=True):
    """How many parameters are analysed, of those that could be: buffers of integers do not count.

    Attributes:
        analysed_parameters: Those of the tensors that have a score.
        parameters: Those of all float tensors of the model.
        adapted_parameters: Those of the tensors that an adapter changes, which alone can be analysed; None if the
            fine-tuned model is no adapter.
    """

    analysed_parameters: int
    parameters: int
    adapted_parameters: int | None = None

    def sentence(self) -> str:
        """The share in words: "analysed 87.3 % of the parameters"."""
        text = f"analysed {_percent(self.analysed_parameters, self.parameters)} of the parameters"
        if self.adapted_parameters is None:
            return text
        if self.analysed_parameters == self.adapted_parameters:
            return f"{text} (all that the adapter changes)"
        part = _percent(self.analysed_parameters, self.adapted_parameters)
        return f"{text} ({part} of those that the adapter changes)"


def coverage_of(rows: Iterable[Row]) -> Coverage:
    """Counts the parameters of all rows of a pairing."""
    analysed = parameters = adapted = 0
    is_adapter = False
    for row in rows:
        if row.dtype not in FLOATS:
            continue
        size = math.prod(row.shape)
        parameters += size
        analysed += size if row.analysed else 0
        if "finetuned" in row.adapted:
            is_adapter = True
            adapted += size if row.adapted["finetuned"] != row.terms.get("aligned") else 0
    return Coverage(analysed, parameters, adapted if is_adapter else None)


def why_nothing_is_analysed(rows: Sequence[Row]) -> str:
    """Says why none of the tensors is analysed, and what to do."""
    reasons = Counter(row.reason for row in rows).most_common()
    named = [f"{count} {printable(reason, 80)}" for reason, count in reasons[:_REASONS]]
    if len(reasons) > _REASONS:
        named.append(f"{sum(count for _, count in reasons[_REASONS:])} for other reasons")
    return (
        f"none of the {len(rows)} tensors is analysed, so that nothing can be decided by ρ ({'; '.join(named)}); pass "
        f"--include REGEX with the names of the weight matrices, or leave --exclude out"
    )


def _percent(part: int, whole: int) -> str:
    """A share, cut off after its digits, so that only all of it is 100 %."""
    share = 100.0 * part / whole if whole else 0.0
    if share >= 1.0 or share == 0.0:
        return f"{math.floor(10.0 * share) / 10.0:g} %"
    return f"{share:.2g} %"
