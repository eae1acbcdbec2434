"""SafeMERGE (arXiv 2503.17239): a layer that left the safety subspace is averaged with a safe model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import PlanError
from ...plan.methods import known_methods, weighing_methods
from ...plan.shards import Blend

__all__ = ["method_parameters", "safemerge"]

# Their elements vote on signs, and the sum is divided by the weights of those that agree. An update of zero never
# votes: with the aligned model as the safe one, the fine-tuned update would always win, undiminished.
_VOTING = ("ties", "dare_ties", "breadcrumbs_ties", "della")


def safemerge(
    alpha: float,
    *,
    safe_role: str,
    method: str = "linear",
    parameters: Mapping[str, Any] | None = None,
) -> Blend:
    """What SafeMERGE puts in place of a module it judges unsafe.

    The paper adds weighted updates to the aligned model: W_aligned + α Δf + (1-α) Δs, with
    Δf = W_finetuned - W_aligned and Δs = W_safe - W_aligned. The weights sum to one, so with the method linear
    W_aligned cancels and the whole is α W_finetuned + (1-α) W_safe: one rounding fewer, and one model fewer to read.
    Other methods have the aligned model as their base, so that their task vectors are Δf and Δs; slerp goes from
    the safe model to the fine-tuned one.

    Args:
        alpha: α, the weight of the fine-tuned update, from 0 to 1; slerp's t.
        safe_role: The role that plays the safe model: "safe", or "aligned" where there is none (then Δs is
            zero, and the update of the fine-tuned model shrinks by α).
        method: One of weighing_methods().
        parameters: The method's other parameters, as method_parameters returns them.

    Returns:
        The blend of fine-tuned and safe model.

    Raises:
        PlanError: The method is none of those, or of no use without a safe model.
    """
    if method == "linear":
        weights = {"finetuned": alpha, safe_role: 1.0 - alpha}
        return Blend(method, {"normalize": False}, weights)
    if method not in weighing_methods():
        raise PlanError(f"method should be one of {', '.join(weighing_methods())}, not {method!r}")
    if method in _VOTING and safe_role == "aligned":
        raise PlanError(
            f"{method} lets updates vote on signs, and without a safe model there is but one; "
            f"give --safe, or another --method"
        )
    known = known_methods()[method].parameters
    shared = {name: value for name, value in (parameters or {}).items() if known[name].scope == "shared"}
    each = {name: value for name, value in (parameters or {}).items() if known[name].scope == "operand"}
    if method == "slerp":
        return Blend(method, {**shared, "t": alpha}, {"finetuned": None}, base=safe_role, each=each)
    weights = {"finetuned": alpha, safe_role: 1.0 - alpha}
    return Blend(method, shared, weights, base="aligned", each=each)


def method_parameters(
    method: str, *, density: float | None = None, seed: int | None = None, parameters: str | None = None
) -> dict[str, Any]:
    """Puts a method's parameters together and checks them.

    Args:
        method: One of weighing_methods().
        density: The parameter of that name.
        seed: The parameter of that name.
        parameters: Further ones as `name=value`, separated by commas.

    Returns:
        Values by name.

    Raises:
        PlanError: The method has no such parameter, it does not take the value, or the weights are given, which
            are α and 1-α.
    """
    import yaml

    from ..mergekit.values import read_parameters

    if method not in weighing_methods():
        raise PlanError(f"method should be one of {', '.join(weighing_methods())}, not {method!r}")
    given: dict[str, Any] = {}
    for part in filter(None, (word.strip() for word in (parameters or "").split(","))):
        name, sign, text = part.partition("=")
        if not sign:
            raise PlanError(f"parameters should read like lambda=0.9,normalize=false, not {parameters!r}")
        try:
            given[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PlanError(f"parameters: {part!r} has no value that can be read") from error
    given |= {name: value for name, value in (("density", density), ("seed", seed)) if value is not None}
    if weighed := [name for name in ("weight", "t") if name in given]:
        raise PlanError(f"parameters: {weighed[0]} follows from alpha; give that instead")
    if method == "linear" and given:
        raise PlanError(
            f"linear has no parameter {next(iter(given))!r} here, since its weights are α and 1-α"
        )
    if several := [name for name, value in given.items() if isinstance(value, list | dict)]:
        raise PlanError(f"parameters: {several[0]} should be one value")
    read = read_parameters(given, "parameters", known_methods()[method], shared=True)
    return {name: value.entries[0].value for name, value in read.items()}
