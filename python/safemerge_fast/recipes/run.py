"""Carries out what a YAML file says: a recipe, or a configuration in mergekit's format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .document import read_recipe
from .fold import FoldConfiguration, FoldReport, run_fold
from .mergekit.execution import MergekitConfiguration, MergekitReport, run_mergekit
from .safemerge.configuration import MergeConfiguration
from .safemerge.merge import run_merge

if TYPE_CHECKING:
    from ..progress import ProgressCallback
    from ..report.merge_report import MergeReport

__all__ = ["carry_out", "run"]


def run(
    config: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    threads: int | None = None,
    memory_budget: int | str | None = None,
    read_backend: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> MergeReport | FoldReport | MergekitReport:
    """Makes what a YAML file says: `recipe: safemerge` or `recipe: fold`, or a merge as mergekit's files say it.

    Args:
        config: The file. Paths in it are relative to the working directory.
        output: Output directory; must be new or empty unless resume or overwrite is given.
        threads: Worker threads; None is the file's number, or two more than there are processors, at most 16.
        memory_budget: Most bytes for the engine's buffers, as a number or like "1GB"; None is the file's.
        read_backend: "mmap", "pread" (positioned reads), or "auto": pread on network file systems; None is the
            file's.
        resume: Continue an unfinished run in the output.
        overwrite: Replace what the output holds.
        progress: Called with ProgressEvents; an exception it raises stops the work.

    Returns:
        The report, which also lies in the output as safemerge_report.json.

    Raises:
        SafemergeError: One of its subclasses; the output then holds nothing that looks complete.
    """
    configuration = read_recipe(
        Path(config),
        output=os.fspath(output),
        threads=threads,
        memory_budget=memory_budget,
        read_backend=read_backend,
        resume=resume,
        overwrite=overwrite,
    )
    return carry_out(configuration, progress)


def carry_out(
    configuration: MergeConfiguration | FoldConfiguration | MergekitConfiguration,
    progress: ProgressCallback | None,
) -> MergeReport | FoldReport | MergekitReport:
    """Does what run says, for a configuration that is already a record."""
    if isinstance(configuration, MergeConfiguration):
        return run_merge(configuration, progress)
    if isinstance(configuration, FoldConfiguration):
        return run_fold(configuration, progress)
    return run_mergekit(configuration, progress)
