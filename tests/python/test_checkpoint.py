"""Finding and refusing models: what open_model takes, and what it says of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import write_checkpoint, write_safetensors
from huggingface_hub.errors import LocalEntryNotFoundError

from safemerge_fast.checkpoint.model import open_model, quantization_method
from safemerge_fast.errors import AdapterError, CheckpointError

WEIGHT = {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 6)}


def test_opens_a_sharded_directory(quartet: dict[str, Path]) -> None:
    model = open_model("aligned", quartet["aligned"])
    assert model.role == "aligned"
    assert model.spec == str(quartet["aligned"])
    assert model.path == quartet["aligned"]
    assert model.config["model_type"] == "llama"
    assert len(model.headers.files) == 3
    assert model.headers.tensor("model.norm.weight").dtype == "F32"


def test_opens_one_file_and_the_configuration_beside_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, WEIGHT, {"model_type": "gpt2"})
    model = open_model("base", str(tmp_path / "model.safetensors"))
    assert model.headers.files == ["model.safetensors"]
    assert model.config == {"model_type": "gpt2"}


def test_has_an_empty_configuration_without_config_json(tmp_path: Path) -> None:
    assert open_model("base", write_checkpoint(tmp_path, WEIGHT)).config == {}


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_refuses_a_malformed_configuration(tmp_path: Path, content: str) -> None:
    write_checkpoint(tmp_path, WEIGHT)
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"base: .*config\.json"):
        open_model("base", tmp_path)


def test_refuses_what_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"aligned: .*nowhere does not exist"):
        open_model("aligned", tmp_path / "nowhere")


def test_refuses_a_directory_of_pickles_and_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"base: .*pytorch_model\.bin is a pickle, .*convert it"):
        open_model("base", tmp_path)


def test_refuses_an_empty_directory_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"base: .*give the directory that holds model\.safetensors"):
        open_model("base", tmp_path)
    (tmp_path / "weights.gguf").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"weights\.gguf is not a \.safetensors file"):
        open_model("base", tmp_path / "weights.gguf")


def test_refuses_adapters_as_directory_and_as_file(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    write_safetensors(file, {"base_model.model.model.q_proj.lora_A.weight": torch.ones(2, 4)})
    with pytest.raises(AdapterError, match="adapter"):
        open_model("finetuned", file)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match=f"{tmp_path} is a PEFT adapter"):
        open_model("finetuned", tmp_path)


def test_takes_a_whole_model_that_keeps_its_old_adapter_configuration(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, WEIGHT)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert len(open_model("base", tmp_path).headers) == 1


QUANTISED: dict[str, dict[str, torch.Tensor]] = {
    "GPTQ": {"a.qweight": torch.ones(2, 4, dtype=torch.int32)},
    "compressed-tensors": {
        "a.weight_packed": torch.ones(2, 4, dtype=torch.int32),
        "a.weight_zero_point": torch.ones(2, 1, dtype=torch.int32),
    },
    "bitsandbytes": {"a.weight": torch.ones(8, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(2)},
    "MXFP4": {"experts.down_proj_blocks": torch.ones(2, 4, dtype=torch.uint8)},
    "I8": {"a.weight": torch.ones(2, 4, dtype=torch.int8)},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_refuses_quantised_weights_by_name(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path, {**WEIGHT, **QUANTISED[kind]})
    if kind == "bitsandbytes":  # refused for its I8 or U8 weights; the configuration gives the name
        (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    with pytest.raises(CheckpointError, match=rf"quantised \(.*{kind}.*full-precision"):
        open_model("base", tmp_path)


def test_takes_full_precision_weights_whatever_the_configuration_says(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gguf"}}
    assert (
        quantization_method(open_model("base", write_checkpoint(tmp_path, WEIGHT, config)).config) == "gguf"
    )
    assert quantization_method({"quantization_config": {}}) is None
    assert quantization_method({}) is None


def test_downloads_only_what_is_no_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        return str(write_checkpoint(tmp_path / "snapshot", WEIGHT))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert open_model("base", "org/name@v1.0").path == tmp_path / "snapshot"
    assert open_model("base", "org/name").spec == "org/name"
    assert asked == [("org/name", "v1.0"), ("org/name", None)]
    write_checkpoint(tmp_path / "org" / "name", WEIGHT)
    assert open_model("base", "org/name").path == tmp_path / "org" / "name"
    for local in ("./org/other", str(tmp_path / "org/other"), "nothing", "a/b/c", "../x"):
        with pytest.raises(CheckpointError, match="does not exist"):
            open_model("base", local)
    assert len(asked) == 2


def test_says_what_the_hub_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"base: org/name is no local path.*: no connection\)"):
        open_model("base", "org/name")


def test_fixture_is_what_transformers_loads(quartet: dict[str, Path]) -> None:
    """The quartet is real: transformers loads it with no missing weight, and ties the head."""
    from transformers import LlamaForCausalLM

    model, info = LlamaForCausalLM.from_pretrained(quartet["finetuned"], output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == {"model.position_ids"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert json.loads((quartet["finetuned"] / "config.json").read_text())["vocab_size"] == 321
