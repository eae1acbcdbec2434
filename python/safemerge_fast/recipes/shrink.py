"""The control of every repair: the update of the selected matrices is made smaller, and no safe model is needed.

W = W_aligned + α · (W_finetuned - W_aligned)
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from ..plan.blend import Blend
from ..plan.methods import summing_method
from ..settings import Dtype, Force, MaxShardSize, RunSettings, Setting
from .analysed import Exclude, Include
from .base import Recipe
from .mask import MASKED, MaskOf
from .repair import RepairJob, Selected
from .roles import Aligned, Finetuned
from .shape import AllowMissing, EncodeAs, FillFrom, OutputShape, Untie

__all__ = ["RECIPE", "ShrinkSettings"]


class _Roles(RunSettings, frozen=True):
    """The roles, which may be given by position."""

    aligned: Aligned
    finetuned: Finetuned


class ShrinkSettings(_Roles, frozen=True, kw_only=True):
    """A shrunken update, as asked for.

    Raises:
        SettingError: A value is not one that its setting may have.
    """

    recipe: ClassVar[str] = "shrink"

    alpha: Annotated[
        float,
        Setting("α: what is left of the update; 0 gives the aligned model's matrices.", least=0.0, most=1.0),
    ] = 0.5
    include: Include = None
    exclude: Exclude = None
    mask: MaskOf = None
    dtype: Dtype = "auto"
    max_shard_size: MaxShardSize = None
    encode: EncodeAs = "keep"
    allow_missing: AllowMissing = False
    fill_from: FillFrom = None
    untie: Untie = False
    force: Force = False

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        OutputShape.of(self)


class ShrinkJob(RepairJob[ShrinkSettings]):
    """A shrunken update, ready to start; errors are those of RepairJob."""

    def __init__(self, settings: ShrinkSettings) -> None:
        """Opens the models and pairs their tensors; only headers are read."""
        self.open(
            settings,
            {"aligned": settings.aligned, "finetuned": settings.finetuned},
            OutputShape.of(settings),
            force=settings.force,
            selected=Selected(settings.include, settings.exclude),
            mask=settings.mask,
        )
        self.changed = "the update is made smaller"
        self.sentence = (
            f"{{aligned}} plus {settings.alpha:g} times what fine-tuning changed to {{finetuned}} in "
            f"{self.merging} matrices; all other tensors are those of {{finetuned}}"
            f"{'' if self.mask is None else MASKED}"
        )

    def blend(self) -> Blend:
        """The weighted mean."""
        alpha = self.settings.alpha
        return Blend(
            summing_method().name, {"normalize": False}, {"finetuned": alpha, "aligned": 1.0 - alpha}
        )


RECIPE = Recipe(
    name="shrink",
    summary="Makes the fine-tuning update of matrices smaller: the control that needs no safe model.",
    settings=ShrinkSettings,
    open=ShrinkJob,
)
