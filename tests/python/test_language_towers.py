"""Models that see or hear against fine-tunes of their language model alone, where transformers renames both."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import rho

from safemerge_fast import PairingError, Report, merge, verify

transformers = pytest.importorskip("transformers")

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "n_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "text_hidden_size": 24,
    "projection_hidden_size": 16,
    "projector_hidden_size": 16,
    "audio_hidden_size": 16,
    "image_size": 56,
    "n_mel_bins": 8,
    "mel_vocab_size": 8,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "vocab_size": 40,
    "blank_token_id": 39,
    "merged_hidden_size": 64,
}
LANGUAGE = {
    # Most of the parameters are the language models, as they are in real ones.
    "vocab_size": 3000,
    "hidden_size": 24,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "dense_intermediate_size": 20,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 6,
    "head_dim": 6,
    "rotary_dim": 4,
    "d_rel": 4,
    "rel_extent": 8,
    "n_routed_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 12,
    "ssm_state_size": 8,
    "n_groups": 2,
    "layers_block_type": ["linear_attention", "moe", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "index_n_heads": 2,
    "index_head_dim": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "image_token_id": 3,
    "video_token_id": 4,
}
CLASSES = {
    "inkling": "InklingForConditionalGeneration",
    "kimi": "Kimi_K25ForConditionalGeneration",
    "minimax": "MiniMaxM3SparseForConditionalGeneration",
    "nemotron": "Nemotron3_5TranscribeForConditionalGeneration",
}


def shrunk(document: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    """A configuration with other sizes, in all of its parts."""
    found = {}
    for name, value in document.items():
        if isinstance(value, dict):
            found[name] = shrunk(value, LANGUAGE if name == "text_config" else sizes)
        elif document.get("model_type") == "inkling_vision" and name == "patch_size":
            found[name] = 8
        elif name == "layer_types" and isinstance(value, list):
            found[name] = value[:2]
        else:
            found[name] = sizes.get(name, value)
    return found


def build(family: str) -> Any:
    """The model, small and in float32."""
    if not hasattr(transformers, CLASSES[family]):
        pytest.skip(f"this transformers has no {CLASSES[family]}")
    model_class = getattr(transformers, CLASSES[family])
    config_class = model_class.config_class
    document = shrunk(config_class().to_dict(), TOWER)
    return model_class(config_class.from_dict(document)).float()


def moved(model: Any, seed: int) -> None:
    """Adds noise to all floats, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


def in_whole(name: str) -> str:
    """A parameter of the language model, as the whole calls it."""
    return name.replace("model.", "model.language_model.", 1)


class Scene:
    """Base and aligned model as wholes, and a fine-tune of the aligned one's language model; saved by transformers."""

    def __init__(self, path: Path, family: str) -> None:
        torch.manual_seed(5)
        whole = build(family)
        # None of the parameters may be zero or alike, so that none can be taken for another.
        moved(whole, 0)
        self.path = path
        self.live: dict[str, dict[str, torch.Tensor]] = {}
        text = transformers.AutoModelForCausalLM.from_config(whole.config.get_text_config()).float()
        self.text_class, names = type(text), list(text.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for seed, role in enumerate(("base", "aligned"), 1):
                moved(whole, seed)
                whole.save_pretrained(path / role)
                state = whole.state_dict()
                self.live[role] = {name: state[in_whole(name)].clone() for name in names}
            text.load_state_dict(self.live["aligned"])
            moved(text, 3)
            text.save_pretrained(path / "finetuned")
        self.live["finetuned"] = {name: tensor.clone() for name, tensor in text.state_dict().items()}
        self.matrices = {
            f"{name}.weight"
            for name, module in text.named_modules()
            if isinstance(module, torch.nn.Linear) and ".layers." in name
        }

    def merge(self, **options: Any) -> Report:
        roles = {role: self.path / role for role in ("base", "aligned", "finetuned")}
        return merge(
            **roles, output=self.path / "out", select="fraction:1", alpha=0.6, device="cpu", **options
        )

    def loaded(self) -> dict[str, torch.Tensor]:
        return self.text_class.from_pretrained(self.path / "out", dtype=torch.float32).state_dict()


@pytest.mark.parametrize(
    ("family", "exclude"),
    [("inkling", None), ("kimi", None), ("minimax", "gate_up_proj\\.weight"), ("nemotron", None)],
)
def test_a_fine_tune_of_the_language_model_alone(tmp_path: Path, family: str, exclude: str | None) -> None:
    """Every matrix of its layers meets that of the whole, whatever the two files call it, and is merged with it."""
    scene = Scene(tmp_path, family)
    report = scene.merge(exclude=exclude)
    found = scene.loaded()
    finetuned, aligned = scene.live["finetuned"], scene.live["aligned"]
    assert found.keys() == finetuned.keys()
    merged = set()
    for name, tensor in found.items():
        mixed = 0.6 * finetuned[name] + 0.4 * aligned[name]
        if torch.equal(tensor, finetuned[name]):
            continue
        torch.testing.assert_close(tensor, mixed, rtol=0, atol=1e-6, msg=name)
        merged.add(name)
    left = {name for name in scene.matrices if exclude is not None and re.search(exclude, name)}
    stacks = {name for name in found if found[name].dim() == 3 and "experts." in name and name not in left}
    assert stacks, "there are experts"
    missed = (scene.matrices | stacks) - left - merged
    assert not {name for name in missed if "gate.weight" not in name and "exclude" not in name}, missed
    # The right matrices are measured against each other, too.
    rhos = {
        module.name.partition("layers.")[2]: module.rho
        for tensor in report.tensors
        if tensor.analysed
        for module in tensor.module_reports()
    }
    seen = 0
    for name in scene.matrices & merged:
        if (value := rhos.get(name.partition("layers.")[2])) is not None:
            expected = rho(*(scene.live[role][name] for role in ("base", "aligned", "finetuned")))
            assert value == pytest.approx(expected, abs=1e-5), name
            seen += 1
    assert seen >= 4
    verify(tmp_path / "out")


def test_what_loading_joins_is_refused_by_name(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "minimax")
    with pytest.raises(PairingError, match=r"mlp\.gate_up_proj.* made of .*gate_proj.* by Concatenate"):
        scene.merge()
