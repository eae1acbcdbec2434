"""What somebody asks of a sweep."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from ..recipes.safemerge.settings import AnalysisSettings, SafemergeSettings
from ..recipes.shape import AllowMissing, EncodeAs, FillFrom, Untie
from ..settings import (
    MOST_THREADS,
    Dtype,
    Field,
    Kind,
    MaxShardSize,
    Setting,
    fields_of,
)
from .command import read_judge
from .metrics import read_metrics

__all__ = ["CONTROLS", "SweepSettings", "axes"]

CONTROLS = ("aligned", "finetuned", "safe", "no-safe", "shrink", "random")
"""Controls, in the order in which they are judged."""


def _check_controls(names: tuple[str, ...]) -> None:
    from ..errors import SettingError

    for name in names:
        if name not in CONTROLS:
            raise SettingError(f"controls should be among {', '.join(CONTROLS)}, not {name!r}")


class SweepSettings(AnalysisSettings, frozen=True, kw_only=True):
    """A sweep, as asked for: what all candidates share, what differs, and who judges them.

    Raises:
        SettingError: A value is not one that its setting may have.
    """

    recipe: ClassVar[str] = "sweep"

    safe: Annotated[
        str | None,
        Setting("The safe model to merge with, or a LoRA adapter.", kind=Kind.MODEL, metavar="MODEL"),
    ] = None
    output: Annotated[
        str,
        Setting(
            "Directory of the sweep: scores, candidates, logs and results; new or empty.",
            kind=Kind.PATH,
            metavar="DIR",
            names=("-o",),
            decides=False,
            in_files=False,
        ),
    ]
    eval: Annotated[
        str,
        Setting(
            "Command that judges a model, run without a shell: {model} is its directory, {out} the JSON file to write; "
            "{aligned} and {name} may be named too.",
            metavar="'CMD {model} {out}'",
        ),
    ]
    metrics: Annotated[
        dict[str, str],
        Setting(
            "Numbers of that JSON by name, each as PATH:max or PATH:min; the first decides what is best.",
            kind=Kind.DOCUMENT,
            on_command_line=False,
        ),
    ]
    grid: Annotated[
        dict[str, Any] | None,
        Setting(
            "Settings of SafeMERGE with a value or a list of values; each combination is a candidate.",
            kind=Kind.DOCUMENT,
            decides=False,
            default="none",
            on_command_line=False,
        ),
    ] = None
    recipes: Annotated[
        tuple[dict[str, Any], ...],
        Setting(
            "Other recipes, each with its settings, which may be lists of values too.",
            kind=Kind.DOCUMENT,
            decides=False,
            default="none",
            on_command_line=False,
        ),
    ] = ()
    controls: Annotated[
        tuple[str, ...],
        Setting(
            f"Which controls are judged beside the candidates: {', '.join(CONTROLS)}.",
            kind=Kind.DOCUMENT,
            decides=False,
            check=_check_controls,
            default="all",
            on_command_line=False,
        ),
    ] = CONTROLS
    randoms: Annotated[
        int,
        Setting(
            "How many random choices of modules stand beside each candidate of SafeMERGE.",
            least=1,
            most=1000,
            decides=False,
        ),
    ] = 1
    random_seed: Annotated[int, Setting("Seed of the random choices.", least=0)] = 0
    timeout: Annotated[
        float | None,
        Setting(
            "Seconds after which a judge is stopped and its candidate has failed.",
            least=0.0,
            metavar="SECONDS",
            default="none",
            decides=False,
        ),
    ] = None
    keep: Annotated[
        Literal["none", "best", "all"],
        Setting(
            "Which candidates stay on disk once they are judged; keep makes any of them again.", decides=False
        ),
    ] = "none"
    scores: Annotated[
        str | None,
        Setting(
            "Reuse what analyze wrote instead of measuring.",
            kind=Kind.PATH,
            metavar="FILE",
            decides=False,
        ),
    ] = None
    output_format: Annotated[
        Literal["auto", "adapter", "checkpoint"],
        Setting(
            "What SafeMERGE writes; auto is an adapter if finetuned (and safe, if given) are adapters. With checkpoint "
            "adapters are folded to be judged as controls."
        ),
    ] = "auto"
    dtype: Dtype = "auto"
    max_shard_size: MaxShardSize = None
    encode: EncodeAs = "keep"
    allow_missing: AllowMissing = False
    fill_from: FillFrom = None
    untie: Untie = False
    threads: Annotated[
        int | None,
        Setting(
            "Worker threads of a merge.",
            least=1,
            most=MOST_THREADS,
            default="processors + 2, at most 16",
            decides=False,
        ),
    ] = None
    memory_budget: Annotated[
        int | str | None,
        Setting(
            "Most bytes for a merge's buffers and input windows, like 1GB.",
            kind=Kind.SIZE,
            metavar="SIZE",
            decides=False,
        ),
    ] = None
    resume: Annotated[
        bool,
        Setting(
            "Go on with an unfinished sweep; what failed is tried again, and new candidates are added.",
            decides=False,
            in_files=False,
        ),
    ] = False

    def __post_init__(self) -> None:
        AnalysisSettings.__post_init__(self)
        read_metrics(self.metrics)
        read_judge(self.eval, self.timeout)


def axes() -> tuple[Field, ...]:
    """The settings of SafeMERGE that a grid may have: those that decide an output and are not shared by all."""
    shared = {field.name for field in fields_of(SweepSettings)}
    return tuple(
        field
        for field in fields_of(SafemergeSettings)
        if field.setting.decides and field.setting.in_files and field.name not in shared
    )
