"""Executes plans in a thread of its own, one after another, so that the next shard is analysed meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from .. import _engine

__all__ = ["ShardWriter"]

# How long a wait for the worker goes on before progress is reported and Ctrl-C can be noticed, in seconds.
_POLL_SECONDS = 0.1


class ShardWriter:
    """Writes shards into one output in the order in which their plans are submitted.

    Attributes:
        facts: What the engine reported of each shard that is done.
        bytes_read: Bytes that the shards submitted so far read, less those that were committed before.
        seconds: How long the worker has been busy.
    """

    def __init__(
        self,
        output: _engine.Output,
        *,
        threads: int | None = None,
        memory_budget: int | None = None,
        read_backend: str = "auto",
        allow_nonfinite: bool = False,
        on_bytes: Callable[[int, str], None],
    ) -> None:
        """Starts without work.

        Args:
            output: Where shards go.
            threads: As `_engine.Plan.execute` takes it.
            memory_budget: As `_engine.Plan.execute` takes it, in bytes.
            read_backend: As `_engine.Plan` takes it.
            allow_nonfinite: As `_engine.Plan.execute` takes it.
            on_bytes: Called by poll and finish, on their thread, with the bytes done and a file name.
        """
        self.facts: list[dict[str, Any]] = []
        self.bytes_read = 0
        self.seconds = 0.0
        self._output = output
        self._threads = threads
        self._memory_budget = memory_budget
        self._read_backend = read_backend
        self._allow_nonfinite = allow_nonfinite
        self._on_bytes = on_bytes
        self._progress = _engine.Progress()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="safemerge-merge")
        self._waiting: list[tuple[str, Future[list[dict[str, Any]]]]] = []

    def submit(self, plan: Mapping[str, Any]) -> None:
        """Validates a plan at once and queues its execution.

        Raises:
            PlanError: The engine finds fault with it.
            CheckpointError: An input cannot be opened.
        """
        self.submit_checked(_engine.Plan(json.dumps(plan), read_backend=self._read_backend))

    def submit_checked(self, checked: _engine.Plan) -> None:
        """Queues the execution of a plan of one shard."""
        self._waiting.append((checked.shards[0], self._executor.submit(self._execute, checked)))

    def poll(self) -> None:
        """Reports progress without waiting, and raises what the worker raised, if it did."""
        while self._waiting and self._waiting[0][1].done():
            self.facts.extend(self._waiting.pop(0)[1].result())
        if self._waiting:
            self._on_bytes(self._progress.bytes_done, self._waiting[0][0])

    def finish(self) -> None:
        """Waits for all that was submitted; raises what the worker raised, if it did."""
        last = ""
        while self._waiting:
            last, future = self._waiting[0]
            wait([future], timeout=_POLL_SECONDS)
            self.poll()
        self._executor.shutdown()
        self._on_bytes(self._progress.bytes_done, last)

    def abandon(self) -> None:
        """Stops the worker within a tile and waits until it has; committed shards stay."""
        self._progress.cancel()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _execute(self, plan: _engine.Plan) -> list[dict[str, Any]]:
        started = time.perf_counter()
        facts = plan.execute(
            self._output,
            threads=self._threads,
            memory_budget=self._memory_budget,
            allow_nonfinite=self._allow_nonfinite,
            progress=self._progress,
        )
        self.seconds += time.perf_counter() - started
        if not all(fact.resumed for fact in facts):
            self.bytes_read += plan.bytes_read
        return [
            {
                "file": fact.file,
                "bytes_written": fact.bytes_written,
                "seconds": fact.seconds,
                "write": fact.write,
                "resumed": fact.resumed,
                "nonfinite_inputs": [f"{place.tensor} of {place.path}" for place in fact.nonfinite_inputs],
            }
            for fact in facts
        ]
