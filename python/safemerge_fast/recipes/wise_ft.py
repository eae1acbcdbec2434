"""WiSE-FT (Wortsman et al., arXiv 2109.01903): every weight is averaged with the model before fine-tuning.

W = (1 - α) · W_finetuned + α · W_aligned
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from ..plan.blend import Blend
from ..plan.methods import summing_method
from ..settings import Dtype, Force, MaxShardSize, RunSettings, Setting
from .base import Recipe
from .mask import MASKED, MaskOf
from .repair import RepairJob
from .roles import Aligned, Finetuned
from .shape import AllowMissing, EncodeAs, FillFrom, OutputShape, Untie

__all__ = ["RECIPE", "WiseFtSettings"]


class _Roles(RunSettings, frozen=True):
    """The roles, which may be given by position."""

    aligned: Aligned
    finetuned: Finetuned


class WiseFtSettings(_Roles, frozen=True, kw_only=True):
    """WiSE-FT, as asked for.

    Raises:
        SettingError: A value is not one that its setting may have.
    """

    recipe: ClassVar[str] = "wise-ft"

    alpha: Annotated[
        float, Setting("α: weight of the aligned model; the fine-tuned one gets 1-α.", least=0.0, most=1.0)
    ] = 0.5
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


class WiseFtJob(RepairJob[WiseFtSettings]):
    """WiSE-FT, ready to start; errors are those of RepairJob."""

    def __init__(self, settings: WiseFtSettings) -> None:
        """Opens the models and pairs their tensors; only headers are read."""
        roles = {"aligned": settings.aligned, "finetuned": settings.finetuned}
        self.open(settings, roles, OutputShape.of(settings), force=settings.force, mask=settings.mask)
        self.changed = "averaged with the aligned model"
        self.sentence = (
            f"{1.0 - settings.alpha:.6g} · {{finetuned}} + {settings.alpha:g} · {{aligned}} "
            "([WiSE-FT](https://arxiv.org/abs/2109.01903))"
            f"{'' if self.mask is None else MASKED}"
        )

    def blend(self) -> Blend:
        """The weighted mean."""
        alpha = self.settings.alpha
        return Blend(
            summing_method().name, {"normalize": False}, {"finetuned": 1.0 - alpha, "aligned": alpha}
        )


RECIPE = Recipe(
    name="wise-ft",
    summary="Averages every weight of the fine-tuned model with the aligned one's (WiSE-FT).",
    settings=WiseFtSettings,
    open=WiseFtJob,
)
