"""What a report says of modules: one of most tensors, and many of a tensor that holds experts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec

from ..analysis.score import Score
from ..decision import Decision
from ..pairing.module import modules_of
from ..pairing.row import Row

__all__ = [
    "NOT_MEASURED",
    "Measured",
    "ModuleRecords",
    "ModuleReport",
    "measured",
    "measurements",
    "module_records",
]

Column = tuple[float | None, ...]


class Measured(NamedTuple):
    """What was measured of a module: fields of its score, of its record, and columns of many, all in this order."""

    rho: float | None
    rho_null: float | None
    v_norm: float | None
    delta_norm: float | None
    weight_norm: float | None
    v_rounding: float | None
    cos_v_delta: float | None
    rho_low: float | None
    rho_high: float | None
    columns: int | None
    null_sd: float | None


NOT_MEASURED = Measured(*(None,) * len(Measured._fields))
"""That nothing was."""

_values = attrgetter(*Measured._fields)


class ModuleReport(msgspec.Struct, frozen=True, gc=False):
    """One module: what was measured, what was decided and why.

    Attributes:
        name: Its name.
        module_type: "q_proj", "experts.gate_proj", …
        layer: The layer it belongs to, or None.
        merged: Whether it was merged.
        reason: Why.
        rho: ρ; None where it was not computed or is undefined.
        rho_null: The ρ expected of a random update; None likewise.
        v_norm: ‖V‖ (Frobenius).
        delta_norm: ‖Δ‖ (Frobenius).
        weight_norm: ‖W_aligned‖ (Frobenius).
        v_rounding: Relative error of V that the dtypes' rounding predicts.
        cos_v_delta: ⟨V, Δ⟩ / (‖V‖ ‖Δ‖).
        rho_low: Lower end of the interval that holds ρ; ρ where that is exact.
        rho_high: Upper end of it.
        columns: Random columns that ρ was estimated from; 0 where it is exact.
        null_sd: Standard deviation of log ρ by chance.
    """

    name: str
    module_type: str
    layer: str | None
    merged: bool
    reason: str
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


class ModuleRecords(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The modules of a tensor that holds many experts, in columns: a model has tens of thousands of them.

    In every column the first expert's parts come first, then the second's.

    Attributes:
        prefix: What their names begin with.
        parts: What they end with: the name of a module is prefix, the expert's number and a part, between dots.
        module_types: The type of each part.
        merged: Whether each was merged.
        reason: Why.
        rho: As for one module; a column is empty where nothing was measured.
        rho_null: Likewise.
        v_norm: Likewise.
        delta_norm: Likewise.
        weight_norm: Likewise.
        v_rounding: Likewise.
        cos_v_delta: Likewise.
        rho_low: Likewise.
        rho_high: Likewise.
        columns: Likewise.
        null_sd: Likewise.
    """

    prefix: str
    parts: tuple[str, ...]
    module_types: tuple[str, ...]
    merged: tuple[bool, ...]
    reason: tuple[str, ...]
    rho: Column = ()
    rho_null: Column = ()
    v_norm: Column = ()
    delta_norm: Column = ()
    weight_norm: Column = ()
    v_rounding: Column = ()
    cos_v_delta: Column = ()
    rho_low: Column = ()
    rho_high: Column = ()
    columns: tuple[int | None, ...] = ()
    null_sd: Column = ()

    def reports(self, layer: str | None) -> Iterator[ModuleReport]:
        """The modules one by one; they belong to the tensor's layer."""
        columns = _values(self)
        for place, (merged, reason) in enumerate(zip(self.merged, self.reason, strict=True)):
            expert, part = divmod(place, len(self.parts))
            yield ModuleReport(
                f"{self.prefix}.{expert}.{self.parts[part]}",
                self.module_types[part],
                layer,
                merged,
                reason,
                *(column[place] if column else None for column in columns),
            )


def module_records(
    row: Row, decisions: Mapping[str, Decision], scores: Mapping[str, Score]
) -> ModuleRecords | None:
    """Joins what the stages found out about the experts that a tensor holds.

    Args:
        row: The tensor's row.
        decisions: What was decided, by module name.
        scores: The scores by module name; may be empty.

    Returns:
        None for a tensor that holds none, or whose experts are not analysed.
    """
    if row.slices is None or not row.analysed:
        return None
    names = [module.name for module in modules_of(row)]
    made = [decisions[name] for name in names]
    values = [measured(score) for name in names if (score := scores.get(name)) is not None]
    columns = tuple(zip(*values, strict=True)) if len(values) == len(names) else ()
    parts = row.slices.stack.parts
    return ModuleRecords(
        row.slices.prefix,
        tuple(part.name for part in parts),
        tuple(part.module_type for part in parts),
        tuple(decision.merge for decision in made),
        tuple(decision.reason for decision in made),
        *columns,
    )


def measured(score: Score) -> Measured:
    """What a score says of a module; JSON has no NaN and no infinity, so both become None."""
    return Measured(*map(_finite, _values(score)))


def measurements(record: object) -> Measured:
    """What a record that has these fields says of a module."""
    return Measured(*_values(record))


def _finite(value: Any) -> Any:
    return value if value is not None and math.isfinite(value) else None
