"""Repairs the safety of fine-tuned language models by merging weights: SafeMERGE, streamed from disk to disk.

The public API is what __all__ lists; each name is loaded when it is first used, so that importing the
package is quick and needs no torch.
"""

from __future__ import annotations

# Type checkers know the name. Importing typing would take longer than all else here, and Ctrl-C before the program's
# first line would end in a traceback.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from ._engine import __version__ as __version__
    from .analysis.scores import Score, Scores
    from .errors import (
        AdapterError,
        AnalysisError,
        CheckpointError,
        OutputError,
        PairingError,
        PlanError,
        SafemergeError,
        VerificationError,
    )
    from .progress import ProgressEvent
    from .recipes.fold import FoldConfiguration, FoldReport, fold
    from .recipes.mergekit.execution import MergekitReport
    from .recipes.run import run
    from .recipes.safemerge.configuration import MergeConfiguration
    from .recipes.safemerge.dry_run import Preview, preview
    from .recipes.safemerge.merge import merge
    from .recipes.safemerge.scoring import analyze
    from .recipes.verification import VerifyReport, verify
    from .report.merge_report import MergeReport

__all__ = [
    "AdapterError",
    "AnalysisError",
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
    "SafemergeError",
    "Score",
    "Scores",
    "VerificationError",
    "VerifyReport",
    "analyze",
    "fold",
    "merge",
    "preview",
    "run",
    "verify",
]

_HOMES = {
    "__version__": "_engine",
    "Score": "analysis.scores",
    "Scores": "analysis.scores",
    "MergeConfiguration": "recipes.safemerge.configuration",
    "FoldConfiguration": "recipes.fold",
    "FoldReport": "recipes.fold",
    "fold": "recipes.fold",
    "MergekitReport": "recipes.mergekit.execution",
    "run": "recipes.run",
    "Preview": "recipes.safemerge.dry_run",
    "preview": "recipes.safemerge.dry_run",
    "merge": "recipes.safemerge.merge",
    "ProgressEvent": "progress",
    "MergeReport": "report.merge_report",
    "analyze": "recipes.safemerge.scoring",
    "VerifyReport": "recipes.verification",
    "verify": "recipes.verification",
}


def __getattr__(name: str) -> object:
    """Loads a public name from the module that defines it."""
    from importlib import import_module

    home = _HOMES.get(name, "errors" if name in __all__ else None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
