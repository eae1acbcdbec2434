"""Stage 3, analysis: a score for every module that is to be analysed. Imports torch only when there is one."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import AnalysisError
from ..pairing.module import Module, modules_of_rows
from .scores import DELTA_REFERENCES, Score

if TYPE_CHECKING:
    import torch

    from ..checkpoint.model import Model
    from ..pairing.operand import LowRank
    from ..pairing.row import Row

__all__ = ["analyze_rows", "low_rank_update"]


def analyze_rows(
    models: Mapping[str, Model],
    rows: Iterable[Row],
    *,
    known: Container[str] = (),
    delta_reference: str = "aligned",
    device: str = "auto",
    on_module: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, Score]]:
    """Scores the modules of those of the rows that are to be analysed, one after the other.

    Args:
        models: base, aligned and finetuned; others are not read.
        rows: Rows of the pairing, e.g. those of one shard.
        known: Names of modules that are left out, because they have a score already.
        delta_reference: What Δ is taken against, "aligned" or "base".
        device: What analysis.device.resolve_device takes.
        on_module: Called with a module's name before it is scored.

    Returns:
        An iterator over (module name, score), in the rows' order.

    Raises:
        AnalysisError: An argument is not one of those above, a role is not given, or the device is not there.
    """
    if delta_reference not in DELTA_REFERENCES:
        raise AnalysisError(f"delta reference should be aligned or base, not {delta_reference!r}")
    for role in ("base", "aligned", "finetuned"):
        if role not in models:
            raise AnalysisError(f"the analysis needs the {role} model; give --{role}")
    analysed = [module for module in modules_of_rows(rows) if module.name not in known]
    if not analysed:
        return iter(())

    from .cosine import Workspace, score_module
    from .device import resolve_device

    resolved = resolve_device(device)
    products = {module.name: low_rank_update(module, delta_reference) for module in analysed}

    def scores() -> Iterator[tuple[str, Score]]:
        low_rank = _score_low_rank(
            models, [(module, update) for module in analysed if (update := products[module.name])], resolved
        )
        workspace = Workspace(resolved)
        for module in analysed:
            if on_module is not None:
                on_module(module.name)
            if products[module.name]:
                yield module.name, next(low_rank)
            else:
                yield (
                    module.name,
                    score_module(models, module, delta_reference=delta_reference, workspace=workspace),
                )

    return scores()


def low_rank_update(module: Module, delta_reference: str) -> tuple[LowRank, ...]:
    """The products that Δ is the sum of; none if it is anything else."""
    terms = module.terms
    finetuned = terms["finetuned"]
    operand = finetuned[0].operand
    if len(finetuned) > 1 or operand.rows is not None or operand.magnitude is not None:
        return ()
    if (
        delta_reference != "aligned"
        or (replace(finetuned[0], operand=replace(operand, low_rank=())),) != terms["aligned"]
    ):
        return ()
    return operand.low_rank


def _score_low_rank(
    models: Mapping[str, Model], modules: Iterable[tuple[Module, tuple[LowRank, ...]]], device: torch.device
) -> Iterator[Score]:
    """Scores modules whose Δ is a sum of products: on the CPU several at once, each in a thread of its own."""
    import threading

    from .blocks import Workspace
    from .low_rank import score_low_rank
    from .threads import score_in_threads

    local = threading.local()

    def score(module: tuple[Module, tuple[LowRank, ...]]) -> Score:
        if not hasattr(local, "workspace"):
            local.workspace = Workspace(device)
        return score_low_rank(models, *module, workspace=local.workspace)

    return score_in_threads(score, modules) if device.type == "cpu" else map(score, modules)
