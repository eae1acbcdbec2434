"""Formats that the engine does not decode: named, with the way out; shown by inspect; buffers pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import write_checkpoint, write_safetensors
from invoke import assert_one_sentence, run
from torch import Tensor

from safemerge_fast.checkpoint.model import open_model
from safemerge_fast.errors import AdapterError, CheckpointError

LAYER = "model.layers.0.mlp.up_proj"
PLAIN = {
    "model.embed_tokens.weight": torch.ones(10, 4, dtype=torch.bfloat16),
    "model.norm.weight": torch.ones(4),
}


def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


# Name in the message; tensors; quantization_config; parameters of the weight that the tensors are of, where they show.
FORMATS: dict[str, tuple[str, dict[str, Tensor], dict[str, object] | None, int | None]] = {
    "GPTQ": (
        "GPTQ",
        {
            f"{LAYER}.qweight": integers(8, 32),
            f"{LAYER}.qzeros": integers(1, 4),
            f"{LAYER}.scales": torch.ones(1, 32, dtype=torch.float16),
            f"{LAYER}.g_idx": integers(64),
        },
        {"quant_method": "gptq", "bits": 4},
        64 * 32,
    ),
    "AWQ": (
        "AWQ",
        {
            f"{LAYER}.qweight": integers(64, 4),
            f"{LAYER}.qzeros": integers(1, 4),
            f"{LAYER}.scales": torch.ones(1, 32, dtype=torch.float16),
        },
        {"quant_method": "awq", "bits": 4},
        64 * 32,
    ),
    "bitsandbytes nf4": (
        "bitsandbytes, 4 bits",
        {
            f"{LAYER}.weight": integers(1024, 1, dtype=torch.uint8),
            f"{LAYER}.weight.absmax": torch.ones(32),
            f"{LAYER}.weight.quant_map": torch.ones(16),
            f"{LAYER}.weight.quant_state.bitsandbytes__nf4": integers(90, dtype=torch.uint8),
        },
        None,
        64 * 32,
    ),
    "bitsandbytes int8": (
        "bitsandbytes, 8 bits",
        {f"{LAYER}.weight": integers(32, 64, dtype=torch.int8), f"{LAYER}.SCB": torch.ones(32)},
        None,
        64 * 32,
    ),
    "HQQ": (
        "HQQ",
        {f"{LAYER}.W_q": integers(16, 64, dtype=torch.uint8), f"{LAYER}.scale": torch.ones(32, 1)},
        None,
        None,
    ),
    "quanto": (
        "quanto",
        {
            f"{LAYER}.weight._data": integers(32, 64, dtype=torch.int8),
            f"{LAYER}.weight._scale": torch.ones(32, 1),
        },
        None,
        None,
    ),
    "AQLM": (
        "AQLM",
        {
            f"{LAYER}.codes": integers(32, 8, 1, dtype=torch.int16),
            f"{LAYER}.codebooks": torch.ones(1, 256, 1, 8, dtype=torch.float16),
            f"{LAYER}.scales": torch.ones(32, 1, 1, 1, dtype=torch.float16),
        },
        None,
        None,
    ),
    "EXL2": (
        "EXL2",
        {
            f"{LAYER}.q_weight": integers(8, 32),
            f"{LAYER}.q_scale": integers(1, 4),
            f"{LAYER}.q_perm": integers(64, dtype=torch.int16),
        },
        None,
        None,
    ),
    "MLX": (
        "MLX",
        {
            f"{LAYER}.weight": integers(32, 8).view(torch.uint32),
            f"{LAYER}.scales": torch.ones(32, 1, dtype=torch.float16),
            f"{LAYER}.biases": torch.ones(32, 1, dtype=torch.float16),
        },
        {"bits": 4},
        64 * 32,
    ),
    "torchao": (
        "torchao",
        {f"{LAYER}._weight_qdata": integers(32, 64, dtype=torch.int8)},
        {"quant_method": "torchao"},
        None,
    ),
    "BitNet": (
        "BitNet",
        {f"{LAYER}.weight": integers(8, 64, dtype=torch.uint8), f"{LAYER}.weight_scale": torch.ones(1)},
        {"quant_method": "bitnet"},
        64 * 32,
    ),
    "VPTQ": (
        "VPTQ",
        {f"{LAYER}.indices": integers(1, 8, 8), f"{LAYER}.centroids.weight": torch.ones(1, 64)},
        {"quant_method": "vptq"},
        None,
    ),
    "nobody's": ("I16", {f"{LAYER}.weight": integers(32, 64, dtype=torch.int16)}, None, None),
    "a new one": (
        "superq, I64",
        {f"{LAYER}.strange": integers(2, 3, 4, dtype=torch.int64)},
        {"quant_method": "superq"},
        None,
    ),
}


def write(path: Path, tensors: dict[str, Tensor], quantization: dict[str, object] | None) -> Path:
    config = {"model_type": "llama", **({"quantization_config": quantization} if quantization else {})}
    return write_checkpoint(path, {**PLAIN, **tensors}, config)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_refused_by_name_and_shown_by_inspect(tmp_path: Path, kind: str) -> None:
    name, tensors, quantization, parameters = FORMATS[kind]
    path = write(tmp_path / "model", tensors, quantization)
    with pytest.raises(CheckpointError) as refused:
        open_model("base", path)
    message = str(refused.value)
    assert name in message
    assert f"{LAYER}." in message
    assert "made from" in message, "the way out"

    shown = run("inspect", path)
    assert shown.exit_code == 0, shown.stderr
    assert f"quantised ({name}" in shown.stdout
    assert "a merge refuses it" in shown.stdout
    document = json.loads(run("inspect", path, "--json").stdout)
    narrow = [tensor for tensor in tensors.values() if not tensor.is_floating_point() and tensor.dim() > 1]
    assert document["quantised"]["tensors"] == len(narrow)
    assert document["quantised"]["bytes"] == sum(tensor.nbytes for tensor in narrow)
    assert document["parameters"] == (None if parameters is None else 44 + parameters)
    assert len(document["tensors"]) == 2 + len(tensors)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_narrow_floats_are_numbers_where_nothing_has_a_scale(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = {f"{LAYER}.weight": torch.ones(4, 4).to(dtype)}
    model = open_model("base", write(tmp_path / "plain", weight, None))
    assert model.headers.tensor(f"{LAYER}.weight").encoding == "FP8 without scales"
    scaled = {**weight, "b.weight": torch.ones(4, 4).to(dtype), "b.weight_scale": torch.ones(())}
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight.*scale"):
        open_model("base", write(tmp_path / "scaled", scaled, None))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("embeddings.position_ids", torch.arange(8).reshape(1, 8)),
        ("embeddings.token_type_ids", torch.zeros(1, 8, dtype=torch.int64)),
        ("layers.0.ffn.gate.tid2eid", integers(10, 2)),
        (
            "encoder.layers.0.blocks.0.attention.self.relative_position_index",
            torch.zeros(49, 49, dtype=torch.int64),
        ),
        ("h.0.attn.bias", torch.ones(1, 1, 8, 8, dtype=torch.uint8)),
        ("gpt_neox.layers.0.attention.bias", torch.ones(1, 1, 8, 8, dtype=torch.bool)),
        ("h.0.attn.masked_bias", torch.tensor(-10000)),
        ("encoder.causal_mask", integers(8, 8)),
        ("bn.num_batches_tracked", torch.tensor(7)),
        ("d2t", torch.arange(8)),
    ],
)
def test_buffers_pass(tmp_path: Path, name: str, tensor: Tensor) -> None:
    model = open_model("base", write(tmp_path / "model", {name: tensor}, None))
    assert model.foreign is None
    assert json.loads(run("inspect", tmp_path / "model", "--json").stdout)["quantised"] is None


def test_a_dequantised_model_is_taken_whatever_its_configuration_says(tmp_path: Path) -> None:
    assert (
        open_model("base", write(tmp_path / "model", {}, {"quant_method": "gptq", "bits": 4})).foreign is None
    )


# --- directories and files ------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [False, True])
def test_one_shard_of_several(tmp_path: Path, alone: bool) -> None:
    file = tmp_path / "model-00002-of-00003.safetensors"
    write_safetensors(file, PLAIN)
    result = run("inspect", tmp_path if alone else file)
    assert result.exit_code == 3
    assert_one_sentence(result, str(file), "shard 2 of 3", "give the directory")
    # One of one is a whole model.
    file.rename(tmp_path / "model-00001-of-00001.safetensors")
    assert len(open_model("base", tmp_path).headers) == 2


@pytest.mark.parametrize(
    ("entries", "advice"),
    [
        (["checkpoint-90/", "checkpoint-500/", "trainer_state.json"], "/checkpoint-500"),
        (["pytorch_model_fsdp_0/"], "accelerate merge-weights"),
        (["__0_0.distcp", ".metadata"], "dcp_to_torch"),
        (["zero_to_fp32.py", "global_step100/"], "zero_to_fp32.py"),
        (["consolidated.00.pth"], "convert_llama_weights_to_hf"),
        (["model_index.json", "unet/"], "/unet"),
        (["iter_0000500/"], "Megatron"),
        (["flax_model.msgpack"], "Flax"),
        (["consolidated.safetensors", "params.json"], "Mistral's own format"),
    ],
)
def test_directories_of_other_programs(tmp_path: Path, entries: list[str], advice: str) -> None:
    for entry in entries:
        if entry.endswith("/"):
            (tmp_path / entry).mkdir()
        elif entry.endswith(".safetensors"):
            write_safetensors(tmp_path / entry, PLAIN)
        else:
            (tmp_path / entry).write_text("{}")
    result = run("inspect", tmp_path)
    assert result.exit_code == 3
    assert_one_sentence(result, "model: ", str(tmp_path), advice)


def test_a_trainer_s_checkpoint_with_a_model_in_it_is_a_model(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoint-500", {}, None)
    for name in ("optimizer.pt", "trainer_state.json", "zero_to_fp32.py"):
        (path / name).write_text("{}")
    (path / "global_step500").mkdir()
    assert len(open_model("base", path).headers) == 2


@pytest.mark.parametrize(
    ("start", "advice"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "`git lfs pull`"),
        (b"<!DOCTYPE html>\n<html></html>", "web page"),
        (b"PK\x03\x04\x14\x00\x00\x08zip", "pickle"),
        (b"GGUF\x03\x00\x00\x00\x10\x00\x00\x00", "GGUF"),
    ],
)
def test_files_under_a_wrong_name(tmp_path: Path, start: bytes, advice: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(start)
    result = run("inspect", tmp_path)
    assert result.exit_code == 3
    assert_one_sentence(result, str(tmp_path / "model.safetensors"), advice)


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "LOHA"},
        {"peft_type": "LORA", "init_lora_weights": "pissa"},
        {"peft_type": "LORA", "use_qalora": True},
    ],
)
def test_other_adapters_may_be_folded(tmp_path: Path, settings: dict[str, object]) -> None:
    from safemerge_fast.checkpoint.adapter import open_source

    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, **settings}))
    write_safetensors(tmp_path / "adapter_model.safetensors", PLAIN)
    with pytest.raises(AdapterError, match="fold it with merge_and_unload"):
        open_source("finetuned", tmp_path)
