"""What runs in a Ray task: one attempt at one shard, while another thread says how far it is. Imports no Ray itself."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from .. import _engine
from ..errors import OutputError, PlanError, SafemergeError
from .job_document import PlanDocument, open_plan

__all__ = ["Answer", "Listener", "Task", "prepare"]

_SECONDS = 1.0
"""How often a worker says how far it is."""


class Task(msgspec.Struct, frozen=True):
    """All that a worker is told.

    Attributes:
        job: The job's directory.
        file: The shard.
        attempt: The attempt's name.
        program: Version of the program that hands out.
        plan: What is known of the plan.
        threads: Worker threads.
        memory_budget: As the settings of runs have it.
        allow_nonfinite: Likewise.
    """

    job: str
    file: str
    attempt: str
    program: str
    plan: PlanDocument
    threads: int
    memory_budget: int | None
    allow_nonfinite: bool


class Answer(msgspec.Struct, frozen=True):
    """What comes of it.

    Attributes:
        node: The machine.
        prepared: The prepared shard, as the engine writes it; None if there is none.
        error: Name of the error's class.
        message: What it says.
        again: Whether another attempt may do better.
    """

    node: str
    prepared: bytes | None = None
    error: str = ""
    message: str = ""
    again: bool = False


class Listener:
    """Hears of all attempts, beside the process that hands them out."""

    def __init__(self) -> None:
        self._moved: dict[str, int] = {}

    def hear(self, attempt: str, done: int) -> None:
        """Notes how far an attempt is."""
        self._moved[attempt] = done

    def moved(self) -> dict[str, int]:
        """Bytes of every attempt that was heard of."""
        return self._moved


def prepare(task: Task, hear: Callable[[str, int], Any]) -> Answer:
    """Makes an attempt.

    Args:
        task: What to do.
        hear: Told the attempt and its bytes, about once a second.
    """
    node = socket.gethostname()
    counters = _engine.Progress()
    ended = threading.Event()

    def tell() -> None:
        hear(task.attempt, counters.bytes_done)
        while not ended.wait(_SECONDS):
            hear(task.attempt, counters.bytes_done)

    teller = threading.Thread(target=tell, name="safemerge-progress", daemon=True)
    teller.start()
    try:
        return Answer(node, prepared=_prepare(task, counters).to_json())
    except SafemergeError as error:
        # Another machine may have the room or the directory that this one lacks.
        return Answer(
            node, error=type(error).__name__, message=str(error), again=isinstance(error, OutputError)
        )
    finally:
        ended.set()


def _prepare(task: Task, counters: _engine.Progress) -> _engine.Prepared:
    if task.program != _engine.__version__:
        raise PlanError(
            f"safemerge-fast {_engine.__version__} is installed there, and {task.program} hands out; install the "
            f"same version on all machines"
        )
    return _engine.prepare_shard(
        _plan(task.job, task.plan),
        task.job,
        task.file,
        task.attempt,
        threads=task.threads,
        memory_budget=task.memory_budget,
        allow_nonfinite=task.allow_nonfinite,
        progress=counters,
    )


@lru_cache(maxsize=1)
def _plan(job: str, document: PlanDocument) -> _engine.Plan:
    """The plan, which a worker process opens once for all its shards."""
    if not (Path(job) / "job.json").is_file():
        raise OutputError(f"{job} is not there; the output must lie on a file system that all machines share")
    return open_plan(Path(job), document)
