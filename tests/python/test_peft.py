"""Adapters that PEFT made, folded by us and by PEFT's merge_and_unload, and run by PEFT as they are."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import all_reads
from safetensors import safe_open
from safetensors.torch import load_file

from safemerge_fast import AdapterError, fold, verify
from safemerge_fast.checkpoint.adapter import open_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
TOKENS = torch.tensor([[1, 5, 7, 3, 44, 12, 0, 9]])


def llama(*, tied: bool = False) -> Any:
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=36,
            intermediate_size=52,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            vocab_size=61,
            attention_bias=True,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> Any:
    torch.manual_seed(2)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=61, n_positions=32)
    )


def train(adapted: Any, seed: int = 0, *, size: float = 0.05) -> None:
    """Moves all that is trainable, so that no factor is zero and no magnitude the weight's own norm."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)


def save(path: Path, model: Any, **settings: Any) -> tuple[Path, Path]:
    """Saves a model and an adapter of it: (model, adapter)."""
    model.save_pretrained(path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        train(adapted)
        adapted.save_pretrained(path / "adapter")
    return path / "model", path / "adapter"


def load(model: Path, adapter: Path) -> Any:
    """The model with the adapter on it, as a user of PEFT has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(fresh, adapter).eval()


def merged(adapted: Any) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unloaded = adapted.merge_and_unload()
    return {name: tensor.detach() for name, tensor in unloaded.state_dict().items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def check(tmp_path: Path, record_property: Callable[[str, object], None]) -> Callable[..., int]:
    def check(model: Any, *, changed: int, same_logits: bool = True, **settings: Any) -> int:
        """Folds an adapter and compares with PEFT; returns how many tensors differ from the model's."""
        paths = save(tmp_path, model, **settings)
        output = tmp_path / "out"
        report = fold(*paths, output=output)
        assert verify(output).bytes_checked == report.bytes_written
        adapted = load(*paths)
        expected_logits = logits(adapted)
        expected = merged(adapted)
        found = load_file(output / "model.safetensors")
        original = load_file(paths[0] / "model.safetensors")
        assert found.keys() == original.keys()
        error = max(float((found[name] - expected[name]).abs().max()) for name in found)
        record_property("weights", error)
        assert error <= TOLERANCE
        assert sum(not torch.equal(found[name], original[name]) for name in found) == changed
        assert report.changed >= changed
        if same_logits:
            folded = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
            difference = float((logits(folded) - expected_logits).abs().max())
            record_property("logits", difference)
            assert difference <= TOLERANCE
        planned = json.loads((output / "safemerge_plan.json").read_text())
        with safe_open(paths[1] / "adapter_model.safetensors", "pt") as file:
            assert set(file.keys()) == _read_from_adapter(planned)
        return changed

    return check


def _read_from_adapter(planned: dict[str, Any]) -> set[str]:
    """The adapter's tensors that a plan reads: all of them, or something was dropped."""
    return {name for source, name in all_reads(planned) if source == "adapter"}


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


class TestTable:
    """The cases of PEFT's LoRA, each against PEFT itself."""

    def test_linear(self, check: Callable[..., int]) -> None:
        check(llama(), changed=4, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])

    def test_all_linear(self, check: Callable[..., int]) -> None:
        check(llama(), changed=14, r=5, lora_alpha=3, target_modules="all-linear")

    def test_regular_expression_of_modules(self, check: Callable[..., int]) -> None:
        check(llama(), changed=2, r=4, target_modules=r"model\.layers\.1\.mlp\.(up|down)_proj")

    def test_layers_to_transform(self, check: Callable[..., int]) -> None:
        check(llama(), changed=1, r=4, target_modules=["q_proj"], layers_to_transform=[1])

    def test_conv1d(self, check: Callable[..., int]) -> None:
        # c_proj of attention is square: only its type says how it is stored.
        check(gpt2(), changed=8, r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)

    def test_conv1d_beside_linear(self, check: Callable[..., int]) -> None:
        untied = gpt2()
        untied.config.tie_word_embeddings = False
        untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone() + 0.01)
        check(untied, changed=3, r=4, target_modules=["attn.c_proj", "lm_head"])

    def test_embedding(self, check: Callable[..., int]) -> None:
        check(llama(), changed=3, r=4, target_modules=["embed_tokens", "q_proj"])

    def test_embedding_of_positions(self, check: Callable[..., int]) -> None:
        check(gpt2(), changed=1, r=4, target_modules=["wpe"])

    def test_tied_embedding_changes_the_head_as_merge_and_unload_does(
        self, check: Callable[..., int], tmp_path: Path
    ) -> None:
        check(llama(tied=True), changed=1, same_logits=False, r=4, target_modules=["embed_tokens"])
        (note,) = json.loads((tmp_path / "out" / "safemerge_report.json").read_text())["notes"]
        assert "ties its head" in note

    def test_dora_linear(self, check: Callable[..., int]) -> None:
        check(llama(), changed=14, r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)

    def test_dora_conv1d(self, check: Callable[..., int]) -> None:
        check(gpt2(), changed=8, r=4, target_modules=["c_attn", "c_proj", "c_fc"], use_dora=True)

    def test_dora_embedding(self, check: Callable[..., int]) -> None:
        check(llama(), changed=1, r=4, target_modules=["embed_tokens"], use_dora=True)

    def test_lora_bias(self, check: Callable[..., int]) -> None:
        check(llama(), changed=16, r=4, lora_alpha=7, target_modules=ATTENTION, lora_bias=True)

    @pytest.mark.parametrize(("bias", "changed"), [("all", 10), ("lora_only", 4)])
    def test_bias(self, check: Callable[..., int], bias: str, changed: int) -> None:
        check(llama(), changed=changed, r=4, target_modules=["q_proj"], bias=bias)

    def test_bias_of_the_model_and_of_b(self, check: Callable[..., int]) -> None:
        check(llama(), changed=4, r=4, target_modules=["q_proj"], bias="lora_only", lora_bias=True)

    def test_biases_of_norms(self, check: Callable[..., int]) -> None:
        # Four Conv1D and two norms a layer, and the last norm; two matrices besides.
        check(gpt2(), changed=15, r=4, target_modules=["c_attn"], bias="all")

    def test_modules_to_save(self, check: Callable[..., int]) -> None:
        saved = ["lm_head", "embed_tokens", "norm", "k_proj"]
        # "norm" is the end of all norms' names; k_proj has a bias.
        check(llama(), changed=13, r=4, target_modules=["q_proj"], modules_to_save=saved)

    def test_modules_to_save_and_all_biases(self, check: Callable[..., int], tmp_path: Path) -> None:
        # PEFT stores the bias twice, and its untrained original, which nothing reads.
        paths = save(
            tmp_path, llama(), r=4, target_modules=["q_proj"], modules_to_save=["k_proj"], bias="all"
        )
        fold(*paths, output=tmp_path / "out")
        adapted = load(*paths)
        expected_logits, expected = logits(adapted), merged(adapted)
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert max(float((found[name] - expected[name]).abs().max()) for name in found) <= TOLERANCE
        folded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert float((logits(folded) - expected_logits).abs().max()) <= TOLERANCE

    @pytest.mark.parametrize("indices", [[3, 60, 0, 7], {"embed_tokens": [44, 5]}])
    def test_trainable_tokens(self, check: Callable[..., int], indices: Any) -> None:
        check(llama(), changed=3, r=4, target_modules=["q_proj"], trainable_token_indices=indices)

    def test_trainable_tokens_of_tied_and_of_two_layers(self, check: Callable[..., int]) -> None:
        check(llama(tied=True), changed=3, r=4, target_modules=["q_proj"], trainable_token_indices=[44, 5])

    def test_trainable_tokens_of_two_layers(self, check: Callable[..., int]) -> None:
        indices = {"embed_tokens": [44, 5], "lm_head": [7]}
        check(llama(), changed=4, r=4, target_modules=["q_proj"], trainable_token_indices=indices)

    def test_rank_and_alpha_patterns(self, check: Callable[..., int]) -> None:
        check(
            llama(),
            changed=14,
            r=4,
            lora_alpha=6,
            target_modules="all-linear",
            rank_pattern={"q_proj": 7, r"layers\.0\..*k_proj": 2, "^model.layers.1.mlp.up_proj": 3},
            alpha_pattern={r"layers\.\d+\.self_attn\.q_proj": 5, "q_proj": 11, "down_proj": 1},
        )

    def test_rank_stabilised(self, check: Callable[..., int]) -> None:
        check(
            llama(),
            changed=4,
            r=9,
            lora_alpha=4,
            target_modules=["q_proj", "v_proj"],
            use_rslora=True,
            rank_pattern={"v_proj": 3},
        )

    @pytest.mark.parametrize("initial", [True, False, "gaussian", "orthogonal", "mica"])
    def test_initialisations_that_leave_the_model_as_it_is(
        self, check: Callable[..., int], initial: Any
    ) -> None:
        check(llama(), changed=4, r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=initial)

    def test_the_stored_dtypes_of_model_and_adapter(self, tmp_path: Path) -> None:
        model, adapter = save(
            tmp_path, llama().to(torch.bfloat16), r=4, lora_alpha=8, target_modules=["q_proj"]
        )
        fold(model, adapter, output=tmp_path / "out")
        weights, factors = (
            load_file(model / "model.safetensors"),
            load_file(adapter / "adapter_model.safetensors"),
        )
        found = load_file(tmp_path / "out" / "model.safetensors")
        for layer in range(2):
            name = f"model.layers.{layer}.self_attn.q_proj"
            a, b = (factors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
            exact = weights[f"{name}.weight"].double() + 2.0 * b @ a
            assert found[f"{name}.weight"].dtype == torch.bfloat16
            # One rounding of the exact sum; float32's own error moves few values over to the neighbour.
            differs = found[f"{name}.weight"] != exact.to(torch.bfloat16)
            assert differs.float().mean() < 0.01
            torch.testing.assert_close(found[f"{name}.weight"].double(), exact, rtol=2**-8, atol=1e-8)


class TestRefused:
    def test_pickles(self, tmp_path: Path) -> None:
        model, adapter = save(tmp_path, llama(), r=4, target_modules=["q_proj"])
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
        with pytest.raises(AdapterError, match=r"adapter_model\.bin"):
            fold(model, adapter, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("initial", ["pissa", "olora", "pissa_niter_4"])
    def test_initialisations_that_changed_the_model(self, tmp_path: Path, initial: str) -> None:
        _, adapter = save(tmp_path, llama(), r=4, target_modules=["q_proj"], init_lora_weights=initial)
        with pytest.raises(AdapterError, match=f"init_lora_weights '{initial}'"):
            open_adapter("finetuned", adapter)

    def test_pissa_that_peft_converted_is_folded(self, tmp_path: Path) -> None:
        model = llama()
        model.save_pretrained(tmp_path / "model")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
            adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
            adapted.peft_config["default"].init_lora_weights = True
            adapted.save_pretrained(tmp_path / "initial")
            adapted.peft_config["default"].init_lora_weights = "pissa"
            train(adapted)
            expected = logits(adapted.eval())
            adapted.save_pretrained(
                tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
            )
        fold(tmp_path / "model", tmp_path / "adapter", output=tmp_path / "out")
        folded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert float((logits(folded) - expected).abs().max()) <= TOLERANCE

    def test_other_kinds(self, tmp_path: Path) -> None:
        config = peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
        peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
        with pytest.raises(AdapterError, match="of peft_type 'LOHA'"):
            open_adapter("finetuned", tmp_path / "adapter")

    def test_a_head_that_the_tied_model_does_not_store(self, tmp_path: Path) -> None:
        model, adapter = save(
            tmp_path, llama(tied=True), r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]
        )
        with pytest.raises(AdapterError, match=r"lm_head\.weight.*tied to the embedding"):
            fold(model, adapter, output=tmp_path / "out")

    def test_a_head_for_classification(self, tmp_path: Path) -> None:
        config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"])
        llama().save_pretrained(tmp_path / "model")
        classifier = transformers.LlamaForSequenceClassification(llama().config)
        peft.get_peft_model(classifier, config).save_pretrained(tmp_path / "adapter")
        with pytest.raises(AdapterError, match=r"score\.weight, which .* does not have"):
            fold(tmp_path / "model", tmp_path / "adapter", output=tmp_path / "out")

    @pytest.mark.parametrize("setting", ["use_qalora", "alora_invocation_tokens"])
    def test_variants(self, tmp_path: Path, setting: str) -> None:
        _, adapter = save(tmp_path, llama(), r=4, target_modules=["q_proj"])
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert setting in config
        (adapter / "adapter_config.json").write_text(json.dumps({**config, setting: [1]}))
        with pytest.raises(AdapterError, match=f"sets {setting}"):
            open_adapter("finetuned", adapter)

    def test_every_setting_of_this_peft_is_known(self, tmp_path: Path) -> None:
        from dataclasses import fields

        from safemerge_fast.checkpoint import adapter_config

        known = adapter_config._NEUTRAL | adapter_config._USED | adapter_config._REFUSED.keys()
        assert {field.name for field in fields(peft.LoraConfig)} <= known
