"""Safe LoRA (Hsu et al., arXiv 2405.16833): updates that left the safety subspace are projected onto it.

With V = W_aligned - W_base and C = V·Vᵀ/‖V‖, where cos(C·Δ, Δ) is not above the threshold, or among the N lowest:

    Δ ← C·Δ      for a LoRA adapter B ← C·B      W = W_aligned + Δ
"""

from __future__ import annotations

from ..base import Recipe
from .job import SafeLoraJob
from .settings import SafeLoraSettings

__all__ = ["RECIPE"]

RECIPE = Recipe(
    name="safe-lora",
    summary="Projects updates that left the safety subspace onto it (Safe LoRA): B ← C·B of adapters, Δ ← C·Δ else.",
    settings=SafeLoraSettings,
    open=SafeLoraJob,
)
