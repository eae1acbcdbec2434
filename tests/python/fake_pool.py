"""Workers that die, hang, wake up, and say things twice or late, as a script has it; on one thread, to repeat runs."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safemerge_fast import _engine
from safemerge_fast.errors import OutputError, PlanError, SafemergeError
from safemerge_fast.execution.handing_out import Done, Failed, HandingOut, Moved, News, Order
from safemerge_fast.plan.plan import Plan
from safemerge_fast.settings import RunSettings

__all__ = ["BAD", "FakePool", "Script", "hands_out"]

BAD = ("die", "freeze", "sleep", "twice", "late", "vanish")
"""die: leaves half a file. freeze: makes the shard once somebody else has. sleep: says nothing, ever. twice: reports
two times. late: reports once nobody waits for it. vanish: reports a shard whose file is gone."""

Script = Mapping[tuple[str, int], str]
"""What happens to the nth attempt at a file, from 0 on; other attempts succeed."""


class FakePool:
    """See above. It looks at the job's directory as it goes, and asserts what must hold at any moment."""

    def __init__(self, plan: Plan, directory: _engine.JobDirectory, script: Script, slots: int) -> None:
        # As in another process: from the document alone.
        self.plan = _engine.Plan(plan.to_json())
        self.directory, self.script, self.slots = directory, script, slots
        self.queue: deque[Order] = deque()
        self.asleep: dict[str, Order] = {}
        self.unsaid: dict[str, News] = {}
        self.tries: Counter[str] = Counter()
        self.started: list[Order] = []
        self.stopped: set[str] = set()
        self.closed = False
        self.ticks = 0.0
        self.before_wait: Callable[[], None] = lambda: None

    def clock(self) -> float:
        return self.ticks

    def start(self, order: Order) -> None:
        journal = (Path(order.job) / "journal").read_text()
        assert f'{{"attempt":"{order.attempt}","at":"{order.file}"}}' in journal, "recorded beforehand"
        assert order.attempt not in {other.attempt for other in self.started}
        self.started.append(order)
        self.queue.append(order)

    def wait(self, seconds: float) -> Sequence[News]:
        self.before_wait()
        made = set(os.listdir(self.directory.files))
        assert made <= set(self.directory.committed), "whoever runs the job alone gives names"
        if not self.queue:
            self.ticks += 1
            return []
        order = self.queue.popleft()
        if order.attempt in self.stopped:
            return []
        action = self.script.get((order.file, self.tries[order.file]), "work")
        self.tries[order.file] += 1
        return self._act(order, action)

    def _act(self, order: Order, action: str) -> Sequence[News]:
        partial = Path(order.job) / "attempts" / f".{order.file}.{order.attempt}.partial"
        if action == "die":
            partial.write_bytes(b"half")
            return [Moved(order.attempt, 4), self._failed(order, OutputError("the worker died"), again=True)]
        if action == "refuse":
            return [self._failed(order, PlanError("an input has changed"), again=False)]
        if action in ("freeze", "sleep"):
            self.asleep[order.attempt] = order
            return [Moved(order.attempt, 1)] if action == "freeze" else []
        done = self._work(order)
        if action == "late":
            self.unsaid[order.attempt] = done
            return []
        if action == "vanish":
            partial.unlink()
        return [done, done] if action == "twice" else [done]

    def _work(self, order: Order) -> News:
        try:
            return Done(_engine.prepare_shard(self.plan, order.job, order.file, order.attempt, threads=1))
        except SafemergeError as error:
            return self._failed(order, error, again=True)

    def _failed(self, order: Order, error: SafemergeError, *, again: bool) -> Failed:
        return Failed(order.attempt, error, "node-7", again)

    def stop(self, attempt: str) -> None:
        self.stopped.add(attempt)

    def close(self) -> None:
        self.closed = True

    def wake(self) -> list[News]:
        """Those who were frozen do what they were told, and what was not said is said."""
        news = [self._work(order) for order in self.asleep.values() if order.attempt in self.stopped]
        said = [self.unsaid[attempt] for attempt in self.unsaid if attempt in self.stopped]
        self.asleep = {key: order for key, order in self.asleep.items() if key not in self.stopped}
        self.unsaid = {key: one for key, one in self.unsaid.items() if key not in self.stopped}
        return news + said


class _Waking(FakePool):
    """Zombies speak up in between."""

    def wait(self, seconds: float) -> Sequence[News]:
        return [*super().wait(seconds), *self.wake()]


def hands_out(
    script: Script,
    *,
    slots: int = 2,
    stall_after: float = 3,
    pools: list[FakePool] | None = None,
    prepare: Callable[[FakePool], None] = lambda pool: None,
) -> HandingOut:
    """An executor with such workers; the pool it makes is added to the list."""
    made = [] if pools is None else pools

    def make(plan: Plan, directory: _engine.JobDirectory, run: RunSettings) -> FakePool:
        made.append(_Waking(plan, directory, script, slots))
        prepare(made[-1])
        return made[-1]

    return HandingOut(make, stall_after=stall_after, clock=lambda: made[-1].clock() if made else 0.0)
