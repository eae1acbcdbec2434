"""Merges fine-tuned language models with safe ones, to bring back safety: SafeMERGE, streamed from disk to disk.

The public API is what __all__ lists; each name is loaded when it is first used, so that importing the
package is quick and needs no torch.
"""

from __future__ import annotations

# Type checkers know the name. Importing typing would take longer than all else here, and Ctrl-C before the program's
# first line would end in a traceback.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from ._engine import __version__ as __version__
    from .analysis.score import Score
    from .analysis.scores import Scores
    from .api import (
        FoldConfiguration,
        FoldReport,
        MergeConfiguration,
        MergekitReport,
        MergeReport,
        analyze,
        check,
        fold,
        keep,
        lox,
        merge,
        preview,
        resta,
        run,
        safe_lora,
        safety_vector,
        shrink,
        sweep,
        verify,
        wise_ft,
    )
    from .errors import (
        AdapterError,
        AnalysisError,
        CheckpointError,
        OutputError,
        PairingError,
        PlanError,
        RoleError,
        SafemergeError,
        SettingError,
        VerificationError,
    )
    from .progress import ProgressEvent
    from .recipes.check import CheckReport
    from .recipes.preview import Preview
    from .recipes.verify import VerifyReport
    from .report.report import Report
    from .sweeps.report import SweepReport

__all__ = [
    "AdapterError",
    "AnalysisError",
    "CheckReport",
    "CheckpointError",
    "FoldConfiguration",
    "FoldReport",
    "MergeConfiguration",
    "MergeReport",
    "MergekitReport",
    "OutputError",
    "PairingError",
    "PlanError",
    "Preview",
    "ProgressEvent",
    "Report",
    "RoleError",
    "SafemergeError",
    "Score",
    "Scores",
    "SettingError",
    "SweepReport",
    "VerificationError",
    "VerifyReport",
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

# Homes of what lies neither in errors nor in api.
_HOMES = {
    "__version__": "_engine",
    "CheckReport": "recipes.check",
    "Preview": "recipes.preview",
    "ProgressEvent": "progress",
    "Report": "report.report",
    "Score": "analysis.score",
    "Scores": "analysis.scores",
    "SweepReport": "sweeps.report",
    "VerifyReport": "recipes.verify",
}


def __getattr__(name: str) -> object:
    """Loads a public name from the module that defines it."""
    if name not in _HOMES and name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = _HOMES.get(name, "errors" if name.endswith("Error") else "api")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
