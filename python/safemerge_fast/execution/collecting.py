"""Finishing: what workers have prepared is committed, and nothing is made."""

from __future__ import annotations

import time
from pathlib import Path

from .. import _engine
from ..errors import OutputError
from ..plan.plan import Plan
from ..progress import ProgressCallback, ProgressEvent
from ..settings import RunSettings
from .prepared import all_committed
from .written import Written

__all__ = ["Collecting"]

_NAMED = 3


class Collecting:
    """An executor for jobs whose workers do not report to it."""

    def execute(
        self,
        plan: Plan,
        checked: _engine.Plan,
        directory: _engine.JobDirectory,
        run: RunSettings,
        tell: ProgressCallback,
    ) -> Written:
        """Commits what is prepared.

        Raises:
            OutputError: A shard is missing; all others are committed.
        """
        started = time.perf_counter()
        tell(ProgressEvent("merge", 0, plan.total_bytes, plan.files[0]))
        facts = all_committed(checked, directory)
        if missing := [file for file in plan.files if file not in facts]:
            named = ", ".join(missing[:_NAMED]) + (
                f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            )
            raise OutputError(
                f"the output {directory.output} lacks {len(missing)} of {len(plan.files)} files: {named}; make them "
                f"with safemerge-fast work {Path(directory.output).name}, or here with merge --resume, and finish again"
            )
        tell(ProgressEvent("merge", plan.total_bytes, plan.total_bytes, plan.files[-1]))
        return Written.of([facts[file] for file in plan.files], checked, time.perf_counter() - started)
