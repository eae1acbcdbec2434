"""On this machine: the engine works at the whole plan in a thread of its own, while this one tells and listens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from .. import _engine
from ..checkpoint.model import Model
from ..plan.plan import Plan
from ..progress import ProgressCallback, ProgressEvent
from ..settings import RunSettings
from .prepared import commit_prepared
from .written import Written

__all__ = ["LocalExecutor", "check_plan", "watch"]

# How long a wait for the engine goes on before progress is told and Ctrl-C can be noticed, in seconds.
_POLL_SECONDS = 0.05

_Result = TypeVar("_Result")


def check_plan(document: bytes, models: Mapping[str, Model], read_backend: str = "auto") -> _engine.Plan:
    """Lets the engine validate a plan against headers that are open already.

    Args:
        document: What Plan.to_json wrote.
        models: The models by role.
        read_backend: As for `_engine.Plan`.

    Raises:
        PlanError: The engine finds fault with it, or an input has changed.
    """
    sources = {role: model.headers for role, model in models.items()}
    return _engine.Plan(document, sources=sources, read_backend=read_backend)


class LocalExecutor:
    """The engine's threads, which cross the shards of one plan."""

    def execute(
        self,
        plan: Plan,
        checked: _engine.Plan,
        directory: _engine.JobDirectory,
        run: RunSettings,
        tell: ProgressCallback,
    ) -> Written:
        """Writes what the journal does not have; what workers have prepared is committed first."""
        started = time.perf_counter()
        prepared = commit_prepared(checked, directory)
        counters = _engine.Progress()
        total, files = plan.total_bytes, plan.files

        def say() -> None:
            # The engine counts headers too, which the total leaves out.
            done = min(counters.bytes_done, total)
            tell(ProgressEvent("merge", done, total, files[min(counters.shards_done, len(files) - 1)]))

        facts = watch(
            lambda: checked.execute(
                directory,
                threads=run.threads,
                memory_budget=None if run.memory_budget is None else int(run.memory_budget),
                allow_nonfinite=run.allow_nonfinite,
                progress=counters,
            ),
            counters,
            say,
        )
        facts = [prepared.get(fact.file, fact) for fact in facts]
        return Written.of(facts, checked, time.perf_counter() - started)


def watch(work: Callable[[], _Result], counters: _engine.Progress, say: Callable[[], None]) -> _Result:
    """Runs the engine's work in a thread, so that progress can be told and Ctrl-C be noticed.

    Args:
        work: What to run.
        counters: What stops it.
        say: Called about twenty times a second on this thread; what it raises stops the work.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="safemerge-engine") as executor:
        future: Future[_Result] = executor.submit(work)
        try:
            say()
            while not future.done():
                wait([future], timeout=_POLL_SECONDS)
                say()
        except BaseException:
            counters.cancel()
            raise
        return future.result()
