"""The pipeline: checkpoint → pairing → analysis → decision → plan → merge → report, shard after shard."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ... import _engine
from ...analysis.rounding import rounding_warning
from ...analysis.scores import Score
from ...decision import Decision, decide
from ...execution.companions import configuration_file
from ...execution.publication import describe_inputs, peak_memory, publish, remove_stray_shards, versions
from ...execution.shard_writer import ShardWriter
from ...pairing.rows import Row
from ...plan.shards import Shard, plan_document, plan_shard, tensor_bytes
from ...progress import ProgressCallback, ProgressEvent
from ...report.card import model_card
from ...report.merge_report import MergeReport, ModuleWarning, TensorReport, tensor_reports
from .adapter.pipeline import merge_into_adapter
from .configuration import MergeConfiguration
from .job import Job, open_job
from .scoring import device_name, score_rows

__all__ = ["merge", "run_merge"]


def merge(
    base: str | os.PathLike[str],
    aligned: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    safe: str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str],
    threshold: float = 0.35,
    alpha: float = 0.8,
    method: str = "linear",
    density: float | None = None,
    seed: int | None = None,
    parameters: str | None = None,
    select: str = "threshold",
    granularity: str = "module",
    delta_reference: str = "aligned",
    include: str | None = None,
    exclude: str | None = None,
    others: str = "keep",
    on_undefined: str = "merge",
    device: str = "auto",
    dtype: str = "auto",
    output_format: str = "auto",
    adapter_rank: int | None = None,
    compat: str | None = None,
    max_shard_size: int | str | None = None,
    threads: int | None = None,
    memory_budget: int | str | None = None,
    read_backend: str = "auto",
    scores: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: ProgressCallback | None = None,
) -> MergeReport:
    """Repairs a fine-tuned model: merges its modules that left the safety subspace with a safe model.

    Args:
        base: The model before alignment: a checkpoint directory, a .safetensors file or org/name[@revision].
        aligned: The aligned model that was fine-tuned.
        finetuned: The fine-tuned model, which the output is made from; or a LoRA adapter of the aligned one.
        safe: The safe model to merge with, or such an adapter; None takes the aligned one.
        output: Output directory; must be new or empty unless resume or overwrite is given.
        threshold: τ: modules whose ρ is strictly below it are merged.
        alpha: α: weight of the fine-tuned update; the safe one gets 1-α.
        method: How tensors are merged: "linear", "slerp", "ties", "dare_ties" or another method of docs/methods.md that
            weighs two models.
        density: The method's density, for both updates: the share of elements that is kept.
        seed: The method's seed.
        parameters: Further parameters of the method, like "lambda=0.9,normalize=false".
        select: "threshold", "lowest:N" (the N lowest ρ) or "fraction:F" (that share of them).
        granularity: "module", or "layer" to decide by the mean ρ of a layer.
        delta_reference: What Δ is taken against: "aligned", or "base" (then Δ contains V and ρ rises).
        include: Regular expression on names: analyses what is left out by default.
        exclude: Regular expression on names: leaves them out of the analysis.
        others: "keep" or "merge" tensors that are not analysed.
        on_undefined: "merge" or "keep" modules without ρ (V or Δ is zero).
        device: "auto", "cpu", "cuda", "cuda:N" or "mps", for the analysis.
        dtype: Output dtype of float tensors: "auto" (each one's own), "bfloat16", "float16" or "float32".
        output_format: "checkpoint", "adapter", or "auto": an adapter if finetuned (and safe, if given) are
            adapters.
        adapter_rank: Highest rank of a merged adapter; updates of a higher one are truncated to it. None is exact.
        compat: "peft-linear" combines adapters as PEFT's add_weighted_adapter(…, "linear") does, whose cross terms
            α·Δ_finetuned + (1-α)·Δ_safe does not have; None is exact.
        max_shard_size: Most bytes per output file, as a number or like "5GB"; None keeps the fine-tuned
            model's files.
        threads: Worker threads of the merge; None is two more than there are processors, at most 16.
        memory_budget: Most bytes for the merge's buffers, as a number or like "1GB".
        read_backend: "mmap", "pread" (positioned reads), or "auto": pread on network file systems.
        scores: scores.json to reuse; torch is then not needed.
        resume: Continue an unfinished merge in the output.
        overwrite: Replace what the output holds.
        allow_nonfinite: Let NaN and infinity of the inputs through; such modules have no ρ.
        progress: Called with ProgressEvents; an exception it raises stops the merge.

    Returns:
        The report, which also lies in the output as safemerge_report.json.

    Raises:
        SafemergeError: One of its subclasses; the output then holds nothing that looks complete.
    """
    values = {name: value for name, value in locals().items() if name != "progress"}
    return run_merge(MergeConfiguration(**values), progress)


def run_merge(configuration: MergeConfiguration, progress: ProgressCallback | None = None) -> MergeReport:
    """Does what merge says, for a configuration that is already a record."""
    started = time.perf_counter()
    tell = progress or (lambda event: None)
    job = open_job(configuration)
    if job.writes_adapter:
        return merge_into_adapter(job, tell, started)
    output = _engine.Output(
        configuration.output,
        inputs=[model.headers.path for model in job.models.values()],
        resume=configuration.resume,
        overwrite=configuration.overwrite,
    )
    writer = _shard_writer(job, output, tell)
    scores = dict(job.reused_scores())
    decisions: dict[str, Decision] = {}
    planned: list[dict[str, Any]] = []
    analysis_seconds = 0.0
    try:
        remove_stray_shards(output, [shard.file for shard in job.layout])
        for shards in _steps(job):
            rows = [row for shard in shards for row in shard.rows]
            if job.scores is None:
                analysis_seconds += _score(job, rows, scores, writer, tell)
            decisions |= decide(rows, scores, job.rule)
            for shard in shards:
                planned.append(plan_shard(shard, decisions, job.blend, dtype=configuration.dtype))
                writer.submit(plan_document(job.models, planned[-1:]))
        writer.finish()
        tensors = tensor_reports(planned, job.pairing.rows, scores, decisions, job.blend)
        report = MergeReport(
            output=output.path,
            configuration=configuration,
            inputs=describe_inputs(job.models),
            versions=versions(),
            device=_device(job),
            seconds={
                "analysis": analysis_seconds,
                "merge": writer.seconds,
                "total": time.perf_counter() - started,
            },
            bytes_read=writer.bytes_read,
            bytes_written=sum(fact["bytes_written"] for fact in writer.facts),
            peak_memory_bytes=peak_memory(),
            shards=tuple(dict(fact) for fact in writer.facts),
            tensors=tensors,
            unused=job.pairing.unused,
            warnings=_warnings(scores, writer.facts),
            notes=(*job.pairing.notes, *_notes(job, tensors)),
        )
        publish(
            output,
            models=job.models,
            host=job.host,
            tokenizer=job.models["finetuned"],
            planned=planned,
            card=model_card(report, job.models),
            report=report.to_json(),
            dtype=configuration.dtype,
        )
        output.finish()
    except BaseException:
        # Also for Ctrl-C: what is committed stays for --resume, but nothing loads it without config.json.
        writer.abandon()
        output.close()
        raise
    return report


def _steps(job: Job) -> Iterator[Sequence[Shard]]:
    """Groups the output files by what must be scored before any of the group can be decided."""
    # Merging tensors that are not analysed needs the whole pairing in view, to know which roles there are.
    if job.rule.is_local and job.rule.others == "keep":
        yield from ([shard] for shard in job.layout)
    else:
        yield job.layout


def _shard_writer(job: Job, output: _engine.Output, tell: ProgressCallback) -> ShardWriter:
    configuration = job.configuration
    total = sum(tensor_bytes(row, configuration.dtype) for row in job.pairing.rows)
    return ShardWriter(
        output,
        threads=configuration.threads,
        memory_budget=None if configuration.memory_budget is None else int(configuration.memory_budget),
        read_backend=configuration.read_backend,
        allow_nonfinite=configuration.allow_nonfinite,
        # The engine counts headers too, which the total leaves out.
        on_bytes=lambda done, file: tell(ProgressEvent("merge", min(done, total), total, file)),
    )


def _score(
    job: Job, rows: Sequence[Row], scores: dict[str, Score], writer: ShardWriter, tell: ProgressCallback
) -> float:
    """Adds the scores of some rows, while the writer works on earlier ones; returns the seconds it took."""
    started = time.perf_counter()
    total = len(job.analysed)
    # Loading torch takes a while before the first score is there.
    tell(ProgressEvent("analysis", len(scores), total, ""))
    for name, score in score_rows(
        job.models,
        rows,
        delta_reference=job.configuration.delta_reference,
        device=job.configuration.device,
        allow_nonfinite=job.configuration.allow_nonfinite,
    ):
        scores[name] = score
        tell(ProgressEvent("analysis", len(scores), total, name))
        writer.poll()
    return time.perf_counter() - started


def _device(job: Job) -> str | None:
    if job.scores is not None:
        return job.scores.device
    return device_name(job.configuration.device) if job.analysed else None


def _warnings(scores: Mapping[str, Score], facts: Sequence[Mapping[str, Any]]) -> tuple[ModuleWarning, ...]:
    """What to mistrust: task vectors near the dtype's resolution, and inputs that are not finite."""
    rounding = [(name, rounding_warning(name, score)) for name, score in scores.items()]
    # The engine says "tensor of file".
    nonfinite = sorted({place for fact in facts for place in fact["nonfinite_inputs"]})
    return (
        *(ModuleWarning(name, message) for name, message in rounding if message is not None),
        *(
            ModuleWarning(place.partition(" of ")[0], f"{place} holds NaN or infinity, and so may the output")
            for place in nonfinite
        ),
    )


def _notes(job: Job, tensors: Sequence[TensorReport]) -> list[str]:
    """What a person should know of this merge, in sentences."""
    notes = []
    if "safe" not in job.models:
        notes.append(
            f"no safe model was given, so the aligned one plays it: merging shrinks a module's update "
            f"to {job.configuration.alpha:g} of itself"
        )
    if not any(tensor.merged for tensor in tensors):
        notes.append("no tensor was merged: the output holds the fine-tuned weights as they are")
    if configuration_file(job.host, "auto") is None:
        notes.append(f"the {job.host.role} model has no config.json, so the output has none either")
    return notes
