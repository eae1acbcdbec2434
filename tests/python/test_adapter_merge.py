"""SafeMERGE of adapters into a checkpoint, against W_aligned + α s_f B_f A_f + (1-α) s_s B_s A_s in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint
from lora import load_checkpoint, update, write_lora

from safemerge_fast import (
    AdapterError,
    AnalysisError,
    MergeConfiguration,
    PairingError,
    analyze,
    fold,
    merge,
    preview,
    verify,
)
from safemerge_fast.analysis.score import Score
from safemerge_fast.analysis.scores import Scores
from safemerge_fast.checkpoint.adapter import open_source
from safemerge_fast.checkpoint.model import open_model
from safemerge_fast.pairing.rows import pair

LAYERS = range(3)
Q = {f"model.layers.{layer}.self_attn.q_proj": (72, 72) for layer in LAYERS}
V = {f"model.layers.{layer}.self_attn.v_proj": (36, 72) for layer in LAYERS}
DOWN = {f"model.layers.{layer}.mlp.down_proj": (72, 200) for layer in LAYERS}
UP = {f"model.layers.{layer}.mlp.up_proj": (200, 72) for layer in LAYERS}


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, make_quartet: Callable[..., dict[str, Path]]
) -> dict[str, Path]:
    """A quartet in float32, with adapters of it that cover different modules with different ranks."""
    path = tmp_path_factory.mktemp("adapters")
    paths = make_quartet(path, dtype="float32", shards=2)
    paths["finetuned adapter"] = write_lora(path / "f", Q | V | DOWN, rank=5, seed=1)
    paths["safe adapter"] = write_lora(path / "s", Q | V | UP, rank=3, seed=2)
    return paths


def score_file(path: Path, rho: Mapping[str, float]) -> Path:
    """Scores of no models in particular, so that what is merged is the test's choice."""
    norms = {"v_norm": 1.0, "delta_norm": 1.0, "weight_norm": 10.0, "v_rounding": 0.0, "cos_v_delta": 0.0}
    modules = {name: Score(rho=value, rho_null=0.5, undefined=None, **norms) for name, value in rho.items()}
    path.write_text(Scores(modules, "aligned", {}, "cpu", 0.0).to_json())
    return path


def repair(models: dict[str, Path], tmp_path: Path, finetuned: str, safe: str | None, **options: Any) -> Any:
    """Merges layer 1 and keeps the rest."""
    opened = {"base": open_model("base", models["base"]), "aligned": open_model("aligned", models["aligned"])}
    opened["finetuned"] = open_source("finetuned", models[finetuned])
    rows = pair(opened).rows
    rho = {row.name: 0.1 if ".layers.1." in row.name else 0.9 for row in rows if row.analysed}
    return merge(
        models["base"],
        models["aligned"],
        models[finetuned],
        None if safe is None else models[safe],
        output=tmp_path / "out",
        scores=score_file(tmp_path / "scores.json", rho),
        output_format="checkpoint",
        **options,
    )


def delta(models: dict[str, Path], role: str, name: str, aligned: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Δ of a role in float64."""
    if role.endswith("adapter"):
        return update(models[role], name)
    return load_checkpoint(models[role])[name].double() - aligned[name].double()


@pytest.mark.parametrize(
    ("finetuned", "safe"),
    [
        ("finetuned adapter", "safe adapter"),
        ("finetuned adapter", "safe"),
        ("finetuned", "safe adapter"),
        ("finetuned adapter", None),
    ],
)
@pytest.mark.parametrize("alpha", [0.8, 0.35, 1.0, 0.0])
def test_the_paper_s_formula(
    models: dict[str, Path], tmp_path: Path, finetuned: str, safe: str | None, alpha: float
) -> None:
    report = repair(models, tmp_path, finetuned, safe, alpha=alpha)
    aligned, found = load_checkpoint(models["aligned"]), load_checkpoint(tmp_path / "out")
    assert found.keys() == aligned.keys()
    decided = {tensor.name: tensor for tensor in report.tensors}
    for name, tensor in aligned.items():
        if not tensor.is_floating_point():
            continue
        f = delta(models, finetuned, name, aligned)
        s = torch.zeros(()) if safe is None else delta(models, safe, name, aligned)
        merged = decided[name].merged
        assert merged == (decided[name].analysed and ".layers.1." in name)
        expected = tensor.double() + (alpha * f + (1 - alpha) * s if merged else f)
        error = float((found[name].double() - expected).abs().max())
        assert error < 3e-7, (name, error)
    assert report.merged == sum(tensor.merged for tensor in report.tensors) > 0
    assert verify(tmp_path / "out").files == 2


def test_only_what_the_finetuned_adapter_changes_is_analysed(models: dict[str, Path], tmp_path: Path) -> None:
    report = repair(models, tmp_path, "finetuned adapter", "safe adapter")
    by_name = {tensor.name: tensor for tensor in report.tensors}
    analysed = {name for name, tensor in by_name.items() if tensor.analysed}
    assert analysed == {f"{module}.weight" for module in Q | V | DOWN}
    lonely = by_name["model.layers.1.mlp.up_proj.weight"]
    assert lonely.reason.startswith("only the safe adapter changes it")
    assert (lonely.merged, lonely.operation) == (False, "copy: aligned")
    assert by_name["model.layers.1.mlp.gate_proj.weight"].reason.startswith("not adapted")
    operations = {name: tensor.operation for name, tensor in by_name.items()}
    assert operations["model.layers.1.self_attn.q_proj.weight"] == (
        "linear: aligned + 1.6·B·A(finetuned) + 0.4·B·A(safe)"
    )
    assert operations["model.layers.0.self_attn.q_proj.weight"] == "linear: aligned + 2·B·A(finetuned)"
    # The safe adapter leaves it alone: its Δ is zero.
    assert operations["model.layers.1.mlp.down_proj.weight"] == "linear: aligned + 1.6·B·A(finetuned)"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| safe | `s` (LoRA adapter) |" in card
    plan = json.loads((tmp_path / "out" / "safemerge_plan.json").read_text())
    assert set(plan["sources"]) == {"aligned", "finetuned", "safe"}
    assert list(plan["sources"]["safe"]["files"]) == ["adapter_model.safetensors"]


def test_the_output_is_shaped_like_the_aligned_model(models: dict[str, Path], tmp_path: Path) -> None:
    repair(models, tmp_path, "finetuned adapter", "safe adapter")
    out, aligned = tmp_path / "out", models["aligned"]
    assert {file.name for file in out.glob("*.safetensors*")} == {
        file.name for file in aligned.glob("*.safetensors*")
    }
    assert (out / "config.json").read_bytes() == (aligned / "config.json").read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"made_for": "aligned"}
    assert not (out / "adapter_config.json").exists()


def test_everything_an_adapter_can_hold(
    models: dict[str, Path], tmp_path: Path, make_quartet: Callable[..., dict[str, Path]]
) -> None:
    """DoRA, replaced rows and replaced tensors in the fine-tuned adapter, a plain safe one, --others both ways."""
    q = "model.layers.1.self_attn.q_proj"
    magnitude, norm = torch.rand(72) + 0.5, torch.rand(72)
    rows = torch.randn(2, 72)
    paths = {
        **models,
        "dora": write_lora(
            tmp_path / "dora",
            {q: (72, 72)},
            rank=4,
            seed=3,
            more={
                f"{q}.lora_magnitude_vector": magnitude,
                "model.norm.weight": norm,
                "model.embed_tokens.token_adapter.trainable_tokens_delta": rows,
            },
            use_dora=True,
            trainable_token_indices=[300, 2],
        ),
    }
    aligned = load_checkpoint(models["aligned"])
    weight = aligned[f"{q}.weight"].double() + update(paths["dora"], f"{q}.weight")
    dora = weight * (magnitude.double() / weight.norm(dim=1))[:, None]
    safe = aligned[f"{q}.weight"].double() + update(models["safe adapter"], f"{q}.weight")
    embedding = aligned["model.embed_tokens.weight"].double().clone()
    embedding[[300, 2]] = rows.double()
    for others in ("keep", "merge"):
        report = repair(paths, tmp_path, "dora", "safe adapter", others=others, overwrite=True)
        found = load_checkpoint(tmp_path / "out")

        def close(name: str, expected: torch.Tensor, found: Mapping[str, torch.Tensor] = found) -> None:
            assert float((found[name].double() - expected).abs().max()) < 1e-6

        close(f"{q}.weight", 0.8 * dora + 0.2 * safe)
        kept = others == "keep"
        close(
            "model.norm.weight",
            norm.double() if kept else 0.8 * norm.double() + 0.2 * aligned["model.norm.weight"],
        )
        plain = aligned["model.embed_tokens.weight"].double()
        close("model.embed_tokens.weight", embedding if kept else 0.8 * embedding + 0.2 * plain)
        # Of what is not analysed, only tensors that some adapter changes can be merged at all.
        merged = {tensor.name for tensor in report.tensors if tensor.merged and not tensor.analysed}
        safe_only = {f"{module}.weight" for module in Q | V | UP} - {f"{q}.weight"}
        changed = {"model.norm.weight", "model.embed_tokens.weight"} | safe_only
        assert merged == (set() if kept else changed)


def test_other_float_dtypes_are_rounded_once(
    tmp_path: Path, make_quartet: Callable[..., dict[str, Path]]
) -> None:
    paths = make_quartet(tmp_path / "models", dtype="bfloat16", shards=1)
    paths["finetuned adapter"] = write_lora(tmp_path / "f", Q, rank=5, seed=1, dtype=torch.bfloat16)
    paths["safe adapter"] = write_lora(tmp_path / "s", Q, rank=9, seed=2, dtype=torch.float16)
    repair(paths, tmp_path, "finetuned adapter", "safe adapter", alpha=0.6)
    aligned, found = load_checkpoint(paths["aligned"]), load_checkpoint(tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    f, s = (update(paths[role], name) for role in ("finetuned adapter", "safe adapter"))
    exact = aligned[name].double() + 0.6 * f + 0.4 * s
    torch.testing.assert_close(found[name].double(), exact, rtol=2**-8 * 1.001, atol=1e-7)


def test_a_dry_run_reads_no_weights(models: dict[str, Path], tmp_path: Path) -> None:
    configuration = MergeConfiguration(
        base=str(models["base"]),
        aligned=str(models["aligned"]),
        finetuned=str(models["finetuned adapter"]),
        safe=str(models["safe adapter"]),
        output=str(tmp_path / "out"),
        output_format="checkpoint",
    )
    outlook = preview(configuration)
    assert (outlook.analysed, outlook.files) == (9, 2)
    matrices = sum(3 * out * inner for out, inner in ((72, 72), (36, 72), (72, 200)))
    factors = sum(3 * 5 * (out + inner) for out, inner in ((72, 72), (36, 72), (72, 200)))
    assert outlook.bytes_analysed == 4 * (2 * matrices + factors)


@pytest.mark.parametrize("role", ["base", "aligned"])
def test_base_and_aligned_are_whole_models(models: dict[str, Path], tmp_path: Path, role: str) -> None:
    roles = {"base": models["base"], "aligned": models["aligned"], "finetuned": models["finetuned"]}
    roles[role] = models["safe adapter"]
    with pytest.raises(AdapterError, match=f"{role}: .*give a whole checkpoint"):
        merge(**roles, output=tmp_path / "out")


def test_an_adapter_that_does_not_fit(models: dict[str, Path], tmp_path: Path) -> None:
    wrong = write_lora(tmp_path / "wrong", {"model.layers.7.self_attn.q_proj": (72, 72)}, rank=3, seed=0)
    with pytest.raises(AdapterError, match=r"safe: the key .*layers\.7.*does not have"):
        merge(models["base"], models["aligned"], models["finetuned"], wrong, output=tmp_path / "out")


def test_the_base_must_have_what_is_analysed(
    models: dict[str, Path], tmp_path: Path, make_quartet: Callable[..., dict[str, Path]]
) -> None:
    def drop(role: str, tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.down_proj.weight"], tensors["model.layers.0.mlp.gate_proj.weight"]

    base = make_quartet(tmp_path / "less", roles=("base",), dtype="float32", edit=drop)["base"]
    opened = {
        "base": open_model("base", base),
        "aligned": open_model("aligned", models["aligned"]),
        "finetuned": open_source("finetuned", models["finetuned adapter"]),
    }
    with pytest.raises(
        PairingError, match=r"layers\.0\.mlp\.down_proj\.weight is .* in aligned but missing in base"
    ):
        pair(opened)
    # Nobody adapts gate_proj, and yet a model that lacks it is another one.
    with pytest.raises(PairingError, match=r"layers\.0\.mlp\.gate_proj\.weight is .* missing in base; "):
        pair(opened, exclude=r"layers\.0\.mlp\.down_proj")
    excluded = pair(opened, exclude=r"layers\.0\.mlp\.(down|gate)_proj")
    assert sum(row.analysed for row in excluded.rows) == 8


def test_a_safe_adapter_of_tensors_that_the_finetuned_model_lacks(
    tmp_path: Path, make_quartet: Callable[..., dict[str, Path]]
) -> None:
    def drop(role: str, tensors: dict[str, torch.Tensor]) -> None:
        if role == "finetuned":
            del tensors["model.norm.weight"]

    paths = make_quartet(tmp_path, edit=drop, shards=1)
    adapter = write_lora(tmp_path / "s", Q, rank=3, seed=0, more={"model.norm.weight": torch.ones(72)})
    opened = {role: open_model(role, paths[role]) for role in ("base", "aligned", "finetuned")}
    pairing = pair({**opened, "safe": open_source("safe", adapter)})
    assert pairing.unused["safe"] == ("model.norm.weight",)
    assert any(
        "of safe have no counterpart" in note and "model.norm.weight" in note for note in pairing.notes
    )


@pytest.mark.parametrize(("rows", "columns", "transposed"), [(8, 24, True), (24, 8, False)])
def test_the_factors_say_how_a_matrix_of_an_unknown_model_is_stored(
    tmp_path: Path, rows: int, columns: int, transposed: bool
) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    for role in ("base", "aligned"):
        write_checkpoint(tmp_path / role, {name: torch.zeros(rows, columns)}, {"model_type": "jais"})
    # 8 inputs, 24 outputs.
    adapter = write_lora(tmp_path / "f", {name.removesuffix(".weight"): (24, 8)}, rank=2, seed=0)
    opened = {role: open_model(role, tmp_path / role) for role in ("base", "aligned")}
    (row,) = pair({**opened, "finetuned": open_source("finetuned", adapter)}).rows
    assert (row.analysed, row.transposed) == (True, transposed)


def test_scores_of_adapters_are_those_of_the_folded_models(models: dict[str, Path], tmp_path: Path) -> None:
    fold(models["aligned"], models["finetuned adapter"], output=tmp_path / "folded")
    thin = analyze(models["base"], models["aligned"], models["finetuned adapter"])
    dense = analyze(models["base"], models["aligned"], tmp_path / "folded").modules
    assert len(thin.modules) == 9
    for name, score in thin.modules.items():
        assert score.rho == pytest.approx(dense[name].rho, abs=1e-5)
        assert score.delta_norm == pytest.approx(dense[name].delta_norm, rel=1e-5)
    report = merge(
        models["base"],
        models["aligned"],
        models["finetuned adapter"],
        models["safe adapter"],
        output=tmp_path / "out",
        select="lowest:4",
    )
    lowest = sorted(thin.modules, key=lambda name: thin.modules[name].rho or 0.0)[:4]
    assert {tensor.name for tensor in report.tensors if tensor.merged} == set(lowest)


def test_scores_of_an_adapter_are_not_reused_after_its_scale_changed(
    models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = tmp_path / "finetuned"
    shutil.copytree(models["finetuned adapter"], adapter)
    scores = tmp_path / "scores.json"
    scores.write_text(analyze(models["base"], models["aligned"], adapter).to_json())
    roles = {"base": models["base"], "aligned": models["aligned"], "finetuned": adapter}
    merge(**roles, output=tmp_path / "same", scores=scores)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["lora_alpha"] *= 2
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AnalysisError, match="other weights than the finetuned that was scored"):
        merge(**roles, output=tmp_path / "other", scores=scores)
    assert not (tmp_path / "other").exists()
