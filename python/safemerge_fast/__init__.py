"""Repairs the safety of fine-tuned language models by merging weights: SafeMERGE, streamed from disk to disk.

The public API is what __all__ lists; each name is loaded when it is first used, so that importing the
package is quick and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

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
    from .pipeline.configuration import MergeConfiguration
    from .pipeline.dry_run import Preview, preview
    from .pipeline.merge import merge
    from .pipeline.progress import ProgressEvent
    from .pipeline.scoring import analyze
    from .pipeline.verification import VerifyReport, verify
    from .recipes.fold import FoldConfiguration, FoldReport, fold
    from .recipes.mergekit.execution import MergekitReport
    from .recipes.run import run
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
    "MergeConfiguration": "pipeline.configuration",
    "FoldConfiguration": "recipes.fold",
    "FoldReport": "recipes.fold",
    "fold": "recipes.fold",
    "MergekitReport": "recipes.mergekit.execution",
    "run": "recipes.run",
    "Preview": "pipeline.dry_run",
    "preview": "pipeline.dry_run",
    "merge": "pipeline.merge",
    "ProgressEvent": "pipeline.progress",
    "MergeReport": "report.merge_report",
    "analyze": "pipeline.scoring",
    "VerifyReport": "pipeline.verification",
    "verify": "pipeline.verification",
}


def __getattr__(name: str) -> object:
    """Loads a public name from the module that defines it."""
    home = _HOMES.get(name, "errors" if name in __all__ else None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
