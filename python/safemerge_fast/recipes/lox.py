"""LoX (Perin et al., arXiv 2506.15606): what alignment changed most is extrapolated, before any fine-tuning.

W = W_aligned + κ · SVD_k(W_aligned - W_base)
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from ..checkpoint.model import Model
from ..pairing.missing import Missing
from ..plan.encoding import Encode
from ..settings import Dtype, Force, MaxShardSize, RunSettings, Setting
from .analysed import Device, Exclude, Include
from .base import Recipe
from .factors import FactorJob, Iterations, Rank
from .roles import Aligned, Base
from .shape import EncodeAs, OutputShape, Untie

__all__ = ["RECIPE", "LoxSettings"]


class _Roles(RunSettings, frozen=True):
    """The roles, which may be given by position."""

    base: Base
    aligned: Aligned


class LoxSettings(_Roles, frozen=True, kw_only=True):
    """LoX, as asked for.

    Raises:
        SettingError: A value is not one that its setting may have.
    """

    recipe: ClassVar[str] = "lox"

    kappa: Annotated[
        float, Setting("κ: how far alignment's largest directions are extrapolated.", least=-10.0, most=10.0)
    ] = 1.0
    rank: Rank = 6
    iterations: Iterations = 100
    include: Include = None
    exclude: Exclude = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    max_shard_size: MaxShardSize = None
    encode: EncodeAs = "keep"
    untie: Untie = False
    force: Force = False


class LoxJob(FactorJob[LoxSettings]):
    """LoX, ready to start; errors are those of FactorJob."""

    minuend, subtrahend, kept = "aligned", "base", "aligned"

    def __init__(self, settings: LoxSettings) -> None:
        """Opens the models and pairs their tensors; only headers are read."""
        self.scale, self.rank = settings.kappa, settings.rank
        self.iterations, self.device = settings.iterations, settings.device
        self.changed = "alignment is extrapolated"
        self.sentence = (
            f"{{aligned}} plus {settings.kappa:g} times the rank-{settings.rank} part of what alignment changed from "
            "{base} ([LoX](https://arxiv.org/abs/2506.15606))"
        )
        size = settings.max_shard_size
        shape = OutputShape(
            settings.dtype,
            None if size is None else int(size),
            Encode(settings.encode),
            Missing.NOTE,
            settings.untie,
        )
        self.open(
            settings,
            {"base": settings.base, "aligned": settings.aligned},
            shape,
            include=settings.include,
            exclude=settings.exclude,
            force=settings.force,
        )

    @property
    def host(self) -> Model:
        """The aligned model."""
        return self.models["aligned"]


RECIPE = Recipe(
    name="lox",
    summary="Extrapolates the largest directions of what alignment changed (LoX), to withstand later fine-tuning.",
    settings=LoxSettings,
    open=LoxJob,
)
