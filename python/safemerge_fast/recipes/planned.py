"""Jobs of recipes whose operations follow from the pairing alone: nothing is measured before the plan is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from ..decision import Decision
from ..pairing.row import Row
from ..plan.checkpoint import plan_checkpoint
from ..plan.encoding import Encode
from ..plan.operation import Operation
from ..plan.pieces import Pieces
from ..report.card import recipe_card
from ..report.report import Report
from ..settings import RunSettings
from .base import CheckpointContents, Contents, Job, Measurement

__all__ = ["PlannedJob"]

_Settings = TypeVar("_Settings", bound=RunSettings)


class PlannedJob(Job[_Settings], Generic[_Settings]):
    """A job of such a recipe.

    Attributes:
        rows: The output's tensors.
        dtype: Output dtype of float tensors.
        max_shard_size: Most bytes per output file, or None.
        encode: What becomes of quantised tensors.
        sentence: What the output is, in a sentence for its card.
        config: What config.json says in place of the host's, if it is not to be that.
    """

    rows: tuple[Row, ...]
    dtype: str
    max_shard_size: int | None
    encode: Encode
    sentence: str
    config: Mapping[str, Any] | None = None

    def operation(self, row: Row) -> Operation | Pieces:
        """What makes a row's tensor."""
        raise NotImplementedError

    def decision(self, row: Row) -> Decision:
        """Whether the recipe changes a tensor, and why."""
        raise NotImplementedError

    @property
    def keeps_formats(self) -> bool:
        """Whether quantised tensors stay so."""
        return self.encode is Encode.KEEP

    def contents(self, measurement: Measurement | None) -> Contents:
        """The checkpoint that the plan makes."""
        plan, config = plan_checkpoint(
            self.models,
            self.rows,
            self.operation,
            host=self.host,
            dtype=self.dtype,
            max_shard_size=self.max_shard_size,
            encode=self.encode,
            config=self.config,
        )
        return CheckpointContents(
            plan, self.decision, self.host, config, read_backend=self.settings.read_backend
        )

    def card(self, report: Report) -> str:
        """The model card."""
        return recipe_card(report, self.models, self.sentence)
