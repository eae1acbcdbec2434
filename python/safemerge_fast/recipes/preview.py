"""What a job would do: counts, bytes, memory and room, from headers alone. Nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..execution.inputs import input_paths
from ..pairing.coverage import Coverage
from ..report.tensors import ModuleCount, count_experts, count_modules
from ..settings import RunSettings
from . import recipes
from .base import Job, Measurement

__all__ = ["Preview", "preview"]

# Python with this package, as measured.
_PYTHON_BYTES = 60_000_000


@dataclass(frozen=True, slots=True)
class Preview:
    """A job that was not done.

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
        memory_bytes: Peak of resident memory, about: what the engine says, the analysis, and Python.
        free_bytes: Room on the output's file system.
        notes: What a person should know.
        coverage: How much of the model is or would be analysed; None where nothing is measured.
        warnings: What to mistrust, as far as it is known.
        experts: Counts of experts per layer, likewise.
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
    coverage: Coverage | None = None
    warnings: tuple[str, ...] = ()
    experts: tuple[ModuleCount, ...] = ()

    def to_json(self) -> str:
        """Writes the preview as JSON."""
        document = {
            **asdict(self),
            "counts": [msgspec.to_builtins(count) for count in self.counts],
            "experts": [msgspec.to_builtins(count) for count in self.experts],
            "coverage": msgspec.to_builtins(self.coverage),
        }
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def preview(settings: RunSettings) -> Preview:
    """Prepares a job as far as headers and given scores allow.

    Args:
        settings: Settings of any recipe.

    Returns:
        What would be done.

    Raises:
        SafemergeError: As carrying it out would raise it for its inputs.
    """
    job: Job[Any] = recipes()[settings.recipe].open(settings)
    job.companions()
    measurement: Measurement | None = job.known_measurement()
    contents = job.contents(measurement)
    tensors = contents.tensors({} if measurement is None else measurement.scores)
    analysed, analysis_memory = job.analysis_bytes
    output = Path(settings.output).expanduser().absolute()
    free = shutil.disk_usage(_existing_parent(output)).free
    written = contents.bytes_written
    return Preview(
        output=str(output),
        files=len(contents.weight_files),
        tensors=len(tensors),
        analysed=sum(tensor.analysed for tensor in tensors),
        merged=None if measurement is None else sum(tensor.merged for tensor in tensors),
        counts=count_modules(tensors),
        bytes_read=contents.bytes_read,
        bytes_analysed=analysed,
        bytes_written=written,
        memory_bytes=_PYTHON_BYTES + max(contents.memory(settings), analysis_memory),
        free_bytes=free,
        notes=(*job.notes, *_obstacles(settings, input_paths(job.models), output, written, free)),
        experts=count_experts(tensors),
        coverage=job.coverage,
        warnings=tuple(
            warning.message
            for warning in (*job.warnings, *(() if measurement is None else measurement.warnings))
        ),
    )


def _existing_parent(path: Path) -> Path:
    """The path or the nearest directory above it that exists."""
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _obstacles(
    settings: RunSettings, inputs: Sequence[str], output: Path, needed: int, free: int
) -> list[str]:
    """What would stop the job, as far as that can be seen without touching the output."""
    notes = []
    if output.is_file():
        notes.append(f"the merge would be refused: {output} is a file")
    elif output.is_dir() and any(output.iterdir()):
        if not (settings.overwrite or settings.resume):
            notes.append(f"the merge would be refused: {output} is not empty, pass --overwrite or --resume")
    elif (output.parent / f".{output.name}.safemerge").is_dir() and not (
        settings.overwrite or settings.resume
    ):
        notes.append(
            f"the merge would be refused: an unfinished one of {output} waits, pass --resume or --overwrite"
        )
    # An old output stays until the new one is whole, unless it is removed first; what is resumed is there in part.
    if free < needed and settings.overwrite != "in-place" and not settings.resume:
        notes.append("the output's file system has less room than the weights need")
    resolved = output.resolve()
    for path in inputs:
        source = Path(path).resolve()
        if source.is_dir() and (resolved.is_relative_to(source) or source.is_relative_to(resolved)):
            notes.append(f"the merge would be refused: {output} overlaps the input {source}")
    return notes
