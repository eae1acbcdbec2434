"""The scores that the report of a merge holds, so that another rule can be tried on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec

from ..analysis.score import Score, write_score
from ..analysis.scores import ESTIMATORS, VERSION, Scores
from ..errors import AnalysisError
from ..printable import printable
from .modules import ModuleReport
from .tensors import TensorReport

__all__ = ["is_report", "scores_of_report"]


class _Kind(msgspec.Struct, frozen=True):
    """Just enough of a document to tell what it is."""

    recipe: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    tensors: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Measured(msgspec.Struct, frozen=True):
    """What a report says of a measurement."""

    recipe: str
    configuration: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    tensors: tuple[TensorReport, ...]
    device: str | None = None


def is_report(data: bytes) -> bool:
    """Whether a document is a report, not scores."""
    try:
        kind = msgspec.json.decode(data, type=_Kind)
    except (msgspec.DecodeError, RecursionError):
        return False
    return kind.recipe is not msgspec.UNSET and kind.tensors is not msgspec.UNSET


def scores_of_report(data: bytes, name: str) -> Scores:
    """Reads what a report says was measured.

    Args:
        data: The report.
        name: Its file's name.

    Returns:
        The scores, with the models that they were measured on.

    Raises:
        AnalysisError: It is malformed, holds no measurement, or does not say of which weights.
    """
    try:
        report = msgspec.json.decode(data, type=_Measured)
    except (msgspec.DecodeError, RecursionError) as error:
        raise AnalysisError(
            f"{name} is a report that cannot be read: {printable(str(error), 200)}"
        ) from error
    modules = {module.name: _score(module) for module in _modules(report)}
    if not modules:
        raise AnalysisError(
            f"{name} is the report of {printable(report.recipe, 40)}, which measured nothing; give scores of analyze, "
            f"or the report of a merge"
        )
    reference = report.configuration.get("delta_reference")
    sources = {
        role: {"path": str(facts.get("path")), "files": facts["files"], "sample": facts["sample"]}
        for role, facts in report.inputs.items()
        if isinstance(facts.get("sample"), str) and isinstance(facts.get("files"), dict)
    }
    if missing := [role for role in ("base", "aligned", "finetuned") if role not in sources]:
        raise AnalysisError(
            f"{name} does not say which weights of the {missing[0]} model it measured, as reports of earlier versions "
            f"do not; write scores with analyze"
        )
    estimator = report.configuration.get("estimator", "exact")
    sampled = any(score.columns for score in modules.values())
    document = {
        "version": VERSION,
        "delta_reference": reference,
        "device": report.device or "cpu",
        "seconds": report.seconds.get("analysis", 0.0),
        "estimator": estimator if estimator in ESTIMATORS else "exact",
        "failure": report.configuration.get("failure") if sampled else None,
        "seed": (report.configuration.get("seed") or 0) if sampled else None,
        "sources": sources,
        "modules": {module: write_score(score) for module, score in modules.items()},
    }
    try:
        return Scores.from_document(document)
    except AnalysisError as error:
        raise AnalysisError(f"{name}: {error}") from error


def _modules(report: _Measured) -> Iterator[ModuleReport]:
    for tensor in report.tensors:
        if tensor.analysed:
            # What was never measured has no columns, not even none.
            yield from (module for module in tensor.module_reports() if module.columns is not None)


def _score(module: ModuleReport) -> Score:
    undefined, nonfinite = None, False
    if module.rho is None:
        undefined, nonfinite = _why(module)
    return Score(
        rho=module.rho,
        rho_null=module.rho_null,
        v_norm=_known(module.v_norm),
        delta_norm=_known(module.delta_norm),
        weight_norm=_known(module.weight_norm),
        v_rounding=_known(module.v_rounding),
        undefined=undefined,
        nonfinite=nonfinite,
        cos_v_delta=module.cos_v_delta,
        rho_low=module.rho_low,
        rho_high=module.rho_high,
        columns=module.columns or 0,
        null_sd=module.null_sd,
    )


def _why(module: ModuleReport) -> tuple[str, bool]:
    """Why there is no ρ, and whether that is for values that are not finite: a report says it by its norms."""
    if module.v_norm == 0.0:
        return "V is zero", False
    if module.delta_norm == 0.0:
        return "Δ is zero", False
    return "non-finite values, as an earlier merge reports", True


def _known(number: float | None) -> float:
    return math.nan if number is None else number
