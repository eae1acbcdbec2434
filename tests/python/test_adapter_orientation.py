"""Conv1D beside Linear: which matrices of an adapter are stored as (in, out), judged against PEFT's own merge."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_adapter import factors, write_adapter, write_aligned

from safemerge_fast import fold
from safemerge_fast.checkpoint.adapter import open_adapter
from safemerge_fast.pairing.adapter_terms import adapter_terms

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def encoder_decoder() -> Any:
    """BERT, whose projections are Linear, and GPT-2, whose are Conv1D; squares of one size in both."""
    torch.manual_seed(3)
    bert = transformers.BertConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=36, vocab_size=61
    )
    gpt2 = transformers.GPT2Config(
        n_embd=24,
        n_layer=1,
        n_head=4,
        vocab_size=61,
        n_positions=32,
        add_cross_attention=True,
        is_decoder=True,
    )
    return transformers.EncoderDecoderModel(
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, gpt2)
    )


@pytest.mark.parametrize("targets", [["query", "value", "q_attn", "c_proj"], ["c_proj", "query", "dense"]])
def test_bert_and_gpt2_in_one_model(tmp_path: Path, targets: list[str]) -> None:
    model = encoder_decoder()
    model.save_pretrained(tmp_path / "model")
    original = load_file(tmp_path / "model" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # "dense" of BERT is a square and two that are not; "c_proj" of GPT-2 likewise.
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
        generator = torch.Generator().manual_seed(4)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        # The flag of an adapter is that of the module which was visited last; here it says "all".
        adapted.peft_config["default"].fan_in_fan_out = True
        adapted.save_pretrained(tmp_path / "adapter")
        expected = adapted.merge_and_unload().state_dict()
    fold(tmp_path / "model", tmp_path / "adapter", output=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    changed = [name for name in found if not torch.equal(found[name], original[name])]
    squares = {name for name in changed if found[name].shape == (24, 24)}
    assert {name.split(".")[0] for name in squares} == {"encoder", "decoder"}
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-5


def test_neighbours_say_how_a_square_is_stored(tmp_path: Path) -> None:
    """A model of a type that nobody knows: the flag says nothing of the layer whose biases speak."""
    linear, conv1d = "model.layers.0.o_proj", "model.layers.1.o_proj"
    model = write_aligned(
        tmp_path / "model",
        model_type="unheard_of",
        more={
            f"{linear}.weight": torch.zeros(12, 12),
            "model.layers.0.fc.weight": torch.zeros(20, 12),
            "model.layers.0.fc.bias": torch.zeros(20),
            f"{conv1d}.weight": torch.zeros(12, 12),
            "model.layers.1.fc.weight": torch.zeros(12, 20),
            "model.layers.1.fc.bias": torch.zeros(20),
        },
    )
    tensors = {**factors(linear), **factors(conv1d)}
    for flag in (False, True):
        adapter = open_adapter(
            "finetuned", write_adapter(tmp_path / f"adapter-{flag}", tensors, fan_in_fan_out=flag)
        )
        terms = adapter_terms(adapter, model).terms
        stored = {name: term.operand.low_rank[0].transpose for name, (term,) in terms.items()}
        assert stored == {f"{linear}.weight": False, f"{conv1d}.weight": True}


def test_the_nested_configuration_says_it_where_no_neighbour_does(tmp_path: Path) -> None:
    name = "decoder.transformer.h.0.attn.c_proj"
    other = "encoder.encoder.layer.0.attn.c_proj"
    model = write_aligned(
        tmp_path / "model",
        model_type="encoder-decoder",
        decoder={"model_type": "gpt2"},
        encoder={"model_type": "bert"},
        more={f"{name}.weight": torch.zeros(12, 12), f"{other}.weight": torch.zeros(12, 12)},
    )
    adapter = open_adapter(
        "finetuned", write_adapter(tmp_path / "adapter", {**factors(name), **factors(other)})
    )
    terms = adapter_terms(adapter, model).terms
    assert terms[f"{name}.weight"][0].operand.low_rank[0].transpose is True
    assert terms[f"{other}.weight"][0].operand.low_rank[0].transpose is False
