"""Adapters: what keys and settings mean, and the refusal of all that cannot be merged exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_safetensors
from tiny_adapter import KV, Q, factors, write_adapter, write_aligned

from safemerge_fast import AdapterError, CheckpointError
from safemerge_fast.checkpoint.adapter import Adapter, open_adapter, open_source
from safemerge_fast.checkpoint.model import Model, open_model


@pytest.fixture
def aligned(tmp_path: Path) -> Model:
    return write_aligned(tmp_path / "aligned", tie_word_embeddings=False)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Adapter]:
    def opened(tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> Adapter:
        return open_adapter("finetuned", write_adapter(tmp_path / "adapter", tensors, **settings))

    return opened


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
        with pytest.raises(AdapterError, match=rf"{role}: .*give a whole checkpoint"):
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
            ({"target_parameters": "experts.gate_up_proj"}, "target_parameters should be a list of names"),
            ({"target_parameters": [3]}, "target_parameters should be a list of names"),
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
            ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is not a regular expression"),
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
