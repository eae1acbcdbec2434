"""Models whose parameters transformers calls otherwise than their checkpoints do: adapters and checkpoints of such."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapter import factors, write_adapter, write_aligned

from safemerge_fast import AdapterError, check, fold
from safemerge_fast.checkpoint.model import open_model
from safemerge_fast.pairing import live_names
from safemerge_fast.pairing.counterparts import counterparts

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "unpadded_vocab_size": 61,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What was asked of one transformers is no answer of another."""
    live_names._cached.cache_clear()
    yield
    live_names._cached.cache_clear()


def small(kind: str) -> Any:
    """A small model of a family, of whichever sizes its configuration knows."""
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if kind not in known:
        pytest.skip(f"this transformers has no {kind}")
    fields = known[kind]().to_dict()
    torch.manual_seed(0)
    config = known[kind](**{name: value for name, value in SIZES.items() if name in fields})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def save(path: Path, model: Any) -> list[str]:
    """Saves a model, an adapter of all its linear layers, and what PEFT merges of them; names the layers."""
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path / "model")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=layers))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(path / "adapter")
        adapted.merge_and_unload().save_pretrained(path / "merged")
    return layers


@pytest.mark.parametrize("kind", ["deepseek_v4", "laguna", "inkling2_text", "bailing_hybrid", "phimoe"])
def test_adapters_of_the_loaded_model_are_folded_into_the_checkpoint(tmp_path: Path, kind: str) -> None:
    layers = save(tmp_path, small(kind))
    original = load(tmp_path / "model")
    strange = [name for name in layers if f"{name}.weight" not in original]
    assert strange, "this family shows nothing"
    report = check(tmp_path / "adapter", tmp_path / "model")
    assert len(report.updates) == len(layers)
    assert [note for note in report.notes if note.startswith(f"{len(strange)} tensors have other names")]
    fold(tmp_path / "model", tmp_path / "adapter", output=tmp_path / "out")
    found, expected = load(tmp_path / "out"), load(tmp_path / "merged")
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-5
    assert sum(not torch.equal(found[name], original[name]) for name in found) == len(layers)


def test_what_loading_splits_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, small("hrm_text"))
    with pytest.raises(AdapterError, match=r"gate_up_proj\.weight by Chunk\(dim=0\), and updates of such"):
        fold(tmp_path / "model", tmp_path / "adapter", output=tmp_path / "out")


def test_without_transformers_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, small("laguna"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AdapterError, match=r"shared_experts.*transformers is not installed: .*pip install"):
        fold(tmp_path / "model", tmp_path / "adapter", output=tmp_path / "out")


def test_a_transformers_without_the_table_is_named_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_aligned(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", factors("model.layers.7.mlp.up"))
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(AdapterError, match=r"transformers 4\.57\.1 has no table of names"):
        fold(model.path, adapter, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({}, "does not know model_type None"),
        ({"model_type": "unheard_of"}, "does not know model_type 'unheard_of'"),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "speaks of 1000000000 layers or experts"),
        ({"model_type": "llama", "hidden_size": "wide"}, "could not say how it names tensors"),
    ],
)
def test_why_nothing_is_known(config: dict[str, Any], problem: str) -> None:
    found = live_names.live_names(config, ["model.norm.weight"])
    assert found.tensors == {}
    assert problem in (found.problem or "")
    assert "\n" not in (found.problem or "")


def test_names_of_tensors_that_loading_leaves_alone(tmp_path: Path) -> None:
    model = small("llama")
    model.save_pretrained(tmp_path)
    names = list(load(tmp_path))
    found = live_names.live_names(open_model("model", tmp_path).config, names)
    assert found.problem is None
    assert found.tensors == {name: name for name in names}
    assert set(found.parameters) == set(names)


@pytest.mark.parametrize("kind", ["deepseek_v4", "laguna"])
def test_a_checkpoint_saved_under_the_loaded_model_s_names_has_its_counterparts(
    tmp_path: Path, kind: str
) -> None:
    model = small(kind)
    model.save_pretrained(tmp_path / "theirs")
    theirs = open_model("base", tmp_path / "theirs")
    live = live_names.live_names(theirs.config, theirs.headers.names)
    old = load(tmp_path / "theirs")
    mine = {name: old[tensor] for name, tensor in live.tensors.items()}
    (tmp_path / "mine").mkdir()
    save_file(mine, tmp_path / "mine" / "model.safetensors", metadata={"format": "pt"})
    found, notes = counterparts(open_model("finetuned", tmp_path / "mine").headers, theirs)
    assert {name: found.get(name) for name in mine} == dict(live.tensors)
    assert any("transformers' own table" in note for note in notes)


def test_transformers_is_imported_by_nobody_who_finds_all_names(tmp_path: Path) -> None:
    model = write_aligned(tmp_path / "model", tie_word_embeddings=False)
    adapter = write_adapter(tmp_path / "adapter")
    script = (
        "import sys\nfrom safemerge_fast import check, fold\n"
        f"fold({str(model.path)!r}, {str(adapter)!r}, output={str(tmp_path / 'out')!r})\n"
        f"check({str(adapter)!r}, {str(model.path)!r})\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_parts_of_transformers_that_are_asked_are_there() -> None:
    """They are not documented: a version that moves them shall fail here, and not at a user's."""
    loading = importlib.import_module("transformers.core_model_loading")
    mapping = importlib.import_module("transformers.conversion_mapping")
    for module, names in (
        (loading, ("WeightRenaming", "WeightConverter", "rename_source_key", "dot_natural_key")),
        (mapping, ("get_model_conversion_mapping",)),
    ):
        assert all(hasattr(module, name) for name in names)


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    """The checkpoint's own name of a tensor and the loaded model's, in one adapter."""
    model = small("laguna")
    layers = save(tmp_path, model)
    original = load(tmp_path / "model")
    (name, *_) = [name for name in layers if f"{name}.weight" not in original]
    live = live_names.live_names(open_model("model", tmp_path / "model").config, list(original))
    stored = live.tensors[f"{name}.weight"].removesuffix(".weight")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for factor in "AB":
        key = f"base_model.model.{{}}.lora_{factor}.weight"
        tensors[key.format(stored)] = tensors[key.format(name)].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=rf"both adapt {stored}\.weight; only one of them"):
        fold(tmp_path / "model", tmp_path / "adapter", output=tmp_path / "out")
