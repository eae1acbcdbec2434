"""Configurations in mergekit's format: adapters, tied heads, buffers and tensors that some models lack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from configurations import (
    HIDDEN,
    INTERMEDIATE,
    assert_close,
    merged,
    read,
    tensors_of,
    write_llama,
)
from lora import update, write_lora

from safemerge_fast import AdapterError, PlanError
from safemerge_fast.recipes.mergekit.document import read_document
from safemerge_fast.recipes.mergekit.models import read_reference

Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
MODULES = {f"model.layers.{layer}.self_attn.q_proj": (HIDDEN, HIDDEN) for layer in range(3)} | {
    f"model.layers.{layer}.mlp.up_proj": (INTERMEDIATE, HIDDEN) for layer in range(3)
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("models")
    return {
        "a": write_llama(path / "a", seed=1, layers=3),
        "b": write_llama(path / "b", seed=2, layers=3),
        "lora": write_lora(path / "lora", MODULES, rank=2, seed=3, size=0.4),
        "other": write_lora(path / "other", MODULES, rank=3, seed=4, size=0.4),
    }


# --- adapters -------------------------------------------------------------------------------------


def test_adapters_in_a_sum_read_their_model_once(models: dict[str, Path], tmp_path: Path) -> None:
    found, report = merged(
        tmp_path,
        merge_method="linear",
        models=[
            {"model": f"{models['a']}+{models['lora']}", "parameters": {"weight": 1}},
            {"model": f"{models['a']}+{models['other']}", "parameters": {"weight": 3}},
            {"model": models["b"], "parameters": {"weight": 4}},
        ],
    )
    a, b = tensors_of(models["a"]), tensors_of(models["b"])
    for name in a:
        delta = (update(models["lora"], name) + 3 * update(models["other"], name)) / 8
        assert_close(found[name], (a[name] + b[name]) / 2 + delta)
    operations = {tensor.name: tensor.operation for tensor in report.tensors}
    assert operations[Q] == ("linear: 0.5 (a + 0.5·B·A(lora) + 1.5·B·A(other)) + 0.5 b")
    assert set(report.inputs) == {"a", "b", "lora", "other"}


def test_adapters_in_methods_with_a_base(models: dict[str, Path], tmp_path: Path) -> None:
    a, b = tensors_of(models["a"]), tensors_of(models["b"])
    adapted = f"{models['a']}+{models['lora']}"
    found, report = merged(
        tmp_path,
        merge_method="task_arithmetic",
        base_model=models["a"],
        models=[{"model": adapted}, {"model": models["b"]}],
        parameters={"weight": 0.5},
    )
    for name in a:
        assert_close(found[name], a[name] + 0.5 * update(models["lora"], name) + 0.5 * (b[name] - a[name]))
    # The base may be one too, also where it is only in the field base_model.
    found, report = merged(
        tmp_path,
        merge_method="nearswap",
        base_model=adapted,
        models=[{"model": models["b"]}],
        parameters={"t": 0},
    )
    for name in a:
        assert_close(found[name], a[name] + update(models["lora"], name))
    plan = json.loads((Path(report.output) / "safemerge_plan.json").read_text())
    number = next(tensor["operation"] for tensor in plan["shards"][0]["tensors"] if tensor["name"] == Q)
    base = plan["operations"][number]["merge"]["base"]
    assert base["source"] == "a"
    assert base["low_rank"][0]["a"]["source"] == "lora"


def test_passthrough_of_an_adapter_folds_it(models: dict[str, Path], tmp_path: Path) -> None:
    adapted = f"{models['a']}+{models['lora']}"
    a = tensors_of(models["a"])
    scale = [{"filter": "up_proj", "value": 0.5}, {"value": 1}]
    found, report = merged(
        tmp_path, merge_method="passthrough", models=[{"model": adapted, "parameters": {"scale": scale}}]
    )
    assert_close(found[Q], a[Q] + update(models["lora"], Q))
    assert_close(found[UP], 0.5 * (a[UP] + update(models["lora"], UP)))
    assert (found["lm_head.weight"] == a["lm_head.weight"]).all()
    assert report.merged == 6
    found, _ = merged(
        tmp_path,
        merge_method="passthrough",
        slices=[{"sources": [{"model": adapted, "layer_range": [1, 2]}]}] * 2,
    )
    for layer in range(2):
        assert_close(found[Q.replace(".1.", f".{layer}.")], a[Q] + update(models["lora"], Q))


def test_an_adapter_that_adds_to_biases(models: dict[str, Path], tmp_path: Path) -> None:
    """lora_bias makes a bias the sum of two tensors: a sum can have that, other methods cannot."""
    name = "model.layers.0.self_attn.q_proj.bias"
    bias = torch.linspace(-1, 1, HIDDEN)
    a = write_llama(tmp_path / "a", seed=1, layers=3, more={name: bias})
    b = write_llama(tmp_path / "b", seed=2, layers=3, more={name: 2 * bias})
    lora = write_lora(
        tmp_path / "lora",
        {"model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN)},
        rank=2,
        seed=3,
        more={"model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(HIDDEN)},
        lora_bias=True,
    )
    found, _ = merged(
        tmp_path,
        merge_method="linear",
        models=[{"model": f"{a}+{lora}"}, {"model": b}],
        parameters={"weight": 3},
    )
    # alpha is twice the rank.
    assert_close(found[name], (bias.double() + 2.0 + 2 * bias.double()) / 2)
    with pytest.raises(
        AdapterError, match=r"models\[0\]: the adapter adds a vector to .*bias.*fold the adapter"
    ):
        merged(
            tmp_path,
            merge_method="nuslerp",
            models=[{"model": f"{a}+{lora}"}, {"model": b}],
            parameters={"weight": 3},
        )
    with pytest.raises(PlanError, match=r"weights for .* sum to zero"):
        merged(
            tmp_path,
            merge_method="linear",
            models=[
                {"model": f"{a}+{lora}", "parameters": {"weight": 1}},
                {"model": b, "parameters": {"weight": -1}},
            ],
        )


def test_adapters_that_do_not_fit_are_refused_as_ever(models: dict[str, Path], tmp_path: Path) -> None:
    wrong = write_lora(tmp_path / "wrong", {"model.layers.0.self_attn.q_proj": (HIDDEN, 99)}, rank=3, seed=0)
    with pytest.raises(AdapterError, match=r"models\[0\]\.model: wrong: .*12 outputs and 99 inputs"):
        merged(tmp_path, merge_method="passthrough", models=[{"model": f"{models['a']}+{wrong}"}])


def test_a_plus_in_a_path(models: dict[str, Path], tmp_path: Path) -> None:
    named = write_llama(tmp_path / "c++", seed=1, layers=3)
    assert read_reference(str(named), "x").adapter is None
    reference = read_reference(f"{named}+{models['lora']}", "x")
    assert (reference.model, reference.adapter) == (str(named), str(models["lora"]))
    reference = read_reference("org/model@main+org/adapter@v1", "x")
    assert (reference.model, reference.adapter) == ("org/model@main", "org/adapter@v1")
    _, report = merged(
        tmp_path,
        merge_method="linear",
        models=[{"model": f"{named}+{models['lora']}"}, {"model": named}],
        parameters={"weight": 1},
    )
    assert set(report.inputs) == {"c++", "lora"}


def test_models_of_one_name_are_told_apart(models: dict[str, Path], tmp_path: Path) -> None:
    twin = write_llama(tmp_path / "twins" / "a", seed=9, layers=3)
    found, report = merged(
        tmp_path,
        merge_method="linear",
        models=[{"model": models["a"]}, {"model": twin}],
        parameters={"weight": 1},
    )
    assert set(report.inputs) == {"a", "a (2)"}
    assert_close(found[Q], (tensors_of(models["a"])[Q] + tensors_of(twin)[Q]) / 2)
    # A directory can be called like a model with an adapter.
    named = write_llama(tmp_path / "a+lora", seed=8, layers=3)
    for order in (1, -1):
        names = [f"{models['a']}+{models['lora']}", str(named)][::order]
        found, _ = merged(
            tmp_path,
            merge_method="linear",
            models=[{"model": name} for name in names],
            parameters={"weight": 1},
        )
        delta = update(models["lora"], Q)
        assert_close(found[Q], (tensors_of(models["a"])[Q] + delta + tensors_of(named)[Q]) / 2)


# --- heads, buffers, single tensors ---------------------------------------------------------------


def test_a_tied_head_is_the_embedding(models: dict[str, Path], tmp_path: Path) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tied = write_llama(tmp_path / "tied", seed=5, layers=3, tied=True)
    a, other = tensors_of(models["a"]), tensors_of(tied)
    found, report = merged(
        tmp_path,
        merge_method="linear",
        models=[{"model": models["a"]}, {"model": tied}],
        parameters={"weight": 1},
    )
    assert_close(found[head], (a[head] + other[embedding]) / 2)
    assert any("lm_head.weight is not stored in tied, which ties it to" in note for note in report.notes)
    # Also where the last slice is of the tied model alone, and far from its embedding.
    found, _ = merged(
        tmp_path,
        merge_method="passthrough",
        slices=[
            {"sources": [{"model": models["a"], "layer_range": [0, 2]}]},
            {"sources": [{"model": tied, "layer_range": [1, 3]}]},
        ],
    )
    assert (found[head] == other[embedding]).all()
    assert (found[embedding] == a[embedding]).all()
    # A copy of the embedding that a tied model stores has no counterpart, and is not missed.
    copy = write_llama(tmp_path / "copy", seed=6, layers=3, tied=True, stores_head=True)
    found, report = merged(
        tmp_path, merge_method="linear", models=[{"model": tied}, {"model": copy}], parameters={"weight": 1}
    )
    assert head not in found
    assert report.unused["copy"] == (head,)


def test_tensors_that_are_not_float(models: dict[str, Path], tmp_path: Path) -> None:
    equal, differs = torch.arange(4), torch.tensor([True])
    a = write_llama(
        tmp_path / "a", seed=1, layers=1, more={"ids": equal, "flag": differs, "none": torch.zeros(0, 3)}
    )
    b = write_llama(
        tmp_path / "b", seed=2, layers=1, more={"ids": equal, "flag": ~differs, "none": torch.zeros(0, 3)}
    )
    found, report = merged(
        tmp_path,
        merge_method="slerp",
        base_model=b,
        models=[{"model": a}],
        parameters={"t": 0.5},
        dtype="bfloat16",
    )
    assert found["ids"].tolist() == [0, 1, 2, 3]
    assert not found["flag"].any()
    operations = {tensor.name: (tensor.dtype, tensor.operation) for tensor in report.tensors}
    assert operations["ids"] == ("I64", "copy: b")
    assert operations["none"] == ("BF16", "copy: b")
    assert [note for note in report.notes if "cannot be merged" in note] == [
        "flag is BOOL, which cannot be merged, and differs between b and a: that of b is copied"
    ]


def test_slerp_passes_a_single_tensor_through(models: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    bias = torch.linspace(-1, 1, HIDDEN)
    a = write_llama(tmp_path / "a", seed=1, layers=1, more={name: bias})
    b = write_llama(tmp_path / "b", seed=2, layers=1)
    for method, parameters in [("slerp", {"t": 0.5}), ("nuslerp", {"weight": 1})]:
        base = {"base_model": a} if method == "slerp" else {}
        found, report = merged(
            tmp_path, merge_method=method, models=[{"model": a}, {"model": b}], parameters=parameters, **base
        )
        assert_close(found[name], bias.double())
        assert f"{name} is copied from a: it is missing in b" in report.notes


def test_buffers_that_models_compute_are_copied(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    a = write_llama(tmp_path / "a", seed=1, layers=1, more={name: torch.ones(3)})
    b = write_llama(tmp_path / "b", seed=2, layers=1)
    found, report = merged(
        tmp_path, merge_method="linear", models=[{"model": a}, {"model": b}], parameters={"weight": 1}
    )
    assert found[name].tolist() == [1, 1, 1]
    assert f"{name} is copied from a: it is missing in b" in report.notes


def test_models_are_opened_only_when_the_document_is_sound(tmp_path: Path) -> None:
    document = {"merge_method": "passthrough", "models": [{"model": "nowhere/at-all"}]}
    settings = read(tmp_path / "config.yml", **document)
    assert settings.config == document
    (source,) = read_document("config.yml", settings.config).slices[0].sources
    assert source.model.model == "nowhere/at-all"
