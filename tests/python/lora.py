"""Writes LoRA adapters of the quartets' Llama by hand, and computes in float64 what they make of a matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import write_safetensors
from safetensors.torch import load_file

PREFIX = "base_model.model."


def write_lora(
    path: Path,
    shapes: dict[str, tuple[int, int]],
    *,
    rank: int,
    seed: int,
    more: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    size: float = 0.05,
    **settings: Any,
) -> Path:
    """Writes an adapter with random factors for modules of the given (out, in) shapes."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for module, (out, inner) in shapes.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = size * torch.randn(rank, inner, generator=generator)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = size * torch.randn(out, rank, generator=generator)
    tensors |= {PREFIX + name: tensor for name, tensor in (more or {}).items()}
    path.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(shapes),
        **settings,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(path / "adapter_model.safetensors", {k: v.to(dtype) for k, v in tensors.items()})
    return path


def update(path: Path, tensor: str) -> torch.Tensor:
    """s·B·A of one weight in float64, for alpha = 2·r; zero if the adapter does not have it."""
    factors = load_file(path / "adapter_model.safetensors")
    name = PREFIX + tensor.removesuffix(".weight")
    if f"{name}.lora_A.weight" not in factors:
        return torch.zeros((), dtype=torch.float64)
    return 2.0 * factors[f"{name}.lora_B.weight"].double() @ factors[f"{name}.lora_A.weight"].double()


def load_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory."""
    return {
        name: tensor
        for file in sorted(path.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
