"""Written target_modules: PEFT loads the merged adapter wherever it loaded those that were merged."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import gemma3n, qwen2_5_vl, qwen2_vl, zamba2

from safemerge_fast import merge
from safemerge_fast.recipes.safemerge.adapter.settings import target_modules

peft = pytest.importorskip("peft")


def adapter(path: Path, model: Any, seed: int) -> Any:
    """An adapter of all that PEFT finds linear, with random factors; saved, and on its model."""
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(path)
    return adapted


def weights(model: Any) -> dict[str, torch.Tensor]:
    """All weights in float64, each shared one once."""
    return {name: tensor.detach().double() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("make", [qwen2_vl, qwen2_5_vl, gemma3n, zamba2])
def test_peft_loads_the_merged_adapter_of_every_family_that_it_loaded(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().eval()
        model.save_pretrained(tmp_path / "aligned")
        base = copy.deepcopy(model)
        for parameter in base.parameters():
            parameter.data += 0.1 * parameter.data.abs().mean() * torch.randn(parameter.shape)
        base.save_pretrained(tmp_path / "base")
        roles = {"base": tmp_path / "base", "aligned": tmp_path / "aligned"}
        merged = {}
        for seed, role in enumerate(("finetuned", "safe")):
            roles[role] = tmp_path / role
            merged[role] = weights(adapter(roles[role], model, seed).merge_and_unload())
        report = merge(**roles, output=tmp_path / "out", threshold=1.0, alpha=0.7)
        # Read again, since a model is loaded otherwise than it is made.
        fresh = type(model).from_pretrained(tmp_path / "aligned", dtype=torch.float32).eval()
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
        tokens = torch.tensor([[1, 5, 7, 3, 44, 12, 9]])
        with torch.no_grad():
            logits = loaded(input_ids=tokens).logits
        found = loaded.merge_and_unload()
    analysed = {tensor.name for tensor in report.tensors if tensor.merged}
    assert analysed
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    expected = weights(model)
    for name in expected:
        # Modules that are not analysed are kept from the fine-tuned adapter.
        mixed = 0.7 * merged["finetuned"][name] + 0.3 * merged["safe"][name]
        near = [
            float((weights(found)[name] - other).abs().max()) < 1e-5
            for other in (mixed, merged["finetuned"][name])
        ]
        assert any(near), (name, config["target_modules"])
    with torch.no_grad():
        assert float((found(input_ids=tokens).logits - logits).abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("adapted", "modules", "names"),
    [
        (["a.0.q", "a.1.q"], ["a.0.q", "a.1.q", "a.0.k"], ["q"]),
        (["a.0.q"], ["a.0.q", "a.1.q"], ["a.0.q"]),
        # A container of the same name, and a list's number.
        (["a.proj"], ["a.proj", "b.proj.inner"], ["a.proj"]),
        (["mlp.0", "mlp.2"], ["mlp.0", "mlp.2"], ["mlp.0", "mlp.2"]),
        # One short name is as good as another's is not.
        (["a.q", "a.proj"], ["a.q", "a.proj", "b.proj"], ["a.proj", "q"]),
    ],
)
def test_names_are_short_where_they_mean_nothing_else(
    adapted: list[str], modules: list[str], names: list[str]
) -> None:
    assert target_modules(adapted, modules) == names
