"""Quantised tensors as Python sees them: one tensor under its own name, whatever it is stored as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_checkpoint

from safemerge_fast._engine import Checkpoint
from safemerge_fast.checkpoint.adapter import open_adapter
from safemerge_fast.checkpoint.model import open_model
from safemerge_fast.errors import AdapterError, CheckpointError, PlanError

F8 = torch.float8_e4m3fn


def block_fp8(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """A weight in blocks of 128 x 128, and its scales, by the formula."""
    torch.manual_seed(rows)
    weight = torch.randn(rows, columns, dtype=torch.float64)
    down, across = -(-rows // 128), -(-columns // 128)
    scales = torch.empty(down, across)
    codes = torch.empty(rows, columns, dtype=F8)
    for i in range(down):
        for j in range(across):
            block = weight[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
            scales[i, j] = block.abs().max() / 448
            codes[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128] = (block / scales[i, j].double()).to(F8)
    return {"weight": codes, "weight_scale_inv": scales}


def sharded(path: Path) -> Path:
    """A weight and its scales that lie in two files, between plain ones."""
    parts = block_fp8(200, 300)
    tensors = {
        "norm.weight": torch.ones(7, dtype=torch.bfloat16),
        "a.weight": parts["weight"],
        "b.weight": torch.ones(100, 300, dtype=torch.float16),
        "a.weight_scale_inv": parts["weight_scale_inv"],
        "a.input_scale": torch.ones(1),
    }
    return write_checkpoint(path, tensors, shards=2)


def test_a_quantised_tensor_stands_once_under_its_own_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint(sharded(tmp_path))
    assert len(checkpoint.files) == 2
    assert checkpoint.names == ["norm.weight", "a.weight", "b.weight"] == [t.name for t in checkpoint.tensors]
    assert len(checkpoint) == 3
    assert checkpoint.parameters == 7 + 200 * 300 + 100 * 300
    found = checkpoint.tensor("a.weight")
    assert (found.name, found.dtype, found.shape) == ("a.weight", "BF16", (200, 300))
    assert found.encoding == "FP8 in blocks of 128 x 128"
    assert found.stored == ("a.weight", "a.weight_scale_inv", "a.input_scale")
    assert found.parameters == 60_000
    assert found.nbytes == 60_000 + 2 * 3 * 4 + 4
    assert found.file == checkpoint.files[0]
    assert "FP8 in blocks" in repr(found)
    plain = checkpoint.tensor("b.weight")
    assert (plain.encoding, plain.stored, plain.dtype) == (None, ("b.weight",), "F16")
    assert "a.weight" in checkpoint
    assert "a.weight_scale_inv" not in checkpoint
    with pytest.raises(CheckpointError, match=r"no tensor `a\.weight_scale_inv`"):
        checkpoint.tensor("a.weight_scale_inv")


def test_what_is_stored_is_listed_and_read_apart(tmp_path: Path) -> None:
    checkpoint = Checkpoint(sharded(tmp_path))
    stored = {tensor.name: tensor for tensor in checkpoint.stored_tensors}
    assert sorted(stored) == sorted(
        ["norm.weight", "a.weight", "b.weight", "a.weight_scale_inv", "a.input_scale"]
    )
    codes = stored["a.weight"]
    assert (codes.dtype, codes.encoding, codes.stored) == ("F8_E4M3", None, ("a.weight",))
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in checkpoint.tensors)
    with pytest.raises(PlanError, match=r"`a\.weight` is encoded as FP8 in blocks of 128 x 128"):
        checkpoint.rows("a.weight", 0, 1)
    expected = block_fp8(200, 300)
    rows = np.asarray(checkpoint.rows("a.weight", 3, 5, stored=True))
    assert rows.tobytes() == expected["weight"][3:5].view(torch.uint8).numpy().tobytes()
    scales = np.asarray(checkpoint.rows("a.weight_scale_inv", 0, 2, stored=True)).view(np.float32)
    assert np.array_equal(scales.reshape(2, 3), expected["weight_scale_inv"].numpy())
    checkpoint.release("a.weight")
    checkpoint.release("b.weight")


U8, I32 = torch.uint8, torch.int32

VARIANTS: dict[str, tuple[str, str, tuple[int, ...], dict[str, torch.Tensor]]] = {
    "one scale": (
        "FP8 with a scale a matrix",
        "m.weight",
        (6, 64),
        {"m.weight": torch.ones(6, 64).to(F8), "m.weight_scale": torch.ones(())},
    ),
    "one scale a row": (
        "FP8 with a scale a row",
        "m.weight",
        (6, 64),
        {"m.weight": torch.ones(6, 64).to(F8), "m.weight_scale": torch.ones(6, 1, dtype=torch.bfloat16)},
    ),
    "no scales": (
        "FP8 without scales",
        "m.weight",
        (6, 64),
        {"m.weight": torch.ones(6, 64).to(torch.float8_e5m2)},
    ),
    "MXFP8": (
        "MXFP8",
        "m.weight",
        (6, 64),
        {"m.weight": torch.ones(6, 64).to(F8), "m.weight_scale": torch.full((6, 2), 127, dtype=U8)},
    ),
    "gpt-oss": (
        "MXFP4",
        "m.experts.down_proj",
        (2, 6, 96),
        {
            "m.experts.down_proj_blocks": torch.ones(2, 6, 3, 16, dtype=U8),
            "m.experts.down_proj_scales": torch.full((2, 6, 3), 127, dtype=U8),
        },
    ),
    "DeepSeek-V4": (
        "MXFP4",
        "m.w1.weight",
        (6, 64),
        {
            "m.w1.weight": torch.ones(6, 32, dtype=torch.int8),
            "m.w1.scale": torch.ones(6, 2).to(torch.float8_e8m0fnu),
        },
    ),
    "Kimi": (
        "INT4 (pack-quantized)",
        "m.weight",
        (6, 64),
        {
            "m.weight_packed": torch.ones(6, 8, dtype=I32),
            "m.weight_scale": torch.ones(6, 2, dtype=torch.bfloat16),
            "m.weight_shape": torch.tensor([6, 64], dtype=I32),
        },
    ),
    "ModelOpt": (
        "NVFP4",
        "m.weight",
        (6, 64),
        {
            "m.weight": torch.ones(6, 32, dtype=U8),
            "m.weight_scale": torch.ones(6, 4).to(F8),
            "m.weight_scale_2": torch.ones(()),
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_formats_are_found_by_names_dtypes_and_shapes(tmp_path: Path, variant: str) -> None:
    words, name, shape, tensors = VARIANTS[variant]
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors))
    (found,) = checkpoint.tensors
    assert (found.name, found.encoding, found.shape) == (name, words, shape)
    assert found.stored == tuple(tensors)
    assert found.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.names == [name]
    assert checkpoint.tensor(name).shape == shape
    assert len(open_model("base", tmp_path).headers) == 1


def test_one_that_is_not_whole_is_named_and_still_looked_into(tmp_path: Path) -> None:
    tensors = {"m.weight": torch.ones(300, 300).to(F8), "m.weight_scale_inv": torch.ones(3, 2)}
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors))
    assert [tensor.name for tensor in checkpoint.stored_tensors] == list(tensors)
    match = r"model.safetensors cannot be used: its tensor `m.weight` .*\[3, 3\].*`m.weight_scale_inv` is F32 \[3, 2\]"
    for ask in (lambda: checkpoint.tensors, lambda: checkpoint.names, lambda: len(checkpoint)):
        with pytest.raises(CheckpointError, match=match):
            ask()
    with pytest.raises(CheckpointError, match=match):
        open_model("base", tmp_path)


def test_an_adapter_of_bare_8_bit_floats_is_refused(tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": torch.ones(4, 4).to(F8)
        for part in "AB"
    }
    write_checkpoint(tmp_path, tensors)
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}'
    )
    with pytest.raises(AdapterError, match="FP8 without scales"):
        open_adapter("finetuned", tmp_path)
