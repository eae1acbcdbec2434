"""Evaluates an output's plan again and compares every byte with what is on disk, and all that lies beside it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from .. import _engine
from ..checkpoint.adapter import ADAPTER_WEIGHTS
from ..documents import RECORD, read_bytes, require_regular
from ..errors import CheckpointError, PlanError, VerificationError
from ..execution.derived import DERIVED_FILE
from ..execution.local import watch
from ..plan.plan import PLAN_FILE
from ..progress import ProgressEvent, silent
from ..report.report import REPORT_FILE, OutputFile, Report
from ..settings import MOST_THREADS, Kind, Progress, Setting, Settings
from .run import read_report
from .safemerge.adapter.verification import verify_adapter

__all__ = ["VerifyReport", "VerifySettings", "verify_output"]


class VerifySettings(Settings, frozen=True):
    """What to verify, and how much of it."""

    recipe: ClassVar[str] = "verify"

    output: Annotated[
        str,
        Setting(
            "A finished output; the models that it was made from must still be where they were.",
            kind=Kind.PATH,
            on_command_line=False,
        ),
    ]
    sample: Annotated[
        float,
        Setting("Share of the weights' bytes to compare; all else is always compared.", least=1e-9, most=1.0),
    ] = 1.0
    seed: Annotated[int, Setting("Decides which bytes a sample takes.", least=0, most=2**64 - 1)] = 0
    threads: Annotated[
        int | None,
        Setting("Worker threads.", least=1, most=MOST_THREADS, default="processors + 2, at most 16"),
    ] = None
    progress: Progress = None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """A verification that found no difference.

    Attributes:
        output: The directory that was verified, absolute.
        files: How many weight files it has.
        bytes_checked: Bytes of weights that were compared.
        bytes_total: Bytes of all weight files.
        seconds: How long it took.
    """

    output: str
    files: int
    bytes_checked: int
    bytes_total: int
    seconds: float

    def to_json(self) -> str:
        """Writes the report as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def verify_output(settings: VerifySettings) -> VerifyReport:
    """Verifies an output against its report, its plan and the models it was made from.

    Every file that the report lists must be there with its size and, but for weights, its digest; nothing else may be
    there. Weights are compared with the plan, evaluated again; an adapter that has no plan is made again.

    Args:
        settings: What to verify.

    Returns:
        The report.

    Raises:
        VerificationError: A byte differs, a file is missing, or one is there that the report does not know.
        CheckpointError: There is no such output, or a model cannot be read.
        PlanError: Report or plan are malformed, or a model is not the one it was made for.
    """
    started = time.perf_counter()
    directory = Path(settings.output).expanduser().absolute()
    report = _read_report(directory)
    _check_files(directory, report)
    if report.adapter is not None and all(file.name != PLAN_FILE for file in report.files):
        # The tensor that differs says more than the file's digest, so that it comes first.
        checked = verify_adapter(directory, report)
        for file in report.files:
            _check_digest(directory, file)
        return VerifyReport(str(directory), 1, checked, checked, time.perf_counter() - started)
    plan = _engine.Plan(read_bytes(directory / PLAN_FILE, PlanError, limit=RECORD), directory=directory)
    _check_weights(directory, report, plan)
    found = _compare(plan, directory, settings)
    if found.mismatches:
        raise VerificationError(_describe(directory, found.mismatches))
    return VerifyReport(
        output=str(directory),
        files=found.files,
        bytes_checked=found.bytes_checked,
        bytes_total=found.bytes_total,
        seconds=time.perf_counter() - started,
    )


def _read_report(directory: Path) -> Report:
    """The report of a finished output; says so if the output is unfinished."""
    unfinished = directory.parent / f".{directory.name}.safemerge"
    if (directory / ".safemerge").is_dir() or (not directory.exists() and unfinished.is_dir()):
        raise CheckpointError(
            f"{directory} is unfinished: what there is of it waits in a hidden directory; finish it with --resume"
        )
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist or is not a directory; name the output of a merge")
    if not (directory / REPORT_FILE).exists():
        raise CheckpointError(f"{directory} has no {REPORT_FILE}: it is not the output of safemerge-fast")
    return read_report(directory)


def _check_files(directory: Path, report: Report) -> None:
    """Compares what lies in the output with the report's list, all but the weights' bytes."""
    listed = {file.name: file for file in report.files}
    for path in sorted(_files(directory)):
        name = path.relative_to(directory).as_posix()
        if name not in listed and name != REPORT_FILE:
            raise VerificationError(
                f"{path} is not in the report, but loaders may take it for a part of the model; remove it"
            )
    for name, file in listed.items():
        path = directory / name
        if not os.path.lexists(path):
            raise VerificationError(
                f"{path} is missing, but the report lists it; merge again with --overwrite"
            )
        try:
            require_regular(path, VerificationError)
            size = path.stat().st_size
        except OSError as error:
            raise VerificationError(f"{path} cannot be verified: {error.strerror}") from error
        if size != file.bytes:
            raise VerificationError(
                f"{path} has {size} bytes, the report says {file.bytes}; merge again with --overwrite"
            )
        if name != ADAPTER_WEIGHTS:
            _check_digest(directory, file)


def _check_digest(directory: Path, file: OutputFile) -> None:
    """Compares a file with its digest, if the report has one."""
    if file.digest is not None and _engine.file_digest(directory / file.name) != file.digest:
        raise VerificationError(
            f"{directory / file.name} is not what was written: its digest differs; merge again with --overwrite"
        )


def _check_weights(directory: Path, report: Report, plan: _engine.Plan) -> None:
    """Refuses a report and a plan that speak of other files of weights."""
    weights = {
        file.name for file in report.files if file.name.endswith(".safetensors") and file.name != DERIVED_FILE
    }
    if differing := sorted(weights.symmetric_difference(plan.shards)):
        raise VerificationError(
            f"{directory}: report and plan disagree on {differing[0]}; merge again with --overwrite"
        )


def _files(directory: Path) -> list[Path]:
    return [
        Path(parent) / name
        for parent, directories, files in os.walk(directory)
        for name in (*files, *(entry for entry in directories if (Path(parent) / entry).is_symlink()))
    ]


def _compare(plan: _engine.Plan, directory: Path, settings: VerifySettings) -> _engine.Verification:
    counters = _engine.Progress()
    tell = settings.progress or silent

    def say() -> None:
        done = min(counters.bytes_done, plan.bytes_written)
        tell(ProgressEvent("verify", done, plan.bytes_written, str(directory)))

    return watch(
        lambda: plan.verify(
            directory, sample=settings.sample, seed=settings.seed, threads=settings.threads, progress=counters
        ),
        counters,
        say,
    )


def _describe(directory: Path, mismatches: list[_engine.Mismatch]) -> str:
    """Says where the first difference is and how many more there are."""
    first = mismatches[0]
    path = directory / first.file
    what = f"tensor {first.tensor} of {path}" if first.tensor is not None else f"the header of {path}"
    files = len({mismatch.file for mismatch in mismatches})
    more = f", and {len(mismatches) - 1} more places in {files} file(s)" if len(mismatches) > 1 else ""
    return f"{what} differs from the plan at byte {first.offset}{more}; merge again with --overwrite"
