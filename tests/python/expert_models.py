"""Tiny models with experts as transformers makes them, and each expert's matrices as their forward pass uses them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safemerge_fast.checkpoint.model import Model
from safemerge_fast.pairing.operand import Operand, Term
from safemerge_fast.pairing.view import View

_COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK = {"n_routed_experts": 4, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "phimoe": {"num_local_experts": 3},
    "qwen2_moe": {"num_experts": 3, "shared_expert_intermediate_size": 20, "decoder_sparse_step": 1},
    "qwen3_moe": {"num_experts": 3},
    "olmoe": {"num_experts": 3},
    "deepseek_v3": {
        **_DEEPSEEK,
        "n_group": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "glm4_moe": {**_DEEPSEEK, "n_group": 1},
    "nemotron_h": {
        "n_routed_experts": 4,
        "layers_block_type": ["moe", "attention"],
        "n_shared_experts": 1,
        "mamba_num_heads": 2,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 4,
        "moe_shared_expert_intermediate_size": 12,
    },
    "qwen3_5_moe_text": {
        "num_experts": 3,
        "shared_expert_intermediate_size": 12,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "gemma4_text": {
        "num_experts": 3,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 32,
    },
    "gpt_oss": {"num_local_experts": 3, "intermediate_size": 16},
    "llama4_text": {"num_local_experts": 3, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
    "granitemoe": {"num_local_experts": 3},
    "jetmoe": {"num_local_experts": 3, "kv_channels": 8},
    "dbrx": {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 32,
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 16},
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
}

SAVED_SINGLY = (
    "mixtral",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
    "glm4_moe",
    "nemotron_h",
)
"""Families whose checkpoints have a tensor for each expert, unless they are saved as they are in memory."""


def make(family: str, seed: int = 0) -> Any:
    """A model of the family with random weights, and biases and norms as they begin."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family]})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def save(model: Any, path: Path, *, singly: bool = True) -> Path:
    """Writes it as save_pretrained does; with a tensor for each expert where the family's checkpoints have that."""
    model.save_pretrained(path, save_original_format=singly)
    return path


def matrices(model: Any) -> Iterator[tuple[tuple[str, int, str], torch.Tensor]]:
    """Every expert's matrices as (out, in), by what its layer's name ends with, its number and "gate", "up", ….

    They are taken as the modules of transformers say that they use them.
    """
    for name, module in model.named_modules():
        layer = (
            name.partition("layers.")[2].partition(".")[0] or name.partition("blocks.")[2].partition(".")[0]
        )
        kind = type(module).__name__
        if kind == "JetMoeMoE":
            for expert in range(module.input_linear.num_experts):
                gate, up = module.input_linear.weight[expert].chunk(2)
                yield (f"{layer}.mlp", expert, "gate"), gate
                yield (f"{layer}.mlp", expert, "up"), up
                yield (f"{layer}.mlp", expert, "down"), module.output_linear.weight[expert]
        elif kind == "JetMoeMoA":
            for expert in range(module.num_experts):
                yield (f"{layer}.attention", expert, "input"), module.input_linear.weight[expert]
                yield (f"{layer}.attention", expert, "output"), module.output_linear.weight[expert]
        elif kind == "DbrxExperts":
            for expert in range(module.num_experts):
                rows = slice(expert * module.ffn_hidden_size, (expert + 1) * module.ffn_hidden_size)
                yield (f"{layer}.mlp", expert, "gate"), module.mlp.w1[rows]
                yield (f"{layer}.mlp", expert, "up"), module.mlp.v1[rows]
                yield (f"{layer}.mlp", expert, "down"), module.mlp.w2[rows].T
        elif kind == "Llama4TextExperts" or hasattr(module, "is_concatenated"):
            llama = kind == "Llama4TextExperts"
            for expert in range(module.num_experts):
                turned = llama or module.is_transposed
                first = module.up_proj if not getattr(module, "has_gate", True) else module.gate_up_proj
                one, down = (
                    weight[expert].T if turned else weight[expert] for weight in (first, module.down_proj)
                )
                yield (f"{layer}.mlp", expert, "down"), down
                if not getattr(module, "has_gate", True):
                    yield (f"{layer}.mlp", expert, "up"), one
                    continue
                gate, up = one.chunk(2) if llama or module.is_concatenated else (one[::2], one[1::2])
                yield (f"{layer}.mlp", expert, "gate"), gate
                yield (f"{layer}.mlp", expert, "up"), up


def read(model: Model, name: str) -> np.ndarray[Any, Any]:
    """A float32 tensor of a checkpoint, as one row of elements."""
    info = model.headers.tensor(name)
    assert info.dtype == "F32"
    return np.array(model.headers.rows(name, 0, info.shape[0])).reshape(-1).view(np.float32)


def look(elements: np.ndarray[Any, Any], view: View) -> np.ndarray[Any, Any]:
    """The elements that a view means, one by one, so that nothing of numpy's strides takes part."""
    places = np.full(view.shape, view.start)
    for axis, (extent, stride) in enumerate(zip(view.shape, view.strides, strict=True)):
        shape = [1] * len(view.shape)
        shape[axis] = extent
        places = places + (np.arange(extent) * stride).reshape(shape)
    return np.asarray(elements[places])


def value(models: dict[str, Model], terms: tuple[Term, ...]) -> np.ndarray[Any, Any]:
    """What terms without adapters come to."""

    def operand(of: Operand) -> np.ndarray[Any, Any]:
        assert of.is_plain
        elements = read(models[of.source], of.tensor)
        if of.view is not None:
            return look(elements, of.view)
        return elements.reshape(models[of.source].headers.tensor(of.tensor).shape)

    return np.asarray(sum(term.weight * operand(term.operand) for term in terms))
