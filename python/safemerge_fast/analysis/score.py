"""One module's score: its numbers, and how JSON holds them. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ..errors import AnalysisError

__all__ = [
    "SCORE_FIELDS",
    "Score",
    "Undefined",
    "expect_keys",
    "finite",
    "malformed",
    "read_number",
    "read_score",
    "signed_cosine",
    "write_score",
]


@dataclass(frozen=True, slots=True)
class Score:
    """How far one module's update lies in the safety subspace.

    With V = W_aligned - W_base and Δ = W_finetuned - W_reference, both (d_out, d_in); all norms are Frobenius
    norms.

    Attributes:
        rho: ρ = cos(V Vᵀ Δ, Δ), from 0 to 1, or its estimate; None where it is undefined.
        rho_null: The ρ expected of a random update, from V alone: ‖V‖² / (√d_out ‖V Vᵀ‖); None where
            undefined.
        v_norm: ‖V‖.
        delta_norm: ‖Δ‖.
        weight_norm: ‖W_aligned‖.
        v_rounding: Relative error of V that the rounding of both checkpoints to their dtypes predicts; NaN if
            V is 0.
        undefined: Why there is no ρ: "V is zero", "Δ is zero" or "non-finite values in <role> tensor <name>";
            None where there is one.
        rho_null_estimated: Whether rho_null is an estimate, good to a few percent, because computing it would have
            taken longer than ρ.
        nonfinite: Whether there is no ρ because a model holds NaN or infinity.
        cos_v_delta: ⟨V, Δ⟩ / (‖V‖ ‖Δ‖), from -1 to 1; None where it is undefined, and in scores of early versions.
        rho_low: Lower end of the interval that holds ρ, but for the analysis' failure probability; ρ where it is exact.
        rho_high: Upper end of it.
        columns: Random columns that ρ was estimated from; 0 where it is exact.
        null_sd: Standard deviation of log ρ over random rotations of Δ, good to about a third; None where undefined,
            and in scores of early versions.
    """

    rho: float | None
    rho_null: float | None
    v_norm: float
    delta_norm: float
    weight_norm: float
    v_rounding: float
    undefined: str | None
    rho_null_estimated: bool = False
    nonfinite: bool = False
    cos_v_delta: float | None = None
    rho_low: float | None = None
    rho_high: float | None = None
    columns: int = 0
    null_sd: float | None = None

    def __post_init__(self) -> None:
        if self.rho_low is None:
            object.__setattr__(self, "rho_low", self.rho)
        if self.rho_high is None:
            object.__setattr__(self, "rho_high", self.rho)

    @property
    def ratio(self) -> float | None:
        """ρ/ρ_null: 1 is what chance gives, whatever the module's shape; None where either is undefined."""
        return None if self.rho is None or not self.rho_null else self.rho / self.rho_null

    @property
    def z(self) -> float | None:
        """(log ρ - log ρ_null) / null_sd: how far ρ is from chance, in standard deviations of chance."""
        if not self.ratio or not self.null_sd:
            return None
        return math.log(self.ratio) / self.null_sd


@dataclass(frozen=True, slots=True)
class Undefined:
    """Why a module has no ρ.

    Attributes:
        reason: In words, as Score.undefined has it.
        nonfinite: Whether it is that a model holds NaN or infinity.
    """

    reason: str
    nonfinite: bool = False


def signed_cosine(inner: float, left_norm: float, right_norm: float) -> float | None:
    """The cosine of two matrices by their inner product and norms, kept within -1 to 1 against rounding.

    None where float32 did not hold the inner product, or a norm is zero.
    """
    scale = left_norm * right_norm
    if not (math.isfinite(inner) and math.isfinite(scale) and scale > 0.0):
        return None
    return max(-1.0, min(1.0, inner / scale))


SCORE_FIELDS = tuple(field.name for field in fields(Score))
"""Names of a score's fields, in order."""


def finite(value: float | str | None) -> float | str | None:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def malformed(what: str, expected: str, found: object) -> AnalysisError:
    """The error of scores that are not as they should be."""
    return AnalysisError(
        f"in the scores, {what} should be {expected}, not {found!r}; write them again with analyze"
    )


def expect_keys(value: object, what: str, keys: set[str], optional: frozenset[str] = frozenset()) -> None:
    """Raises AnalysisError if a value is no object with these keys."""
    if not isinstance(value, dict):
        raise malformed(what, "an object", value)
    if missing := sorted(keys - value.keys()):
        raise AnalysisError(f"in the scores, {what} has no {missing[0]!r}; write them again with analyze")
    if unknown := sorted(value.keys() - keys - optional):
        raise AnalysisError(
            f"in the scores, {what} has an unknown {unknown[0]!r}; write them again with analyze"
        )


def read_number(what: str, value: object) -> float:
    """A finite number, or AnalysisError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise malformed(what, "a finite number", value)
    return float(value)


# What scores of early versions do not have: flags, a cosine, intervals.
_FLAGS = frozenset({"rho_null_estimated", "nonfinite"})
_OPTIONAL_FIELDS = _FLAGS | {"cos_v_delta", "rho_low", "rho_high", "columns", "null_sd"}


def write_score(score: Score) -> dict[str, Any]:
    """A score as JSON can hold it."""
    return {field: finite(getattr(score, field)) for field in SCORE_FIELDS}


def read_score(name: str, value: Any) -> Score:
    """Reads what write_score wrote; a null norm was not finite.

    Raises:
        AnalysisError: Any part of it is not as it should be.
    """
    expect_keys(value, name, set(SCORE_FIELDS) - _OPTIONAL_FIELDS, _OPTIONAL_FIELDS)
    numbers = {
        field: None if value[field] is None else read_number(f"{field} of {name}", value[field])
        for field in SCORE_FIELDS
        if field != "undefined" and field not in _OPTIONAL_FIELDS
    }
    undefined = value["undefined"]
    # What early versions said of values that are not finite.
    known_flags = {"nonfinite": isinstance(undefined, str) and undefined.startswith("non-finite values")}
    flags = {field: value.get(field, known_flags.get(field, False)) for field in _FLAGS}
    for field, flag in flags.items():
        if not isinstance(flag, bool):
            raise malformed(f"{field} of {name}", "true or false", flag)
    if undefined is not None and not isinstance(undefined, str):
        raise malformed(f"undefined of {name}", "a string or null", undefined)
    if (numbers["rho"] is None) == (undefined is None):
        raise AnalysisError(
            f"in the scores, {name} should have either rho or undefined; write them again with analyze"
        )

    low, high, null_sd = (
        None if value.get(field) is None else read_number(f"{field} of {name}", value[field])
        for field in ("rho_low", "rho_high", "null_sd")
    )
    columns = value.get("columns", 0)
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 0:
        raise malformed(f"columns of {name}", "a whole number", columns)
    rho = numbers["rho"]
    if rho is not None and not (rho if low is None else low) <= rho <= (rho if high is None else high):
        raise malformed(f"the interval of {name}", "around rho", (low, high))

    def known(field: str) -> float:
        number = numbers[field]
        return math.nan if number is None else number

    return Score(
        rho=rho,
        rho_null=numbers["rho_null"],
        v_norm=known("v_norm"),
        delta_norm=known("delta_norm"),
        weight_norm=known("weight_norm"),
        v_rounding=known("v_rounding"),
        undefined=undefined,
        rho_null_estimated=flags["rho_null_estimated"],
        nonfinite=flags["nonfinite"],
        cos_v_delta=_read_cosine(f"cos_v_delta of {name}", value.get("cos_v_delta")),
        rho_low=low,
        rho_high=high,
        columns=columns,
        null_sd=null_sd,
    )


def _read_cosine(what: str, value: object) -> float | None:
    number = None if value is None else read_number(what, value)
    if number is not None and abs(number) > 1.0:
        raise malformed(what, "from -1 to 1", number)
    return number
