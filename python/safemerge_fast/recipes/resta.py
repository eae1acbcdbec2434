"""RESTA (Bhardwaj et al., arXiv 2402.11746): the safety vector, which alignment added, is added once more.

    W = W_finetuned + γ · (W_aligned - W_base)

with every element of the safety vector dropped at random and the others scaled up (DARE), if a density is given.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from ..plan.blend import Blend
from ..plan.methods import summing_method, thinning_method
from ..settings import Dtype, Force, MaxShardSize, RunSettings, Setting
from .base import Recipe
from .repair import RepairJob
from .roles import Aligned, Base, Finetuned
from .shape import AllowMissing, EncodeAs, FillFrom, OutputShape, Untie

__all__ = ["RECIPE", "RestaSettings"]


class _Roles(RunSettings, frozen=True):
    """The roles, which may be given by position."""

    base: Base
    aligned: Aligned
    finetuned: Finetuned


class RestaSettings(_Roles, frozen=True, kw_only=True):
    """RESTA, as asked for.

    Raises:
        SettingError: A value is not one that its setting may have.
    """

    recipe: ClassVar[str] = "resta"

    gamma: Annotated[float, Setting("γ: how much of the safety vector is added.", least=-10.0, most=10.0)] = (
        0.5
    )
    density: Annotated[
        float | None,
        Setting(
            "Share of the safety vector's elements that DARE keeps, scaled up by its inverse.",
            least=0.0,
            most=1.0,
            default="all",
        ),
    ] = None
    seed: Annotated[int, Setting("Seed of DARE's random numbers.", least=0)] = 0
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


class RestaJob(RepairJob[RestaSettings]):
    """RESTA, ready to start; errors are those of RepairJob."""

    def __init__(self, settings: RestaSettings) -> None:
        """Opens the models and pairs their tensors; only headers are read."""
        roles = {"base": settings.base, "aligned": settings.aligned, "finetuned": settings.finetuned}
        self.open(settings, roles, OutputShape.of(settings), force=settings.force)
        self.changed = "the safety vector is added"
        self.sentence = (
            f"{{finetuned}} plus {settings.gamma:g} times what alignment changed from {{base}} to {{aligned}} "
            "([RESTA](https://arxiv.org/abs/2402.11746))"
        )

    def blend(self) -> Blend:
        """F + γ·a - γ·b; with DARE b + (f - b) + γ·thinned(a - b), which is the same but for the thinning."""
        gamma, density = self.settings.gamma, self.settings.density
        if density is None or density == 1.0:
            weights = {"finetuned": 1.0, "aligned": gamma, "base": -gamma}
            return Blend(summing_method().name, {"normalize": False}, weights)
        return Blend(
            thinning_method().name,
            {"normalize": False, "seed": self.settings.seed},
            {"finetuned": 1.0, "aligned": gamma},
            base="base",
            each={"aligned": {"density": density}},
        )


RECIPE = Recipe(
    name="resta",
    summary="Adds the safety vector, aligned - base, to the fine-tuned model (RESTA), thinned by DARE on request.",
    settings=RestaSettings,
    open=RestaJob,
)
