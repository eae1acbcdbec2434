"""Checkpoints with the real shapes of known models and random weights, written without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHARD_BYTES = 2_000_000_000
BLOCK = 1 << 24  # elements of random data, reused from another offset for every tensor


@dataclass(frozen=True)
class Shapes:
    """The dimensions that decide a dense Llama- or Qwen-like checkpoint."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    bias: bool = False
    head_dim: int | None = None

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields name and shape of every tensor, in the order in which checkpoints hold them."""
        head = self.head_dim or self.hidden // self.heads
        q, kv = self.heads * head, self.kv_heads * head
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            yield f"{name}.self_attn.q_proj.weight", (q, self.hidden)
            yield f"{name}.self_attn.k_proj.weight", (kv, self.hidden)
            yield f"{name}.self_attn.v_proj.weight", (kv, self.hidden)
            yield f"{name}.self_attn.o_proj.weight", (self.hidden, q)
            if self.bias:
                yield f"{name}.self_attn.q_proj.bias", (q,)
                yield f"{name}.self_attn.k_proj.bias", (kv,)
                yield f"{name}.self_attn.v_proj.bias", (kv,)
            yield f"{name}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{name}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{name}.mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield f"{name}.input_layernorm.weight", (self.hidden,)
            yield f"{name}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)

    def config(self) -> dict[str, object]:
        """Returns the part of config.json that loaders need."""
        return {
            "architectures": ["Qwen2ForCausalLM" if self.bias else "LlamaForCausalLM"],
            "model_type": "qwen2" if self.bias else "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "dtype": "bfloat16",
        }


MODELS = {
    "qwen2.5-0.5b": Shapes(896, 4864, 24, 14, 2, 151936, tied=True, bias=True),
    "qwen2.5-1.5b": Shapes(1536, 8960, 28, 12, 2, 151936, tied=True, bias=True),
    "llama-3.2-3b": Shapes(3072, 8192, 28, 24, 8, 128256, tied=True, head_dim=128),
    "llama-3.1-8b": Shapes(4096, 14336, 32, 32, 8, 128256, tied=False),
    "llama-3.1-70b": Shapes(8192, 28672, 80, 64, 8, 128256, tied=False),
}


def random_bfloat16(seed: int, scale: float = 0.02) -> np.ndarray:
    """Returns BLOCK normal values of standard deviation `scale` as bfloat16 bits (uint16)."""
    values = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32) * np.float32(scale)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_checkpoint(directory: Path, shapes: Shapes, seed: int) -> int:
    """Writes a bfloat16 checkpoint with random weights; returns its bytes. An existing one is left alone."""
    done = directory / "config.json"
    if done.exists():
        return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in shapes.tensors():
        size = 2 * int(np.prod(shape))
        if filled and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    block = random_bfloat16(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += write_shard(directory / file, tensors, block, offset=number * 7919)
        weight_map.update(dict.fromkeys((name for name, _ in tensors), file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    done.write_text(json.dumps(shapes.config()))
    return total


def write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], block: np.ndarray, offset: int
) -> int:
    """Writes one shard, its tensors filled from consecutive values of `block`; returns its bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left, place = end // 2, offset % block.size
        while left:
            part = block[place : place + left]
            part.tofile(file)
            left, place = left - part.size, 0
    return 8 + len(text) + end
