"""SafeMERGE the plain way, on whole tensors in memory: the streamed merge must give the same bits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

PROJECTION = "_proj.weight"


@dataclass(frozen=True)
class DenseMerge:
    """The tensors that a merge must give, and rho of every projection."""

    tensors: dict[str, Tensor]
    rho: dict[str, float]
    merged: frozenset[str]

    def counts(self) -> dict[str, str]:
        """Merged out of all, for each type of module."""
        every = Counter(module_type(name) for name in self.rho)
        merged = Counter(module_type(name) for name in self.merged)
        return {kind: f"{merged[kind]}/{count}" for kind, count in every.items()}


def module_type(name: str) -> str:
    """The type of the module that a weight belongs to, such as `q_proj`."""
    return name.split(".")[-2]


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whatever the shards."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def rho(base: Tensor, aligned: Tensor, finetuned: Tensor) -> float:
    """The cosine of V Vᵀ Δ and Δ in float64, where V is aligned - base and Δ is finetuned - aligned.

    V Vᵀ is never formed where Vᵀ Δ is the smaller product; both orders give the same matrix.
    """
    v = aligned.double() - base.double()
    delta = finetuned.double() - aligned.double()
    projected = v @ v.T @ delta if v.shape[0] <= v.shape[1] else v @ (v.T @ delta)
    return float((projected * delta).sum() / (projected.norm() * delta.norm()))


def fused_multiply_add(values: Tensor, weight: float, addend: Tensor) -> Tensor:
    """`values * weight + addend` in float32 with a single rounding, as the hardware instruction gives it.

    The product of two float32 numbers is exact in float64. The sum may not be, and rounding it to float64 and
    then to float32 could go wrong in the last bit. So it is rounded to odd first: where it is inexact, the
    float64 neighbour whose last bit is odd is taken, which the second rounding cannot mistake for a tie.
    """
    product = values.double() * torch.tensor(weight, dtype=torch.float32).double()
    addend = addend.double()
    total = product + addend
    # What the addition lost (Knuth's two-sum, itself exact).
    virtual = total - product
    lost = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    towards_lost = torch.where((lost > 0) == (total > 0), 1, -1)
    bits += torch.where((lost != 0) & (bits % 2 == 0), towards_lost, 0)
    return total.float()


def linear(finetuned: Tensor, safe: Tensor, alpha: float) -> Tensor:
    """`alpha * finetuned + (1 - alpha) * safe` in float32 by fused multiply-add, rounded once to store."""
    first = fused_multiply_add(finetuned, alpha, torch.zeros_like(finetuned, dtype=torch.float32))
    return fused_multiply_add(safe, 1 - alpha, first).to(finetuned.dtype)


def dense_merge(
    base: dict[str, Tensor],
    aligned: dict[str, Tensor],
    finetuned: dict[str, Tensor],
    safe: dict[str, Tensor],
    threshold: float,
    alpha: float,
) -> DenseMerge:
    """Merges every projection whose rho is below the threshold and keeps every other tensor as fine-tuned."""
    scores = {
        name: rho(base[name], aligned[name], finetuned[name]) for name in finetuned if PROJECTION in name
    }
    # A rho that is not a number (no update at all) counts as low.
    merged = frozenset(name for name, score in scores.items() if not score >= threshold)
    tensors = {
        name: linear(tensor, safe[name], alpha) if name in merged else tensor
        for name, tensor in finetuned.items()
    }
    return DenseMerge(tensors, scores, merged)


def differing(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are missing, superfluous or not the same in every bit."""

    def same(name: str) -> bool:
        one, other = expected[name], found[name]
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        )

    return sorted(
        name
        for name in expected.keys() | found.keys()
        if not (name in expected and name in found and same(name))
    )
