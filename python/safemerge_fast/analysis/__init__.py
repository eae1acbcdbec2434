"""Stage 3, analysis: a score for every row that is to be analysed. Imports torch only when there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from ..errors import AnalysisError
from .scores import DELTA_REFERENCES, Score

if TYPE_CHECKING:
    from ..checkpoint import Model
    from ..pairing import Row

__all__ = ["analyze_rows"]


def analyze_rows(
    models: Mapping[str, Model],
    rows: Iterable[Row],
    *,
    delta_reference: str = "aligned",
    device: str = "auto",
    on_module: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, Score]]:
    """Scores those of the rows that are to be analysed, one after the other.

    Args:
        models: base, aligned and finetuned; others are not read.
        rows: Rows of the pairing, e.g. those of one shard.
        delta_reference: What Δ is taken against, "aligned" or "base".
        device: What analysis.device.resolve_device takes.
        on_module: Called with a tensor's name before it is scored.

    Returns:
        An iterator over (tensor name, score), in the rows' order.

    Raises:
        AnalysisError: An argument is not one of those above, a role is not given, or the device is not there.
    """
    if delta_reference not in DELTA_REFERENCES:
        raise AnalysisError(f"delta reference should be aligned or base, not {delta_reference!r}")
    for role in ("base", "aligned", "finetuned"):
        if role not in models:
            raise AnalysisError(f"the analysis needs the {role} model; give --{role}")
    analysed = [row for row in rows if row.analysed]
    if not analysed:
        return iter(())

    from .cosine import Workspace, score_module
    from .device import resolve_device

    workspace = Workspace(resolve_device(device))

    def scores() -> Iterator[tuple[str, Score]]:
        for row in analysed:
            if on_module is not None:
                on_module(row.name)
            yield row.name, score_module(models, row, delta_reference=delta_reference, workspace=workspace)

    return scores()
