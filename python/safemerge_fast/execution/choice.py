"""Which executor settings ask for."""

from __future__ import annotations

from ..settings import RunSettings
from .executor import Executor
from .local import LocalExecutor

__all__ = ["executor_of"]


def executor_of(run: RunSettings) -> Executor:
    """The executor of a run.

    Raises:
        SettingError: What it needs is not installed or not there.
    """
    if run.executor == "local":
        return LocalExecutor()
    from .ray_pool import ray_executor

    return ray_executor(run)
