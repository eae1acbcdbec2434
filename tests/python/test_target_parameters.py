"""LoRA of fused experts: what our views of the factors make of every expert, against PEFT's own merge in float64."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import (
    EXPERTS,
    HIDDEN,
    INNER,
    fused_qwen3_moe,
    gpt_oss,
    gpt_oss_square,
    jetmoe,
    llama4,
    llama4_square,
    mixtral,
    qwen3_moe,
)
from tiny_adapter import PREFIX, write_adapter, write_aligned

from safemerge_fast import fold, merge
from safemerge_fast.checkpoint.adapter import Adapter, open_adapter
from safemerge_fast.checkpoint.model import Access, Model, open_model
from safemerge_fast.pairing.adapter_terms import adapter_uses, stacked_pieces
from safemerge_fast.pairing.operand import Operand
from safemerge_fast.pairing.view import View

peft = pytest.importorskip("peft")

FAMILIES = [mixtral, qwen3_moe, gpt_oss, gpt_oss_square, llama4, llama4_square, fused_qwen3_moe]


def save(path: Path, make: Any, **settings: Any) -> dict[str, torch.Tensor]:
    """Saves a model, an adapter of it, and what PEFT merges of the two; returns the latter's checkpoint."""
    model = make().double()
    form = {} if make is not fused_qwen3_moe else {"save_original_format": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path / "model", **form)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(7)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).double()
        adapted.save_pretrained(path / "adapter")
        adapted.merge_and_unload().save_pretrained(path / "merged", **form)
    return load(path / "merged")


def load(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def opened(path: Path, **access: Any) -> tuple[Adapter, Model]:
    adapter = open_adapter("adapter", path / "adapter", access=Access(**access))
    return adapter, open_model("model", path / "model")


def seen(tensor: np.ndarray, view: View | None) -> np.ndarray:
    """The matrix that a view is of."""
    if view is None:
        return tensor
    flat = tensor.reshape(-1)
    strides = tuple(stride * flat.itemsize for stride in view.strides)
    last = view.start + sum(
        (size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)
    )
    assert 0 <= view.start <= last < flat.size, "a view lies within its tensor"
    return np.lib.stride_tricks.as_strided(flat[view.start :], view.shape, strides)


def evaluated(operand: Operand, tensors: dict[str, dict[str, np.ndarray]]) -> np.ndarray:
    """An operand by its formula, in float64."""
    matrix = seen(tensors[operand.source][operand.tensor], operand.view).copy()
    for product in operand.low_rank:
        factors = tensors[product.source]
        update = seen(factors[product.b], product.b_view) @ seen(factors[product.a], product.a_view)
        matrix += product.scale * (update.T if product.transpose else update)
    return matrix


def folded(path: Path, **access: Any) -> dict[str, np.ndarray]:
    """The checkpoint with every piece put where it belongs."""
    adapter, model = opened(path, **access)
    tensors = {
        "adapter": {
            k: v.numpy() for k, v in load_file(path / "adapter" / "adapter_model.safetensors").items()
        },
        "model": {k: v.numpy() for k, v in load(path / "model").items()},
    }
    uses = adapter_uses(adapter, model)
    assert uses.problems == []
    output = {name: tensor.copy() for name, tensor in tensors["model"].items()}
    written = {name: np.zeros(tensor.shape, dtype=int) for name, tensor in output.items()}
    for piece in stacked_pieces(adapter, model, uses):
        seen(output[piece.tensor], piece.view)[:] = evaluated(piece.term.operand, tensors)
        seen(written[piece.tensor], piece.view)[:] += 1
    for name, counts in written.items():
        assert counts.max(initial=0) <= 1, name
        assert counts.min(initial=1) == counts.max(initial=0) or not counts.size, f"{name} is written in part"
    for use in uses.modules:
        assert use.tensor is not None
        output[use.tensor] = evaluated(use.terms[0].operand, tensors)
    return output


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize(
    "targets",
    [
        ["experts.gate_up_proj", "experts.down_proj"],
        ["experts.down_proj", "experts.gate_up_proj"],
        ["down_proj"],
        ["gate_up_proj"],
    ],
)
def test_every_expert_is_what_peft_merges(tmp_path: Path, make: Any, targets: list[str]) -> None:
    torch.manual_seed(1)
    expected = save(tmp_path, make, r=2, lora_alpha=6, target_modules=[], target_parameters=targets)
    original = load(tmp_path / "model")
    found = folded(tmp_path)
    assert found.keys() == expected.keys()
    changed = {name for name, tensor in expected.items() if not torch.equal(tensor, original[name])}
    assert changed
    for name, tensor in expected.items():
        assert np.abs(found[name] - tensor.numpy()).max() < 1e-12, name
        assert (name in changed) == bool((found[name] != original[name].numpy()).any()), name


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("prefix", ["experts.", ""])
def test_patterns_of_parameters_and_modules_beside_them(tmp_path: Path, make: Any, prefix: str) -> None:
    torch.manual_seed(2)
    expected = save(
        tmp_path,
        make,
        r=2,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj"],
        target_parameters=[f"{prefix}gate_up_proj", f"{prefix}down_proj"],
        rank_pattern={"down_proj": 3, "layers.1.mlp.experts.gate_up_proj": 5, "q_proj": 4},
        alpha_pattern={"down_proj": 9, "q_proj": 1},
    )
    found = folded(tmp_path)
    for name, tensor in expected.items():
        assert np.abs(found[name] - tensor.numpy()).max() < 1e-12, name


def test_a_weight_that_is_a_stack_of_experts(tmp_path: Path) -> None:
    torch.manual_seed(9)
    targets = ["mlp.input_linear.weight", "mlp.output_linear.weight"]
    expected = save(tmp_path, jetmoe, r=2, target_modules=["router.layer"], target_parameters=targets)
    original, found = load(tmp_path / "model"), folded(tmp_path)
    for name, tensor in expected.items():
        assert np.abs(found[name] - tensor.numpy()).max() < 1e-12, name
    changed = [name for name in found if (found[name] != original[name].numpy()).any()]
    assert len([name for name in changed if "linear" in name]) == 4


def test_a_matrix_that_is_adapted_as_a_parameter_is_folded(tmp_path: Path) -> None:
    """A router: its weight is no module's of its own, and its patterns are the parameter's."""
    torch.manual_seed(3)
    expected = save(
        tmp_path,
        qwen3_moe,
        r=2,
        target_modules=[],
        target_parameters=["mlp.gate.weight"],
        rank_pattern={"gate.weight": 3},
    )
    fold(tmp_path / "model", tmp_path / "adapter", output=tmp_path / "out")
    found = load(tmp_path / "out")
    for name, tensor in expected.items():
        assert (found[name].double() - tensor).abs().max() < 1e-6, name


def test_the_layout_of_unsloth(tmp_path: Path) -> None:
    """B as (out, experts, rank): the same file means what PEFT's means with its columns in another order."""
    torch.manual_seed(4)
    expected = save(
        tmp_path, mixtral, r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]
    )
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            columns = tensor.reshape(len(tensor), -1, EXPERTS)
            tensors[name] = columns.transpose(1, 2).reshape(tensor.shape).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    found, taken_for_peft = folded(tmp_path, expert_layout="unsloth"), folded(tmp_path)
    for name, tensor in expected.items():
        assert np.abs(found[name] - tensor.numpy()).max() < 1e-12, name
    assert any(np.abs(taken_for_peft[name] - tensor.numpy()).max() > 0.1 for name, tensor in expected.items())


def test_early_versions_of_peft_took_every_stack_for_in_out(tmp_path: Path) -> None:
    """A (experts·rank, d1) and B (d2, rank·experts) of a (experts, d1, d2) parameter, as (B·A)ᵀ."""
    torch.manual_seed(5)
    save(tmp_path, fused_qwen3_moe, r=2, target_modules=[], target_parameters=["experts.down_proj"])
    file, config = (
        tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    generator = torch.Generator().manual_seed(8)
    tensors = {
        name: torch.randn(
            (2 * EXPERTS, HIDDEN) if "lora_A" in name else (INNER, 2 * EXPERTS), generator=generator
        ).double()
        for name in load_file(file)
    }
    save_file(tensors, file, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_version": "0.18.1"}))
    original, found = load(tmp_path / "model"), folded(tmp_path)
    a, b = (
        next(tensor for name, tensor in tensors.items() if f"layers.1.mlp.experts.{factor}" in name)
        for factor in ("lora_A", "lora_B")
    )
    update = torch.einsum("ore,eri->eio", b.reshape(INNER, 2, EXPERTS), a.reshape(EXPERTS, 2, HIDDEN))
    (name,) = [name for name in original if name.endswith("layers.1.mlp.experts.down_proj")]
    expected = original[name] + 4.0 * update
    assert np.abs(found[name] - expected.numpy()).max() < 1e-12


@pytest.mark.parametrize("make", [*FAMILIES, jetmoe])
def test_folds_are_peft_s_merges(tmp_path: Path, make: Any) -> None:
    target = ["input_linear.weight"] if make is jetmoe else ["gate_up_proj", "down_proj"]
    merged = save(tmp_path, make, r=2, lora_alpha=8, target_modules=["q_proj"], target_parameters=target)
    fold(tmp_path / "model", tmp_path / "adapter", output=tmp_path / "out")
    original, found = load(tmp_path / "model"), load(tmp_path / "out")
    assert found.keys() == merged.keys()
    changed = 0
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=2e-6, msg=name)
        changed += not torch.equal(tensor, original[name])
    assert changed >= 4


@pytest.mark.parametrize("make", [gpt_oss, fused_qwen3_moe, qwen3_moe, llama4])
def test_merges_are_decided_expert_by_expert(tmp_path: Path, make: Any) -> None:
    """ρ of every expert's part from the dense models, and what is merged shrinks PEFT's update to α of itself."""
    merged = save(tmp_path, make, r=2, lora_alpha=8, target_modules=[], target_parameters=["gate_up_proj"])
    original = load(tmp_path / "model")
    generator = torch.Generator().manual_seed(3)
    base = {
        name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator).double()
        for name, tensor in original.items()
    }
    shutil.copytree(tmp_path / "model", tmp_path / "base")
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    report = merge(
        base=tmp_path / "base",
        aligned=tmp_path / "model",
        finetuned=tmp_path / "adapter",
        output=tmp_path / "out",
        output_format="checkpoint",
        select="lowest:4",
        alpha=0.75,
        device="cpu",
    )
    found = load(tmp_path / "out")
    assert sum(module.merged for tensor in report.tensors for module in tensor.module_reports()) == 4
    seen = 0
    for tensor in report.tensors:
        name = tensor.name
        v, delta = original[name] - base[name], merged[name] - original[name]
        if tensor.modules is None and not tensor.analysed:
            assert torch.equal(found[name], original[name]), name
            continue
        modules = list(tensor.module_reports())
        expected = original[name].clone()
        for place, module in enumerate(modules):
            part = _part(make, place, len(modules), v)
            left, right = v[part], delta[part]
            if make in (gpt_oss, llama4):
                left, right = left.T, right.T
            assert module.rho == pytest.approx(_cosine(left @ left.T @ right, right), abs=1e-5), module.name
            expected[part] += (0.75 if module.merged else 1.0) * delta[part]
            seen += 1
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-6, msg=name)
    assert seen == 2 * 2 * EXPERTS


def _part(make: Any, place: int, count: int, whole: torch.Tensor) -> Any:
    """Where the module with this number of a tensor lies: experts one after another, gate before up."""
    if count == 1:
        return slice(None)
    expert, up = divmod(place, 2)
    if make is gpt_oss:
        return (expert, slice(None), slice(up, None, 2))
    half = (slice(0, INNER), slice(INNER, None))[up]
    return (expert, slice(None), half) if make is llama4 else (expert, half)


def _cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left * right).sum() / (left.norm() * right.norm()))


def test_factors_that_fit_no_parameter(tmp_path: Path) -> None:
    save(tmp_path, gpt_oss, r=2, target_modules=[], target_parameters=["down_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 3}))
    adapter, model = opened(tmp_path)
    (problem, *_) = adapter_uses(adapter, model).problems
    assert "fit no parameter of model.layers.0.mlp.experts" in problem
    assert "says rank 3" in problem


def test_what_peft_makes_of_all_linear_by_itself(tmp_path: Path) -> None:
    """A configuration of transformers 4's time, whose experts were modules: PEFT turns them into parameters."""
    torch.manual_seed(6)
    names = ["q_proj", "w1", "w2", "w3", "gate"]
    expected = save(tmp_path, mixtral, r=2, lora_alpha=6, target_modules=names)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    if not written["target_parameters"]:
        pytest.skip("this PEFT does not")
    assert set(written["target_parameters"]) >= {"gate_up_proj", "down_proj"}
    found = folded(tmp_path)
    for name, tensor in expected.items():
        assert np.abs(found[name] - tensor.numpy()).max() < 1e-12, name


def test_products_that_could_be_of_either_parameter_go_by_the_model_s_order(tmp_path: Path) -> None:
    """Two parameters of one shape: shapes say nothing, the loaded model's own order does."""
    name = "model.layers.0.mlp.experts"
    stacks = {f"{name}.{leaf}": torch.zeros(EXPERTS, 12, 12) for leaf in ("down_proj", "up_proj")}
    model = write_aligned(tmp_path / "model", hidden_size=12, more=stacks)
    tensors = {
        f"{PREFIX}{name}{wrapper}.lora_{factor}.weight": torch.ones(*shape)
        for wrapper in (".base_layer", "")
        for factor, shape in (("A", (2 * EXPERTS, 12)), ("B", (12, 2 * EXPERTS)))
    }
    written = write_adapter(
        tmp_path / "adapter", tensors, r=2, target_parameters=["down_proj", "up_proj"], peft_version="0.21.2"
    )
    (problem,) = adapter_uses(open_adapter("adapter", written), model).problems
    assert "in either order, and nothing says which is which" in problem
