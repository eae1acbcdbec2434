"""The Python API: functions whose arguments are the settings of recipes, with the same names as on the command line."""

from __future__ import annotations

import inspect
from typing import Any

from .recipes.base import entry
from .recipes.check import CheckSettings, check_adapter
from .recipes.fold import FoldSettings
from .recipes.lox import LoxSettings
from .recipes.preview import Preview
from .recipes.preview import preview as preview_settings
from .recipes.resta import RestaSettings
from .recipes.run import carry_out, run
from .recipes.safe_lora.settings import SafeLoraSettings
from .recipes.safemerge.scoring import analyze_settings
from .recipes.safemerge.settings import AnalysisSettings, SafemergeSettings
from .recipes.safety_vector import SafetyVectorSettings
from .recipes.shrink import ShrinkSettings
from .recipes.verify import VerifySettings, verify_output
from .recipes.wise_ft import WiseFtSettings
from .report.report import Report
from .settings import RunSettings
from .sweeps.keep import KeepSettings, keep_candidate
from .sweeps.run import run_sweep
from .sweeps.settings import SweepSettings

__all__ = [
    "FoldConfiguration",
    "FoldReport",
    "MergeConfiguration",
    "MergeReport",
    "MergekitReport",
    "analyze",
    "check",
    "fold",
    "keep",
    "lox",
    "merge",
    "preview",
    "resta",
    "run",
    "safe_lora",
    "safety_vector",
    "shrink",
    "sweep",
    "verify",
    "wise_ft",
]

_RETURNS = (
    "\n\nReturns the report, which also lies in the output as safemerge_report.json. Raises a SafemergeError; what "
    "stood under the output's name stands there still."
)

merge = entry(
    SafemergeSettings,
    carry_out,
    "merge",
    "Merges the modules of a fine-tuned model that left the safety subspace with those of a safe model."
    + _RETURNS,
)

fold = entry(
    FoldSettings,
    carry_out,
    "fold",
    "Folds a LoRA adapter into the checkpoint it was trained on, exactly; all of its keys are applied."
    + _RETURNS,
)

resta = entry(
    RestaSettings,
    carry_out,
    "resta",
    "Adds the safety vector, aligned - base, to a fine-tuned model." + _RETURNS,
)

wise_ft = entry(
    WiseFtSettings, carry_out, "wise_ft", "Averages a fine-tuned model with the aligned one." + _RETURNS
)

shrink = entry(
    ShrinkSettings,
    carry_out,
    "shrink",
    "Makes the update of a fine-tuned model's matrices smaller: the control that needs no safe model."
    + _RETURNS,
)

lox = entry(
    LoxSettings,
    carry_out,
    "lox",
    "Extrapolates the largest directions of what alignment changed (LoX); needs torch." + _RETURNS,
)

safety_vector = entry(
    SafetyVectorSettings,
    carry_out,
    "safety_vector",
    "Takes the largest directions of the fine-tuning update back towards the aligned model; needs torch."
    + _RETURNS,
)

safe_lora = entry(
    SafeLoraSettings,
    carry_out,
    "safe_lora",
    "Projects updates that left the safety subspace onto it (Safe LoRA); needs torch." + _RETURNS,
)


def preview(*args: Any, **kwargs: Any) -> Preview:
    """Says what merge would do with the same arguments, from headers and given scores alone; writes nothing.

    Args:
        *args: As of merge; or the settings of any recipe, as one record.
        **kwargs: As of merge.

    Returns:
        What would be done.

    Raises:
        SafemergeError: As merge would raise it for its inputs.
    """
    if len(args) == 1 and not kwargs and isinstance(args[0], RunSettings):
        return preview_settings(args[0])
    return preview_settings(SafemergeSettings(*args, **kwargs))


preview.__signature__ = inspect.signature(SafemergeSettings)  # type: ignore[attr-defined]

analyze = entry(
    AnalysisSettings,
    analyze_settings,
    "analyze",
    "Measures how far each module's update lies in the safety subspace; writes nothing.\n\nReturns Scores, whose "
    "to_json is what merge takes as scores.",
)

sweep = entry(
    SweepSettings,
    run_sweep,
    "sweep",
    "Makes candidates over rules, α and recipes, one at a time, and has each judged by a command, with controls beside "
    "them.\n\nReturns a SweepReport: results, the Pareto set, the best candidate. Raises a SafemergeError; what is "
    "judged already stays for resume.",
)

keep = entry(
    KeepSettings,
    keep_candidate,
    "keep",
    "Makes a candidate of a sweep again, with the weights that were judged, to be kept." + _RETURNS,
)

check = entry(
    CheckSettings,
    check_adapter,
    "check",
    "Says which tensors of a model an adapter changes, how and by how much; reads no weights of the model.\n\n"
    "Returns a CheckReport, in which every key of the adapter is; its require_all_used raises AdapterError if some go "
    "nowhere, as a merge does.",
)

verify = entry(
    VerifySettings,
    verify_output,
    "verify",
    "Compares an output with its report, its plan and the models it was made from.\n\nReturns a VerifyReport; raises "
    "VerificationError if anything differs.",
)

# One record and one report serve all recipes; these are the names that earlier versions had for them.
MergeConfiguration = SafemergeSettings
FoldConfiguration = FoldSettings
MergeReport = FoldReport = MergekitReport = Report
