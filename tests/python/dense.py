"""A dense merge and its parts, computed without the package under test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

TAU = 0.35
"""The default threshold."""


def load(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory, whatever its files are called."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def fused_multiply_add(x: np.ndarray, weight: float, addend: np.ndarray) -> np.ndarray:
    """fma in float32 by float64: the product is exact there, the sum is rounded to odd, and that once more.

    A sum rounded to odd at 53 bits rounds correctly to any format of at most 51 bits.
    """
    product = x.astype(np.float64) * np.float64(np.float32(weight))
    other = addend.astype(np.float64)
    total = product + other
    shadow = total - product
    error = (product - (total - shadow)) + (other - shadow)  # Knuth's two-sum: exact
    bits = total.view(np.int64)
    even = (bits & 1) == 0
    away = (error > 0) == (total > 0)
    odd = np.where((error != 0) & even, np.where(away, bits + 1, bits - 1), bits)
    return odd.view(np.float64).astype(np.float32)


def linear(operands: list[tuple[Tensor, float]], dtype: torch.dtype) -> Tensor:
    """Σ weight·tensor by a chain of fma in float32, rounded once to dtype."""
    total = np.zeros(tuple(operands[0][0].shape), dtype=np.float32)
    for tensor, weight in operands:
        total = fused_multiply_add(tensor.float().numpy(), weight, total)
    return torch.from_numpy(total).to(dtype)


def rho(base: Tensor, aligned: Tensor, finetuned: Tensor) -> float:
    """cos(V Vᵀ Δ, Δ), dense, in float64."""
    v, delta = (aligned.double() - base.double()), (finetuned.double() - aligned.double())
    moved = v @ v.T @ delta
    return float((moved * delta).sum() / (moved.norm() * delta.norm()))


def is_projection(name: str) -> bool:
    return name.endswith("_proj.weight")


def cosines(quartet: dict[str, Path]) -> dict[str, float]:
    base, aligned, finetuned = (load(quartet[role]) for role in ("base", "aligned", "finetuned"))
    return {
        name: rho(base[name], aligned[name], tensor)
        for name, tensor in finetuned.items()
        if is_projection(name)
    }


def dense_merge(
    quartet: dict[str, Path],
    merged: set[str],
    *,
    alpha: float = 0.8,
    safe: str = "safe",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The output that is expected: merged tensors by fma, all others the fine-tuned ones."""
    finetuned, other = load(quartet["finetuned"]), load(quartet[safe])
    result = {}
    for name, tensor in finetuned.items():
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if name in merged:
            result[name] = linear([(tensor, alpha), (other[name], 1 - alpha)], wanted)
        else:
            result[name] = tensor.to(wanted)
    return result


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        left = found[name].contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(left, tensor.contiguous().reshape(-1).view(torch.uint8)), name


def weight_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors*")}
