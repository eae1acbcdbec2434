"""Evaluates the plan that an output carries again and compares every byte with what is on disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import _engine
from ..errors import CheckpointError, PlanError, VerificationError
from ..plan.shards import INDEX_FILE, PLAN_FILE, index_document
from ..progress import ProgressCallback, ProgressEvent
from .safemerge.adapter.verification import read_adapter_report, verify_adapter

__all__ = ["VerifyReport", "verify"]

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """A verification that found no difference.

    Attributes:
        output: The directory that was verified, absolute.
        files: How many weight files it has.
        bytes_checked: Bytes that were compared.
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


def verify(
    output: str | os.PathLike[str],
    *,
    sample: float = 1.0,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> VerifyReport:
    """Verifies the weights of an output against its plan and the models it was made from.

    An adapter has no plan: it is made again from its report and compared whole.

    Args:
        output: A directory that merge wrote; the models must still be where they were.
        sample: Share of the bytes to compare, above 0 and at most 1; the files' headers are always compared.
        threads: Worker threads; None is two more than there are processors, at most 16.
        progress: Called with ProgressEvents of the stage "verify".

    Returns:
        The report.

    Raises:
        VerificationError: A byte differs, a file is missing, or one is there that the plan does not know.
        CheckpointError: There is no such output, or a model cannot be read.
        PlanError: The plan is malformed, or a model is not the one it was made for.
    """
    started = time.perf_counter()
    directory = Path(output).expanduser().absolute()
    if (report := read_adapter_report(directory)) is not None:
        checked = verify_adapter(directory, report)
        return VerifyReport(str(directory), 1, checked, checked, time.perf_counter() - started)
    document = _read_plan(directory)
    plan = _engine.Plan(json.dumps(document))
    _check_file_names(directory, document["shards"])
    found = _compare(plan, directory, sample, threads, progress or (lambda event: None))
    if found.mismatches:
        raise VerificationError(_describe(directory, found.mismatches))
    return VerifyReport(
        output=str(directory),
        files=found.files,
        bytes_checked=found.bytes_checked,
        bytes_total=found.bytes_total,
        seconds=time.perf_counter() - started,
    )


def _read_plan(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist or is not a directory; name the output of a merge")
    path = directory / PLAN_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} has no {PLAN_FILE}: it is not the finished output of safemerge-fast merge"
        ) from error
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict):
        raise PlanError(f"{path} should hold a JSON object, not a {type(document).__name__}")
    return document


def _check_file_names(directory: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Refuses weights and an index that the plan does not know, since loaders would take them."""
    planned = {shard["file"] for shard in shards}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in planned:
            raise VerificationError(
                f"{path} is not in the plan, but loaders may take it for weights; remove it"
            )
    index = directory / INDEX_FILE
    expected = index_document(shards) if len(planned) > 1 else None
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:
        raise VerificationError(f"cannot read {index}: {error}") from error
    if found != expected:
        problem = "is missing" if found is None else "does not say what the plan says"
        raise VerificationError(f"{index} {problem}; merge again with --overwrite")


def _compare(
    plan: _engine.Plan,
    directory: Path,
    sample: float,
    threads: int | None,
    tell: Callable[[ProgressEvent], None],
) -> _engine.Verification:
    """Runs the engine in a thread of its own, so that progress can be told and Ctrl-C be noticed."""
    counters = _engine.Progress()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="safemerge-verify") as executor:
        future = executor.submit(plan.verify, directory, sample=sample, threads=threads, progress=counters)
        try:
            while not future.done():
                wait([future], timeout=_POLL_SECONDS)
                done = min(counters.bytes_done, plan.bytes_written)
                tell(ProgressEvent("verify", done, plan.bytes_written, str(directory)))
        except BaseException:
            counters.cancel()
            raise
        return future.result()


def _describe(directory: Path, mismatches: Sequence[_engine.Mismatch]) -> str:
    """Says where the first difference is and how many more there are."""
    first = mismatches[0]
    path = directory / first.file
    what = f"tensor {first.tensor} of {path}" if first.tensor is not None else f"the header of {path}"
    files = len({mismatch.file for mismatch in mismatches})
    more = f", and {len(mismatches) - 1} more places in {files} file(s)" if len(mismatches) > 1 else ""
    return f"{what} differs from the plan at byte {first.offset}{more}; merge again with --overwrite"
