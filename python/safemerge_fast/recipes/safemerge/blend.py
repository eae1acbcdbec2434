"""SafeMERGE (arXiv 2503.17239): a layer that left the safety subspace is averaged with a safe model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import PlanError
from ...plan.blend import Blend
from ...plan.methods import Method, known_methods, weighing_methods
from ...plan.values import read_parameters
from ...yaml_documents import parse_yaml

__all__ = ["method_parameters", "safemerge"]


def safemerge(
    alpha: float,
    *,
    safe_role: str,
    method: str,
    parameters: Mapping[str, Any] | None = None,
) -> Blend:
    """What SafeMERGE puts in place of a module it judges unsafe.

    The paper adds weighted updates to the aligned model: W_aligned + α Δf + (1-α) Δs, with
    Δf = W_finetuned - W_aligned and Δs = W_safe - W_aligned. The weights sum to one, so in a weighted sum W_aligned
    cancels and the whole is α W_finetuned + (1-α) W_safe: one rounding fewer, and one model fewer to read.
    Other methods have the aligned model as their base, so that their task vectors are Δf and Δs; interpolations go from
    the safe model to the fine-tuned one.

    Args:
        alpha: α, the weight of the fine-tuned update, from 0 to 1; the place of an interpolation.
        safe_role: The role that plays the safe model: "safe", or "aligned" where there is none (then Δs is
            zero, and the update of the fine-tuned model shrinks by α).
        method: One of weighing_methods().
        parameters: The method's other parameters, as method_parameters returns them.

    Returns:
        The blend of fine-tuned and safe model.

    Raises:
        PlanError: The method is none of those, or of no use without a safe model.
    """
    known = _weighing(method)
    weights: dict[str, float | None] = {"finetuned": alpha, safe_role: 1.0 - alpha}
    if known.sums:
        return Blend(method, {"normalize": False}, weights)
    if known.votes and safe_role == "aligned":
        # An update of zero never votes: the fine-tuned one would always win, undiminished.
        raise PlanError(
            f"{method} lets updates vote on signs, and without a safe model there is but one; "
            f"give --safe, or another --method"
        )
    given = parameters or {}
    shared = {name: value for name, value in given.items() if known.parameters[name].scope == "shared"}
    own = {name: value for name, value in given.items() if known.parameters[name].scope == "operand"}
    if known.interpolates:
        return Blend(
            method,
            {**shared, known.interpolates: alpha},
            {"finetuned": None},
            base=safe_role,
            each={"finetuned": own},
        )
    return Blend(method, shared, weights, base="aligned", each=dict.fromkeys(weights, own))


def method_parameters(
    method: str, *, density: float | None = None, seed: int | None = None, parameters: str | None = None
) -> dict[str, Any]:
    """Puts a method's parameters together and checks them.

    Args:
        method: One of weighing_methods().
        density: The parameter of that name.
        seed: The parameter of that name, if the method has one; the analysis has a seed as well.
        parameters: Further ones as `name=value`, separated by commas.

    Returns:
        Values by name.

    Raises:
        PlanError: The method has no such parameter, it does not take the value, or the weights are given, which
            are α and 1-α.
    """
    known = _weighing(method)
    given: dict[str, Any] = {}
    for part in filter(None, (word.strip() for word in (parameters or "").split(","))):
        name, sign, text = part.partition("=")
        if not sign:
            raise PlanError(f"parameters should read like lambda=0.9,normalize=false, not {parameters!r}")
        given[name.strip()] = parse_yaml(text, PlanError, subject=f"parameters: {part!r}")
    given |= {} if density is None else {"density": density}
    given |= {} if seed is None or "seed" not in known.parameters else {"seed": seed}
    if weighed := [name for name in ("weight", known.interpolates) if name in given]:
        raise PlanError(f"parameters: {weighed[0]} follows from alpha; give that instead")
    if known.sums and given:
        raise PlanError(
            f"{method} has no parameter {next(iter(given))!r} here, since its weights are α and 1-α"
        )
    if several := [name for name, value in given.items() if isinstance(value, list | dict)]:
        raise PlanError(f"parameters: {several[0]} should be one value")
    read = read_parameters(given, "parameters", known, shared=True)
    return {name: value.entries[0].value for name, value in read.items()}


def _weighing(method: str) -> Method:
    if method not in weighing_methods():
        raise PlanError(f"method should be one of {', '.join(weighing_methods())}, not {method!r}")
    return known_methods()[method]
