"""Stage 7, report: what happened to every tensor and why, as data for JSON, tables and card."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from ..analysis.scores import Score
from ..decision import Decision
from ..documents import write_document
from ..errors import SafemergeError
from ..pairing.rows import Row
from ..plan.shards import Blend, compose
from ..recipes.safemerge.configuration import MergeConfiguration

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "MergeReport",
    "ModuleCount",
    "ModuleWarning",
    "TensorReport",
    "count_modules",
    "module_table",
    "tensor_reports",
]

VERSION = 1
"""Version of the JSON that MergeReport.to_json writes."""


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One output tensor: what was measured, what was decided and why.

    Attributes:
        name: Its name, the fine-tuned model's.
        file: The output file that holds it.
        dtype: Its dtype in the output.
        shape: Its shape.
        module_type: "q_proj", "norm", …
        layer: The layer it belongs to, or None.
        analysed: Whether it was scored.
        merged: Whether it was merged; otherwise it is the fine-tuned tensor.
        reason: Why.
        operation: What it is made of, e.g. `linear: 0.8 finetuned + 0.2 safe` or `copy: finetuned`; with adapters
            `linear: aligned + 1.6·B·A(finetuned) + 0.4·B·A(safe)`.
        rho: ρ; None where it was not computed or is undefined.
        rho_null: The ρ expected of a random update; None likewise.
        v_norm: ‖V‖ = ‖W_aligned - W_base‖ (Frobenius); None where not analysed.
        delta_norm: ‖Δ‖ (Frobenius); None where not analysed.
        weight_norm: ‖W_aligned‖ (Frobenius); None where not analysed.
        v_rounding: Relative error of V that the dtypes' rounding predicts; None if not analysed, or V is 0.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    module_type: str
    layer: str | None
    analysed: bool
    merged: bool
    reason: str
    operation: str
    rho: float | None = None
    rho_null: float | None = None
    v_norm: float | None = None
    delta_norm: float | None = None
    weight_norm: float | None = None
    v_rounding: float | None = None


_TENSOR_FIELDS = tuple(field.name for field in fields(TensorReport))


@dataclass(frozen=True, slots=True)
class ModuleCount:
    """How the tensors of one module type fared.

    Attributes:
        module_type: "q_proj", "norm", …
        tensors: How many there are.
        analysed: How many were scored.
        merged: How many were merged.
        kept: How many are the fine-tuned tensor.
        median_rho: Median ρ of those that have one.
        median_rho_null: Median ρ_null of those that have one.
    """

    module_type: str
    tensors: int
    analysed: int
    merged: int
    kept: int
    median_rho: float | None
    median_rho_null: float | None


@dataclass(frozen=True, slots=True)
class ModuleWarning:
    """Something to mistrust in one tensor, in a sentence."""

    tensor: str
    message: str


@dataclass(frozen=True, slots=True)
class MergeReport:
    """A finished merge.

    Attributes:
        output: The output directory, absolute.
        configuration: What was asked for.
        inputs: By role: "spec" (as typed), "path", and "files" with size, mtime_ns and header_digest of each.
        versions: Versions of this package, Python and, where they took part, torch and numpy.
        device: Where the scores were computed, or None if there was nothing to score.
        seconds: "analysis" and "merge" (which overlap) and "total".
        bytes_read: Bytes that the merge read; the analysis is not counted.
        bytes_written: Bytes of weights written in this run.
        peak_memory_bytes: Largest resident memory of the process so far, mapped pages included.
        shards: The engine's facts of each output file.
        tensors: Every output tensor, in the order of the files.
        unused: By role, tensors that no output tensor is made from or compared with.
        warnings: What to mistrust, by tensor.
        notes: What else a person should know.
        adapter: If the output is an adapter: "combination" ("concatenation" or "peft-linear"), "rank" (of all
            its modules), "modules" (how many), "ranks" (of each weight's update before truncation and padding),
            "relative_errors" (Frobenius, of those that are not exact) and "full_tensors" (keys). Else None.
    """

    output: str
    configuration: MergeConfiguration
    inputs: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    device: str | None
    seconds: Mapping[str, float]
    bytes_read: int
    bytes_written: int
    peak_memory_bytes: int
    shards: tuple[Mapping[str, Any], ...]
    tensors: tuple[TensorReport, ...]
    unused: Mapping[str, tuple[str, ...]]
    warnings: tuple[ModuleWarning, ...]
    notes: tuple[str, ...]
    adapter: Mapping[str, Any] | None = None

    @property
    def counts(self) -> tuple[ModuleCount, ...]:
        """Counts per module type, in the order of first appearance."""
        return count_modules(self.tensors)

    @property
    def merged(self) -> int:
        """How many tensors were merged."""
        return sum(tensor.merged for tensor in self.tensors)

    def table(self) -> Table:
        """The counts per module type as a rich table."""
        return module_table(self.counts)

    def to_json(self) -> str:
        """Writes the report as JSON that from_json reads."""
        document = {
            "version": VERSION,
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "configuration": self.configuration.to_dict(),
            "counts": [asdict(count) for count in self.counts],
            # Not asdict, which copies deeply: there may be a hundred thousand of them.
            "tensors": [{name: getattr(tensor, name) for name in _TENSOR_FIELDS} for tensor in self.tensors],
            "warnings": [asdict(warning) for warning in self.warnings],
        }
        return write_document(document, levels=2)

    @classmethod
    def from_json(cls, text: str) -> MergeReport:
        """Reads what to_json wrote.

        Raises:
            SafemergeError: The text is not such a report.
        """
        try:
            document = json.loads(text)
            if document["version"] != VERSION:
                raise SafemergeError(
                    f"the report is of version {document['version']!r}, this program reads version {VERSION}"
                )
            known = [field.name for field in fields(cls) if field.name != "adapter"]
            values = {name: document[name] for name in known}
            # Reports of early versions know of no adapters.
            values["adapter"] = document.get("adapter")
            values["configuration"] = MergeConfiguration.from_dict(document["configuration"])
            values["tensors"] = tuple(
                TensorReport(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in document["tensors"]
            )
            values["warnings"] = tuple(ModuleWarning(**warning) for warning in document["warnings"])
            values["unused"] = {role: tuple(names) for role, names in document["unused"].items()}
            values["shards"], values["notes"] = tuple(document["shards"]), tuple(document["notes"])
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SafemergeError(
                f"this is not a report of a merge ({type(error).__name__}: {error})"
            ) from error


def tensor_reports(
    planned: Iterable[Mapping[str, Any]],
    rows: Sequence[Row],
    scores: Mapping[str, Score],
    decisions: Mapping[str, Decision],
    blend: Blend,
) -> tuple[TensorReport, ...]:
    """Joins what the stages found out about each tensor.

    Args:
        planned: The plan's shards.
        rows: The rows of the pairing.
        scores: Scores of the analysed rows.
        decisions: The decision for every row.
        blend: What merged tensors are made of, and where the others come from.

    Returns:
        One record per output tensor, in the order of the plan.
    """
    by_name = {row.name: row for row in rows}
    reports = []
    for shard in planned:
        for tensor in shard["tensors"]:
            row, decision = by_name[tensor["name"]], decisions[tensor["name"]]
            score = scores.get(row.name)
            reports.append(
                TensorReport(
                    name=row.name,
                    file=shard["file"],
                    dtype=tensor["dtype"],
                    shape=row.shape,
                    module_type=row.module_type,
                    layer=row.layer,
                    analysed=row.analysed,
                    merged=decision.merge,
                    reason=decision.reason,
                    operation=compose(row, decision, blend).describe(),
                    **(_measured(score) if score is not None else {}),
                )
            )
    return tuple(reports)


def count_modules(tensors: Iterable[TensorReport]) -> tuple[ModuleCount, ...]:
    """Counts tensors per module type, in the order of first appearance."""
    groups: dict[str, list[TensorReport]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.module_type, []).append(tensor)
    return tuple(
        ModuleCount(
            module_type=module_type,
            tensors=len(group),
            analysed=sum(tensor.analysed for tensor in group),
            merged=sum(tensor.merged for tensor in group),
            kept=sum(not tensor.merged for tensor in group),
            median_rho=_median(tensor.rho for tensor in group),
            median_rho_null=_median(tensor.rho_null for tensor in group),
        )
        for module_type, group in groups.items()
    )


def module_table(counts: Iterable[ModuleCount]) -> Table:
    """Makes a rich table: a line per module type that was analysed or merged, one for the rest, the sum."""
    from rich import box
    from rich.table import Table

    counts = list(counts)
    shown = [count for count in counts if count.analysed or count.merged]
    rest = sum(count.tensors for count in counts) - sum(count.tensors for count in shown)
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    kept = sum(count.kept for count in counts)
    table.add_column("module type", footer="all", no_wrap=True)
    for title, footer in (
        ("analysed", str(sum(count.analysed for count in counts))),
        ("merged", str(sum(count.merged for count in counts))),
        ("kept", str(kept)),
        ("median ρ", ""),
        ("median ρ_null", ""),
    ):
        table.add_column(title, footer=footer, justify="right", no_wrap=True)
    for count in shown:
        table.add_row(
            count.module_type,
            str(count.analysed),
            str(count.merged),
            str(count.kept),
            _three_digits(count.median_rho),
            _three_digits(count.median_rho_null),
        )
    if rest:
        table.add_row("not analysed", "0", "0", str(rest), "", "", style="dim")
    return table


def _measured(score: Score) -> dict[str, float | None]:
    """The fields of a report that a score fills; JSON has no NaN and no infinity, so both become None."""
    names = ("rho", "rho_null", "v_norm", "delta_norm", "weight_norm", "v_rounding")
    values = {name: getattr(score, name) for name in names}
    return {
        name: value if value is not None and math.isfinite(value) else None for name, value in values.items()
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _three_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
