"""A merge in three steps that may run anywhere: plan, work, finish. `merge` is all of them in one process.

They meet in the job's directory alone. Workers neither lock it nor hear of each other: each prepares shards in files of
its own, so that indices may come in any order, twice or not at all, and the last step says what is missing.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from .. import _engine
from ..errors import OutputError, PlanError, SettingError
from ..execution.collecting import Collecting
from ..execution.job_document import (
    JobDocument,
    find_job,
    hand_out,
    open_plan,
    read_document,
    write_plan,
)
from ..execution.local import watch
from ..execution.prepared import leave_prepared, new_attempt, prepared_files
from ..progress import ProgressEvent, silent
from ..report.report import REPORT_FILE, Report
from ..settings import MOST_THREADS, Kind, Progress, RunSettings, Setting, Settings, fields_of
from . import recipes
from .run import carry_out_job, decided, job_directory, read_report

__all__ = [
    "FinishSettings",
    "Planned",
    "WorkSettings",
    "Worked",
    "finish_job",
    "plan_job",
    "work_at_job",
]


@dataclass(frozen=True, slots=True)
class Planned:
    """A job that waits for workers.

    Attributes:
        output: The output it will become, absolute; what work and finish are given.
        files: How many files of weights there are, which is the most workers that find something to do.
        bytes_written: Bytes of the weights.
        seconds: How long analysis and plan took.
    """

    output: str
    files: int
    bytes_written: int
    seconds: float

    def to_json(self) -> str:
        """Writes it as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def plan_job(settings: RunSettings) -> Planned:
    """Does what a merge does before it writes weights, and leaves the rest to workers.

    Args:
        settings: Settings of any recipe.

    Returns:
        What was planned.

    Raises:
        SafemergeError: One of its subclasses, as merge would raise it.
    """
    started = time.perf_counter()
    for field in fields_of(type(settings)):
        if field.holds_object(getattr(settings, field.name)):
            raise SettingError(f"{field.name} should be a file, which later steps can read again")
    if settings.executor != "local":
        raise SettingError("a job that is planned is handed out by work; leave the executor out")
    job = recipes()[settings.recipe].open(settings)
    # What would be refused in the end is refused now.
    job.companions()
    with job_directory(job) as directory:
        if directory.complete:
            raise OutputError(f"the output {directory.output} is complete; replace it with --overwrite")
        _, contents = decided(job, directory)
        plan = contents.handed_out()
        if plan is None:
            raise SettingError(
                "the output is an adapter, which one process makes at once; use merge, or ask for "
                "--output-format checkpoint"
            )
        document = JobDocument(
            identity=job.identity(),
            recipe=settings.recipe,
            settings=settings.to_dict(),
            working_directory=os.getcwd(),
            plan=write_plan(directory, plan, settings.read_backend),
        )
        hand_out(directory, document)
        directory.close()
    return Planned(
        directory.output, len(contents.weight_files), contents.bytes_written, time.perf_counter() - started
    )


def _check_index(index: str) -> None:
    _share(index)


def _share(index: str) -> tuple[int, int]:
    """The number of a worker, from 0 on, and how many there are."""
    number, slash, count = index.partition("/")
    plain = number.isascii() and number.isdigit() and count.isascii() and count.isdigit()
    if not slash or not plain or len(index) > 20 or int(count) == 0:
        raise SettingError(f"should be like 0/8, the first of eight, not {index[:40]!r}")
    if int(number) >= int(count):
        raise SettingError(
            f"counts from 0, so that the last of {count} is {int(count) - 1}/{count}, not {index}"
        )
    return int(number), int(count)


class WorkSettings(Settings, frozen=True):
    """Which shards of a planned job to prepare, and how."""

    recipe: ClassVar[str] = "work"

    output: Annotated[
        str,
        Setting("The output of a job that was planned.", kind=Kind.PATH, on_command_line=False),
    ]
    index: Annotated[
        str,
        Setting(
            "Which worker this is, from 0 on, and how many there are; each prepares its share of the files.",
            metavar="I/N",
            check=_check_index,
        ),
    ] = "0/1"
    threads: Annotated[
        int | None,
        Setting("Worker threads.", least=1, most=MOST_THREADS, default="processors + 2, at most 16"),
    ] = None
    memory_budget: Annotated[
        int | str | None,
        Setting(
            "Most bytes for the merge's buffers and input windows, like 1GB.",
            kind=Kind.SIZE,
            metavar="SIZE",
            default="as planned",
        ),
    ] = None
    progress: Progress = None


@dataclass(frozen=True, slots=True)
class Worked:
    """What a worker did.

    Attributes:
        output: The output, absolute.
        prepared: Files that it prepared.
        found: Files of its share that were prepared or committed before.
        bytes_written: Bytes that it wrote.
        seconds: How long it took.
        complete: Whether the output is complete, so that there was nothing to do.
    """

    output: str
    prepared: tuple[str, ...]
    found: tuple[str, ...]
    bytes_written: int
    seconds: float
    complete: bool = False

    def to_json(self) -> str:
        """Writes it as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def work_at_job(settings: WorkSettings) -> Worked:
    """Prepares a worker's share of a planned job.

    Args:
        settings: Which job, and which share.

    Returns:
        What was done.

    Raises:
        SafemergeError: One of its subclasses; what was prepared before it stays.
    """
    started = time.perf_counter()
    output = Path(settings.output).expanduser().absolute()
    if _is_complete(output):
        return Worked(str(output), (), (), 0, time.perf_counter() - started, complete=True)
    job, document = read_document(output)
    planned = _settings_of(document)
    plan = open_plan(job, document.plan)
    number, count = _share(settings.index)
    share = plan.shards[number::count]
    left = set(_engine.open_shards(plan, job)) - prepared_files(plan, job)
    prepared: list[str] = []
    written = 0
    for file in share:
        if file in left:
            made = _prepare(plan, job, file, settings, planned, written)
            leave_prepared(job, made)
            prepared.append(file)
            written += made.size
    found = tuple(file for file in share if file not in left)
    return Worked(str(output), tuple(prepared), found, written, time.perf_counter() - started)


def _prepare(
    plan: _engine.Plan, job: Path, file: str, settings: WorkSettings, planned: RunSettings, before: int
) -> _engine.Prepared:
    counters = _engine.Progress()
    tell = settings.progress or silent
    budget = planned.memory_budget if settings.memory_budget is None else settings.memory_budget

    def say() -> None:
        done = min(before + counters.bytes_done, plan.bytes_written)
        tell(ProgressEvent("merge", done, plan.bytes_written, file))

    return watch(
        lambda: _engine.prepare_shard(
            plan,
            job,
            file,
            new_attempt(),
            threads=planned.threads if settings.threads is None else settings.threads,
            memory_budget=None if budget is None else int(budget),
            allow_nonfinite=planned.allow_nonfinite,
            progress=counters,
        ),
        counters,
        say,
    )


class FinishSettings(Settings, frozen=True):
    """Which planned job to finish."""

    recipe: ClassVar[str] = "finish"

    output: Annotated[
        str,
        Setting("The output of a job that was planned.", kind=Kind.PATH, on_command_line=False),
    ]
    progress: Progress = None


def finish_job(settings: FinishSettings) -> Report:
    """Commits what workers prepared for a planned job, and publishes the output.

    Args:
        settings: Which job.

    Returns:
        The report, which also lies in the output; of one that is complete already, that one.

    Raises:
        OutputError: Files are missing; those that are there are committed.
        PlanError: An input or this program is not what it was when the job was planned.
        SafemergeError: Another of its subclasses, as merge would raise it.
    """
    started = time.perf_counter()
    output = Path(settings.output).expanduser().absolute()
    if _is_complete(output):
        return read_report(output)
    job, document = read_document(output)
    if os.getcwd() != document.working_directory:
        raise PlanError(
            f"{output} was planned in {document.working_directory}, where its relative paths begin; finish it there"
        )
    planned = _settings_of(
        document, resume=True, overwrite=False, output=settings.output, progress=settings.progress
    )
    # Names the file that has changed.
    open_plan(job, document.plan)
    opened = recipes()[planned.recipe].open(planned)
    if opened.identity() != document.identity:
        raise PlanError(
            f"{output} was planned with other inputs than lie there now: a configuration or a file of scores has "
            f"changed; plan again with --overwrite"
        )
    return carry_out_job(opened, started, Collecting())


def _is_complete(output: Path) -> bool:
    """Whether nothing is left to do: a step of a pipeline may come twice."""
    return find_job(output) is None and (output / REPORT_FILE).is_file()


def _settings_of(document: JobDocument, **changed: Any) -> RunSettings:
    if document.recipe not in recipes():
        raise PlanError(f"this program has no recipe {document.recipe!r}; plan again with --overwrite")
    record: type[RunSettings] = recipes()[document.recipe].settings
    return record.from_dict({**document.settings, **changed})
