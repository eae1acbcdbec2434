"""SafeMERGE (arXiv 2503.17239): a layer that left the safety subspace is averaged with a safe model."""

from __future__ import annotations

from ..plan.shards import Blend

__all__ = ["safemerge"]


def safemerge(alpha: float, *, safe_role: str, method: str = "linear") -> Blend:
    """What SafeMERGE puts in place of a module it judges unsafe.

    The paper adds weighted updates to the aligned model: W_aligned + α Δf + (1-α) Δs, with
    Δf = W_finetuned - W_aligned and Δs = W_safe - W_aligned. The weights sum to one, so W_aligned cancels and
    the whole is α W_finetuned + (1-α) W_safe: one rounding fewer, and one model fewer to read.

    Args:
        alpha: α, the weight of the fine-tuned update, from 0 to 1.
        safe_role: The role that plays the safe model: "safe", or "aligned" where there is none (then Δs is
            zero, and the update of the fine-tuned model shrinks by α).
        method: Name of the engine's method.

    Returns:
        The blend of fine-tuned and safe model.
    """
    return Blend(
        method=method,
        parameters={"normalize": False},
        weights={"finetuned": alpha, safe_role: 1.0 - alpha},
    )
