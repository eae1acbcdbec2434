"""The tensors of known models: names, shapes, and the files that a published checkpoint spreads them over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Tensor = tuple[str, tuple[int, ...]]

ITEM_BYTES = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The dimensions that decide a checkpoint of bfloat16.

    Attributes:
        hidden: Width of the residual stream.
        layers: Decoder layers.
        vocab: Rows of the embedding.
        tied: Whether the output head is the embedding.
        shard_bytes: Most bytes of tensors in a file.
    """

    hidden: int
    layers: int
    vocab: int
    tied: bool
    shard_bytes: int = 2_000_000_000

    def tensors(self) -> Iterator[Tensor]:
        """Yields name and shape of every tensor, in the order in which checkpoints hold them."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield from ((f"{prefix}.{name}", shape) for name, shape in self.layer(layer))
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)

    def layer(self, number: int) -> Iterator[Tensor]:
        """Yields the tensors of one layer but for its norms, named from within the layer."""
        raise NotImplementedError

    def config(self) -> dict[str, object]:
        """Returns the part of config.json that loaders need."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "dtype": "bfloat16",
        }

    def files(self) -> list[tuple[str, list[Tensor]]]:
        """Spreads the tensors over files in order, as transformers does; a file's name and its tensors."""
        groups: list[list[Tensor]] = [[]]
        filled = 0
        for tensor in self.tensors():
            size = tensor_bytes(tensor[1])
            if filled and filled + size > self.shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(tensor)
            filled += size
        count = len(groups)
        return [
            (f"model-{number:05}-of-{count:05}.safetensors", group)
            for number, group in enumerate(groups, start=1)
        ]

    def projections(self) -> Iterator[tuple[int, int]]:
        """Yields (d_out, d_in) of every weight that the analysis scores."""
        for name, shape in self.tensors():
            if len(shape) == 2 and "_proj" in name:
                yield shape[0], shape[1]

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(math.prod(shape) for _, shape in self.tensors())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return ITEM_BYTES * self.parameters


@dataclass(frozen=True, kw_only=True)
class Dense(Shapes):
    """A model like Llama or Qwen2, whose layers have one MLP each."""

    intermediate: int
    heads: int
    kv_heads: int
    bias: bool = False

    def layer(self, number: int) -> Iterator[Tensor]:
        """Yields the tensors of one layer but for its norms."""
        head = self.hidden // self.heads
        kv = self.kv_heads * head
        yield "self_attn.q_proj.weight", (self.hidden, self.hidden)
        yield "self_attn.k_proj.weight", (kv, self.hidden)
        yield "self_attn.v_proj.weight", (kv, self.hidden)
        yield "self_attn.o_proj.weight", (self.hidden, self.hidden)
        if self.bias:
            yield "self_attn.q_proj.bias", (self.hidden,)
            yield "self_attn.k_proj.bias", (kv,)
            yield "self_attn.v_proj.bias", (kv,)
        yield "mlp.gate_proj.weight", (self.intermediate, self.hidden)
        yield "mlp.up_proj.weight", (self.intermediate, self.hidden)
        yield "mlp.down_proj.weight", (self.hidden, self.intermediate)

    def config(self) -> dict[str, object]:
        """Returns the part of config.json that loaders need."""
        return {
            **super().config(),
            "architectures": ["Qwen2ForCausalLM" if self.bias else "LlamaForCausalLM"],
            "model_type": "qwen2" if self.bias else "llama",
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
        }


@dataclass(frozen=True, kw_only=True)
class Mixture(Shapes):
    """A mixture of experts with latent attention, like DeepSeek-V3 or Kimi K2; its first layer is dense."""

    intermediate: int
    experts: int
    expert_intermediate: int
    heads: int
    query_rank: int
    kv_rank: int
    rope_head: int = 64
    head: int = 128

    def layer(self, number: int) -> Iterator[Tensor]:
        """Yields the tensors of one layer but for its norms."""
        width = self.heads * self.head
        yield "self_attn.q_a_proj.weight", (self.query_rank, self.hidden)
        yield "self_attn.q_b_proj.weight", (width + self.heads * self.rope_head, self.query_rank)
        yield "self_attn.kv_a_proj_with_mqa.weight", (self.kv_rank + self.rope_head, self.hidden)
        yield "self_attn.kv_b_proj.weight", (2 * width, self.kv_rank)
        yield "self_attn.o_proj.weight", (self.hidden, width)
        if number == 0:
            yield from self._mlp("mlp", self.intermediate)
            return
        yield "mlp.gate.weight", (self.experts, self.hidden)
        for expert in range(self.experts):
            yield from self._mlp(f"mlp.experts.{expert}", self.expert_intermediate)
        yield from self._mlp("mlp.shared_experts", self.expert_intermediate)

    def _mlp(self, name: str, width: int) -> Iterator[Tensor]:
        yield f"{name}.gate_proj.weight", (width, self.hidden)
        yield f"{name}.up_proj.weight", (width, self.hidden)
        yield f"{name}.down_proj.weight", (self.hidden, width)


def tensor_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a bfloat16 tensor."""
    return ITEM_BYTES * math.prod(shape)


_HF_SHARD = 5_000_000_000

MODELS: dict[str, Shapes] = {
    # Not a model: for tests of the benchmarks.
    "tiny": Dense(
        hidden=64, intermediate=160, layers=3, heads=4, kv_heads=2, vocab=500, tied=False, shard_bytes=200_000
    ),
    "qwen2.5-0.5b": Dense(
        hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, vocab=151936, tied=True, bias=True
    ),
    "qwen2.5-1.5b": Dense(
        hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2, vocab=151936, tied=True, bias=True
    ),
    "llama-3.2-3b": Dense(
        hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8, vocab=128256, tied=True
    ),
    "llama-3.1-8b": Dense(
        hidden=4096,
        intermediate=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        vocab=128256,
        tied=False,
        shard_bytes=_HF_SHARD,
    ),
    "llama-3-70b": Dense(
        hidden=8192,
        intermediate=28672,
        layers=80,
        heads=64,
        kv_heads=8,
        vocab=128256,
        tied=False,
        shard_bytes=_HF_SHARD,
    ),
    "llama-3.1-405b": Dense(
        hidden=16384,
        intermediate=53248,
        layers=126,
        heads=128,
        kv_heads=8,
        vocab=128256,
        tied=False,
        shard_bytes=_HF_SHARD,
    ),
    # The shapes of Kimi K2, in bfloat16.
    "mixture-1t": Mixture(
        hidden=7168,
        intermediate=18432,
        layers=61,
        heads=64,
        vocab=163840,
        tied=False,
        experts=384,
        expert_intermediate=2048,
        query_rank=1536,
        kv_rank=512,
        shard_bytes=_HF_SHARD,
    ),
}
