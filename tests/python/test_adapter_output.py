"""Merged adapters: loaded by PEFT, compared with the merged checkpoint and with PEFT's own combinations."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import run
from safetensors.torch import load_file, save_file
from test_peft import gpt2, llama, load, logits, merged, train

from safemerge_fast import AdapterError, PlanError, Report, VerificationError, merge, preview, verify
from safemerge_fast._engine import file_digest
from safemerge_fast.recipes.run import read_report

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 8}


def save_adapter(path: Path, model: Any, seed: int, settings: Mapping[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configuration = peft.LoraConfig(task_type="CAUSAL_LM", **copy.deepcopy(dict(settings)))
        adapted = peft.get_peft_model(copy.deepcopy(model), configuration)
        train(adapted, seed)
        adapted.save_pretrained(path)
    return path


class Roles(dict[str, Path]):
    """Directories of base, aligned and two adapters of aligned."""

    def __init__(
        self, path: Path, model: Any, finetuned: Mapping[str, Any], safe: Mapping[str, Any] | None
    ) -> None:
        model.save_pretrained(path / "aligned")
        base = copy.deepcopy(model)
        train(base, 7, size=0.005)
        base.save_pretrained(path / "base")
        super().__init__(base=path / "base", aligned=path / "aligned")
        self["finetuned"] = save_adapter(path / "finetuned", model, 1, finetuned)
        if safe is not None:
            self["safe"] = save_adapter(path / "safe", model, 2, safe)


def merge_roles(roles: Mapping[str, Path], output: Path, **options: Any) -> Report:
    return merge(**roles, output=output, **options)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "the paper's": (llama, LLAMA, LLAMA, {}),
    "no safe adapter": (llama, LLAMA, None, {}),
    "different ranks, scales and modules": (
        llama,
        {**LLAMA, "use_rslora": True, "rank_pattern": {"down_proj": 7}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj", "up_proj"], "r": 2, "lora_alpha": 5},
        {},
    ),
    "what only the safe one adapts": (
        llama,
        LLAMA,
        {"target_modules": ["q_proj", "up_proj"], "r": 2},
        {"others": "merge"},
    ),
    "some layers only": (
        llama,
        {**LLAMA, "layers_to_transform": [1]},
        {"target_modules": r".*\.1\.self_attn\.(q|o)_proj", "r": 3},
        {},
    ),
    "Conv1D": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj"], "r": 3, "lora_alpha": 6, "fan_in_fan_out": True},
        {"target_modules": ["c_attn"], "r": 5, "fan_in_fan_out": True},
        {},
    ),
    "an embedding": (
        llama,
        {**LLAMA, "target_modules": ["q_proj", "embed_tokens"]},
        {**LLAMA, "target_modules": ["q_proj", "embed_tokens"], "r": 2},
        {"include": "embed_tokens"},
    ),
    "modules_to_save": (
        llama,
        {**LLAMA, "modules_to_save": ["lm_head", "norm"]},
        {**LLAMA, "modules_to_save": ["lm_head"], "r": 2},
        {"others": "merge"},
    ),
    "modules_to_save with a bias": (
        llama,
        {**LLAMA, "target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
        {**LLAMA, "target_modules": ["q_proj", "v_proj"]},
        {},
    ),
    "bias=all": (llama, {**LLAMA, "bias": "all"}, {**LLAMA, "bias": "all"}, {"others": "merge"}),
    "bias=lora_only": (llama, {**LLAMA, "bias": "lora_only"}, LLAMA, {}),
    "lora_bias": (
        llama,
        {**LLAMA, "target_modules": ["q_proj", "v_proj"], "lora_bias": True},
        {**LLAMA, "target_modules": ["q_proj"], "lora_bias": True, "r": 2},
        {"others": "merge"},
    ),
}


@pytest.mark.parametrize("select", ["lowest:0", "lowest:2", "fraction:1"])
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_the_checkpoint_holds(tmp_path: Path, case: str, select: str) -> None:
    model, finetuned, safe, options = CASES[case]
    roles = Roles(tmp_path, model(), finetuned, safe)
    options = {"select": select, "alpha": 0.7, **options}
    report = merge_roles(roles, tmp_path / "adapter", **options)
    merge_roles(roles, tmp_path / "checkpoint", output_format="checkpoint", **options)
    assert report.adapter is not None
    adapted = load(roles["aligned"], tmp_path / "adapter")
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.float32
    ).eval()
    assert float((logits(adapted) - logits(whole)).abs().max()) <= TOLERANCE
    # Logits of a small model forgive much; weights do not.
    found, expected = merged(adapted), whole.state_dict()
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) <= 1e-6
    plain = merged(load(roles["aligned"], roles["finetuned"]))
    moved = max(float((found[name] - plain[name]).abs().max()) for name in expected)
    if select == "lowest:0" and "others" not in options:
        assert moved <= 1e-6
    elif select != "lowest:0":
        assert moved > 1e-3

    check_files(tmp_path / "adapter", report)
    assert verify(tmp_path / "adapter").bytes_checked == report.bytes_written
    again = read_report(tmp_path / "adapter")
    assert again.adapter == report.adapter


def check_files(path: Path, report: Report) -> None:
    """Reads an adapter the way that servers do: one rank for all, alpha for scale, and no patterns."""
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == report.adapter["rank"]
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["inference_mode"] is True
    assert isinstance(config["target_modules"], list)
    assert config["target_modules"] == sorted(set(config["target_modules"]))
    modules = set()
    for key, tensor in tensors.items():
        assert key.startswith("base_model.model.")
        assert tensor.dtype == torch.float32
        if key.endswith((".lora_A.weight", ".lora_embedding_A")):
            assert tensor.shape[0] == config["r"]
            modules.add(key.removeprefix("base_model.model.").rpartition(".lora_")[0])
        elif key.endswith((".lora_B.weight", ".lora_embedding_B")):
            assert tensor.shape[1] == config["r"]
        else:
            module = key.removeprefix("base_model.model.").rpartition(".")[0]
            assert module in (config["modules_to_save"] or ()) or (
                config["bias"] == "all" and key.endswith("bias")
            )
    for module in modules:
        assert any(module == name or module.endswith(f".{name}") for name in config["target_modules"])
    assert len(modules) == report.adapter["modules"]
    readme = (path / "README.md").read_text()
    assert "library_name: peft" in readme
    assert "base_model_relation: adapter" in readme
    assert not (path / "config.json").exists()
    assert not (path / "safemerge_plan.json").exists()


def test_a_kept_module_of_lower_rank_is_padded_with_zeros(tmp_path: Path) -> None:
    roles = Roles(tmp_path, llama(), LLAMA, {**LLAMA, "r": 3})
    report = merge_roles(roles, tmp_path / "out", select="lowest:1")
    assert report.adapter["rank"] == 7
    merged_name = next(tensor.name for tensor in report.tensors if tensor.merged)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    original = load_file(roles["finetuned"] / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if merged_name.removesuffix(".weight") in key:
            continue
        if "lora_A" in key:
            assert torch.equal(tensor[:4], original[key])
            assert not tensor[4:].any()
        else:
            assert torch.equal(tensor[:, :4], 2.0 * original[key])
            assert not tensor[:, 4:].any()


def product(tensors: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    return tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()


def test_truncation_is_the_best_of_that_rank_and_says_its_error(tmp_path: Path) -> None:
    roles = Roles(tmp_path, llama(), LLAMA, {**LLAMA, "r": 3})
    merge_roles(roles, tmp_path / "exact", select="lowest:2")
    report = merge_roles(roles, tmp_path / "out", select="lowest:2", adapter_rank=3)
    assert report.adapter["rank"] == 3
    exact, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exact", "out"))
    assert len(report.adapter["relative_errors"]) == 6
    for key in exact:
        if "lora_A" not in key:
            continue
        whole = product(exact, key)
        u, values, vt = torch.linalg.svd(whole)
        best = (u[:, :3] * values[:3]) @ vt[:3]
        torch.testing.assert_close(product(found, key), best, rtol=1e-5, atol=1e-7)
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        expected = float(torch.linalg.vector_norm(values[3:]) / torch.linalg.vector_norm(values))
        assert report.adapter["relative_errors"][name] == pytest.approx(expected, rel=1e-4)
    assert any("truncated to rank 3" in note for note in report.notes)
    check_files(tmp_path / "out", report)
    verify(tmp_path / "out")
    generous = merge_roles(roles, tmp_path / "generous", select="lowest:2", adapter_rank=64)
    assert generous.adapter["relative_errors"] == {}
    assert (tmp_path / "generous/adapter_model.safetensors").read_bytes() == (
        tmp_path / "exact/adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("scales", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_compat_peft_linear_is_bit_for_bit_peft_s(tmp_path: Path, scales: dict[str, Any]) -> None:
    roles = Roles(tmp_path, llama(), {**LLAMA, **scales}, {**LLAMA, "target_modules": ["q_proj", "up_proj"]})
    report = merge_roles(roles, tmp_path / "out", select="fraction:1", alpha=0.8, compat="peft-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(roles["aligned"], roles["finetuned"])
        model.load_adapter(roles["safe"], adapter_name="safe")
        model.add_weighted_adapter(["default", "safe"], [0.8, 0.2], "both", combination_type="linear")
        expected = peft.get_peft_model_state_dict(model, adapter_name="both")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    compared = [key for key in found if "up_proj" not in key]
    assert len(compared) == 12
    for key in compared:
        assert torch.equal(found[key], expected[key]), key

    # The cross terms: what the report says of q_proj, against the dense matrices.
    exact = merge_roles(roles, tmp_path / "exact", select="fraction:1", alpha=0.8)
    sums = load_file(tmp_path / "exact" / "adapter_model.safetensors")
    for name, error in report.adapter["relative_errors"].items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        dense = float((product(found, key) - product(sums, key)).norm() / product(sums, key).norm())
        assert error == pytest.approx(dense, rel=1e-4, abs=1e-6)
        assert (error > 0.1) == ("q_proj" in name)
    assert report.adapter["combination"] == "peft-linear"
    assert exact.adapter["combination"] == "concatenation"
    assert any("cross terms" in note for note in report.notes)
    assert "cross terms" in (tmp_path / "out/README.md").read_text()
    check_files(tmp_path / "out", report)
    verify(tmp_path / "out")


def test_compat_keeps_what_is_kept_exact_and_needs_equal_ranks(tmp_path: Path) -> None:
    roles = Roles(tmp_path / "a", llama(), LLAMA, LLAMA)
    report = merge_roles(roles, tmp_path / "out", select="lowest:0", compat="peft-linear")
    assert report.adapter["relative_errors"] == {}
    found = logits(load(roles["aligned"], tmp_path / "out"))
    assert float((found - logits(load(roles["aligned"], roles["finetuned"]))).abs().max()) <= TOLERANCE
    unequal = Roles(tmp_path / "b", llama(), LLAMA, {**LLAMA, "r": 2})
    with pytest.raises(AdapterError, match=r"equal ranks, but those of .* are 4 and 2"):
        merge_roles(unequal, tmp_path / "none", select="lowest:1", compat="peft-linear")
    assert not (tmp_path / "none" / "adapter_config.json").exists()


def test_refusals_come_before_the_work(tmp_path: Path) -> None:
    roles = Roles(tmp_path, llama(), LLAMA, LLAMA)
    dora = {**roles, "safe": save_adapter(tmp_path / "dora", llama(), 3, {**LLAMA, "use_dora": True})}
    with pytest.raises(AdapterError, match=r"norms \(DoRA\) of .*--output-format checkpoint"):
        merge_roles(dora, tmp_path / "out")
    merge_roles(dora, tmp_path / "whole", output_format="checkpoint")
    tokens = {
        **roles,
        "finetuned": save_adapter(tmp_path / "t", llama(), 3, {**LLAMA, "trainable_token_indices": [3, 5]}),
    }
    with pytest.raises(AdapterError, match=r"trainable tokens.*--output-format checkpoint"):
        merge_roles(tokens, tmp_path / "out")
    mixed = {**roles, "safe": roles["aligned"]}
    with pytest.raises(AdapterError, match=r"safe is a full checkpoint; pass --output-format checkpoint"):
        merge_roles(mixed, tmp_path / "out", output_format="adapter")
    assert merge_roles(mixed, tmp_path / "mixed").adapter is None
    with pytest.raises(PlanError, match="adapter_rank is for adapters"):
        merge_roles(mixed, tmp_path / "out", adapter_rank=4)
    with pytest.raises(PlanError, match="compat is for adapters"):
        merge_roles(roles, tmp_path / "out", output_format="checkpoint", compat="peft-linear")
    with pytest.raises(PlanError, match="max_shard_size is for checkpoints"):
        merge_roles(roles, tmp_path / "out", max_shard_size="1GB")
    with pytest.raises(PlanError, match="give one of them"):
        merge_roles(roles, tmp_path / "out", adapter_rank=4, compat="peft-linear")
    assert not (tmp_path / "out").exists()


def test_nan_in_a_factor(tmp_path: Path) -> None:
    roles = Roles(tmp_path, llama(), LLAMA, LLAMA)
    tensors = load_file(roles["safe"] / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key][1, 2] = torch.nan
    save_file(tensors, roles["safe"] / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=f"{key} of .* holds NaN"):
        merge_roles(roles, tmp_path / "out", select="fraction:1")
    merge_roles(roles, tmp_path / "out", select="fraction:1", allow_nonfinite=True, overwrite=True)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")[key].isnan().any()


def restate(output: Path, file: Path) -> None:
    """Makes an output's report say that a file is as it is now, as if it had been written so."""
    path = output / "safemerge_report.json"
    document = json.loads(path.read_text())
    entry = next(entry for entry in document["files"] if entry["name"] == file.name)
    entry.update(bytes=file.stat().st_size, digest=file_digest(file))
    path.write_text(json.dumps(document))


def test_verify_finds_a_changed_value_and_another_input(tmp_path: Path) -> None:
    roles = Roles(tmp_path, llama(), LLAMA, LLAMA)
    out = tmp_path / "out"
    merge_roles(roles, out, select="lowest:2", adapter_rank=6)
    verify(out)
    shutil.rmtree(roles["base"])
    verify(out)

    weights = out / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if "lora_A" in key)
    changed = {**tensors, key: tensors[key].clone()}
    changed[key][0, 0] += 1e-2
    save_file(changed, weights, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="differs from what the report says"):
        verify(out)
    assert run("verify", str(out)).exit_code == 4
    save_file(tensors, weights, metadata={"format": "pt"})
    verify(out)
    # Factors of a truncated product may turn around together: another library's SVD has other signs.
    truncated = next(
        iter(json.loads((out / "safemerge_report.json").read_text())["adapter"]["relative_errors"])
    )
    a = f"base_model.model.{truncated.removesuffix('.weight')}.lora_A.weight"
    b = a.replace("lora_A", "lora_B")
    original = weights.read_bytes()
    save_file({**tensors, a: -tensors[a], b: -tensors[b]}, weights, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=f"{weights} is not what was written: its digest differs"):
        verify(out)
    report = (out / "safemerge_report.json").read_text()
    restate(out, weights)
    verify(out)
    weights.write_bytes(original)
    (out / "safemerge_report.json").write_text(report)
    verify(out)

    config = out / "adapter_config.json"
    settings = config.read_bytes()
    config.write_bytes(settings.replace(b'"lora_alpha": 6', b'"lora_alpha": 9'))
    with pytest.raises(VerificationError, match=f"{config} is not what was written"):
        verify(out)
    # Even if the report agrees: the settings follow from the models and what was asked for.
    restate(out, config)
    with pytest.raises(VerificationError, match="should set lora_alpha to 6"):
        verify(out)
    config.write_bytes(settings)
    (out / "safemerge_report.json").write_text(report)
    smaller = save_adapter(tmp_path / "smaller", llama(), 5, {**LLAMA, "r": 2})
    shutil.copytree(smaller, roles["safe"], dirs_exist_ok=True)
    with pytest.raises(PlanError, match="is not the one that was merged"):
        verify(out)


def test_dtype_and_files_beside(tmp_path: Path) -> None:
    roles = Roles(tmp_path, llama(), LLAMA, LLAMA)
    (roles["finetuned"] / "tokenizer_config.json").write_text("{}")
    report = merge_roles(roles, tmp_path / "out", select="lowest:2", dtype="bfloat16")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in report.tensors} == {"BF16"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "safemerge_report.html",
        "safemerge_report.json",
        "tokenizer_config.json",
    }


def test_the_command_line(tmp_path: Path) -> None:
    roles = Roles(tmp_path, llama(), LLAMA, LLAMA)
    flags = [part for role, path in roles.items() for part in (f"--{role}", str(path))]
    out = tmp_path / "out"
    result = run("merge", *flags, "-o", str(out), "--select", "lowest:3", "--adapter-rank", "5", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["adapter"]["rank"] == 5
    assert "--adapter-rank 5" in (out / "README.md").read_text()
    assert run("verify", str(out)).exit_code == 0
    whole = run("merge", *flags, "-o", str(tmp_path / "whole"), "--output-format", "checkpoint")
    assert whole.exit_code == 0, whole.output
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    dry = run("merge", *flags, "-o", str(tmp_path / "dry"), "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    assert json.loads(dry.stdout)["bytes_written"] < 100_000
    assert not (tmp_path / "dry").exists()


def test_a_dry_run_knows_the_size(tmp_path: Path) -> None:
    from safemerge_fast import MergeConfiguration

    roles = {role: str(path) for role, path in Roles(tmp_path, llama(), LLAMA, {**LLAMA, "r": 3}).items()}
    outlook = preview(MergeConfiguration(**roles, output=str(tmp_path / "out")))
    report = merge_roles(
        {role: Path(path) for role, path in roles.items()}, tmp_path / "out", select="fraction:1"
    )
    assert outlook.files == 1
    assert outlook.tensors == len(report.tensors) == 6
    assert outlook.bytes_written <= report.bytes_written <= outlook.bytes_written + 4096
