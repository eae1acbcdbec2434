"""The smallest adapters and aligned models that tests of keys and settings need; no values matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import write_checkpoint, write_safetensors

from safemerge_fast.checkpoint.model import Model, open_model

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
KV = "model.layers.0.self_attn.k_proj"


def factors(module: str = Q, rank: int = 4, out: int = 12, inner: int = 12) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.ones(rank, inner),
        f"{PREFIX}{module}.lora_B.weight": torch.ones(out, rank),
    }


def write_adapter(path: Path, tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(path / "adapter_model.safetensors", factors() if tensors is None else tensors)
    return path


def write_aligned(path: Path, **config: Any) -> Model:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(20, 12),
        f"{Q}.weight": torch.zeros(12, 12),
        f"{Q}.bias": torch.zeros(12),
        f"{KV}.weight": torch.zeros(6, 12),
        "model.norm.weight": torch.zeros(12),
        **config.pop("more", {}),
    }
    return open_model("aligned", write_checkpoint(path, tensors, {"model_type": "llama", **config}))
