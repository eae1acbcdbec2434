"""A merged adapter as an output: its tensors in one file, and the configuration that PEFT reads."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .... import _engine
from ....analysis.score import Score
from ....checkpoint.adapter import ADAPTER_WEIGHTS, Adapter
from ....checkpoint.adapter_config import ADAPTER_CONFIG
from ....checkpoint.model import Model
from ....decision import Decision, decision_of
from ....errors import SettingError
from ....execution.executor import Executor
from ....execution.local import LocalExecutor
from ....execution.written import Written, WrittenShard
from ....pairing.rows import Pairing
from ....plan.pieces import compose_row
from ....progress import ProgressCallback, ProgressEvent
from ....report.modules import module_records
from ....report.tensors import TensorReport, tensor_report
from ....settings import DTYPES, RunSettings
from ..settings import SafemergeSettings
from .layout import AdapterLayout
from .settings import adapter_settings

if TYPE_CHECKING:
    from .tensors import AdapterTensors

__all__ = ["AdapterContents"]


@dataclass(frozen=True, slots=True)
class AdapterContents:
    """A merged adapter.

    Attributes:
        models: The models by role.
        pairing: The rows of the aligned model.
        adapters: Those that are merged, the fine-tuned one first.
        layout: What the adapter consists of.
        decisions: The decision for every module, and for every row that has none, by name.
        settings: What was asked for.
    """

    models: Mapping[str, Model]
    pairing: Pairing
    adapters: Sequence[Adapter]
    layout: AdapterLayout
    decisions: Mapping[str, Decision]
    settings: SafemergeSettings
    _made: list[AdapterTensors] = field(default_factory=list, compare=False, repr=False)

    @property
    def weight_files(self) -> Sequence[str]:
        """The one file."""
        return (ADAPTER_WEIGHTS,)

    @property
    def bytes_read(self) -> int:
        """Bytes of the tensors that the adapter is made from."""
        layout = self.layout
        read = (
            {
                (product.source, key)
                for weight in layout.weights
                for product in weight.products
                for key in (product.a, product.b)
            }
            | {
                (share.product.source, key)
                for weight in layout.stacked
                for share in weight.shares
                for key in (share.product.a, share.product.b)
            }
            | {
                (term.operand.source, term.operand.tensor)
                for tensor in layout.tensors
                for term in tensor.terms
            }
        )
        return sum(self.models[source].headers.tensor(key).nbytes for source, key in read)

    @property
    def bytes_written(self) -> int:
        """Bytes of the tensors of the merged adapter; its header is not counted."""
        layout, settings = self.layout, self.settings
        ranks = [weight.rank for weight in layout.weights] + [weight.rank for weight in layout.stacked]
        rank = max(ranks)
        if settings.compat is not None:
            rank = max(product.rank for weight in layout.weights for product in weight.products)
        elif settings.adapter_rank is not None:
            rank = min(rank, settings.adapter_rank)
        elements = rank * sum(sum(weight.row.shape) for weight in layout.weights)
        elements += rank * sum(weight.experts * (weight.inputs + weight.outputs) for weight in layout.stacked)
        elements += sum(math.prod(tensor.row.shape) for tensor in layout.tensors)
        return elements * (2 if settings.dtype in ("bfloat16", "float16") else 4)

    def memory(self, run: RunSettings) -> int:
        """The tensors and the file that they are put into."""
        return 2 * self.bytes_written

    def make(self) -> tuple[AdapterTensors, bytes]:
        """Makes the tensors and the file that holds them; both depend on nothing but the attributes."""
        from safetensors.torch import save

        from .tensors import make_tensors

        settings = self.settings
        made = make_tensors(
            self.models,
            self.layout,
            dtype=settings.dtype,
            adapter_rank=settings.adapter_rank,
            compat=settings.compat,
            allow_nonfinite=settings.allow_nonfinite,
        )
        return made, save(dict(made.tensors), metadata={"format": "pt"})

    def write(
        self,
        directory: _engine.JobDirectory,
        run: RunSettings,
        tell: ProgressCallback,
        executor: Executor,
    ) -> Written:
        """Makes the file and writes it."""
        if not isinstance(executor, LocalExecutor):
            raise SettingError(
                "the output is an adapter, which one process makes at once; leave the executor out, or ask for "
                "--output-format checkpoint"
            )
        started = time.perf_counter()
        made, weights = self.make()
        self._made.append(made)
        tell(ProgressEvent("merge", len(weights), len(weights), ADAPTER_WEIGHTS))
        directory.write_file(ADAPTER_WEIGHTS, weights)
        seconds = time.perf_counter() - started
        return Written(
            (WrittenShard(ADAPTER_WEIGHTS, len(weights), seconds, "buffered"),), self.bytes_read, seconds
        )

    def handed_out(self) -> None:
        """Nothing: it has no plan."""
        return None

    def small_files(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """adapter_config.json."""
        yield ADAPTER_CONFIG, (self.configuration(self._made[-1].rank),)

    def configuration(self, rank: int) -> bytes:
        """The adapter_config.json of the adapter, whose products have that rank."""
        # All modules of the aligned model, by the names that PEFT knows the adapted ones by.
        known = {weight.row.name: weight.module for weight in self.layout.weights}
        modules = [known.get(row.name, row.name.rpartition(".")[0]) for row in self.pairing.rows]
        settings = adapter_settings(self.adapters, self.layout, rank, modules)
        return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()

    def tensors(
        self, scores: Mapping[str, Score], written: Written | None = None
    ) -> tuple[TensorReport, ...]:
        """A record per tensor of the aligned model that the adapter speaks of."""
        spoken_of = {row.name for row in self.layout.rows}
        dtype = DTYPES.get(self.settings.dtype, "F32")
        reports = []
        for row in self.pairing.rows:
            if row.name not in spoken_of and not row.analysed:
                continue
            operation = compose_row(self.layout.composer, row, self.decisions)
            reports.append(
                tensor_report(
                    row,
                    file=ADAPTER_WEIGHTS,
                    dtype=dtype,
                    operation=operation,
                    description=operation.describe(),
                    decision=decision_of(row, self.decisions),
                    score=scores.get(row.name),
                    modules=module_records(row, self.decisions, scores),
                )
            )
        return tuple(reports)

    def adapter(self) -> Mapping[str, Any]:
        """What the report says of the adapter beside its tensors."""
        made = self._made[-1]
        return {
            "combination": self.settings.compat or "concatenation",
            "rank": made.rank,
            "modules": len(self.layout.weights),
            "parameters": [weight.parameter for weight in self.layout.stacked],
            "full_tensors": [tensor.key for tensor in self.layout.tensors],
            "ranks": {weight.row.name: weight.rank for weight in self.layout.weights}
            | {weight.parameter: weight.rank for weight in self.layout.stacked},
            "relative_errors": dict(made.errors),
        }

    def notes(self) -> Sequence[str]:
        """What a person should know of the adapter, in sentences."""
        notes = []
        if not any(decision.merge for decision in self.decisions.values()):
            notes.append("no tensor was merged: the output is the fine-tuned adapter in another form")
        if self.layout.stacked and any(adapter.expert_layout != "peft" for adapter in self.adapters):
            notes.append(
                "the output's LoRA of fused experts is laid out as PEFT does it, whatever the inputs' layout: "
                "read it with no other expert_lora_layout"
            )
        errors = self._made[-1].errors if self._made else {}
        if self.settings.compat is not None and errors:
            notes.append(
                f"merged modules hold PEFT's linear combination, Σ√(w·s)·A and Σ√(w·s)·B, for the sake of published "
                f"runs: its cross terms make it differ from α·Δ_finetuned + (1-α)·Δ_safe by {_percent(errors.values())}"
            )
        elif errors:
            count = len(self.layout.weights) + len(self.layout.stacked)
            notes.append(
                f"{len(errors)} of {count} modules were truncated to rank "
                f"{self.settings.adapter_rank}, with errors of {_percent(errors.values())}; safemerge_report.json "
                f"lists them"
            )
        return notes


def _percent(errors: Iterable[float]) -> str:
    errors = list(errors)
    return f"{statistics.median(errors):.2%} of its norm in the median and {max(errors):.2%} at most"
