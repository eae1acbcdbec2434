"""A job that is planned by one process, worked at by others and finished by a third: what they need to know of it.

Plan and document lie in the job's directory. The document is written last and names the plan by its digest, so that no
worker takes half a plan for one.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec

from .. import _engine
from ..documents import RECORD, read_bytes
from ..errors import CheckpointError, OutputError, PlanError
from ..plan.plan import Plan

__all__ = ["JobDocument", "PlanDocument", "find_job", "hand_out", "open_plan", "read_document", "write_plan"]

PLAN = "plan.json"
"""The plan, in a job's directory."""

_DOCUMENT = "handed-out.json"
_VERSION = 1


class InputFile(msgspec.Struct, frozen=True, array_like=True):
    """A file of a model, as whoever planned saw it; its times and inode are the same on all machines that share it."""

    path: str
    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    def check(self) -> None:
        """Compares the file with what was seen.

        Raises:
            PlanError: It is another one.
        """
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}, which the plan reads, cannot be read here: {error.strerror}"
            ) from error
        if found.st_size != self.size:
            what = "its size differs"
        elif found.st_ino != self.inode:
            what = "another file has taken its place"
        elif found.st_mtime_ns != self.mtime_ns:
            what = "it was modified"
        elif found.st_ctime_ns != self.ctime_ns:
            what = "its time of change (ctime) differs"
        else:
            return
        raise PlanError(f"{self.path} has changed since the plan was made ({what}); make the plan again")


class PlanDocument(msgspec.Struct, frozen=True):
    """What workers need of a plan.

    Attributes:
        digest: Digest of the plan that lies in the job's directory.
        read_backend: How inputs are read.
        inputs: All files of all models.
    """

    digest: str
    read_backend: str
    inputs: tuple[InputFile, ...]


class JobDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What is handed out.

    Attributes:
        identity: The job's, which tells it from others.
        recipe: Name of the recipe.
        settings: Its settings, as Settings.to_dict has them.
        working_directory: Where relative paths in them begin.
        plan: What is known of the plan.
        program: Version of the program that planned.
        version: Version of this format.
    """

    identity: str
    recipe: str
    settings: dict[str, Any]
    working_directory: str
    plan: PlanDocument
    program: str = _engine.__version__
    version: int = _VERSION


def write_plan(directory: _engine.JobDirectory, plan: Plan, read_backend: str) -> PlanDocument:
    """Puts a plan where workers find it.

    Args:
        directory: The job's directory.
        plan: The plan.
        read_backend: How inputs are read.

    Raises:
        OutputError: It cannot be written.
    """
    text = plan.to_json()
    directory.remove(PLAN)
    directory.append(PLAN, text)
    inputs = (
        InputFile(str(Path(model.headers.path) / file), seen.size, seen.inode, seen.mtime_ns, seen.ctime_ns)
        for model in plan.models.values()
        for file, seen in model.headers.identity().items()
    )
    return PlanDocument(_digest(text), read_backend, tuple(inputs))


def hand_out(directory: _engine.JobDirectory, document: JobDocument) -> None:
    """Lets workers begin; the plan is written already.

    Raises:
        OutputError: It cannot be written.
    """
    directory.remove(_DOCUMENT)
    directory.hand_out()
    directory.append(_DOCUMENT, msgspec.json.encode(document))


def find_job(output: Path) -> Path | None:
    """The directory of an output's unfinished job, or None."""
    place = Path(os.path.realpath(output))
    beside, inside = place.parent / f".{place.name}.safemerge", place / ".safemerge"
    return next((path for path in (beside, inside) if (path / "job.json").is_file()), None)


def read_document(output: Path) -> tuple[Path, JobDocument]:
    """The directory of a job that is handed out, and what is handed out there.

    Args:
        output: The job's output.

    Raises:
        OutputError: There is none.
        PlanError: It was planned by another version of this program.
    """
    job = find_job(output)
    path = None if job is None else job / _DOCUMENT
    if job is None or path is None or not path.is_file():
        raise OutputError(
            f"{output} has no job that waits for workers; make one with safemerge-fast plan, on a file system that "
            f"all machines share"
        )
    text = read_bytes(path, PlanError, limit=RECORD)
    try:
        known = msgspec.json.decode(text)
        program = known["program"] if isinstance(known, dict) else None
        if isinstance(program, str) and program != _engine.__version__:
            raise PlanError(
                f"{output} was planned by safemerge-fast {program}, and this is {_engine.__version__}; install the "
                f"same version on all machines, or plan again with --overwrite"
            )
        document = msgspec.json.decode(text, type=JobDocument)
    except (KeyError, msgspec.MsgspecError) as error:
        raise PlanError(f"{path} is damaged ({error}); plan again with --overwrite") from error
    if document.version != _VERSION:
        raise PlanError(f"{path} is of another version of this program; plan again with --overwrite")
    return job, document


def open_plan(job: Path, document: PlanDocument) -> _engine.Plan:
    """Opens the plan of a job: every input must be the file that it was made for, not a copy.

    Args:
        job: The job's directory.
        document: What is known of the plan.

    Raises:
        PlanError: It is another plan, or an input has changed.
        CheckpointError: An input cannot be opened.
    """
    text = read_bytes(job / PLAN, PlanError, limit=RECORD)
    if _digest(text) != document.digest:
        raise PlanError(f"{job / PLAN} is not the plan that was handed out; plan again with --overwrite")
    # Before and after the headers are read: the engine then sees to it that they stay as they are.
    for file in document.inputs:
        file.check()
    plan = _engine.Plan(text, read_backend=document.read_backend)
    for file in document.inputs:
        file.check()
    return plan


def _digest(plan: bytes) -> str:
    return hashlib.blake2b(plan, digest_size=16).hexdigest()
