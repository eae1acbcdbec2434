"""Folding: an adapter becomes part of the checkpoint it was trained on; what users call merge_and_unload.

The output is the checkpoint with W + s·B·A for every adapted W, made tile by tile: no model is loaded, and
torch is not imported.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..checkpoint.adapter import open_adapter
from ..checkpoint.model import open_model
from ..decision import Decision
from ..errors import PlanError
from ..execution.planned import write_planned
from ..execution.publication import describe_inputs, peak_memory, publish, versions
from ..pairing.rows import pair_adapter
from ..plan.shards import Blend, compose, lay_out, output_dtype, plan_shard
from ..progress import ProgressCallback
from ..report.card import fold_card
from ..settings import check_dtype, check_read_backend, check_sizes, check_threads

__all__ = ["FoldConfiguration", "FoldReport", "fold", "run_fold"]

VERSION = 1
"""Version of the JSON that FoldReport.to_json writes."""

_BLEND = Blend("linear", {"normalize": False}, {"adapter": 1.0}, kept="adapter")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldConfiguration:
    """A fold, as asked for. `fold` documents each field.

    Raises:
        PlanError: A field is out of range.
    """

    model: str
    adapter: str
    output: str
    dtype: str = "auto"
    max_shard_size: int | str | None = None
    threads: int | None = None
    memory_budget: int | str | None = None
    read_backend: str = "auto"
    resume: bool = False
    overwrite: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        for name in ("model", "adapter", "output"):
            object.__setattr__(self, name, os.fspath(getattr(self, name)))
        check_sizes(self)
        check_dtype(self.dtype)
        check_threads(self.threads)
        check_read_backend(self.read_backend)
        if self.resume and self.overwrite:
            raise PlanError("resume continues an output and overwrite starts it anew; give one of them")

    def settings(self) -> dict[str, Any]:
        """The recipe as a document: the fields that decide the output's weights, as far as they are set."""
        shown = ("model", "adapter", "dtype", "max_shard_size")
        return {
            "recipe": "fold",
            **{name: value for name in shown if (value := getattr(self, name)) is not None},
        }

    def command(self) -> str:
        """The command line of the same fold, for a recipe in a file recipe.yml."""
        return shlex.join(["safemerge-fast", "run", "recipe.yml", "-o", self.output])


@dataclass(frozen=True, slots=True)
class FoldReport:
    """A finished fold.

    Attributes:
        output: The output directory, absolute.
        configuration: What was asked for.
        inputs: By role ("model" and "adapter"): "spec", "path" and "files", as in MergeReport.
        versions: Versions of what took part.
        seconds: "merge" and "total".
        bytes_read: Bytes that were read.
        bytes_written: Bytes of weights written in this run.
        peak_memory_bytes: Largest resident memory of the process so far, mapped pages included.
        shards: The engine's facts of each output file.
        tensors: Every output tensor: "name", "file", "dtype", "shape" and the "operation" that makes it.
        notes: What a person should know.
    """

    output: str
    configuration: FoldConfiguration
    inputs: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    seconds: Mapping[str, float]
    bytes_read: int
    bytes_written: int
    peak_memory_bytes: int
    shards: tuple[Mapping[str, Any], ...]
    tensors: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def changed(self) -> int:
        """How many tensors the adapter changes."""
        return sum(not tensor["operation"].startswith("copy: model") for tensor in self.tensors)

    def to_json(self) -> str:
        """Writes the report as JSON."""
        document = {
            "version": VERSION,
            "recipe": "fold",
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "configuration": asdict(self.configuration),
        }
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def fold(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    dtype: str = "auto",
    max_shard_size: int | str | None = None,
    threads: int | None = None,
    memory_budget: int | str | None = None,
    read_backend: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: ProgressCallback | None = None,
) -> FoldReport:
    """Folds a LoRA adapter into the checkpoint it was trained on, exactly; all of its keys are applied.

    Args:
        model: The checkpoint: a directory, a .safetensors file or org/name[@revision].
        adapter: The adapter: a directory that PEFT saved, or org/name[@revision].
        output: Output directory; must be new or empty unless resume or overwrite is given.
        dtype: Output dtype of float tensors: "auto" (each one's own in the checkpoint), "bfloat16", "float16"
            or "float32". Tensors are computed in float32 and rounded once.
        max_shard_size: Most bytes per output file, as a number or like "5GB"; None keeps the checkpoint's files.
        threads: Worker threads; None is two more than there are processors, at most 16.
        memory_budget: Most bytes for the engine's buffers, as a number or like "1GB".
        read_backend: "mmap", "pread" (positioned reads), or "auto": pread on network file systems.
        resume: Continue an unfinished fold in the output.
        overwrite: Replace what the output holds.
        allow_nonfinite: Let NaN and infinity of the inputs through.
        progress: Called with ProgressEvents; an exception it raises stops the fold.

    Returns:
        The report, which also lies in the output as safemerge_report.json.

    Raises:
        SafemergeError: One of its subclasses; the output then holds nothing that looks complete.
    """
    values = {name: value for name, value in locals().items() if name != "progress"}
    return run_fold(FoldConfiguration(**values), progress)


def run_fold(configuration: FoldConfiguration, progress: ProgressCallback | None = None) -> FoldReport:
    """Does what fold says, for a configuration that is already a record."""
    started = time.perf_counter()
    adapter = open_adapter("adapter", configuration.adapter)
    model = open_model("model", configuration.model)
    models = {"model": model, "adapter": adapter}
    pairing = pair_adapter(model, adapter)
    size = configuration.max_shard_size
    layout = lay_out(
        pairing.rows, dtype=configuration.dtype, max_shard_size=None if size is None else int(size)
    )
    decision = Decision(True, "folded")
    decisions = {row.name: decision for row in pairing.rows}
    planned = [plan_shard(shard, decisions, _BLEND, dtype=configuration.dtype) for shard in layout]
    with write_planned(configuration, models, planned, progress) as (output, writer):
        report = FoldReport(
            output=output.path,
            configuration=configuration,
            inputs=describe_inputs(models),
            versions=versions(),
            seconds={"merge": writer.seconds, "total": time.perf_counter() - started},
            bytes_read=writer.bytes_read,
            bytes_written=sum(fact["bytes_written"] for fact in writer.facts),
            peak_memory_bytes=peak_memory(),
            shards=tuple(dict(fact) for fact in writer.facts),
            tensors=tuple(
                {
                    "name": row.name,
                    "file": shard.file,
                    "dtype": output_dtype(row, configuration.dtype),
                    "shape": row.shape,
                    "operation": compose(row, decision, _BLEND).describe(),
                }
                for shard in layout
                for row in shard.rows
            ),
            notes=pairing.notes,
        )
        publish(
            output,
            models=models,
            host=model,
            tokenizer=adapter,
            planned=planned,
            card=fold_card(report.output, configuration.settings(), configuration.command(), models),
            report=report.to_json(),
            dtype=configuration.dtype,
        )
    return report
