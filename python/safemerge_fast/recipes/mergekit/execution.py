"""Merges what a configuration says: models are opened, the plan is made and executed, and the output completed."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...checkpoint.model import Model
from ...errors import PlanError
from ...execution.companions import configuration_file
from ...execution.planned import write_planned
from ...execution.publication import describe_inputs, peak_memory, publish, versions
from ...plan.invocation import Invocation
from ...plan.shards import Shard, lay_out, output_dtype
from ...progress import ProgressCallback
from ...report.card import configuration_card
from ...settings import check_read_backend, check_threads
from ...sizes import parse_size
from .document import Document
from .planning import Planner, plan_file
from .references import Participant, Participants
from .slices import Section, open_sections
from .stacking import check_architectures, stacked_configuration
from .targets import Targets, find_targets
from .tokenizers import check_vocabularies, tokenizer_model

__all__ = ["MergekitConfiguration", "MergekitReport", "run_mergekit"]

VERSION = 1
"""Version of the JSON that MergekitReport.to_json writes."""

# Stacked layers come from files of several models, so that none of their layouts is the output's.
_STACKED_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class MergekitConfiguration:
    """A configuration, and how to carry it out.

    Raises:
        PlanError: A field is out of range.
    """

    document: Document
    output: str
    threads: int | None = None
    memory_budget: int | str | None = None
    read_backend: str = "auto"
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.memory_budget is not None:
            object.__setattr__(self, "memory_budget", parse_size(self.memory_budget))
        check_threads(self.threads)
        check_read_backend(self.read_backend)
        if self.resume and self.overwrite:
            raise PlanError("resume continues an output and overwrite starts it anew; give one of them")

    @property
    def allow_nonfinite(self) -> bool:
        """Whether NaN and infinity of the inputs may get through."""
        return self.document.allow_nonfinite

    def command(self) -> str:
        """The command line of the same merge, for a configuration in a file config.yml."""
        return shlex.join(["safemerge-fast", "run", "config.yml", "-o", self.output])


@dataclass(frozen=True, slots=True)
class MergekitReport:
    """A finished merge of a configuration.

    Attributes:
        output: The output directory, absolute.
        configuration: The fields of the configuration, as YAML holds them.
        inputs: By model or adapter: "spec", "path" and "files", as in MergeReport.
        versions: Versions of what took part.
        seconds: "merge" and "total".
        bytes_read: Bytes that were read.
        bytes_written: Bytes of weights written in this run.
        peak_memory_bytes: Largest resident memory of the process so far, mapped pages included.
        shards: The engine's facts of each output file.
        tensors: Every output tensor: "name", "file", "dtype", "shape" and the "operation" that makes it.
        unused: For each model its tensors that no output tensor is made of.
        notes: What a person should know.
    """

    output: str
    configuration: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    seconds: Mapping[str, float]
    bytes_read: int
    bytes_written: int
    peak_memory_bytes: int
    shards: tuple[Mapping[str, Any], ...]
    tensors: tuple[Mapping[str, Any], ...]
    unused: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    @property
    def merged(self) -> int:
        """How many tensors are computed, not copied."""
        return sum(not tensor["operation"].startswith("copy: ") for tensor in self.tensors)

    def to_json(self) -> str:
        """Writes the report as JSON."""
        document = {
            "version": VERSION,
            "recipe": "mergekit",
            **{field.name: getattr(self, field.name) for field in fields(self)},
        }
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True, slots=True)
class _Job:
    """What is known before the first byte is written."""

    participants: Participants
    host: Participant
    tokenizer: Model
    targets: Targets
    operations: dict[str, Invocation]
    layout: list[Shard]
    config: dict[str, Any] | None
    notes: tuple[str, ...]


def run_mergekit(
    configuration: MergekitConfiguration, progress: ProgressCallback | None = None
) -> MergekitReport:
    """Merges what a configuration says.

    Args:
        configuration: The configuration.
        progress: Called with ProgressEvents; an exception it raises stops the merge.

    Returns:
        The report, which also lies in the output as safemerge_report.json.

    Raises:
        SafemergeError: One of its subclasses; the output then holds nothing that looks complete.
    """
    started = time.perf_counter()
    document = configuration.document
    job = _open(document)
    planned = [plan_file(shard, job.operations, document.dtype) for shard in job.layout]
    models = job.participants.models
    with write_planned(configuration, models, planned, progress) as (output, writer):
        nonfinite = sorted({place for fact in writer.facts for place in fact["nonfinite_inputs"]})
        report = MergekitReport(
            output=output.path,
            configuration=document.written,
            inputs=describe_inputs(models),
            versions=versions(),
            seconds={"merge": writer.seconds, "total": time.perf_counter() - started},
            bytes_read=writer.bytes_read,
            bytes_written=sum(fact["bytes_written"] for fact in writer.facts),
            peak_memory_bytes=peak_memory(),
            shards=tuple(dict(fact) for fact in writer.facts),
            tensors=_describe(job, document.dtype),
            unused=job.targets.unused,
            notes=(
                *job.notes,
                *(f"{place} holds NaN or infinity, and so may the output" for place in nonfinite),
            ),
        )
        publish(
            output,
            models=models,
            host=job.host.model,
            tokenizer=job.tokenizer,
            planned=planned,
            card=configuration_card(
                report.output, document.method.name, document.written, configuration.command(), models
            ),
            report=report.to_json(),
            dtype=document.dtype,
            config=job.config,
        )
    return report


def _open(document: Document) -> _Job:
    """Opens the models and plans every tensor; only headers are read, and buffers that are not float."""
    participants = Participants()
    host, sections = open_sections(document, participants)
    notes = check_architectures(host, sections)
    asked = None
    owner = host
    if document.tokenizer_source is not None:
        asked = f"{document.file}: tokenizer_source"
        owner = participants.open(document.tokenizer_source)
    tokenizer = tokenizer_model(owner, asked)
    notes += check_vocabularies(owner, _merged(sections), asked)
    targets = find_targets(host, sections, document.method.name, gradients=document.has_gradients)
    planner = Planner(document)
    operations = {target.row.name: planner.plan(target) for target in targets.targets}
    notes += [note for participant in participants for note in participant.notes()]
    notes += [*targets.notes, *planner.notes()]
    if configuration_file(host.model, "auto") is None:
        notes.append(f"{host.label} has no config.json, so the output has none either")
    size = document.max_shard_size or (_STACKED_SHARD_SIZE if targets.layers else None)
    return _Job(
        participants=participants,
        host=host,
        tokenizer=tokenizer,
        targets=targets,
        operations=operations,
        layout=lay_out(
            [target.row for target in targets.targets],
            dtype=document.dtype,
            max_shard_size=size,
        ),
        config=stacked_configuration(host, targets.layers) if targets.layers else None,
        notes=tuple(dict.fromkeys(notes)),
    )


def _merged(sections: Sequence[Section]) -> list[Participant]:
    """The models that tensors are made of, each once."""
    return list({item.participant: None for section in sections for item in section.all_inputs})


def _describe(job: _Job, dtype: str) -> tuple[dict[str, Any], ...]:
    """What the report says of every output tensor."""
    return tuple(
        {
            "name": row.name,
            "file": shard.file,
            "dtype": output_dtype(row, dtype),
            "shape": row.shape,
            "operation": job.operations[row.name].describe(),
        }
        for shard in job.layout
        for row in shard.rows
    )
