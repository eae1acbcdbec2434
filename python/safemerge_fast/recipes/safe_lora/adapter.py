"""The projected adapter as an output: the fine-tuned one's file, with C·B in place of B where that was decided."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...analysis.score import Score
from ...checkpoint.adapter import ADAPTER_WEIGHTS, Adapter
from ...checkpoint.adapter_config import ADAPTER_CONFIG
from ...documents import read_bytes
from ...errors import CheckpointError
from ...execution.written import Written
from ...pairing.operand import LowRank, Operand
from ...pairing.row import Row, SameName
from ...plan.layout import Shard
from ...plan.operation import Operation, copy_of
from ...plan.pieces import compose_row
from ...plan.plan import Plan, build_plan
from ...plan.projected import Projected
from ...report.tensors import TensorReport, tensor_report
from ..base import CheckpointContents

__all__ = ["ProjectedAdapter", "plan_adapter"]


def plan_adapter(
    models: Mapping[str, Any],
    adapter: Adapter,
    projected: Mapping[str, Operand],
    *,
    dtype: str,
    beside: Mapping[str, str],
) -> Plan:
    """Says what every tensor of the adapter's file is made of.

    Args:
        models: The models by role.
        adapter: The fine-tuned adapter.
        projected: By key, what takes the place of a B.
        dtype: Output dtype of float tensors.
        beside: As Plan has it.
    """
    roles = (adapter.role,)
    rows = [
        Row(
            name=tensor.name,
            file=ADAPTER_WEIGHTS,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            names=SameName(tensor.name, roles),
            module_type="",
            layer=None,
            analysed=False,
            transposed=False,
            reason="",
        )
        for tensor in adapter.headers.tensors
    ]

    def operation(row: Row) -> Operation:
        return copy_of(projected.get(row.name) or Operand(adapter.role, row.name))

    shard = Shard(ADAPTER_WEIGHTS, tuple(rows))
    return build_plan(models, [shard], operation, anchor=adapter.role, dtype=dtype, beside=beside)


@dataclass(frozen=True, slots=True)
class ProjectedAdapter(CheckpointContents):
    """A projected adapter: its file by a plan, and the fine-tuned one's configuration.

    Attributes:
        rows: The rows of the aligned model.
        composer: What the adapter makes of them.
        ranks: By matrix, the rank of its product.
    """

    rows: Sequence[Row] = ()
    composer: Projected | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)

    def small_files(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """The plan, what was derived for it, and the configuration, which is the fine-tuned adapter's."""
        # Zero-argument super does not know a class that slots made anew.
        for name, pieces in CheckpointContents.small_files(self):
            if name != "config.json":
                yield name, pieces
        yield ADAPTER_CONFIG, (read_bytes(self.host.path / ADAPTER_CONFIG, CheckpointError),)

    def tensors(self, scores: Mapping[str, Score], written: Written | None = None) -> Sequence[TensorReport]:
        """A record per matrix of the aligned model that was looked at."""
        assert self.composer is not None
        reports = []
        for row in self.rows:
            if not row.analysed:
                continue
            decision = self.decisions(row)
            operation = compose_row(self.composer, row, self.module_decisions)
            reports.append(
                tensor_report(
                    row,
                    file=ADAPTER_WEIGHTS,
                    dtype=row.dtype,
                    operation=operation,
                    description=operation.describe(),
                    decision=decision,
                    score=scores.get(row.name),
                )
            )
        return reports

    def adapter(self) -> Mapping[str, Any] | None:
        """What the report says of the adapter beside its tensors."""
        return {
            "combination": "projection",
            "rank": max(self.ranks.values(), default=0),
            "modules": len(self.ranks),
            "full_tensors": [],
            "ranks": dict(self.ranks),
            "relative_errors": {},
        }

    def notes(self) -> Sequence[str]:
        """The remarks."""
        return self.remarks


def is_plain(products: Sequence[LowRank], role: str) -> bool:
    """Whether an update is one product of an adapter's own matrices, so that C·B can take the place of B."""
    return (
        len(products) == 1
        and products[0].source == role
        and products[0].a_view is None
        and products[0].b_view is None
    )
