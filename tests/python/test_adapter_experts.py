"""Merged adapters of fused experts (target_parameters): PEFT loads them, and merges what dense float64 says."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import (
    EXPERTS,
    fused_qwen3_moe,
    gpt_oss,
    gpt_oss_square,
    jetmoe,
    llama4,
    llama4_square,
    mixtral,
    qwen3_moe,
)

from safemerge_fast import (
    AdapterError,
    MergeConfiguration,
    Report,
    VerificationError,
    fold,
    merge,
    preview,
    verify,
)

peft = pytest.importorskip("peft")

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
ALPHA = 0.7


class Scene:
    """A model on disk, another beside it, adapters of the first, and what PEFT merges of each, in float64."""

    def __init__(self, path: Path, make: Any) -> None:
        torch.manual_seed(3)
        self.path = path
        self._model = make().double()
        self._form = {"save_original_format": False} if make is fused_qwen3_moe else {}
        self.roles = {}
        self.weights = {"aligned": self._save(self._model, "aligned")}
        base = make().double()
        base.load_state_dict(self._model.state_dict())
        for parameter in base.parameters():
            parameter.data += 0.1 * parameter.data.abs().mean() * torch.randn(parameter.shape).double()
        self._save(base, "base")
        self._make, self._base = make, base

    def _save(self, model: Any, role: str) -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(self.path / role, **self._form)
        self.roles[role] = self.path / role
        return load_file(self.path / role / "model.safetensors")

    def _fresh(self) -> Any:
        """The aligned model again."""
        model = self._make().double()
        model.load_state_dict(self._model.state_dict())
        return model

    def adapt(self, role: str, **settings: Any) -> None:
        """Saves an adapter with random factors."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(
                self._fresh(), peft.LoraConfig(**{"target_modules": [], **settings})
            )
            generator = torch.Generator().manual_seed(len(role))
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).double()
            adapted.save_pretrained(self.path / role)
            self.roles[role] = self.path / role
            self.weights[role] = self._merged(adapted)

    def _merged(self, adapted: Any) -> dict[str, torch.Tensor]:
        merged = self.path / "merged"
        adapted.merge_and_unload().save_pretrained(merged, **self._form)
        return load_file(merged / "model.safetensors")

    def loaded(self, adapter: Path) -> dict[str, torch.Tensor]:
        """What PEFT makes of the aligned model and an adapter."""
        with warnings.catch_warnings():
            # PEFT warns of keys that it expected and did not find, and of others.
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*(dtype|deprecated|tied|Unsloth).*")
            return self._merged(peft.PeftModel.from_pretrained(self._fresh(), adapter))

    def merge(self, output: str = "out", **options: Any) -> Report:
        return merge(**self.roles, output=self.path / output, device="cpu", **{"alpha": ALPHA, **options})

    def expected(self, report: Report) -> dict[str, torch.Tensor]:
        """The merged modules' blend of dense weights, and the fine-tuned ones elsewhere."""
        finetuned = self.weights["finetuned"]
        safe = self.weights.get("safe", self.weights["aligned"])
        found = {name: tensor.clone() for name, tensor in finetuned.items()}
        for tensor in report.tensors:
            merged = ALPHA * finetuned[tensor.name] + (1 - ALPHA) * safe[tensor.name]
            modules = [*tensor.module_reports()]
            for place, module in enumerate(modules):
                if module.merged:
                    part = _part(self._make, place, len(modules), merged)
                    found[tensor.name][part] = merged[part]
        return found


def _part(make: Any, place: int, count: int, whole: torch.Tensor) -> Any:
    """Where the module with this number of a tensor lies: experts one after another, gate before up."""
    if count == 1:
        return slice(None)
    if count == EXPERTS:
        return place
    expert, up = divmod(place, 2)
    if make in (gpt_oss, gpt_oss_square):
        return (expert, slice(None), slice(up, None, 2))
    axis = 2 if make in (llama4, llama4_square) else 1
    half = whole.shape[axis] // 2
    rows = slice(up * half, (up + 1) * half)
    return (expert, slice(None), rows) if axis == 2 else (expert, rows)


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=0, atol=3e-6, msg=name)


@pytest.mark.parametrize(
    "make", [mixtral, qwen3_moe, gpt_oss, gpt_oss_square, llama4, llama4_square, fused_qwen3_moe]
)
@pytest.mark.parametrize("select", ["lowest:0", "lowest:7", "fraction:1"])
def test_peft_merges_what_dense_models_say(tmp_path: Path, make: Any, select: str) -> None:
    """Experts, and gate and up of one, decided apart; ranks, scales and modules of their own in both adapters."""
    scene = Scene(tmp_path, make)
    scene.adapt("finetuned", r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=BOTH)
    scene.adapt(
        "safe",
        r=3,
        lora_alpha=4,
        use_rslora=True,
        target_modules=["q_proj", "o_proj"],
        target_parameters=BOTH,
        rank_pattern={"down_proj": 4},
    )
    report = scene.merge(select=select)
    count = sum(module.merged for tensor in report.tensors for module in tensor.module_reports())
    assert count == {"lowest:0": 0, "lowest:7": 7}.get(select, count)
    assert count or select == "lowest:0"
    expected = scene.expected(report)
    assert_same(scene.loaded(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(BOTH)
    assert (config["r"], config["rank_pattern"], config["use_rslora"]) == (report.adapter["rank"], {}, False)
    # The same as the checkpoint, and as our own reading of the adapter.
    scene.merge("checkpoint", select=select, output_format="checkpoint")
    assert_same(load_file(tmp_path / "checkpoint" / "model.safetensors"), expected)
    fold(tmp_path / "aligned", tmp_path / "out", output=tmp_path / "folded")
    assert_same(load_file(tmp_path / "folded" / "model.safetensors"), expected)
    assert verify(tmp_path / "out").bytes_checked == report.bytes_written


@pytest.mark.parametrize(
    ("finetuned", "safe"),
    [
        (["experts.gate_up_proj"], None),
        (["experts.down_proj"], BOTH),
        (BOTH, ["experts.gate_up_proj"]),
        (["layers.1.mlp.experts.down_proj"], BOTH),
        (["mlp.gate.weight", "experts.down_proj"], ["experts.down_proj"]),
    ],
)
def test_parameters_that_not_both_adapt(tmp_path: Path, finetuned: list[str], safe: list[str] | None) -> None:
    """What only the safe one adapts stays out; names that mean more than is left are written in full."""
    scene = Scene(tmp_path, qwen3_moe)
    scene.adapt("finetuned", r=2, target_parameters=finetuned)
    if safe is not None:
        scene.adapt("safe", r=3, target_parameters=safe)
    report = scene.merge(select="lowest:3")
    assert_same(scene.loaded(tmp_path / "out"), scene.expected(report))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    if "mlp.gate.weight" in finetuned:
        assert config["target_parameters"] == ["experts.down_proj", "mlp.gate.weight"]


def test_what_only_the_safe_one_adapts_may_be_merged_too(tmp_path: Path) -> None:
    scene = Scene(tmp_path, qwen3_moe)
    scene.adapt("finetuned", r=2, target_parameters=["experts.down_proj"])
    scene.adapt("safe", r=3, target_parameters=BOTH)
    report = scene.merge(select="fraction:1", others="merge")
    assert_same(
        scene.loaded(tmp_path / "out"),
        {
            name: ALPHA * tensor + (1 - ALPHA) * scene.weights["safe"][name]
            for name, tensor in scene.weights["finetuned"].items()
        },
    )
    assert len(report.adapter["parameters"]) == 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with scale 1, to each expert of 4 stacked parameters. Updates are added up exactly" in card


def test_a_weight_of_experts_and_a_router(tmp_path: Path) -> None:
    scene = Scene(tmp_path, jetmoe)
    targets = ["mlp.input_linear.weight", "mlp.output_linear.weight"]
    scene.adapt("finetuned", r=2, target_modules=["router.layer"], target_parameters=targets)
    scene.adapt("safe", r=2, target_parameters=targets)
    report = scene.merge(select="lowest:5")
    assert_same(scene.loaded(tmp_path / "out"), scene.expected(report))


def test_the_layout_of_unsloth_becomes_peft_s(tmp_path: Path) -> None:
    scene = Scene(tmp_path, mixtral)
    scene.adapt("finetuned", r=2, target_parameters=BOTH)
    file = tmp_path / "finetuned" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            columns = tensor.reshape(len(tensor), -1, EXPERTS)
            tensors[name] = columns.transpose(1, 2).reshape(tensor.shape).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    report = scene.merge(select="lowest:4", expert_lora_layout="unsloth")
    assert_same(scene.loaded(tmp_path / "out"), scene.expected(report))
    assert any("output's LoRA of fused experts is laid out as PEFT does it" in note for note in report.notes)


def test_experts_are_truncated_one_by_one(tmp_path: Path) -> None:
    """Of merged experts the best approximation of that rank; kept ones have it and stay as they are."""
    scene = Scene(tmp_path, qwen3_moe)
    scene.adapt("finetuned", r=2, target_parameters=["experts.down_proj"])
    scene.adapt("safe", r=3, target_parameters=["experts.down_proj"])
    roles = {role: str(path) for role, path in scene.roles.items()}
    outlook = preview(MergeConfiguration(**roles, output=str(tmp_path / "out"), adapter_rank=3))
    report = scene.merge(select="lowest:3", adapter_rank=3)
    # All but the header.
    assert 0 < report.bytes_written - outlook.bytes_written < 2000
    assert report.adapter["rank"] == 3
    found, expected, aligned = (
        scene.loaded(tmp_path / "out"),
        scene.expected(report),
        scene.weights["aligned"],
    )
    differences = norms = 0.0
    for tensor in report.tensors:
        update = expected[tensor.name] - aligned[tensor.name]
        u, values, vt = torch.linalg.svd(update)
        best = u[:, :3] @ torch.diag(values[:3]) @ vt[:3]
        torch.testing.assert_close(found[tensor.name] - aligned[tensor.name], best, rtol=0, atol=1e-5)
        if "layers.0" in tensor.name:
            differences += float((update - best).norm() ** 2)
            norms += float(update.norm() ** 2)
    errors = report.adapter["relative_errors"]
    (name,) = [name for name in errors if "layers.0" in name]
    assert errors[name] == pytest.approx((differences / norms) ** 0.5, abs=1e-6)
    assert verify(tmp_path / "out").files == 1


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    scene = Scene(tmp_path, mixtral)
    scene.adapt("finetuned", r=2, target_parameters=BOTH)
    scene.merge(select="lowest:4")
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "base_layer" in name)
    tensors[name][0, 0] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"base_layer\.lora_A"):
        verify(tmp_path / "out")


def test_what_no_one_adapter_holds_is_refused_by_name(tmp_path: Path) -> None:
    scene = Scene(tmp_path, fused_qwen3_moe)
    scene.adapt("finetuned", r=2, target_parameters=["experts.down_proj"])
    with pytest.raises(
        AdapterError, match=r"experts\.down_proj, which is adapted expert by expert .*leave --compat"
    ):
        scene.merge(compat="peft-linear")
    scene.adapt("safe", r=3, target_parameters=["experts.gate_up_proj"])
    with pytest.raises(AdapterError, match=r"different parameters of model\.layers\.0\.mlp\.experts"):
        scene.merge(select="fraction:1", others="merge")
    file = tmp_path / "finetuned" / "adapter_config.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "fan_in_fan_out": True}))
    with pytest.raises(AdapterError, match="sets fan_in_fan_out, with which PEFT adapts no parameters"):
        scene.merge()
    factors = tmp_path / "finetuned" / "adapter_model.safetensors"
    turned = {
        name.replace("lora_A", "lora_x").replace("lora_B", "lora_A").replace("lora_x", "lora_B"): tensor.T
        for name, tensor in load_file(factors).items()
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in turned.items()}, factors, metadata={"format": "pt"}
    )
    file.write_text(json.dumps({**document, "peft_version": "0.18.1"}))
    with pytest.raises(AdapterError, match=r"made by PEFT before 0\.19, .*pass --output-format checkpoint"):
        scene.merge()
