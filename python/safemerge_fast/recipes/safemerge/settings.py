"""What somebody asks of SafeMERGE, and of the analysis alone."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from ...analysis.precision import Precision
from ...analysis.scores import Scores
from ...decision import Rule
from ...errors import SettingError
from ...patterns import compile_pattern
from ...plan.methods import known_methods, summing_method, weighing_methods
from ...settings import (
    AllowNonfinite,
    Dtype,
    ExpertLoraLayout,
    Force,
    Kind,
    MaxShardSize,
    Progress,
    ReadBackend,
    RunSettings,
    Setting,
    Settings,
)
from ..roles import Aligned, Base, Finetuned
from ..shape import AllowMissing, EncodeAs, FillFrom, OutputShape, Untie
from .alphas import check_alpha
from .rule import Granularity, Modules, OnUndefined, PerType, Select, Threshold, checked_rule

__all__ = ["AnalysisSettings", "SafemergeSettings", "precision_of"]


def _check_pattern(text: str) -> None:
    compile_pattern("it", text, SettingError)


DeltaReference = Annotated[
    Literal["aligned", "base"],
    Setting("The model that the update Δ is taken against; against base it contains V, and ρ rises."),
]
Include = Annotated[
    str | None,
    Setting(
        "Analyse these tensors too, if they are 2-D and float.",
        kind=Kind.PATTERN,
        metavar="REGEX",
        check=_check_pattern,
    ),
]
Exclude = Annotated[
    str | None,
    Setting(
        "Leave these tensors out of the analysis.", kind=Kind.PATTERN, metavar="REGEX", check=_check_pattern
    ),
]
Device = Annotated[
    str, Setting("Where the analysis computes.", metavar="auto|cpu|cuda[:N]|mps", decides=False)
]
Estimator = Annotated[
    Literal["auto", "sketch", "exact"],
    Setting(
        "How ρ is measured: from random columns with an interval, and exactly where that does not settle the decision "
        "(auto); from random columns alone; or exactly. Adapters are always measured exactly."
    ),
]
Failure = Annotated[
    float,
    Setting(
        "Probability that any interval of the run misses its ρ; the smaller, the wider they are.",
        least=1e-12,
        most=0.5,
    ),
]
Seed = Annotated[
    int | None,
    Setting(
        "Seed of the random columns that ρ is measured from, and of methods that draw random numbers.",
        least=0,
        default="0",
    ),
]
Resolution = Annotated[
    float | None,
    Setting(
        "Decide by the estimate of ρ where its interval is not wider than this share of it to either side, like 0.01, "
        "instead of measuring on until it is settled.",
        least=1e-6,
        most=0.5,
        default="never",
    ),
]


class AnalysisSettings(Settings, frozen=True):
    """What is measured, and where."""

    recipe: ClassVar[str] = "analyze"

    base: Base
    aligned: Aligned
    finetuned: Finetuned
    include: Include = None
    exclude: Exclude = None
    delta_reference: DeltaReference = "aligned"
    estimator: Estimator = "auto"
    failure: Failure = 1e-3
    seed: Seed = None
    resolution: Resolution = None
    device: Device = "auto"
    read_backend: ReadBackend = "auto"
    expert_lora_layout: ExpertLoraLayout = "peft"
    allow_nonfinite: AllowNonfinite = False
    force: Force = False
    progress: Progress = None


class _Roles(RunSettings, frozen=True):
    """The roles, which may be given by position."""

    base: Base
    aligned: Aligned
    finetuned: Finetuned
    safe: Annotated[
        str | None,
        Setting(
            "The safe model to merge with, or a LoRA adapter.",
            kind=Kind.MODEL,
            metavar="MODEL",
            default="the aligned one",
        ),
    ] = None


class SafemergeSettings(_Roles, frozen=True, kw_only=True):
    """A merge, as asked for.

    Raises:
        SettingError: A value is not one that its setting may have.
    """

    recipe: ClassVar[str] = "safemerge"
    command_name: ClassVar[str | None] = "merge"

    threshold: Threshold = 0.35
    select: Select = "threshold"
    per_type: PerType = False
    granularity: Granularity = "module"
    on_undefined: OnUndefined = "merge"
    modules: Modules = None
    others: Annotated[Literal["keep", "merge"], Setting("What to do with tensors that are not analysed.")] = (
        "keep"
    )
    scores: Annotated[
        str | Scores | None,
        Setting(
            "Reuse what analyze wrote, or what an earlier merge's report says; torch is then not needed.",
            kind=Kind.PATH,
            metavar="FILE",
            decides=False,
        ),
    ] = None
    alpha: Annotated[
        float | str,
        Setting(
            "α: weight of the fine-tuned update; the safe one gets 1-α. Behind a comma, others by module type.",
            kind=Kind.WEIGHTS,
            least=0.0,
            most=1.0,
            metavar="NUMBER[,TYPE=NUMBER...]",
            check=check_alpha,
        ),
    ] = 0.8
    alpha_file: Annotated[
        str | None,
        Setting(
            "Other α in YAML or JSON, by module type or by a regular expression on names; the first that fits counts.",
            kind=Kind.PATH,
            metavar="FILE",
        ),
    ] = None
    method: Annotated[
        str,
        Setting(
            "How tensors are merged; docs/methods.md explains each. All but the weighted sum and interpolations "
            "merge updates of the aligned model.",
            choices=weighing_methods,
        ),
    ] = summing_method().name
    density: Annotated[
        float | None,
        Setting(
            "Share of each update's elements that is kept, for methods that make it sparse.",
            least=0.0,
            most=1.0,
            default="1",
        ),
    ] = None
    seed: Seed = None
    parameters: Annotated[
        str | None,
        Setting(
            "Further parameters of the method, like lambda=0.9,normalize=false.", metavar="NAME=VALUE,..."
        ),
    ] = None
    dtype: Dtype = "auto"
    output_format: Annotated[
        Literal["auto", "adapter", "checkpoint"],
        Setting("What to write; auto is an adapter if finetuned (and safe, if given) are adapters."),
    ] = "auto"
    adapter_rank: Annotated[
        int | None,
        Setting("Truncate a merged adapter to this rank.", least=1, metavar="N", default="exact"),
    ] = None
    compat: Annotated[
        Literal["peft-linear"] | None,
        Setting(
            "Combine adapters as PEFT's linear combination does, which has cross terms.", default="exact"
        ),
    ] = None
    max_shard_size: MaxShardSize = None
    encode: EncodeAs = "keep"
    allow_missing: AllowMissing = False
    fill_from: FillFrom = None
    untie: Untie = False
    delta_reference: DeltaReference = "aligned"
    include: Include = None
    exclude: Exclude = None
    estimator: Estimator = "auto"
    failure: Failure = 1e-3
    resolution: Resolution = None
    device: Device = "auto"
    force: Force = False

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        OutputShape.of(self)
        self.rule()
        self._check_alternatives()
        if self.output_format == "adapter" and not known_methods()[self.method].sums:
            raise SettingError(
                f"an adapter holds sums of products, which {self.method} does not make; leave the method at its "
                f"default or pass --output-format checkpoint"
            )
        if self.adapter_rank is not None and self.compat is not None:
            raise SettingError(
                "adapter_rank truncates, and compat reproduces what PEFT makes; give one of them"
            )

    def _check_alternatives(self) -> None:
        """Refuses what is said twice."""
        if self.modules is not None:
            for name, usual in (
                ("threshold", 0.35),
                ("select", "threshold"),
                ("per_type", False),
                ("granularity", "module"),
            ):
                if getattr(self, name) != usual:
                    raise SettingError(
                        f"modules lists what is merged, and {name} is a rule; give one of them"
                    )
        if self.alpha_file is not None and isinstance(self.alpha, str) and "," in self.alpha:
            raise SettingError("alpha holds others by module type, and so does alpha_file; give one of them")

    def rule(self) -> Rule:
        """The rule of the decision, but for a list of modules."""
        return checked_rule(
            threshold=self.threshold,
            select=self.select,
            per_type=self.per_type,
            granularity=self.granularity,
            on_undefined=self.on_undefined,
            others=self.others,
        )

    def roles(self) -> dict[str, str]:
        """What was given for each role, in the order of checkpoint.ROLES; "safe" may be missing."""
        given = {role: getattr(self, role) for role in ("base", "aligned", "finetuned", "safe")}
        return {role: spec for role, spec in given.items() if spec is not None}


def precision_of(settings: AnalysisSettings | SafemergeSettings) -> Precision:
    """How ρ is to be measured."""
    return Precision(settings.estimator, settings.failure, settings.seed or 0, settings.resolution)
