"""What a merge would do: counts, bytes, memory and room, from headers alone. Nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ... import _engine
from ...analysis.scores import Score
from ...decision import Decision, decide
from ...pairing.operand import references
from ...plan.shards import plan_document, plan_shard
from ...report.merge_report import ModuleCount, TensorReport, count_modules, tensor_reports
from .adapter.layout import lay_out_adapter
from .adapter.pipeline import adapter_bytes, adapter_document, adapters_by_role, input_bytes
from .configuration import MergeConfiguration
from .job import Job, open_job

__all__ = ["Preview", "preview"]

# The engine's tile, and what a worker maps of each operand meanwhile.
_TILE_BYTES = 4 << 20
# Python with this package, and torch on top of it, as measured.
_PYTHON_BYTES = 60_000_000
_TORCH_BYTES = 400_000_000
# Blocks of the analysis: elements of a block, and how many there are.
_BLOCK_BYTES = 3 * 4 * (4 << 20)


@dataclass(frozen=True, slots=True)
class Preview:
    """A merge that was not done.

    Attributes:
        output: The output directory, absolute.
        files: How many weight files it would have.
        tensors: How many tensors.
        analysed: How many of them have or would get a score.
        merged: How many would be merged; None where scores are not known yet.
        counts: Counts per module type; merged, kept and medians are meaningful only where merged is known.
        bytes_read: Bytes that the merge would read of all models; at most, where merged is not known.
        bytes_analysed: Bytes that the analysis would read once; a module's V is read up to twice.
        bytes_written: Bytes of the weights.
        memory_bytes: Peak of resident memory, about.
        free_bytes: Room on the output's file system.
        notes: What a person should know.
    """

    output: str
    files: int
    tensors: int
    analysed: int
    merged: int | None
    counts: tuple[ModuleCount, ...]
    bytes_read: int
    bytes_analysed: int
    bytes_written: int
    memory_bytes: int
    free_bytes: int
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Writes the preview as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def preview(configuration: MergeConfiguration) -> Preview:
    """Prepares a merge as far as headers and given scores allow.

    Args:
        configuration: What was asked for.

    Returns:
        What would be done.

    Raises:
        SafemergeError: As merge would raise it for its inputs.
    """
    job = open_job(configuration)
    scores = job.reused_scores()
    if job.scores is not None:
        decisions = decide(job.pairing.rows, scores, job.rule)
    else:
        # Not known yet: assume the most that can be read.
        decisions = {row.name: Decision(row.analysed, row.reason) for row in job.pairing.rows}
    if job.writes_adapter:
        return _preview_adapter(job, scores, decisions)
    planned = [plan_shard(shard, decisions, job.blend, dtype=configuration.dtype) for shard in job.layout]
    plan = _engine.Plan(json.dumps(plan_document(job.models, planned)))
    tensors = tensor_reports(planned, job.pairing.rows, scores, decisions, job.blend)
    return _preview(
        job,
        tensors,
        files=len(plan.shards),
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        memory_bytes=_memory(job, scores),
    )


def _preview(
    job: Job,
    tensors: Sequence[TensorReport],
    *,
    files: int,
    bytes_read: int,
    bytes_written: int,
    memory_bytes: int,
) -> Preview:
    """Adds to what depends on the output's format what does not."""
    output = Path(job.configuration.output).expanduser().absolute()
    free = shutil.disk_usage(_existing_parent(output)).free
    return Preview(
        output=str(output),
        files=files,
        tensors=len(tensors),
        analysed=len(job.analysed),
        merged=sum(tensor.merged for tensor in tensors) if job.scores is not None else None,
        counts=count_modules(tensors),
        bytes_read=bytes_read,
        bytes_analysed=0 if job.scores is not None else _bytes_analysed(job),
        bytes_written=bytes_written,
        memory_bytes=memory_bytes,
        free_bytes=free,
        notes=(*job.pairing.notes, *_obstacles(job, output, bytes_written, free)),
    )


def _preview_adapter(job: Job, scores: Mapping[str, Score], decisions: Mapping[str, Decision]) -> Preview:
    """The preview of a merge into an adapter."""
    layout = lay_out_adapter(job.pairing.rows, decisions, job.blend, adapters_by_role(job))
    written = adapter_bytes(job, layout)
    return _preview(
        job,
        tensor_reports([adapter_document(job, layout)], job.pairing.rows, scores, decisions, job.blend),
        files=1,
        bytes_read=input_bytes(job, layout),
        bytes_written=written,
        # The tensors and the file that they are put into; the analysis needs buffers only.
        memory_bytes=_PYTHON_BYTES + _TORCH_BYTES + 2 * written + _BLOCK_BYTES,
    )


def _bytes_analysed(job: Job) -> int:
    """Bytes of the analysed tensors of base, aligned and finetuned, each read once."""
    read = {
        reference
        for row in job.analysed
        for role in ("base", "aligned", "finetuned")
        for term in row.terms[role]
        for reference in references(term.operand.to_plan())
    }
    return sum(job.models[source].headers.tensor(name).nbytes for source, name in read)


def _memory(job: Job, scores: dict[str, Score]) -> int:
    """Estimates the peak: buffers and windows of the workers, and the analysis' Gram matrices and blocks."""
    configuration = job.configuration
    threads = configuration.threads or os.cpu_count() or 1
    merge = threads * _TILE_BYTES * (1 + len(job.blend.weights))
    if configuration.memory_budget is not None:
        merge = min(merge, int(configuration.memory_budget))
    if scores or not job.analysed:
        return _PYTHON_BYTES + merge
    # float32, the smaller side squared; a tall module needs two of them.
    gram = max(4 * min(row.shape) ** 2 * (1 if row.shape[0] <= row.shape[1] else 2) for row in job.analysed)
    return _PYTHON_BYTES + _TORCH_BYTES + merge + gram + _BLOCK_BYTES


def _existing_parent(path: Path) -> Path:
    """The path or the nearest directory above it that exists."""
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _obstacles(job: Job, output: Path, needed: int, free: int) -> list[str]:
    """What would stop the merge, as far as that can be seen without touching the output."""
    notes = []
    if output.is_file():
        notes.append(f"the merge would be refused: {output} is a file")
    elif output.is_dir() and any(output.iterdir()):
        if not (job.configuration.overwrite or job.configuration.resume):
            notes.append(f"the merge would be refused: {output} is not empty, pass --overwrite or --resume")
    elif free < needed:
        notes.append("the output's file system has less room than the weights need")
    resolved = output.resolve()
    for role, model in job.models.items():
        source = Path(model.headers.path).resolve()
        if resolved.is_relative_to(source) or source.is_relative_to(resolved):
            notes.append(f"the merge would be refused: {output} overlaps the {role} model {source}")
    return notes
