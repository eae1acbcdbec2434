"""The keys of adapters: each is used, or named in an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import reads
from tiny_adapter import KV, PREFIX, Q, factors, write_adapter, write_aligned

from safemerge_fast import AdapterError
from safemerge_fast.checkpoint.adapter import Adapter, open_adapter
from safemerge_fast.checkpoint.model import Model
from safemerge_fast.pairing.adapter_terms import adapter_notes, adapter_terms
from safemerge_fast.pairing.operand import LowRank, Magnitude, Operand, Rows, Term


@pytest.fixture
def aligned(tmp_path: Path) -> Model:
    return write_aligned(tmp_path / "aligned", tie_word_embeddings=False)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Adapter]:
    def opened(tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> Adapter:
        return open_adapter("finetuned", write_adapter(tmp_path / "adapter", tensors, **settings))

    return opened


def plain(name: str) -> tuple[Term, ...]:
    return (Term(Operand("finetuned", PREFIX + name)),)


class TestKeys:
    """Every key is used, or named in an error."""

    def test_linear(self, opened: Callable[..., Adapter], aligned: Model) -> None:
        adapter = opened()
        a, b = adapter.headers.tensors[0].name, adapter.headers.tensors[1].name
        product = LowRank("finetuned", a, b, 2.0, 4, False)
        assert adapter_terms(adapter, aligned).terms == {
            f"{Q}.weight": (Term(Operand("aligned", f"{Q}.weight", low_rank=(product,))),)
        }

    def test_everything_at_once(self, opened: Callable[..., Adapter], aligned: Model) -> None:
        tensors = {
            **factors(),
            f"{PREFIX}{Q}.lora_B.bias": torch.ones(12),
            f"{PREFIX}{Q}.base_layer.bias": torch.ones(12),
            **factors(KV, 4, 6),
            f"{PREFIX}{KV}.lora_magnitude_vector": torch.ones(6),
            f"{PREFIX}model.norm.weight": torch.ones(12),
            f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 12),
        }
        terms = adapter_terms(opened(tensors, trainable_token_indices=[7, 3]), aligned).terms
        used = {
            name
            for group in terms.values()
            for term in group
            for _, name in reads(term.operand.to_plan(), "")
        }
        assert used - {"model.embed_tokens.weight", f"{Q}.weight", f"{KV}.weight"} == set(tensors)
        assert terms["model.norm.weight"] == plain("model.norm.weight")
        assert terms[f"{Q}.bias"] == (
            *plain(f"{Q}.base_layer.bias"),
            Term(Operand("finetuned", f"{PREFIX}{Q}.lora_B.bias"), 2.0),
        )
        assert terms[f"{KV}.weight"][0].operand.magnitude == Magnitude(
            "finetuned", f"{PREFIX}{KV}.lora_magnitude_vector", False
        )
        key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
        assert terms["model.embed_tokens.weight"][0].operand.rows == Rows("finetuned", key, (7, 3))

    def test_embedding_keys_and_their_stored_base(
        self, opened: Callable[..., Adapter], aligned: Model
    ) -> None:
        name = f"{PREFIX}model.embed_tokens"
        tensors = {
            f"{name}.lora_embedding_A": torch.ones(4, 20),
            f"{name}.lora_embedding_B": torch.ones(12, 4),
            f"{name}.base_layer.weight": torch.ones(20, 12),
        }
        (term,) = adapter_terms(opened(tensors), aligned).terms["model.embed_tokens.weight"]
        product = LowRank("finetuned", f"{name}.lora_embedding_A", f"{name}.lora_embedding_B", 2.0, 4, True)
        assert term == Term(Operand("finetuned", f"{name}.base_layer.weight", low_rank=(product,)))

    def test_names_are_matched_by_suffix(self, opened: Callable[..., Adapter], aligned: Model) -> None:
        other = Q.replace("model.", "language_model.model.", 1)
        assert list(adapter_terms(opened(factors(other)), aligned).terms) == [f"{Q}.weight"]

    def test_the_untrained_original_of_a_trained_module_is_not_used(
        self, opened: Callable[..., Adapter], aligned: Model
    ) -> None:
        tensors = {
            f"{PREFIX}{Q}.modules_to_save.bias": torch.ones(12),
            f"{PREFIX}{Q}.original_module.bias": torch.zeros(12),
            f"{PREFIX}{Q}.weight": torch.ones(12, 12),
            f"{PREFIX}{Q}.bias": torch.ones(12),
        }
        assert adapter_terms(opened(tensors), aligned).terms[f"{Q}.bias"] == plain(f"{Q}.bias")
        del tensors[f"{PREFIX}{Q}.bias"]
        with pytest.raises(AdapterError, match=r"modules_to_save\.bias belongs to a module"):
            opened(tensors)

    @pytest.mark.parametrize(
        ("model_type", "fan_in_fan_out", "transpose"),
        [("gpt2", False, True), ("gpt2", True, True), ("llama", False, False), ("jais", True, True)],
    )
    def test_how_a_square_matrix_is_stored(
        self,
        tmp_path: Path,
        opened: Callable[..., Adapter],
        model_type: str,
        fan_in_fan_out: bool,
        transpose: bool,
    ) -> None:
        name = "transformer.h.0.attn.c_proj"
        model = write_aligned(
            tmp_path / "gpt", model_type=model_type, more={f"{name}.weight": torch.zeros(12, 12)}
        )
        (term,) = adapter_terms(opened(factors(name), fan_in_fan_out=fan_in_fan_out), model).terms[
            f"{name}.weight"
        ]
        assert term.operand.low_rank[0].transpose is transpose

    def test_the_shapes_decide_where_they_can(self, opened: Callable[..., Adapter], aligned: Model) -> None:
        # The flag is that of the module which PEFT happened to visit last.
        (term,) = adapter_terms(opened(factors(KV, 4, 6), fan_in_fan_out=True), aligned).terms[f"{KV}.weight"]
        assert term.operand.low_rank[0].transpose is False
        (term,) = adapter_terms(opened(factors(KV, 4, 12, 6)), aligned).terms[f"{KV}.weight"]
        assert term.operand.low_rank[0].transpose is True

    @pytest.mark.parametrize(
        ("tensors", "settings", "message"),
        [
            (
                {"q_proj.lora_A.weight": torch.ones(4, 4)},
                {},
                "key q_proj.lora_A.weight does not start with base_model",
            ),
            ({}, {}, "holds no tensors"),
            (
                {f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 12)},
                {},
                "q_proj.lora_A.weight has no lora_B beside it",
            ),
            (
                {f"{PREFIX}{Q}.lora_B.weight": torch.ones(12, 4)},
                {},
                "q_proj.lora_B.weight has no lora_A beside it",
            ),
            ({f"{PREFIX}{Q}.lora_B.bias": torch.ones(12)}, {}, "q_proj.lora_B.bias has no lora_A"),
            ({f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(12)}, {}, "magnitude_vector has no lora_A"),
            (factors(Q, 4, 12, 0), {}, r"lora_A.weight is empty, of shape \(4, 0\).*ZeRO-3"),
            (factors(Q, 4, 0), {}, r"lora_B.weight is empty, of shape \(0, 4\)"),
            (
                {
                    f"{PREFIX}{Q}.lora_A.weight": torch.ones(0),
                    f"{PREFIX}{Q}.lora_B.weight": torch.ones(12, 4),
                },
                {},
                r"lora_A.weight is empty, of shape \(0,\)",
            ),
            (
                {
                    f"{PREFIX}conv.lora_A.weight": torch.ones(4, 3, 3, 3),
                    f"{PREFIX}conv.lora_B.weight": torch.ones(8, 4, 1, 1),
                },
                {},
                r"conv.lora_A.weight has shape \(4, 3, 3, 3\)",
            ),
            (factors(Q, 3), {}, "says rank 4 for it"),
            (factors(Q, 4), {"rank_pattern": {"q_proj": 8}}, "says rank 8 for it"),
            ({**factors(), f"{PREFIX}{Q}.lora_diag": torch.ones(4)}, {}, "key .*q_proj.lora_diag is not one"),
            (
                {**factors(), f"{PREFIX}{Q}.lora_A.default.weight": torch.ones(4, 12)},
                {},
                r"key .*lora_A\.default",
            ),
            (
                {**factors(), f"{PREFIX}{Q}.base_layer.lora_A.weight": torch.ones(4, 12)},
                {},
                "lora_A.weight mean the same",
            ),
            ({f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 12, dtype=torch.int8)}, {}, "lora_A.weight is I8"),
            ({f"{PREFIX}weight": torch.ones(2)}, {}, "names no module"),
            (
                {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 12)},
                {},
                "trainable_token_indices names none for model.embed_tokens",
            ),
            (
                {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 12)},
                {"trainable_token_indices": {"embed_tokens": [1, 2, 3]}},
                r"has shape \(2, 12\), but trainable_token_indices names 3 rows",
            ),
            (
                {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 12)},
                {"trainable_token_indices": [5, 5]},
                "names 2 rows, 1 of them different",
            ),
        ],
    )
    def test_keys_that_make_no_sense(
        self,
        opened: Callable[..., Adapter],
        tensors: dict[str, torch.Tensor],
        settings: dict[str, Any],
        message: str,
    ) -> None:
        with pytest.raises(AdapterError, match=message):
            opened(tensors, **settings)

    @pytest.mark.parametrize(
        ("tensors", "settings", "message"),
        [
            (
                factors("model.layers.9.self_attn.q_proj"),
                {},
                r"layers\.9\.self_attn\.q_proj\.lora_A\.weight adapts .*does not have",
            ),
            (
                {f"{PREFIX}score.weight": torch.ones(2, 12)},
                {},
                r"score\.weight adapts score\.weight.*does not have",
            ),
            (factors(Q, 4, 8), {}, r"8 outputs and 12 inputs, but .*q_proj\.weight has shape \(12, 12\)"),
            (
                {**factors(KV, 4, 6), f"{PREFIX}{KV}.lora_B.bias": torch.ones(6)},
                {},
                r"k_proj\.lora_B\.bias adapts .*k_proj\.bias.*a bias that the model lacks",
            ),
            (
                {f"{PREFIX}model.embed_tokens.weight": torch.ones(24, 12)},
                {},
                r"has shape \(24, 12\).*needs \(20, 12\)",
            ),
            (
                {**factors(), f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(5)},
                {},
                r"magnitude_vector has shape \(5,\).*needs \(12,\)",
            ),
            (
                {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 12)},
                {"trainable_token_indices": [20]},
                "replaces row 20, but model.embed_tokens.weight has only 20 rows",
            ),
            (
                {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 9)},
                {"trainable_token_indices": [2]},
                r"trainable_tokens_delta has shape \(1, 9\).*needs \(1, 12\)",
            ),
        ],
    )
    def test_keys_that_do_not_fit_the_checkpoint(
        self,
        opened: Callable[..., Adapter],
        aligned: Model,
        tensors: dict[str, torch.Tensor],
        settings: dict[str, Any],
        message: str,
    ) -> None:
        adapter = opened(tensors, **settings)
        with pytest.raises(AdapterError, match=message):
            adapter_terms(adapter, aligned)

    def test_a_base_tensor_that_is_not_float(self, tmp_path: Path, opened: Callable[..., Adapter]) -> None:
        model = write_aligned(tmp_path / "m", more={f"{Q}.counts": torch.zeros(3, dtype=torch.int64)})
        adapter = opened({f"{PREFIX}{Q}.counts": torch.ones(3)})
        with pytest.raises(AdapterError, match=r"counts, which is I64"):
            adapter_terms(adapter, model)


class TestTiedHead:
    HEAD = staticmethod(lambda: {f"{PREFIX}lm_head.weight": torch.ones(20, 12)})
    EMBEDDING = staticmethod(lambda: {f"{PREFIX}model.embed_tokens.weight": torch.ones(20, 12)})

    def test_a_head_that_the_model_does_not_store(
        self, tmp_path: Path, opened: Callable[..., Adapter]
    ) -> None:
        model = write_aligned(tmp_path / "tied", tie_word_embeddings=True)
        with pytest.raises(
            AdapterError, match=r"lm_head\.weight adapts lm_head\.weight.*tied to the embedding.*untie"
        ):
            adapter_terms(opened(self.HEAD()), model)

    def test_an_embedding_whose_head_changes_with_it(
        self, tmp_path: Path, opened: Callable[..., Adapter], aligned: Model
    ) -> None:
        model = write_aligned(tmp_path / "tied", tie_word_embeddings=True)
        adapter = opened(self.EMBEDDING())
        (note,) = adapter_notes(adapter, model, adapter_terms(adapter, model).terms)
        assert "model.embed_tokens.weight" in note
        assert "ties its head" in note
        assert adapter_notes(adapter, aligned, adapter_terms(adapter, aligned).terms) == []
        linear = opened()
        assert adapter_notes(linear, model, adapter_terms(linear, model).terms) == []

    def test_a_tied_head_that_is_stored_nevertheless_follows(
        self, tmp_path: Path, opened: Callable[..., Adapter]
    ) -> None:
        more = {"lm_head.weight": torch.zeros(20, 12)}
        tied = write_aligned(tmp_path / "tied", tie_word_embeddings=True, more=more)
        terms = adapter_terms(opened(self.EMBEDDING()), tied).terms
        assert terms["lm_head.weight"] == terms["model.embed_tokens.weight"]
        untied = write_aligned(tmp_path / "untied", tie_word_embeddings=False, more=more)
        assert list(adapter_terms(opened(self.EMBEDDING()), untied).terms) == ["model.embed_tokens.weight"]
