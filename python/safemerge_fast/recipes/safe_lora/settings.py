"""What somebody asks of Safe LoRA."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from ...decision import Rule
from ...decision.selection import FORMS
from ...errors import SafemergeError, SettingError
from ...settings import Dtype, Force, Kind, MaxShardSize, RunSettings, Setting
from ..analysed import Device, Exclude, Include
from ..roles import Aligned, Base, Finetuned
from ..safemerge.settings import Estimator
from ..shape import AllowMissing, EncodeAs, FillFrom, OutputShape, Untie

__all__ = ["SafeLoraSettings"]


def _check_select(text: str) -> None:
    try:
        Rule(select=text)
    except SafemergeError as error:
        raise SettingError(str(error)) from error


class _Roles(RunSettings, frozen=True):
    """The roles, which may be given by position."""

    base: Base
    aligned: Aligned
    finetuned: Finetuned


class SafeLoraSettings(_Roles, frozen=True, kw_only=True):
    """Safe LoRA, as asked for.

    Raises:
        SettingError: A value is not one that its setting may have.
    """

    recipe: ClassVar[str] = "safe-lora"

    threshold: Annotated[
        float,
        Setting("τ: updates whose ρ is not above it are projected.", least=0.0, most=1.0, names=("--tau",)),
    ] = 0.35
    select: Annotated[
        str,
        Setting(
            "Project by the threshold, or the N (or the share F) of lowest ρ.",
            metavar=FORMS,
            check=_check_select,
        ),
    ] = "threshold"
    scores: Annotated[
        str | None, Setting("Reuse what analyze wrote.", kind=Kind.PATH, metavar="FILE", decides=False)
    ] = None
    include: Include = None
    exclude: Exclude = None
    estimator: Estimator = "auto"
    device: Device = "auto"
    dtype: Dtype = "auto"
    output_format: Annotated[
        Literal["auto", "adapter", "checkpoint"],
        Setting("What to write; auto is an adapter if finetuned is one of plain LoRA."),
    ] = "auto"
    max_shard_size: MaxShardSize = None
    encode: EncodeAs = "keep"
    allow_missing: AllowMissing = False
    fill_from: FillFrom = None
    untie: Untie = False
    force: Force = False

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        OutputShape.of(self)

    def rule(self) -> Rule:
        """The rule of the decision; what has no ρ is left alone."""
        return Rule(threshold=self.threshold, select=self.select, on_undefined="keep", inclusive=True)
