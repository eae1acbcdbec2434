"""Tiny Llama checkpoints for configurations in mergekit's format, and what a configuration makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import llama_config, write_checkpoint
from lora import load_checkpoint

from safemerge_fast import verify
from safemerge_fast.recipes.mergekit.job import MergekitSettings
from safemerge_fast.recipes.run import carry_out, read_recipe
from safemerge_fast.report.report import Report

HIDDEN, INTERMEDIATE, VOCABULARY = 12, 16, 22

SHAPES = {
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}


def write_llama(
    path: Path,
    *,
    seed: int,
    layers: int = 5,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    stores_head: bool | None = None,
    shards: int = 1,
    more: Mapping[str, torch.Tensor] | None = None,
    without: tuple[str, ...] = (),
    edit_config: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Writes a checkpoint with random weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in SHAPES.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    if (not tied) if stores_head is None else stores_head:
        shapes["lm_head.weight"] = (vocabulary, HIDDEN)
    tensors = {
        name: (0.3 * torch.randn(*shape, generator=generator) + (len(shape) == 1)).to(dtype)
        for name, shape in shapes.items()
        if name not in without
    }
    config = llama_config(
        hidden=HIDDEN,
        vocabulary=vocabulary,
        layers=layers,
        intermediate=INTERMEDIATE,
        dtype=str(dtype).removeprefix("torch."),
        tied=tied,
    )
    if edit_config is not None:
        edit_config(config)
    return write_checkpoint(path, {**tensors, **(more or {})}, config, shards=shards)


def read(path: Path, output: Path | str = "out", /, **document: Any) -> MergekitSettings:
    """Writes a configuration to a file and reads it again."""
    path.write_text(yaml.safe_dump(plain(document), sort_keys=False))
    settings = read_recipe(path, {"output": str(output)})
    assert isinstance(settings, MergekitSettings)
    return settings


def merged(tmp_path: Path, /, **document: Any) -> tuple[dict[str, torch.Tensor], Report]:
    """Runs a configuration, verifies the output, and returns its tensors in float64, with the report."""
    number = len(list(tmp_path.glob("merged-*")))
    output = tmp_path / f"merged-{number}"
    report = carry_out(read(tmp_path / "config.yml", output, **document))
    verify(output)
    tensors = load_checkpoint(output)
    assert {tensor.name for tensor in report.tensors} == set(tensors)
    return {name: tensor.double() for name, tensor in tensors.items()}, report


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, in float64."""
    return {name: tensor.double() for name, tensor in load_checkpoint(path).items()}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal as far as arithmetic in float32 goes."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def plain(value: Any) -> Any:
    """Paths as text, all the way down."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
