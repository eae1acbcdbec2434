"""Who writes the weights of a plan: the seam between a job and the machines that work at it."""

from __future__ import annotations

from typing import Protocol

from .. import _engine
from ..plan.plan import Plan
from ..progress import ProgressCallback
from ..settings import RunSettings
from .written import Written

__all__ = ["Executor"]


class Executor(Protocol):
    """Takes a plan and a job's directory, sees to it that all shards are committed there, and says what happened.

    Others prepare shards, each attempt in a file of its own; only the process that holds the directory commits.
    Committed bytes do not depend on the executor.
    """

    def execute(
        self,
        plan: Plan,
        checked: _engine.Plan,
        directory: _engine.JobDirectory,
        run: RunSettings,
        tell: ProgressCallback,
    ) -> Written:
        """Writes the weights of a plan into a job's directory; files that its journal has are left alone.

        Args:
            plan: The plan.
            checked: The same as the engine has checked it.
            directory: Where to.
            run: How to work.
            tell: Called with ProgressEvents of the stage "merge", on this thread.

        Raises:
            SafemergeError: One of its subclasses; what is committed stays in the job's directory.
        """
