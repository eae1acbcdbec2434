"""Hands the shards of a plan out to a pool of workers, who may die, hang, wake up again and say things twice.

An attempt is in the journal before a worker hears of it, and is made in a file of its own. The first that is prepared
is committed, by this process alone, and every other one is removed, whether or not somebody still writes into it. A
worker that says nothing for a while is not waited for: its shard is handed out again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from .. import _engine
from ..errors import OutputError, SafemergeError
from ..plan.plan import Plan
from ..progress import ProgressCallback, ProgressEvent
from ..settings import RunSettings
from .prepared import all_committed
from .written import Written

__all__ = ["MOST_ATTEMPTS", "Done", "Failed", "HandingOut", "Moved", "News", "Order", "Pool", "Queued"]

MOST_ATTEMPTS = 4
"""Attempts at one shard, after which the job gives up."""

_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Order:
    """One attempt at one shard.

    Attributes:
        job: The job's directory.
        file: The shard.
        attempt: The attempt's name.
    """

    job: str
    file: str
    attempt: str


@dataclass(frozen=True, slots=True)
class Moved:
    """An attempt is alive.

    Attributes:
        attempt: Which.
        bytes: How many it has written.
    """

    attempt: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Queued:
    """An attempt has not begun, since all workers are busy with something else; that is no stall.

    Attributes:
        attempt: Which.
    """

    attempt: str


@dataclass(frozen=True, slots=True)
class Done:
    """An attempt is prepared.

    Attributes:
        prepared: What it made.
    """

    prepared: _engine.Prepared


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt came to nothing.

    Attributes:
        attempt: Which.
        error: Why.
        where: The machine, or what else helps to find it.
        again: Whether another attempt may do better; what is wrong with inputs, plan or settings does not change.
    """

    attempt: str
    error: SafemergeError
    where: str
    again: bool


News: TypeAlias = Queued | Moved | Done | Failed


class Pool(Protocol):
    """Workers."""

    @property
    def slots(self) -> int:
        """How many attempts are best under way at once."""

    def start(self, order: Order) -> None:
        """Has an attempt made; returns at once."""

    def wait(self, seconds: float) -> Sequence[News]:
        """What happened since the last call; waits for that long at most."""

    def stop(self, attempt: str) -> None:
        """Asks whoever is at an attempt to leave it; it need not be heard."""

    def close(self) -> None:
        """Asks all to stop, and lets go of them."""


@dataclass(slots=True)
class _Shard:
    """A shard that is not committed.

    Attributes:
        tries: How many attempts were begun.
        running: When each attempt that may still succeed was last heard of.
        stalled: Those of them that were not heard of for too long.
        moved: Bytes that each has written.
    """

    tries: int = 0
    running: dict[str, float] = field(default_factory=dict)
    stalled: set[str] = field(default_factory=set)
    moved: dict[str, int] = field(default_factory=dict)


class HandingOut:
    """An executor that hands shards out."""

    def __init__(
        self,
        make_pool: Callable[[Plan, _engine.JobDirectory, RunSettings], Pool],
        *,
        stall_after: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Remembers how.

        Args:
            make_pool: Finds the workers of a job, once it is known that there is something to do.
            stall_after: Seconds without a word of an attempt after which its shard is handed out again.
            clock: Counts seconds.
        """
        self._make_pool = make_pool
        self._stall_after = stall_after
        self._clock = clock

    def execute(
        self,
        plan: Plan,
        checked: _engine.Plan,
        directory: _engine.JobDirectory,
        run: RunSettings,
        tell: ProgressCallback,
    ) -> Written:
        """As Executor has it."""
        started = time.perf_counter()
        facts = all_committed(checked, directory)
        if any(file not in facts for file in plan.files):
            # What an earlier run handed out comes to nothing from here on.
            directory.take_over()
            pool = self._make_pool(plan, directory, run)
            _Course(plan, checked, directory, pool, facts, self._stall_after, self._clock).run(tell)
        return Written.of([facts[file] for file in plan.files], checked, time.perf_counter() - started)


class _Course:
    """One time that shards are handed out."""

    def __init__(
        self,
        plan: Plan,
        checked: _engine.Plan,
        directory: _engine.JobDirectory,
        pool: Pool,
        facts: dict[str, _engine.ShardFacts],
        stall_after: float,
        clock: Callable[[], float],
    ) -> None:
        self._checked, self._directory, self._pool, self._facts = checked, directory, pool, facts
        self._stall_after, self._clock = stall_after, clock
        self._total = plan.total_bytes
        self._done = checked.bytes_written
        self._waiting = deque(file for file in plan.files if file not in facts)
        self._open = {file: _Shard() for file in self._waiting}
        self._files: dict[str, str] = {}
        # Bytes of what is left are not known by shard before it is prepared.
        self._prepared_bytes = 0

    def run(self, tell: ProgressCallback) -> None:
        """Hands out until all is committed.

        Raises:
            SafemergeError: A shard cannot be made.
        """
        try:
            while self._open:
                self._hand_out()
                for news in self._pool.wait(_POLL_SECONDS):
                    self._hear(news)
                self._look_for_stalls()
                self._tell(tell)
        finally:
            for shard in self._open.values():
                for attempt in shard.running:
                    self._pool.stop(attempt)
            self._pool.close()
            for file, shard in self._open.items():
                for attempt in list(shard.running):
                    self._directory.abort(file, attempt)

    def _hand_out(self) -> None:
        at_work = sum(len(shard.running) - len(shard.stalled) for shard in self._open.values())
        while self._waiting and at_work < self._pool.slots:
            file = self._waiting.popleft()
            if file in self._open:
                self._begin(file)
                at_work += 1

    def _begin(self, file: str) -> None:
        attempt = self._directory.begin_attempt(file)
        shard = self._open[file]
        shard.tries += 1
        shard.running[attempt] = self._clock()
        self._files[attempt] = file
        self._pool.start(Order(str(self._directory.path), file, attempt))

    def _hear(self, news: News) -> None:
        attempt = news.prepared.attempt if isinstance(news, Done) else news.attempt
        file = self._files.get(attempt)
        if file is None:
            return
        shard = self._open.get(file)
        if isinstance(news, Done):
            self._commit(file, news.prepared)
        elif shard is not None and attempt in shard.running:
            if isinstance(news, Failed):
                self._fail(file, news)
            elif isinstance(news, Queued):
                shard.running[attempt] = self._clock()
            elif news.bytes != shard.moved.get(attempt):
                shard.running[attempt] = self._clock()
                shard.moved[attempt] = news.bytes
                shard.stalled.discard(attempt)

    def _commit(self, file: str, prepared: _engine.Prepared) -> None:
        came = _engine.commit_shard(self._checked, self._directory, prepared)
        if came == "named":
            shard = self._open.pop(file)
            self._facts[file] = prepared.facts
            self._prepared_bytes += prepared.size
            for other in shard.running.keys() - {prepared.attempt}:
                self._pool.stop(other)
                self._directory.abort(file, other)
        elif came == "gone" and prepared.attempt in (self._open[file].running if file in self._open else ()):
            lost = OutputError(f"{file} is not where its worker says that it put it")
            self._fail(file, Failed(prepared.attempt, lost, "this machine", True))

    def _fail(self, file: str, failed: Failed) -> None:
        shard = self._open[file]
        del shard.running[failed.attempt]
        shard.stalled.discard(failed.attempt)
        shard.moved.pop(failed.attempt, None)
        self._directory.abort(file, failed.attempt)
        if not failed.again:
            raise failed.error
        if shard.running or file in self._waiting:
            return
        if shard.tries >= MOST_ATTEMPTS:
            raise OutputError(
                f"{file} could not be written in {shard.tries} attempts, the last on {failed.where}: {failed.error}; "
                f"see to that machine and continue with --resume"
            )
        self._waiting.append(file)

    def _look_for_stalls(self) -> None:
        now = self._clock()
        for file, shard in self._open.items():
            for attempt, heard in shard.running.items():
                if now - heard >= self._stall_after:
                    shard.stalled.add(attempt)
            if shard.running and len(shard.stalled) == len(shard.running) and file not in self._waiting:
                if shard.tries >= MOST_ATTEMPTS:
                    raise OutputError(
                        f"{file} could not be written: {shard.tries} attempts said nothing for "
                        f"{self._stall_after:g} seconds; see to the workers' machines and continue with --resume"
                    )
                self._waiting.append(file)

    def _tell(self, tell: ProgressCallback) -> None:
        under_way = sum(max(shard.moved.values(), default=0) for shard in self._open.values())
        item = next(iter(self._open), "")
        tell(ProgressEvent("merge", min(self._prepared_bytes + under_way, self._total), self._total, item))
