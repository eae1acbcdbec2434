"""What a report says of every output tensor, and counts of them per module type."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import eq
from typing import TYPE_CHECKING, overload

import msgspec

from ..analysis.score import Score
from ..decision import Decision
from ..pairing.row import Row
from ..plan.operation import Operation
from ..plan.pieces import Pieces
from ..printable import printable
from .expert_lines import expert_label, is_of_expert
from .modules import NOT_MEASURED, ModuleRecords, ModuleReport, measured, measurements

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "ModuleCount",
    "TensorReport",
    "TensorReports",
    "count_experts",
    "count_modules",
    "module_table",
    "tensor_report",
]


class TensorReport(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One output tensor: what was measured, what was decided and why.

    Attributes:
        name: Its name.
        file: The output file that holds it.
        dtype: Its dtype in the output.
        shape: Its shape.
        module_type: "q_proj", "norm", …
        layer: The layer it belongs to, or None.
        operation: What it is made of, e.g. `linear: 0.8 finetuned + 0.2 safe` or `copy: finetuned`; with adapters
            `linear: aligned + 1.6·B·A(finetuned) + 0.4·B·A(safe)`.
        reason: Why.
        merged: Whether it was merged, or changed as the recipe says.
        copied: Whether it is one input tensor as it is.
        analysed: Whether it was scored.
        rho: ρ; None where it was not computed or is undefined.
        rho_null: The ρ expected of a random update; None likewise.
        v_norm: ‖V‖ = ‖W_aligned - W_base‖ (Frobenius); None where not analysed.
        delta_norm: ‖Δ‖ (Frobenius); None where not analysed.
        weight_norm: ‖W_aligned‖ (Frobenius); None where not analysed.
        v_rounding: Relative error of V that the dtypes' rounding predicts; None if not analysed, or V is 0.
        cos_v_delta: ⟨V, Δ⟩ / (‖V‖ ‖Δ‖); None where not analysed or undefined.
        rho_low: Lower end of the interval that holds ρ; ρ where that is exact, None where there is none.
        rho_high: Upper end of it.
        columns: Random columns that ρ was estimated from; 0 where it is exact, None where not analysed.
        null_sd: Standard deviation of log ρ by chance; None where not analysed or undefined.
        encoding: How it is stored, in words, if it is quantised.
        survival: Of a tensor that was quantised again, how large a change is stored, against the one that was
            asked for, ‖Q(W') - W‖ / ‖W' - W‖; None where nothing was, or nothing was to change.
        retained: How much of the change is stored: the part of that which lies along it,
            ⟨Q(W') - W, W' - W⟩ / ‖W' - W‖²; None likewise.
        modules: The same of each expert, of a tensor that holds many and was analysed; else None.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    module_type: str
    layer: str | None
    operation: str
    reason: str
    merged: bool
    copied: bool
    analysed: bool
    rho: float | None = None
    rho_null: float | None = None
    v_norm: float | None = None
    delta_norm: float | None = None
    weight_norm: float | None = None
    v_rounding: float | None = None
    cos_v_delta: float | None = None
    rho_low: float | None = None
    rho_high: float | None = None
    columns: int | None = None
    null_sd: float | None = None
    encoding: str | None = None
    survival: float | None = None
    retained: float | None = None
    modules: ModuleRecords | None = None

    def module_reports(self) -> Iterator[ModuleReport]:
        """The tensor as one module, analysed or not; or the many that it holds."""
        if self.modules is not None:
            return self.modules.reports(self.layer)
        return iter((self._as_module(),))

    def _as_module(self) -> ModuleReport:
        return ModuleReport(
            self.name, self.module_type, self.layer, self.merged, self.reason, *measurements(self)
        )


class ModuleCount(msgspec.Struct, frozen=True):
    """How the modules of one type fared, and tensors that are none.

    Attributes:
        module_type: "q_proj", "norm", …
        tensors: How many there are; each expert's matrix counts, wherever it is stored.
        analysed: How many were scored.
        merged: How many were merged.
        kept: How many were not.
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


class TensorReports(Sequence[TensorReport]):
    """The records of all output tensors, made when they are looked at: models have a hundred thousand of them."""

    def __init__(self, count: int, make: Callable[[int, int], Iterator[TensorReport]]) -> None:
        """Holds how they are made.

        Args:
            count: How many there are.
            make: Makes those from one number on until before another.
        """
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[TensorReport]:
        return self._make(0, self._count)

    @overload
    def __getitem__(self, index: int) -> TensorReport: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TensorReport, ...]: ...
    def __getitem__(self, index: int | slice) -> TensorReport | tuple[TensorReport, ...]:
        numbers = range(self._count)[index]
        if isinstance(numbers, int):
            return next(self._make(numbers, numbers + 1))
        if numbers.step == 1:
            return tuple(self._make(numbers.start, numbers.stop))
        return tuple(self[number] for number in numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<records of {self._count} tensors>"


def tensor_report(
    row: Row,
    *,
    file: str,
    dtype: str,
    operation: Operation | Pieces,
    description: str,
    decision: Decision,
    score: Score | None,
    survival: float | None = None,
    retained: float | None = None,
    modules: ModuleRecords | None = None,
) -> TensorReport:
    """Joins what the stages found out about one tensor.

    Args:
        row: Its row.
        file: The output file that holds it.
        dtype: Its dtype in the output.
        operation: What it is made of.
        description: operation.describe(), which many tensors share.
        decision: What was decided, and why.
        score: Its score, or None.
        survival: How large a change is stored, if it was quantised again.
        retained: How much of its change is, likewise.
        modules: The experts that it holds, or None.
    """
    return TensorReport(
        row.name,
        file,
        dtype,
        row.shape,
        row.module_type,
        row.layer,
        description,
        decision.reason,
        decision.merge,
        operation.is_copy,
        row.analysed,
        *(NOT_MEASURED if score is None else measured(score)),
        encoding=row.encoded.format if row.encoded is not None and row.encoded.kept else None,
        survival=survival,
        retained=retained,
        modules=modules,
    )


def count_modules(tensors: Iterable[TensorReport]) -> tuple[ModuleCount, ...]:
    """Counts modules, and tensors that are none, per module type, in the order of first appearance."""
    groups: dict[str, _Group] = {}
    for tensor in tensors:
        if tensor.modules is None:
            _group(groups, tensor.module_type).add(tensor, analysed=tensor.analysed)
            continue
        for module in tensor.modules.reports(tensor.layer):
            _group(groups, module.module_type).add(module, analysed=True)
    return tuple(group.count(module_type) for module_type, group in groups.items())


def count_experts(tensors: Iterable[TensorReport]) -> tuple[ModuleCount, ...]:
    """Counts the experts' matrices that were analysed, per layer, in the order of first appearance.

    A model may have a hundred thousand of them, so that counts per module type say little of any one layer.
    """
    groups: dict[str, _Group] = {}
    for tensor in tensors:
        if not tensor.analysed or tensor.layer is None:
            continue
        if tensor.modules is None:
            if is_of_expert(tensor.module_type):
                _group(groups, tensor.layer).add(tensor, analysed=True)
            continue
        for module in tensor.modules.reports(tensor.layer):
            if is_of_expert(module.module_type):
                _group(groups, tensor.layer).add(module, analysed=True)
    return tuple(group.count(expert_label(layer)) for layer, group in groups.items())


class _Group:
    """What is counted of one module type."""

    __slots__ = ("_analysed", "_merged", "_nulls", "_rhos", "_tensors")

    def __init__(self) -> None:
        self._tensors = self._analysed = self._merged = 0
        self._rhos: list[float] = []
        self._nulls: list[float] = []

    def add(self, module: TensorReport | ModuleReport, *, analysed: bool) -> None:
        self._tensors += 1
        self._analysed += analysed
        self._merged += module.merged
        if module.rho is not None:
            self._rhos.append(module.rho)
        if module.rho_null is not None:
            self._nulls.append(module.rho_null)

    def count(self, module_type: str) -> ModuleCount:
        return ModuleCount(
            module_type=module_type,
            tensors=self._tensors,
            analysed=self._analysed,
            merged=self._merged,
            kept=self._tensors - self._merged,
            median_rho=_median(self._rhos),
            median_rho_null=_median(self._nulls),
        )


def _group(groups: dict[str, _Group], module_type: str) -> _Group:
    if module_type not in groups:
        groups[module_type] = _Group()
    return groups[module_type]


def module_table(counts: Iterable[ModuleCount], experts: Iterable[ModuleCount] = ()) -> Table:
    """Makes a rich table: a line per module type that was analysed or merged, one for the rest, the sum.

    Args:
        counts: Counts per module type.
        experts: Those of count_experts, which are among the others; their lines follow on the types'.
    """
    from rich import box
    from rich.table import Table

    counts = list(counts)
    shown = [count for count in counts if count.analysed or count.merged]
    rest = sum(count.tensors for count in counts) - sum(count.tensors for count in shown)
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, padding=(0, 1, 0, 0))
    kept = sum(count.kept for count in counts)
    # Where there is no room, names give way, and no number.
    table.add_column("module type", footer="all", overflow="fold", min_width=8)
    for title, footer in (
        ("analysed", str(sum(count.analysed for count in counts))),
        ("merged", str(sum(count.merged for count in counts))),
        ("kept", str(kept)),
        ("median ρ", ""),
        ("median ρ_null", ""),
    ):
        table.add_column(title, footer=footer, justify="right", no_wrap=True)
    for count in shown:
        table.add_row(*_cells(count))
    if rest:
        table.add_row("not analysed", "0", "0", str(rest), "", "", style="dim")
    for count in experts:
        # In brackets, since the types' lines have counted them already.
        name, *numbers = _cells(count)
        table.add_row(name, *(f"({number})" for number in numbers[:3]), *numbers[3:])
    return table


def _cells(count: ModuleCount) -> tuple[str, ...]:
    return (
        printable(count.module_type),
        str(count.analysed),
        str(count.merged),
        str(count.kept),
        _three_digits(count.median_rho),
        _three_digits(count.median_rho_null),
    )


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _three_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
