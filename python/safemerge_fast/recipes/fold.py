"""Folding: an adapter becomes part of the checkpoint it was trained on; what users call merge_and_unload.

The output is the checkpoint with W + s·B·A for every adapted W, made tile by tile: no model is loaded, and
torch is not imported.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from ..checkpoint.adapter import open_adapter
from ..checkpoint.model import Model, open_model
from ..decision import Decision
from ..pairing.folding import pair_adapter
from ..pairing.row import Row
from ..plan.blend import Blend
from ..plan.encoding import Encode
from ..plan.methods import summing_method
from ..plan.operation import Operation
from ..plan.pieces import Pieces, compose_row
from ..settings import Dtype, Kind, MaxShardSize, RunSettings, Setting
from .base import Recipe
from .planned import PlannedJob
from .roles import access_of
from .shape import EncodeAs, Untie

__all__ = ["RECIPE", "FoldSettings"]


class _Roles(RunSettings, frozen=True):
    """The models, which may be given by position."""

    model: Annotated[
        str, Setting("The checkpoint that the adapter was trained on.", kind=Kind.MODEL, metavar="MODEL")
    ]
    adapter: Annotated[
        str, Setting("The adapter; all of its keys are applied.", kind=Kind.MODEL, metavar="MODEL")
    ]


class FoldSettings(_Roles, frozen=True, kw_only=True):
    """A fold, as asked for.

    Raises:
        SettingError: A value is not one that its setting may have.
    """

    recipe: ClassVar[str] = "fold"

    dtype: Dtype = "auto"
    max_shard_size: MaxShardSize = None
    encode: EncodeAs = "keep"
    untie: Untie = False


class FoldJob(PlannedJob[FoldSettings]):
    """A fold, ready to start."""

    def __init__(self, settings: FoldSettings) -> None:
        """Opens checkpoint and adapter and pairs them; only headers are read.

        Raises:
            CheckpointError: The checkpoint cannot be found, read or trusted.
            AdapterError: The adapter does not fit it, or cannot be merged exactly.
        """
        self.settings = settings
        adapter = open_adapter("adapter", settings.adapter, access=access_of(settings))
        model = open_model("model", settings.model, access=access_of(settings))
        self.models = {"model": model, "adapter": adapter}
        pairing = pair_adapter(model, adapter, untie=settings.untie)
        self.rows, self.notes, self.config = pairing.rows, pairing.notes, pairing.config
        self.dtype, self.encode = settings.dtype, Encode(settings.encode)
        self.max_shard_size = None if settings.max_shard_size is None else int(settings.max_shard_size)
        self.sentence = "{model} with the LoRA adapter {adapter} folded into its weights"
        self._blend = Blend(summing_method().name, {"normalize": False}, {"adapter": 1.0}, kept="model")

    @property
    def host(self) -> Model:
        """The checkpoint."""
        return self.models["model"]

    @property
    def tokenizer(self) -> Model:
        """The adapter, which may have tokens of its own."""
        return self.models["adapter"]

    def operation(self, row: Row) -> Operation | Pieces:
        """The tensor with the adapter's update, or a copy."""
        return compose_row(self._blend, row, self.decision)

    def decision(self, row: Row) -> Decision:
        """Whether the adapter changes a tensor."""
        adapted = row.is_elsewhere("adapter") or row.adapted["adapter"] != row.terms["model"]
        return _ADAPTED if adapted else _LEFT


_ADAPTED = Decision(True, "adapted")
_LEFT = Decision(False, "not adapted")

RECIPE = Recipe(
    name="fold",
    summary="Folds a LoRA adapter into the checkpoint it was trained on, exactly and without torch; what PEFT calls "
    "merge_and_unload.",
    settings=FoldSettings,
    open=FoldJob,
)
