"""Stage 3, analysis: a score for every row that is to be analysed. Imports torch only when there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import AnalysisError
from .scores import DELTA_REFERENCES, Score

if TYPE_CHECKING:
    import torch

    from ..checkpoint.model import Model
    from ..pairing.operand import LowRank
    from ..pairing.row import Row

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

    resolved = resolve_device(device)
    products = {row.name: _low_rank_update(row, delta_reference) for row in analysed}

    def scores() -> Iterator[tuple[str, Score]]:
        low_rank = _score_low_rank(
            models, [(row, update) for row in analysed if (update := products[row.name])], resolved
        )
        workspace = Workspace(resolved)
        for row in analysed:
            if on_module is not None:
                on_module(row.name)
            if products[row.name]:
                yield row.name, next(low_rank)
            else:
                yield (
                    row.name,
                    score_module(models, row, delta_reference=delta_reference, workspace=workspace),
                )

    return scores()


def _low_rank_update(row: Row, delta_reference: str) -> tuple[LowRank, ...]:
    """The products that Δ is the sum of; none if it is anything else."""
    finetuned = row.terms["finetuned"]
    operand = finetuned[0].operand
    if len(finetuned) > 1 or operand.rows is not None or operand.magnitude is not None:
        return ()
    if (
        delta_reference != "aligned"
        or (replace(finetuned[0], operand=replace(operand, low_rank=())),) != row.terms["aligned"]
    ):
        return ()
    return operand.low_rank


def _score_low_rank(
    models: Mapping[str, Model], modules: Iterable[tuple[Row, tuple[LowRank, ...]]], device: torch.device
) -> Iterator[Score]:
    """Scores modules whose Δ is a sum of products: on the CPU several at once, each in a thread of its own."""
    import threading

    from .blocks import Workspace
    from .low_rank import score_low_rank
    from .threads import score_in_threads

    local = threading.local()

    def score(module: tuple[Row, tuple[LowRank, ...]]) -> Score:
        if not hasattr(local, "workspace"):
            local.workspace = Workspace(device)
        return score_low_rank(models, *module, workspace=local.workspace)

    return score_in_threads(score, modules) if device.type == "cpu" else map(score, modules)
