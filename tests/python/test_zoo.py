"""What is analysed, and how it is stored, against the modules of transformers' own models."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
import zoo

from safemerge_fast.pairing.rows import Missing, pair

MODELS = re.findall(
    r"\w+",
    """
AlbertForMaskedLM AriaForConditionalGeneration BarkModel BartForConditionalGeneration BertForMaskedLM BloomForCausalLM
CTRLLMHeadModel CanineForSequenceClassification CodeGenForCausalLM DebertaV2ForMaskedLM DeepseekV3ForCausalLM
DeepseekV4ForCausalLM DistilBertForMaskedLM ElectraForMaskedLM FalconForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM
GPTJForCausalLM GPTNeoForCausalLM GPTNeoXForCausalLM Gemma3ForConditionalGeneration GptOssForCausalLM
GraniteMoeForCausalLM IBertForMaskedLM ImageGPTForCausalImageModeling InklingForCausalLM JetMoeForCausalLM
Kosmos2_5ForConditionalGeneration LEDForConditionalGeneration Lfm2ForCausalLM LlamaForCausalLM
LlavaForConditionalGeneration LongT5ForConditionalGeneration MPNetForMaskedLM MT5ForConditionalGeneration
Mamba2ForCausalLM MambaForCausalLM MarianMTModel MixtralForCausalLM MllamaForConditionalGeneration MptForCausalLM
OPTForCausalLM OlmoeForCausalLM OpenAIGPTLMHeadModel PhimoeForCausalLM Pix2StructForConditionalGeneration
ProphetNetForConditionalGeneration Qwen2MoeForCausalLM Qwen2VLForConditionalGeneration Qwen3MoeForCausalLM
RecurrentGemmaForCausalLM RemBertForCausalLM RobertaForMaskedLM RwkvForCausalLM SpeechT5ForSpeechToText
SwitchTransformersForConditionalGeneration T5ForConditionalGeneration TapasForMaskedLM Tipsv2Model
UdopForConditionalGeneration WhisperForConditionalGeneration XLMWithLMHeadModel XLNetLMHeadModel
    """,
)

IN_LAYER = re.compile(r"\.\d+\.(?!weight$|bias$)")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_is_analysed_is_what_linear_modules_of_layers_own(name: str) -> None:
    if not hasattr(transformers, name):
        pytest.skip("this version of transformers does not have it")
    model, tensors = zoo.build(name)
    rows = {row.name: row for row in pair({"finetuned": zoo.as_role(model, tensors)}).rows}
    wrong = []
    for tensor in tensors:
        row = rows[tensor.name]
        if row.slices is not None:
            # Experts of all of a layer, which no linear module owns: test_expert_layouts looks at them.
            assert row.analysed, row
            continue
        matrix = tensor.kind in ("matrix", "conv1d")
        if matrix and IN_LAYER.search(tensor.name) and not row.analysed:
            wrong.append(f"{row.name} is left out: {row.reason}")
        known = re.search(r"rel_attn\.[qkvor]$", row.name)
        if tensor.kind in ("router", "head", "embedding", "other") and row.analysed and known is None:
            wrong.append(f"{row.name} is analysed, and is {tensor.kind}")
        heads = re.search(r"rel_attn\.[qkvor]$", row.name)
        if heads is not None:
            # Parameters of the attention itself, which no module tells apart.
            assert (row.analysed, row.transposed) == (True, row.name[-1] != "o"), row
        elif row.transposed != (tensor.kind == "conv1d"):
            wrong.append(f"{row.name} is stored as {tensor.kind}, transposed is {row.transposed}")
    assert wrong == []
    # Not for want of any.
    assert sum(row.analysed for row in rows.values())


PAIRS = [
    ("LlamaForCausalLM", "LlavaForConditionalGeneration"),
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    ("MllamaForCausalLM", "MllamaForConditionalGeneration"),
    ("MistralForCausalLM", "Idefics2ForConditionalGeneration"),
    ("OPTForCausalLM", "InstructBlipForConditionalGeneration"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "whole"), PAIRS)
def test_a_language_model_is_matched_with_that_of_a_multimodal_model(text: str, whole: str) -> None:
    model, tensors = zoo.build(whole)
    with torch.device("meta"):
        own = getattr(transformers, text)(model.config.text_config)
    mine = list(zoo.stored(own))
    models = {
        "base": zoo.as_role(model, tensors, "base"),
        "aligned": zoo.as_role(model, tensors, "aligned"),
        "finetuned": zoo.as_role(own, mine),
    }
    pairing = pair(models, missing=Missing.REFUSE)
    assert len(pairing.rows) == len(mine)
    vision = re.compile(r"vision|qformer|connector|project")
    for row in pairing.rows:
        assert not any(vision.search(other) for other in row.names.values()), row
        assert set(row.names) == {"finetuned", "base", "aligned"}, row
    assert sum("is the language model of aligned alone" in note for note in pairing.notes) == 1
