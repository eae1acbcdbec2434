"""Executes a plan on this machine: the engine works in a thread of its own, while this one tells and listens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from .. import _engine
from ..checkpoint.model import Model
from ..plan.plan import Plan
from ..progress import ProgressCallback, ProgressEvent
from ..settings import RunSettings

__all__ = ["Written", "WrittenShard", "check_plan", "execute", "watch"]

# How long a wait for the engine goes on before progress is told and Ctrl-C can be noticed, in seconds.
_POLL_SECONDS = 0.05

_Result = TypeVar("_Result")


class WrittenShard(msgspec.Struct, frozen=True):
    """What happened to one file of weights.

    Attributes:
        file: Its name.
        bytes_written: Bytes; 0 if it had been committed before.
        seconds: From its first tile to its commit.
        write: "direct", "buffered", or "cloned" from an input of the same bytes.
        resumed: Whether an earlier run had written it.
        nonfinite_inputs: Input tensors, as (name, file), that hold NaN or infinity and were let through.
    """

    file: str
    bytes_written: int
    seconds: float
    write: str
    resumed: bool = False
    nonfinite_inputs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """Weights that were written.

    Attributes:
        shards: What happened to each file.
        bytes_read: Bytes that were read of all models, less those of files that were there already.
        seconds: How long it took.
        survival: Of tensors that were quantised again, by name: ‖Q(W') - W‖ / ‖W' - W‖, what is stored of a change.
        retained: Of the same: ⟨Q(W') - W, W' - W⟩ / ‖W' - W‖², the part of that which lies along the change.
    """

    shards: tuple[WrittenShard, ...]
    bytes_read: int
    seconds: float
    survival: Mapping[str, float] = field(default_factory=dict)
    retained: Mapping[str, float] = field(default_factory=dict)

    @property
    def bytes_written(self) -> int:
        """Bytes of weights written in this run."""
        return sum(shard.bytes_written for shard in self.shards)

    @property
    def nonfinite(self) -> list[tuple[str, str]]:
        """Input tensors (name, file) that hold NaN or infinity and were let through."""
        return sorted({place for shard in self.shards for place in shard.nonfinite_inputs})


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


def execute(
    plan: Plan,
    checked: _engine.Plan,
    directory: _engine.JobDirectory,
    run: RunSettings,
    tell: ProgressCallback,
) -> Written:
    """Writes the weights of a plan into a job's directory; files that its journal has are left alone.

    Args:
        plan: The plan.
        checked: What check_plan said of it.
        directory: Where to.
        run: How to work.
        tell: Called with ProgressEvents of the stage "merge".

    Raises:
        SafemergeError: One of its subclasses; what is committed stays in the job's directory.
    """
    started = time.perf_counter()
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
    resumed = all(fact.resumed for fact in facts)
    shards = (
        WrittenShard(
            file=fact.file,
            bytes_written=fact.bytes_written,
            seconds=fact.seconds,
            write=fact.write,
            resumed=fact.resumed,
            nonfinite_inputs=tuple((place.tensor, place.path) for place in fact.nonfinite_inputs),
        )
        for fact in facts
    )
    survival = {name: share for fact in facts for name, share in fact.survival.items()}
    retained = {name: share for fact in facts for name, share in fact.retained.items()}
    seconds = time.perf_counter() - started
    return Written(tuple(shards), 0 if resumed else checked.bytes_read, seconds, survival, retained)


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
