"""Small models of transformers' own classes, with random weights, for the tests of adapters and of what is analysed."""

from __future__ import annotations

from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

HIDDEN, INNER, EXPERTS, VOCABULARY = 24, 16, 3, 61
# What most configurations call alike.
TEXT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}
VISION = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 1,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0}


def mixtral() -> Any:
    """Experts of their own on disk, under another name than in the loaded model."""
    config = transformers.MixtralConfig(
        **TEXT,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
    )
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> Any:
    """Experts of their own on disk, under the loaded model's name."""
    config = transformers.Qwen3MoeConfig(
        **TEXT,
        intermediate_size=20,
        moe_intermediate_size=INNER,
        head_dim=6,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss(inner: int = INNER) -> Any:
    """Experts in one tensor, stored as (in, out)."""
    config = transformers.GptOssConfig(
        **TEXT,
        intermediate_size=inner,
        head_dim=6,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        layer_types=["full_attention", "full_attention"],
    )
    return transformers.GptOssForCausalLM(config)


def gpt_oss_square() -> Any:
    """The same with squares, whose shapes do not say how they are stored."""
    return gpt_oss(HIDDEN)


def llama4(inner: int = INNER) -> Any:
    """Experts in one tensor, stored as (in, out), of which the class says nothing."""
    config = transformers.Llama4TextConfig(
        **TEXT,
        intermediate_size=inner,
        intermediate_size_mlp=20,
        head_dim=6,
        num_local_experts=EXPERTS,
        interleave_moe_layer_step=1,
    )
    return transformers.Llama4ForCausalLM(config)


def llama4_square() -> Any:
    """The same with squares."""
    return llama4(HIDDEN)


def fused_qwen3_moe() -> Any:
    """Experts in one tensor, stored as (out, in)."""
    return qwen3_moe()


def jetmoe() -> Any:
    """Experts in a module's own weight."""
    config = transformers.JetMoeConfig(
        **TEXT,
        intermediate_size=INNER,
        kv_channels=6,
        num_local_experts=EXPERTS,
    )
    return transformers.JetMoeForCausalLM(config)


def qwen2_vl() -> Any:
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "intermediate_size": 32, "rope_parameters": MROPE},
        vision_config={**VISION, "embed_dim": 16, "hidden_size": 24, "mlp_ratio": 2},
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 20, "out_hidden_size": 24, "window_size": 8}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "intermediate_size": 32, "rope_parameters": MROPE},
        vision_config={**VISION, **vision, "fullatt_block_indexes": [0]},
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def gemma3n() -> Any:
    config = transformers.Gemma3nTextConfig(
        **{**TEXT, "num_hidden_layers": 4, "intermediate_size": 32},
        head_dim=6,
        vocab_size_per_layer_input=61,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        activation_sparsity_pattern=[0.0] * 4,
    )
    return transformers.Gemma3nForCausalLM(config)


def zamba2() -> Any:
    config = transformers.Zamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=4,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_mem_blocks=2,
        use_shared_attention_adapter=True,
        adapter_rank=4,
        chunk_size=8,
    )
    return transformers.Zamba2ForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def bert_and_gpt2() -> Any:
    """Linear modules in the encoder, Conv1D in the decoder; both square and not."""
    encoder = transformers.BertConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
        vocab_size=VOCABULARY,
    )
    decoder = transformers.GPT2Config(
        n_embd=24,
        n_layer=1,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=16,
        add_cross_attention=True,
        is_decoder=True,
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.EncoderDecoderModel(config)


def lfm2() -> Any:
    config = transformers.Lfm2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        layer_types=["conv", "full_attention"],
    )
    return transformers.Lfm2ForCausalLM(config)


def t5() -> Any:
    config = transformers.T5Config(
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=3,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    return transformers.T5ForConditionalGeneration(config)


def bert_with_a_head() -> Any:
    config = transformers.BertConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    return transformers.BertForMaskedLM(config)


def ctrl() -> Any:
    config = transformers.CTRLConfig(
        n_embd=24, n_layer=1, n_head=2, dff=40, vocab_size=VOCABULARY, n_positions=16
    )
    return transformers.CTRLLMHeadModel(config)
