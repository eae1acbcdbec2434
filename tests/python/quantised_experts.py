"""Tiny quantised models with experts as transformers makes them, related as the roles of a merge are."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import write_checkpoint
from dense import linear, load, rho
from expert_models import matrices
from quantised_formats import BF16, FORMS, Form
from quantised_models import ROLES, Role, encode_tensors
from torch import Tensor

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    # All of them: which few a router takes may hang by the last bit.
    "num_experts_per_tok": 3,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_DEEPSEEK = {
    "n_routed_experts": 3,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, "strategy": "group"},
        }
    },
}  # fmt: skip
_STACKED_FP8 = replace(FORMS["block fp8"], codes="", scales="_scale_inv")
_LINEAR = r"(_proj|_proj_with_mqa|\.w[123])\.weight$"


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        kind: The model_type of transformers.
        options: Its configuration beside the common one.
        form: The format of what is quantised.
        names: Which tensors are, by name.
        quantization: What config.json says.
        stacked: Whether experts are stored stacked though the family's checkpoints have one tensor an expert.
        prefix: What stands before all names, in a model that is a part of another.
        loads: Whether transformers decodes it without a graphics card.
    """

    kind: str
    options: Mapping[str, Any]
    form: Form
    names: str
    quantization: Mapping[str, Any]
    stacked: bool = False
    prefix: str = ""
    loads: bool = True

    def form_of(self, name: str) -> Form | None:
        """The format of a tensor, or None."""
        return self.form if re.search(self.names, name) else None

    @property
    def turned(self) -> bool:
        """Whether matrices are quantised as (out, in) that are stored as (in, out) otherwise."""
        return self.form.codes == "_blocks"


FAMILIES = {
    "deepseek fp8": Family("deepseek_v3", _DEEPSEEK, FORMS["block fp8"], _LINEAR, _FP8),
    "gpt-oss mxfp4": Family(
        "gpt_oss",
        {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 3},
        FORMS["gpt-oss"],
        r"experts\.(gate_up|down)_proj$",
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    ),
    "qwen3-moe fp8": Family("qwen3_moe", {"num_experts": 3}, FORMS["block fp8"], _LINEAR, _FP8),
    "qwen3-moe fp8 stacked": Family(
        "qwen3_moe",
        {"num_experts": 3, "moe_intermediate_size": 128},
        _STACKED_FP8,
        r"experts\.(gate_up|down)_proj$",
        {**_FP8, "modules_to_not_convert": ["lm_head", r"model\.layers\.\d\.self_attn"]},
        stacked=True,
        loads=False,
    ),
    "mixtral fp8": Family(
        "mixtral",
        {"num_local_experts": 3, "moe_intermediate_size": 256},
        FORMS["block fp8"],
        _LINEAR,
        _FP8,
    ),
    "llama4 fp8": Family(
        "llama4_text",
        {"num_local_experts": 3, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1,
         "intermediate_size": 128},
        _STACKED_FP8,
        r"experts\.(gate_up|down)_proj$",
        _FP8,
        loads=False,
    ),
    "kimi int4": Family(
        "deepseek_v3",
        {**_DEEPSEEK, "first_k_dense_replace": 0},
        FORMS["int4"],
        r"mlp\.experts\.\d+\.\w+_proj\.weight$",
        _INT4,
        prefix="language_model.",
        loads=False,
    ),
}  # fmt: skip


def _model(family: Family, seed: int = 0) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.kind, **{**_COMMON, **family.options})
    return AutoModelForCausalLM.from_config(config)


@cache
def related(key: str) -> dict[str, dict[str, Tensor]]:
    """Each role's tensors in float64, by the names that the model has in memory."""
    model = _model(FAMILIES[key])
    generator = torch.Generator().manual_seed(7)

    def gauss(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found: dict[str, dict[str, Tensor]] = {role: {} for role in ROLES}
    for name, parameter in model.state_dict().items():
        if parameter.dim() < 2:
            base = parameter.double() + 0.05 * gauss(*parameter.shape)
            values = [base + 0.01 * gauss(*base.shape) * (place > 0) for place in range(4)]
        else:
            *leading, rows, columns = parameter.shape
            left, right = gauss(*leading, rows, 3), gauss(*leading, 3, columns)
            share = torch.rand(*leading, 1, 1, generator=generator, dtype=torch.float64)
            base = 0.1 * gauss(*parameter.shape)
            update = share * (left @ gauss(*leading, 3, 3) @ right) / 3 + (1 - share) * 2 * gauss(
                *parameter.shape
            )
            aligned = base + 0.012 * (left @ right)
            values = [
                base,
                aligned,
                aligned + 0.008 * update,
                aligned + 0.004 * gauss(*parameter.shape),
            ]
        for role, value in zip(ROLES, values, strict=True):
            found[role][name] = value
    return found


def _load(family: Family, tensors: Mapping[str, Tensor]) -> Any:
    """A model in memory with these parameters."""
    model = _model(family)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model


def write_role(
    path: Path, key: str, role: str, *, encoded: bool = True, stacked: bool | None = None, shards: int = 2
) -> Role:
    """Writes one model of a quartet.

    Args:
        path: Where to.
        key: Of FAMILIES.
        role: Which.
        encoded: Whether it is quantised; else the same numbers are written in bfloat16.
        stacked: Whether experts are stacked, if it is not the family's way.
        shards: Number of files.
    """
    family = FAMILIES[key]
    stacks = family.stacked if stacked is None else stacked
    # The way through transformers, so that names and layouts are what it writes.
    plain = path.parent / f"{path.name}-plain"
    model = _load(family, related(key)[role]).to(BF16)
    model.save_pretrained(plain, save_original_format=not stacks)
    tensors = {family.prefix + name: tensor for name, tensor in sorted(load(plain).items())}
    config = json.loads((plain / "config.json").read_text())
    config["dtype"] = "bfloat16"
    forms: dict[str, Form] = {}
    if encoded:
        config["quantization_config"] = dict(family.quantization)
        forms = {name: form for name in tensors if (form := family.form_of(name)) is not None}
        assert forms
        tensors = encode_tensors(
            {name: _turned(family, name, tensor) if name in forms else tensor for name, tensor in tensors.items()},
            forms.get,
        )  # fmt: skip
    if family.prefix:
        config = {"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"],
                  "text_config": config, "dtype": "bfloat16"}  # fmt: skip
    write_checkpoint(path, tensors, config, shards=shards)
    return Role(path, forms)


def write_experts_quartet(
    path: Path, key: str, *, plain: Collection[str] = (), stacked: Collection[str] = ()
) -> dict[str, Role]:
    """Writes a quartet.

    Args:
        path: Where to.
        key: Of FAMILIES.
        plain: Roles that are not quantised.
        stacked: Roles whose experts are stacked, beside those where the family's are.
    """
    return {
        role: write_role(
            path / role, key, role, encoded=role not in plain, stacked=True if role in stacked else None
        )
        for role in ROLES
    }


def _turned(family: Family, name: str, tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous() if family.turned else tensor


def decoded(family: Family, directory: Path, forms: Mapping[str, Form]) -> dict[str, Tensor]:
    """A checkpoint's tensors as numbers, by their names without a prefix, in the layout that loaders want."""
    tensors = Role(directory, forms).single()
    return {
        name.removeprefix(family.prefix): _turned(family, name, tensor) if name in forms else tensor
        for name, tensor in tensors.items()
    }


def dense_model(family: Family, tensors: Mapping[str, Tensor], path: Path) -> Any:
    """A model in float32 that transformers loads from plain tensors; every tensor must find its place."""
    from transformers import AutoModelForCausalLM

    config = _model(family).config.to_dict()
    write_checkpoint(path, {name: tensor.float() for name, tensor in tensors.items()}, config)
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert_loaded(info)
    return model


def assert_loaded(info: Mapping[str, Any]) -> None:
    """Nothing is missing, nothing is left over."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(what), (what, info[what])


Key = tuple[str, int, str]


@torch.no_grad()
def merge_dense(
    finetuned: Any, safe: Any, experts: Collection[Key], parameters: Collection[str], alpha: float
) -> Any:
    """The fine-tuned model with some matrices merged; all in float32, as a chain of fused multiply-adds."""
    result = copy.deepcopy(finetuned)
    others = dict(matrices(safe))
    for key, matrix in matrices(result):
        if key in experts:
            matrix.copy_(linear([(matrix, alpha), (others[key], 1 - alpha)], torch.float32))
    mine, theirs = dict(result.named_parameters()), dict(safe.named_parameters())
    for name in parameters:
        mine[name].copy_(linear([(mine[name], alpha), (theirs[name], 1 - alpha)], torch.float32))
    return result


def cosines(models: Mapping[str, Any]) -> dict[Key, float]:
    """ρ of each expert's matrices, in float64."""
    base, aligned, finetuned = (
        {key: matrix.detach() for key, matrix in matrices(models[role])}
        for role in ("base", "aligned", "finetuned")
    )
    return {key: rho(base[key], aligned[key], finetuned[key]) for key in finetuned}


@torch.no_grad()
def logits(model: Any) -> np.ndarray[Any, Any]:
    """What a model says to a few tokens, in float32."""
    tokens = torch.tensor([[1, 5, 9, 33, 60, 7, 12, 3], [1, 44, 2, 17, 8, 25, 50, 61]])
    return np.asarray(model.eval()(input_ids=tokens).logits.float().numpy())
