"""Stage 7, report: what happened to every tensor and why, as data for JSON, tables and card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import PlanError
from ..execution.written import WrittenShard
from ..pairing.coverage import Coverage
from ..settings import Settings
from .tensors import ModuleCount, TensorReport, count_experts, count_modules

__all__ = ["CARD_FILE", "HTML_FILE", "REPORT_FILE", "ModuleWarning", "OutputFile", "Report"]

VERSION = 2
"""Version of the JSON that Report.to_json writes."""

REPORT_FILE = "safemerge_report.json"
"""Name of the report in an output; its presence marks the output as one of this program's."""

CARD_FILE = "README.md"
"""Name of the model card."""

HTML_FILE = "safemerge_report.html"
"""Name of the report as a page."""


_PIECE = 1 << 20


class OutputFile(msgspec.Struct, frozen=True):
    """One file of an output.

    Attributes:
        name: Its name, with "/" where it lies in a directory.
        bytes: Its size.
        digest: BLAKE3 of its bytes, hexadecimal; None for weights, which the plan verifies.
    """

    name: str
    bytes: int
    digest: str | None = None


class ModuleWarning(msgspec.Struct, frozen=True):
    """Something to mistrust in one tensor, or in the whole output if that is None; in a sentence."""

    tensor: str | None
    message: str


class _Job(msgspec.Struct, frozen=True):
    identity: str


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """All of a report but its tensors, as JSON has it."""

    version: int
    job: _Job
    files: tuple[OutputFile, ...]
    recipe: str
    output: str
    configuration: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    versions: dict[str, str]
    device: str | None
    seconds: dict[str, float]
    bytes_read: int
    bytes_written: int
    peak_memory_bytes: int
    shards: tuple[WrittenShard, ...]
    unused: dict[str, tuple[str, ...]]
    warnings: tuple[ModuleWarning, ...]
    notes: tuple[str, ...]
    adapter: dict[str, Any] | None
    coverage: Coverage | None = None
    counts: tuple[ModuleCount, ...]


class _Document(_Head, frozen=True, kw_only=True):
    tensors: tuple[TensorReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A finished job.

    Attributes:
        recipe: What made the output: "safemerge", "fold", "mergekit", …
        output: The output directory, absolute.
        configuration: What was asked for.
        identity: Digest of the settings and inputs that decide the output.
        files: Every file of the output but the report itself.
        inputs: By role: "spec" (as typed), "path", and "files" with the identity of each.
        versions: Versions of this package, Python and, where they took part, torch and numpy.
        device: Where scores were computed, or None if there was nothing to score.
        seconds: "analysis", "merge" and "total".
        bytes_read: Bytes that the merge read; the analysis is not counted.
        bytes_written: Bytes of weights written in this run.
        peak_memory_bytes: Largest resident memory of the process so far, mapped pages included.
        shards: What happened to each file of weights.
        tensors: Every output tensor, in the order of the files.
        unused: By role, tensors that no output tensor is made from or compared with.
        warnings: What to mistrust, by tensor.
        notes: What else a person should know.
        adapter: If the output is an adapter: "combination" ("concatenation" or "peft-linear"), "rank" (of all
            its modules), "modules" (how many), "ranks" (of each weight's update before truncation and padding),
            "relative_errors" (Frobenius, of those that are not exact) and "full_tensors" (keys). Else None.
        coverage: How many of the model's parameters were analysed; None where a recipe measures nothing.
    """

    recipe: str
    output: str
    configuration: Settings
    identity: str
    files: tuple[OutputFile, ...] = ()
    inputs: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    device: str | None = None
    seconds: Mapping[str, float]
    bytes_read: int
    bytes_written: int
    peak_memory_bytes: int
    shards: tuple[WrittenShard, ...]
    tensors: Sequence[TensorReport]
    unused: Mapping[str, tuple[str, ...]]
    warnings: tuple[ModuleWarning, ...] = ()
    notes: tuple[str, ...] = ()
    adapter: Mapping[str, Any] | None = None
    coverage: Coverage | None = None

    @property
    def counts(self) -> tuple[ModuleCount, ...]:
        """Counts per module type, in the order of first appearance."""
        return count_modules(self.tensors)

    @property
    def experts(self) -> tuple[ModuleCount, ...]:
        """Counts of the experts' matrices that were analysed, per layer."""
        return count_experts(self.tensors)

    @property
    def merged(self) -> int:
        """How many tensors were merged."""
        return sum(tensor.merged for tensor in self.tensors)

    @property
    def changed(self) -> int:
        """How many tensors are computed, or taken from elsewhere than tensors that are left alone."""
        return sum(tensor.merged or not tensor.copied for tensor in self.tensors)

    def table(self) -> Any:
        """The counts per module type, and of experts per layer, as a rich table."""
        from .tensors import module_table

        return module_table(self.counts, self.experts)

    def to_json(self) -> str:
        """Writes the report as JSON that from_json reads; a line per tensor."""
        return b"".join(self.pieces()).decode()

    def pieces(self) -> Iterator[bytes]:
        """As to_json, in UTF-8 and piece by piece: the whole may be larger than all that it tells of."""
        head = _Head(
            version=VERSION,
            job=_Job(self.identity),
            files=self.files,
            recipe=self.recipe,
            output=self.output,
            configuration=self.configuration.to_dict(),
            inputs={role: dict(source) for role, source in self.inputs.items()},
            versions=dict(self.versions),
            device=self.device,
            seconds=dict(self.seconds),
            bytes_read=self.bytes_read,
            bytes_written=self.bytes_written,
            peak_memory_bytes=self.peak_memory_bytes,
            shards=self.shards,
            unused=dict(self.unused),
            warnings=self.warnings,
            notes=self.notes,
            adapter=None if self.adapter is None else dict(self.adapter),
            coverage=self.coverage,
            counts=self.counts,
        )
        encoder = msgspec.json.Encoder(enc_hook=str)
        text = msgspec.json.format(encoder.encode(head), indent=2)
        piece = bytearray(text.rstrip()[:-1].rstrip() + b',\n  "tensors": [')
        for place, tensor in enumerate(self.tensors):
            piece += b",\n    " if place else b"\n    "
            encoder.encode_into(tensor, piece, -1)
            if len(piece) > _PIECE:
                yield bytes(piece)
                piece.clear()
        yield bytes(piece) + b"\n  ]\n}\n"

    @classmethod
    def from_json(
        cls, text: str | bytes, configuration: Callable[[str, Mapping[str, Any]], Settings]
    ) -> Report:
        """Reads what to_json wrote.

        Args:
            text: The JSON.
            configuration: Makes the settings of a recipe, given its name and their values.

        Raises:
            PlanError: The text is not such a report.
        """
        try:
            document = msgspec.json.decode(text, type=_Document)
        except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
            raise PlanError(f"this is not a report of this version of safemerge-fast: {error}") from error
        if document.version != VERSION:
            raise PlanError(
                f"the report is of version {document.version}, this program reads version {VERSION}"
            )
        values = {
            field: getattr(document, field)
            for field in document.__struct_fields__
            if field not in ("version", "job", "counts", "configuration")
        }
        settings = configuration(document.recipe, document.configuration)
        return cls(identity=document.job.identity, configuration=settings, **values)
