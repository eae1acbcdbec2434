"""The safety vector of low rank: what fine-tuning moved away from the aligned model most is moved back.

W = W_finetuned + κ · SVD_k(W_aligned - W_finetuned)
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from ..checkpoint.model import Model
from ..settings import Dtype, Force, MaxShardSize, RunSettings, Setting
from .analysed import Device, Exclude, Include
from .base import Recipe
from .factors import FactorJob, Iterations, Rank
from .roles import Aligned, Finetuned, shape_of_repair
from .shape import AllowMissing, EncodeAs, FillFrom, OutputShape, Untie

__all__ = ["RECIPE", "SafetyVectorSettings"]


class _Roles(RunSettings, frozen=True):
    """The roles, which may be given by position."""

    aligned: Aligned
    finetuned: Finetuned


class SafetyVectorSettings(_Roles, frozen=True, kw_only=True):
    """A safety vector, as asked for.

    Raises:
        SettingError: A value is not one that its setting may have.
    """

    recipe: ClassVar[str] = "safety-vector"

    kappa: Annotated[
        float,
        Setting(
            "κ: how far the largest directions of the update are taken back; 1 takes them back whole.",
            least=-10.0,
            most=10.0,
        ),
    ] = 0.5
    rank: Rank = 16
    iterations: Iterations = 100
    include: Include = None
    exclude: Exclude = None
    device: Device = "auto"
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


class SafetyVectorJob(FactorJob[SafetyVectorSettings]):
    """A safety vector, ready to be added; errors are those of FactorJob."""

    minuend, subtrahend, kept = "aligned", "finetuned", "finetuned"

    def __init__(self, settings: SafetyVectorSettings) -> None:
        """Opens the models and pairs their tensors; only headers are read."""
        self.scale, self.rank = settings.kappa, settings.rank
        self.iterations, self.device = settings.iterations, settings.device
        self.changed = "the safety vector is added"
        self.sentence = (
            f"{{finetuned}} plus {settings.kappa:g} times the rank-{settings.rank} part of its difference to "
            "{aligned} (W_finetuned + κ · SVD_k(W_aligned − W_finetuned))"
        )
        self.open(
            settings,
            {"aligned": settings.aligned, "finetuned": settings.finetuned},
            OutputShape.of(settings),
            include=settings.include,
            exclude=settings.exclude,
            force=settings.force,
        )

    @property
    def host(self) -> Model:
        """The fine-tuned model, or the aligned one for an adapter."""
        return shape_of_repair(self.models)


RECIPE = Recipe(
    name="safety-vector",
    summary="Takes the largest directions of the fine-tuning update back towards the aligned model.",
    settings=SafetyVectorSettings,
    open=SafetyVectorJob,
)
