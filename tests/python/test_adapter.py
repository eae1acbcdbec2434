"""Adapters: what keys and settings mean, and the refusal of all that cannot be merged exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint, write_safetensors

from safemerge_fast import AdapterError, CheckpointError
from safemerge_fast.adapter import Adapter, open_adapter, open_source
from safemerge_fast.adapter_terms import adapter_notes, adapter_terms
from safemerge_fast.checkpoint import Model, open_model
from safemerge_fast.composition import Composition, combine
from safemerge_fast.operand import LowRank, Magnitude, Operand, Rows, Term, references

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
KV = "model.layers.0.self_attn.k_proj"


def factors(module: str = Q, rank: int = 4, out: int = 12, inner: int = 12) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.ones(rank, inner),
        f"{PREFIX}{module}.lora_B.weight": torch.ones(out, rank),
    }


def write_adapter(path: Path, tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(path / "adapter_model.safetensors", factors() if tensors is None else tensors)
    return path


def write_aligned(path: Path, **config: Any) -> Model:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(20, 12),
        f"{Q}.weight": torch.zeros(12, 12),
        f"{Q}.bias": torch.zeros(12),
        f"{KV}.weight": torch.zeros(6, 12),
        "model.norm.weight": torch.zeros(12),
        **config.pop("more", {}),
    }
    return open_model("aligned", write_checkpoint(path, tensors, {"model_type": "llama", **config}))


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


class TestOpening:
    def test_directory_file_and_checkpoint_are_told_apart(self, tmp_path: Path, aligned: Model) -> None:
        path = write_adapter(tmp_path / "adapter")
        for spec in (path, path / "adapter_model.safetensors", str(path)):
            model = open_source("safe", spec)
            assert isinstance(model, Adapter)
            assert (model.role, model.path, model.headers.path) == ("safe", path, str(path))
        assert not isinstance(open_source("safe", aligned.path), Adapter)

    def test_a_whole_model_with_an_adapter_config_beside_it_is_a_model(self, tmp_path: Path) -> None:
        model = write_aligned(tmp_path / "both")
        (model.path / "adapter_config.json").write_text("{}")
        assert not isinstance(open_source("finetuned", model.path), Adapter)

    @pytest.mark.parametrize("role", ["base", "aligned"])
    def test_base_and_aligned_must_be_checkpoints(self, tmp_path: Path, role: str) -> None:
        path = write_adapter(tmp_path / "adapter")
        with pytest.raises(AdapterError, match=rf"{role}: .*only finetuned and safe may be adapters"):
            open_model(role, path)

    def test_the_snapshot_of_a_repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import fnmatch

        import huggingface_hub

        path = write_adapter(tmp_path / "snapshot")
        asked: dict[str, Any] = {}

        def download(name: str, **options: Any) -> str:
            asked.update(options, name=name)
            return str(path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        adapter = open_source("finetuned", "someone/adapter@main")
        assert isinstance(adapter, Adapter)
        assert (adapter.spec, asked["name"], asked["revision"]) == (
            "someone/adapter@main",
            "someone/adapter",
            "main",
        )
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert any(fnmatch.fnmatch(file, pattern) for pattern in asked["allow_patterns"])
            assert not any(fnmatch.fnmatch(file, pattern) for pattern in asked["ignore_patterns"])

    def test_a_pickle_is_refused_with_the_remedy(self, tmp_path: Path) -> None:
        path = write_adapter(tmp_path / "adapter")
        (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
        with pytest.raises(AdapterError, match=r"adapter_model\.bin, a pickle.*safe_serialization=True"):
            open_adapter("finetuned", path)

    def test_missing_weights(self, tmp_path: Path) -> None:
        path = write_adapter(tmp_path / "adapter")
        (path / "adapter_model.safetensors").unlink()
        with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors; give the directory"):
            open_adapter("finetuned", path)

    def test_a_bare_file_of_factors_has_no_scale(self, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "lora.safetensors", factors())
        with pytest.raises(AdapterError, match=r"without its adapter_config\.json"):
            open_model("finetuned", tmp_path / "lora.safetensors")

    def test_no_such_path(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist"):
            open_adapter("finetuned", tmp_path / "nowhere")


class TestSettings:
    def test_scale(self, opened: Callable[..., Adapter]) -> None:
        assert opened().modules[Q].scale == 2.0
        assert opened(use_rslora=True).modules[Q].scale == 4.0
        assert opened(lora_alpha=3).modules[Q].scale == 0.75
        assert opened(lora_alpha=0.5).modules[Q].scale == 0.125

    def test_the_first_pattern_that_matches_wins(self, opened: Callable[..., Adapter]) -> None:
        tensors = {**factors(Q, 2), **factors(KV, 3, 6)}
        adapter = opened(
            tensors,
            rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 7, r".*k_pro.": 3},
            alpha_pattern={"k_proj": 5, r"model\.layers\.\d+\.self_attn\.k_proj": 6},
        )
        assert adapter.modules[Q].scale == 8 / 2
        assert adapter.modules[KV].scale == 5 / 3
        # The dot before the name is optional, but it may not be cut in two.
        assert opened(rank_pattern={"proj": 9, "^q_proj": 9}).modules[Q].rank == 4

    def test_rank_stabilised_scale_takes_the_pattern_s_rank(self, opened: Callable[..., Adapter]) -> None:
        adapter = opened(
            factors(Q, 2), use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6}
        )
        assert adapter.modules[Q].scale == pytest.approx(6 / math.sqrt(2), rel=1e-15)

    def test_missing_r_and_alpha_are_peft_s_defaults(self, opened: Callable[..., Adapter]) -> None:
        adapter = open_adapter(
            "finetuned", write_adapter(Path(opened(factors(Q, 8), r=8).path), factors(Q, 8), r=8)
        )
        config = dict(adapter.config)
        del config["r"], config["lora_alpha"]
        (adapter.path / "adapter_config.json").write_text(json.dumps(config))
        module = open_adapter("finetuned", adapter.path).modules[Q]
        assert (module.rank, module.scale) == (8, 1.0)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"peft_type": "LOHA"}, "of peft_type 'LOHA'; only LORA"),
            ({"peft_type": None}, "of peft_type None"),
            (
                {"init_lora_weights": "pissa"},
                "init_lora_weights 'pissa'.*path_initial_model_for_weight_conversion",
            ),
            ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16'"),
            ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
            ({"init_lora_weights": "OLoRA"}, "init_lora_weights 'olora'"),
            ({"init_lora_weights": "corda"}, "init_lora_weights 'corda'"),
            ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga'"),
            ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
            ({"init_lora_weights": "tomorrow"}, "init_lora_weights 'tomorrow', which is not known"),
            ({"layer_replication": [[0, 2], [1, 3]]}, "sets layer_replication"),
            ({"target_parameters": ["experts.gate_up_proj"]}, "sets target_parameters: .*fused experts"),
            ({"megatron_config": {"x": 1}}, "sets megatron_config"),
            ({"alora_invocation_tokens": [1, 2]}, "sets alora_invocation_tokens"),
            ({"arrow_config": {"top_k": 3}}, "sets arrow_config"),
            ({"kasa_config": {"beta": 1e-4}}, "sets kasa_config"),
            ({"monteclora_config": {"num_samples": 8}}, "sets monteclora_config"),
            ({"use_bdlora": {"nblocks": 2}}, "sets use_bdlora"),
            ({"use_qalora": True}, "sets use_qalora"),
            ({"enable_lora": [True, False]}, "sets enable_lora"),
            ({"use_next_variant": True}, "sets use_next_variant to True, which is not known"),
            ({"r": 0}, "r should be a whole number of at least 1, not 0"),
            ({"r": "4"}, "r should be a whole number of at least 1, not '4'"),
            ({"lora_alpha": "x"}, "lora_alpha should be a finite number, not 'x'"),
            ({"lora_alpha": float("nan")}, "lora_alpha should be a finite number, not nan"),
            ({"rank_pattern": [1]}, r"rank_pattern should be an object, not \[1\]"),
            ({"rank_pattern": {"q_proj": -1}}, "rank_pattern 'q_proj' should be a whole number"),
            ({"alpha_pattern": {"(": 1}}, r"'\(' in alpha_pattern is not a regular expression"),
            ({"trainable_token_indices": {"embed_tokens": 3}}, "should hold lists of row numbers, not 3"),
            ({"trainable_token_indices": [1, -2]}, "should hold lists of row numbers"),
        ],
    )
    def test_refusals(self, opened: Callable[..., Adapter], settings: dict[str, Any], message: str) -> None:
        with pytest.raises(AdapterError, match=rf"finetuned: .*adapter_config\.json.*{message}"):
            opened(**settings)

    @pytest.mark.parametrize(
        "settings",
        [
            {"init_lora_weights": True},
            {"init_lora_weights": False},
            {"init_lora_weights": None},
            *({"init_lora_weights": name} for name in ("gaussian", "eva", "orthogonal", "mica")),
            {"target_modules": "all-linear"},
            {"velora_config": {"num_groups": 64}},
            {"use_next_variant": None, "another": False, "list": []},
        ],
    )
    def test_what_does_not_change_the_arithmetic_is_let_through(
        self, opened: Callable[..., Adapter], settings: dict[str, Any]
    ) -> None:
        assert opened(**settings).modules[Q].scale == 2.0

    @pytest.mark.parametrize(
        ("text", "message"), [("[1]", "should hold a JSON object"), ("{", "cannot be read")]
    )
    def test_malformed_configuration(self, tmp_path: Path, text: str, message: str) -> None:
        path = write_adapter(tmp_path / "adapter")
        (path / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=message):
            open_adapter("finetuned", path)


class TestKeys:
    """Every key is used, or named in an error."""

    def test_linear(self, opened: Callable[..., Adapter], aligned: Model) -> None:
        adapter = opened()
        a, b = adapter.headers.tensors[0].name, adapter.headers.tensors[1].name
        product = LowRank("finetuned", a, b, 2.0, 4, False)
        assert adapter_terms(adapter, aligned) == {
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
        terms = adapter_terms(opened(tensors, trainable_token_indices=[7, 3]), aligned)
        used = {
            name
            for group in terms.values()
            for term in group
            for _, name in references(term.operand.to_plan())
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
        (term,) = adapter_terms(opened(tensors), aligned)["model.embed_tokens.weight"]
        product = LowRank("finetuned", f"{name}.lora_embedding_A", f"{name}.lora_embedding_B", 2.0, 4, True)
        assert term == Term(Operand("finetuned", f"{name}.base_layer.weight", low_rank=(product,)))

    def test_names_are_matched_by_suffix(self, opened: Callable[..., Adapter], aligned: Model) -> None:
        other = Q.replace("model.", "language_model.model.", 1)
        assert list(adapter_terms(opened(factors(other)), aligned)) == [f"{Q}.weight"]

    def test_the_untrained_original_of_a_trained_module_is_not_used(
        self, opened: Callable[..., Adapter], aligned: Model
    ) -> None:
        tensors = {
            f"{PREFIX}{Q}.modules_to_save.bias": torch.ones(12),
            f"{PREFIX}{Q}.original_module.bias": torch.zeros(12),
            f"{PREFIX}{Q}.weight": torch.ones(12, 12),
            f"{PREFIX}{Q}.bias": torch.ones(12),
        }
        assert adapter_terms(opened(tensors), aligned)[f"{Q}.bias"] == plain(f"{Q}.bias")
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
        (term,) = adapter_terms(opened(factors(name), fan_in_fan_out=fan_in_fan_out), model)[f"{name}.weight"]
        assert term.operand.low_rank[0].transpose is transpose

    def test_the_shapes_decide_where_they_can(self, opened: Callable[..., Adapter], aligned: Model) -> None:
        # The flag is that of the module which PEFT happened to visit last.
        (term,) = adapter_terms(opened(factors(KV, 4, 6), fan_in_fan_out=True), aligned)[f"{KV}.weight"]
        assert term.operand.low_rank[0].transpose is False
        (term,) = adapter_terms(opened(factors(KV, 4, 12, 6)), aligned)[f"{KV}.weight"]
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
        (note,) = adapter_notes(adapter, model, adapter_terms(adapter, model))
        assert "model.embed_tokens.weight" in note
        assert "ties its head" in note
        assert adapter_notes(adapter, aligned, adapter_terms(adapter, aligned)) == []
        linear = opened()
        assert adapter_notes(linear, model, adapter_terms(linear, model)) == []

    def test_a_tied_head_that_is_stored_nevertheless_follows(
        self, tmp_path: Path, opened: Callable[..., Adapter]
    ) -> None:
        more = {"lm_head.weight": torch.zeros(20, 12)}
        tied = write_aligned(tmp_path / "tied", tie_word_embeddings=True, more=more)
        terms = adapter_terms(opened(self.EMBEDDING()), tied)
        assert terms["lm_head.weight"] == terms["model.embed_tokens.weight"]
        untied = write_aligned(tmp_path / "untied", tie_word_embeddings=False, more=more)
        assert list(adapter_terms(opened(self.EMBEDDING()), untied)) == ["model.embed_tokens.weight"]


class TestComposition:
    @staticmethod
    def adapted(role: str, scale: float) -> tuple[Term, ...]:
        product = LowRank(role, f"{role}.A", f"{role}.B", scale, 4, False)
        return (Term(Operand("aligned", "w", low_rank=(product,))),)

    def test_two_adapters_share_the_matrix(self) -> None:
        terms = combine([(0.8, self.adapted("finetuned", 2.0)), (1 - 0.8, self.adapted("safe", 0.5))])
        composition = Composition("linear", {"normalize": False}, terms)
        (term,) = terms
        assert term.weight == 1.0
        assert [product.scale for product in term.operand.low_rank] == pytest.approx([1.6, 0.1], rel=1e-15)
        assert composition.describe() == "linear: aligned + 1.6·B·A(finetuned) + 0.1·B·A(safe)"

    def test_an_adapter_and_the_matrix_itself(self) -> None:
        (term,) = combine([(0.8, self.adapted("finetuned", 2.0)), (0.2, (Term(Operand("aligned", "w")),))])
        assert term.weight == 1.0
        assert [product.scale for product in term.operand.low_rank] == [1.6]

    def test_the_same_plain_tensor_is_a_copy(self) -> None:
        same = (Term(Operand("aligned", "w")),)
        composition = Composition("linear", {}, combine([(0.7, same), (1 - 0.7, same)]))
        assert composition.is_copy
        assert composition.to_plan() == {"copy": {"source": "aligned", "tensor": "w"}}
        assert composition.describe() == "copy: aligned"

    def test_weights_that_do_not_sum_to_one_stay(self) -> None:
        (term,) = combine([(0.5, self.adapted("finetuned", 2.0)), (0.25, self.adapted("safe", 1.0))])
        assert term.weight == 0.75
        # 0.75·(W + s1 P1 + s2 P2) = 0.5 (W + 2 P1) + 0.25 (W + P2)
        assert [0.75 * product.scale for product in term.operand.low_rank] == pytest.approx(
            [1.0, 0.25], rel=1e-15
        )

    def test_weights_that_cancel_are_left_apart(self) -> None:
        terms = combine([(1.0, self.adapted("finetuned", 2.0)), (-1.0, self.adapted("safe", 1.0))])
        assert [term.weight for term in terms] == [1.0, -1.0]

    def test_norms_and_rows_are_not_added_up(self) -> None:
        magnitude = (Term(Operand("aligned", "w", magnitude=Magnitude("finetuned", "m", False))),)
        rows = (Term(Operand("aligned", "w", rows=Rows("safe", "t", (1,)))),)
        assert combine([(0.8, magnitude), (0.2, rows)]) == (
            Term(magnitude[0].operand, 0.8),
            Term(rows[0].operand, 0.2),
        )
        assert len(combine([(0.8, magnitude), (0.2, magnitude)])) == 2

    def test_plain_models_keep_their_order_and_weights(self) -> None:
        finetuned, safe = Term(Operand("finetuned", "w")), Term(Operand("safe", "w"))
        terms = combine([(0.8, (finetuned,)), (0.2, (safe,))])
        assert terms == (Term(finetuned.operand, 0.8), Term(safe.operand, 0.2))
        assert Composition("linear", {}, terms).describe() == "linear: 0.8 finetuned + 0.2 safe"
