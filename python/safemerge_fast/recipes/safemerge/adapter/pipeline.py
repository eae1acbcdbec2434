"""The second half of a merge whose output is an adapter: decision → layout → tensors → files → report."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .... import _engine
from ....analysis.rounding import rounding_warning
from ....analysis.scores import Score
from ....checkpoint.adapter import ADAPTER_WEIGHTS, Adapter
from ....checkpoint.adapter_config import ADAPTER_CONFIG
from ....decision import Decision, decide
from ....execution.companions import companion_files
from ....execution.publication import (
    CARD_FILE,
    REPORT_FILE,
    describe_inputs,
    peak_memory,
    remove_stray_shards,
    versions,
)
from ....progress import ProgressCallback, ProgressEvent
from ....report.card import model_card
from ....report.merge_report import MergeReport, ModuleWarning, tensor_reports
from ....settings import DTYPES
from ..job import Job
from ..scoring import device_name, score_rows
from .layout import AdapterLayout, lay_out_adapter
from .settings import adapter_settings

if TYPE_CHECKING:
    from .tensors import AdapterTensors

__all__ = [
    "adapter_bytes",
    "adapter_document",
    "adapters_by_role",
    "input_bytes",
    "make_weights",
    "merge_into_adapter",
    "write_settings",
]


def merge_into_adapter(job: Job, tell: ProgressCallback, started: float) -> MergeReport:
    """Scores, decides, and writes the merged adapter.

    Args:
        job: A job whose writes_adapter is true.
        tell: Called with ProgressEvents.
        started: time.perf_counter() at the start of the merge.

    Returns:
        The report, which also lies in the output.

    Raises:
        SafemergeError: One of its subclasses; the output then holds nothing that looks complete.
    """
    configuration = job.configuration
    output = _engine.Output(
        configuration.output,
        inputs=[model.headers.path for model in job.models.values()],
        resume=configuration.resume,
        overwrite=configuration.overwrite,
    )
    try:
        remove_stray_shards(output, [])
        scores = dict(job.reused_scores())
        if job.scores is None:
            _score(job, scores, tell)
        scored = time.perf_counter()
        decisions = decide(job.pairing.rows, scores, job.rule)
        layout = lay_out_adapter(job.pairing.rows, decisions, job.blend, adapters_by_role(job))
        made, weights = make_weights(job, layout)
        tell(ProgressEvent("merge", len(weights), len(weights), ADAPTER_WEIGHTS))
        output.write_file(ADAPTER_WEIGHTS, weights)
        written = time.perf_counter()
        report = MergeReport(
            output=output.path,
            configuration=configuration,
            inputs=describe_inputs(job.models),
            versions=versions(),
            device=_device(job),
            seconds={
                "analysis": 0.0 if job.scores is not None else scored - started,
                "merge": written - scored,
                "total": written - started,
            },
            bytes_read=input_bytes(job, layout),
            bytes_written=len(weights),
            peak_memory_bytes=peak_memory(),
            shards=(
                {
                    "file": ADAPTER_WEIGHTS,
                    "bytes_written": len(weights),
                    "seconds": written - scored,
                    "write": "buffered",
                    "resumed": False,
                    "nonfinite_inputs": [],
                },
            ),
            tensors=tensor_reports(
                [adapter_document(job, layout)], job.pairing.rows, scores, decisions, job.blend
            ),
            unused=job.pairing.unused,
            warnings=_warnings(scores),
            notes=(*job.pairing.notes, *_notes(job, layout, decisions, made)),
            adapter=_describe(job, layout, made),
        )
        for path, name in companion_files(job.models["finetuned"]):
            output.copy_file(path, name)
        output.write_file(CARD_FILE, model_card(report, job.models).encode())
        output.write_file(REPORT_FILE, report.to_json().encode())
        # Without its configuration nothing takes the directory for an adapter, so that it comes last.
        output.write_file(ADAPTER_CONFIG, write_settings(job, layout, made.rank))
        output.finish()
    except BaseException:
        output.close()
        raise
    return report


def adapters_by_role(job: Job) -> dict[str, Adapter]:
    """The adapters of a job, the fine-tuned one first."""
    found = ((role, job.models.get(role)) for role in ("finetuned", "safe"))
    return {role: model for role, model in found if isinstance(model, Adapter)}


def make_weights(job: Job, layout: AdapterLayout) -> tuple[AdapterTensors, bytes]:
    """Makes the tensors of an adapter and the file that holds them; both depend on nothing but the arguments."""
    from safetensors.torch import save

    from .tensors import make_tensors

    configuration = job.configuration
    made = make_tensors(
        job.models,
        layout,
        dtype=configuration.dtype,
        adapter_rank=configuration.adapter_rank,
        compat=configuration.compat,
        allow_nonfinite=configuration.allow_nonfinite,
    )
    return made, save(dict(made.tensors), metadata={"format": "pt"})


def write_settings(job: Job, layout: AdapterLayout, rank: int) -> bytes:
    """The adapter_config.json of a merged adapter of that rank."""
    # All modules of the aligned model that have a matrix, by the names that PEFT knows the adapted ones by.
    known = {weight.row.name: weight.module for weight in layout.weights}
    modules = [
        known.get(row.name, row.name.rpartition(".")[0]) for row in job.pairing.rows if len(row.shape) == 2
    ]
    settings = adapter_settings(job.models["finetuned"].config, layout, rank, modules)
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def _score(job: Job, scores: dict[str, Score], tell: ProgressCallback) -> None:
    """Adds the scores of all rows that are to be analysed."""
    total = len(job.analysed)
    # Loading torch takes a while before the first score is there.
    tell(ProgressEvent("analysis", 0, total, ""))
    for name, score in score_rows(
        job.models,
        job.pairing.rows,
        delta_reference=job.configuration.delta_reference,
        device=job.configuration.device,
        allow_nonfinite=job.configuration.allow_nonfinite,
    ):
        scores[name] = score
        tell(ProgressEvent("analysis", len(scores), total, name))


def adapter_document(job: Job, layout: AdapterLayout) -> dict[str, Any]:
    """What tensor_reports needs of a plan: the tensors of the aligned model that the adapter speaks of."""
    spoken_of = {row.name for row in layout.rows} | {row.name for row in job.analysed}
    dtype = DTYPES.get(job.configuration.dtype, "F32")
    return {
        "file": ADAPTER_WEIGHTS,
        "tensors": [{"name": row.name, "dtype": dtype} for row in job.pairing.rows if row.name in spoken_of],
    }


def _describe(job: Job, layout: AdapterLayout, made: AdapterTensors) -> dict[str, Any]:
    """What the report says of the adapter beside its tensors."""
    return {
        "combination": job.configuration.compat or "concatenation",
        "rank": made.rank,
        "modules": len(layout.weights),
        "full_tensors": [tensor.key for tensor in layout.tensors],
        "ranks": {weight.row.name: weight.rank for weight in layout.weights},
        "relative_errors": dict(made.errors),
    }


def _notes(
    job: Job, layout: AdapterLayout, decisions: Mapping[str, Decision], made: AdapterTensors
) -> list[str]:
    """What a person should know of the adapter, in sentences."""
    notes = []
    configuration = job.configuration
    if "safe" not in job.models:
        notes.append(
            f"no safe model was given, so the aligned one plays it: merging shrinks a module's update "
            f"to {configuration.alpha:g} of itself"
        )
    if not any(decision.merge for decision in decisions.values()):
        notes.append("no tensor was merged: the output is the fine-tuned adapter in another form")
    errors = made.errors.values()
    if configuration.compat is not None and errors:
        notes.append(
            f"merged modules hold PEFT's linear combination, Σ√(w·s)·A and Σ√(w·s)·B, for the sake of published "
            f"runs: its cross terms make it differ from α·Δ_finetuned + (1-α)·Δ_safe by {_percent(errors)}"
        )
    elif errors:
        notes.append(
            f"{len(made.errors)} of {len(layout.weights)} modules were truncated to rank "
            f"{configuration.adapter_rank}, with errors of {_percent(errors)}; safemerge_report.json lists them"
        )
    return notes


def _percent(errors: Iterable[float]) -> str:
    errors = list(errors)
    return f"{statistics.median(errors):.2%} of its norm in the median and {max(errors):.2%} at most"


def _warnings(scores: Mapping[str, Score]) -> tuple[ModuleWarning, ...]:
    found = ((name, rounding_warning(name, score)) for name, score in scores.items())
    return tuple(ModuleWarning(name, message) for name, message in found if message is not None)


def input_bytes(job: Job, layout: AdapterLayout) -> int:
    """Bytes of the tensors that the adapter is made from."""
    read = {
        (product.source, key)
        for weight in layout.weights
        for product in weight.products
        for key in (product.a, product.b)
    } | {(term.operand.source, term.operand.tensor) for tensor in layout.tensors for term in tensor.terms}
    return sum(job.models[source].headers.tensor(key).nbytes for source, key in read)


def adapter_bytes(job: Job, layout: AdapterLayout) -> int:
    """Bytes of the tensors of the merged adapter; its header is not counted."""
    configuration = job.configuration
    rank = max(weight.rank for weight in layout.weights)
    if configuration.compat is not None:
        rank = max(product.rank for weight in layout.weights for product in weight.products)
    elif configuration.adapter_rank is not None:
        rank = min(rank, configuration.adapter_rank)
    elements = rank * sum(sum(weight.row.shape) for weight in layout.weights)
    elements += sum(math.prod(tensor.row.shape) for tensor in layout.tensors)
    return elements * (2 if configuration.dtype in ("bfloat16", "float16") else 4)


def _device(job: Job) -> str | None:
    if job.scores is not None:
        return job.scores.device
    return device_name(job.configuration.device) if job.analysed else None
