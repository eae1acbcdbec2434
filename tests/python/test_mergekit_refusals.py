"""Configurations in mergekit's format that are refused: every message names the place and the way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from configurations import HIDDEN, merged, plain, read, write_llama
from invoke import run

from safemerge_fast import PairingError, PlanError, SafemergeError
from safemerge_fast.recipes.mergekit.document import read_document

LINEAR: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}


def slices(*sources: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"merge_method": "passthrough", "slices": [{"sources": list(sources), **more}]}


def weight(value: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": value}}]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        # Fields.
        (
            {**LINEAR, "merge_methods": 1},
            "merge_methods: a configuration has no field 'merge_methods'; it has merge",
        ),
        (
            {**LINEAR, "merge_method": "arcee_fusion"},
            "merge_method should be one of linear, .*not 'arcee_fusion'",
        ),
        ({**LINEAR, "merge_method": 3}, "merge_method should be one of"),
        ({**LINEAR, "recipe": "fold"}, "fold has no setting 'merge_method'"),
        ({**LINEAR, "slices": [{}]}, "either models or slices, not both"),
        ({"merge_method": "linear"}, "either models or slices, not neither"),
        ({"merge_method": "linear", "models": []}, r"models should be a list of models, not \[\]"),
        (
            {"merge_method": "linear", "models": ["a"]},
            r"models\[0\] should be a model with the fields model, param",
        ),
        ({"merge_method": "linear", "models": [{}]}, r"models\[0\]\.model should be a model: a directory"),
        (
            {"merge_method": "linear", "models": [{"model": {"path": "a"}}]},
            r"models\[0\]\.model should be a model.*not \{'path': 'a'\}",
        ),
        (
            {"merge_method": "linear", "models": [{"model": "a", 1: None}]},
            r"models\[0\]\.1: a model has no field 1",
        ),
        (
            {"merge_method": "linear", "models": [{"model": "a", "layer_range": [0, 1]}]},
            r"models\[0\]\.layer_range: a model has no field 'layer_range'",
        ),
        ({**LINEAR, "modules": {}}, "modules is not supported: merge the parts"),
        ({**LINEAR, "tokenizer": {"source": "base"}}, "tokenizer is not supported: tokenizers are copied"),
        ({**LINEAR, "chat_template": "chatml"}, "chat_template is not supported: take it out"),
        ({**LINEAR, "tokenizer_source": "union"}, "tokenizer_source: union makes a new vocabulary"),
        ({**LINEAR, "tokenizer_source": 1}, "tokenizer_source should be a model"),
        ({**LINEAR, "dtype": "int8"}, "dtype should be bfloat16, float16, float32, not 'int8'"),
        ({**LINEAR, "dtype": "float64"}, "dtype should be"),
        ({**LINEAR, "out_dtype": 16}, "out_dtype should be bfloat16, float16, float32, not 16"),
        ({**LINEAR, "base_model": ["a"]}, "base_model should be a model"),
        ({**LINEAR, "base_model": "a+b+c"}, r"base_model: a\+b\+c does not exist, and is not model\+adapter"),
        ({**LINEAR, "base_model": "a+"}, r"not model\+adapter"),
        ({**LINEAR, "max_shard_size": "big"}, "max_shard_size: .*should be like 5GB"),
        ({**LINEAR, "max_shard_size": True}, "max_shard_size should be a size"),
        ({**LINEAR, "allow_nonfinite": 1}, "allow_nonfinite should be true or false, not 1"),
        # Slices.
        ({"merge_method": "linear", "slices": {}}, "slices should be a list of slices"),
        ({"merge_method": "linear", "slices": [3]}, r"slices\[0\] should be a slice with the fields sources"),
        ({"merge_method": "linear", "slices": [{}]}, r"slices\[0\]\.sources should be a list of models"),
        (slices({"model": "a"}), r"slices\[0\]\.sources\[0\]\.layer_range should be the first layer and"),
        (slices({"model": "a", "layer_range": [3, 3]}), r"layer_range should be .*not \[3, 3\]"),
        (slices({"model": "a", "layer_range": [0, 1, 2]}), "layer_range should be"),
        (slices({"model": "a", "layer_range": [0, 1.5]}), "layer_range should be"),
        (slices({"model": "a", "layer_range": [-1, 1]}), "layer_range should be"),
        (slices({"model": "a", "layer_range": "04"}), "layer_range should be"),
        (
            slices({"model": "a", "layer_range": [0, 1]}, residual_weight=0.5),
            r"slices\[0\]\.residual_weight is not supported",
        ),
        (
            slices({"model": "a", "layer_range": [0, 1], "weight": 1}),
            r"slices\[0\]\.sources\[0\]\.weight: a source has no field 'weight'; it has model, layer_range, param",
        ),
        # Parameters.
        ({**LINEAR, "parameters": [1]}, r"parameters should hold names with values, not \[1\]"),
        (
            {**LINEAR, "parameters": {"density": 0.5}},
            "parameters.density: linear has no parameter 'density'; it has weight, normalize",
        ),
        ({**LINEAR, "parameters": {1: 2}}, "linear has no parameter 1"),
        ({**LINEAR, "parameters": {"int8_mask": "x"}}, "int8_mask should be true or false"),
        (
            {"merge_method": "linear", "models": [{"model": "a", "parameters": {"normalize": False}}]},
            r"models\[0\]\.parameters\.normalize: normalize of linear is the same for all models",
        ),
        (weight("much"), r"models\[0\]\.parameters\.weight should be a finite number, not 'much'"),
        (weight(True), r"weight should be a finite number, not True"),
        (weight("nan"), r"weight should be a finite number, not 'nan'"),
        (weight("1e999"), r"weight should be a finite number"),
        (weight([]), "weight is an empty list"),
        (weight([0, "x"]), r"weight\[1\] should be a finite number, not 'x'"),
        (weight([0, {"value": 1}]), r"weight\[1\] should be a finite number"),
        (weight({"filter": "mlp"}), "weight has no value"),
        (weight([{"filter": "", "value": 1}]), r"weight\[0\]\.filter should be a part of tensors' names"),
        (
            weight([{"filter": 3, "value": 1}]),
            r"weight\[0\]\.filter should be a part of tensors' names, not 3",
        ),
        (weight([{"values": 3}]), r"weight\[0\]\.values: an entry has the fields filter and value only"),
        (
            weight([{"value": 3}, {"filter": "x", "value": 1}]),
            r"weight\[1\] is never reached, since .*weight\[0\] has no",
        ),
        ({**LINEAR, "parameters": {"normalize": "no"}}, "normalize should be true or false, not 'no'"),
        ({**LINEAR, "parameters": {"normalize": [1, 0]}}, "cannot be a gradient"),
        (
            {
                "merge_method": "ties",
                "base_model": "a",
                "models": [{"model": "b", "parameters": {"density": -1}}],
            },
            r"models\[0\]\.parameters\.density should be a finite number of at least 0, not -1",
        ),
        (
            {
                "merge_method": "della",
                "base_model": "a",
                "models": LINEAR["models"],
                "parameters": {"epsilon": 2},
            },
            "parameters.epsilon should be a finite number from 0 to 1, not 2",
        ),
        (
            {
                "merge_method": "ties",
                "base_model": "a",
                "models": LINEAR["models"],
                "parameters": {"rescale": "max"},
            },
            "rescale should be one of none, l1, true, false, not 'max'",
        ),
        (
            {"merge_method": "karcher", "models": [{"model": "a"}], "parameters": {"max_iter": 2.5}},
            "max_iter should be a whole number from 1 to 1000, not 2.5",
        ),
    ],
)
def test_documents(tmp_path: Path, document: dict[str, Any], message: str) -> None:
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(document))
    result = run("run", file, "-o", tmp_path / "out")
    assert result.exit_code == 3
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {file}: ") or line.startswith(f"error: {file} should"), line
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("models")
    made = {
        "a": write_llama(path / "a", seed=1),
        "b": write_llama(path / "b", seed=2),
        "deep": write_llama(path / "deep", seed=3, layers=7),
        "wide": write_llama(path / "wide", seed=4, vocabulary=24),
        "tied": write_llama(path / "tied", seed=5, tied=True),
        "less": write_llama(path / "less", seed=6, without=("model.layers.2.mlp.up_proj.weight",)),
        "heads": write_llama(
            path / "heads", seed=7, edit_config=lambda config: config.update(num_attention_heads=3)
        ),
        "int": write_llama(
            path / "int",
            seed=8,
            without=("model.norm.weight",),
            more={"model.norm.weight": torch.ones(HIDDEN, dtype=torch.int64)},
        ),
    }
    return made


def listed(models: dict[str, Path], *names: str, **document: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": models[name], "parameters": {"weight": 1}} for name in names],
        **document,
    }


def cut(models: dict[str, Path], *sources: tuple[str, int, int], **document: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "slices": [{"sources": [{"model": models[name], "layer_range": [a, b]} for name, a, b in sources]}],
        "parameters": {"weight": 1},
        **document,
    }


def assert_refused(
    tmp_path: Path, document: dict[str, Any], message: str, error: type[SafemergeError]
) -> None:
    with pytest.raises(error, match=message) as caught:
        merged(tmp_path, **document)
    assert "\n" not in str(caught.value)
    # Nor the hidden directory of a job.
    assert not list(tmp_path.glob("merged-*")) + list(tmp_path.glob(".merged-*"))


def test_models_that_do_not_fit(models: dict[str, Path], tmp_path: Path) -> None:
    for document, message in [
        (
            listed(models, "a", "wide"),
            r"model.embed_tokens.weight has shape \(22, 12\) in a but \(24, 12\) in wide; give all models one voc",
        ),
        (listed(models, "a", "deep"), "deep has 7 layers but a has 5; say by slices which layers"),
        (listed(models, "deep", "a"), "a has 5 layers but deep has 7"),
        (
            listed(models, "a", "less"),
            r"model.layers.2.mlp.up_proj.weight of a has no counterpart in less \(.*models\[1\]; expected as model",
        ),
        (
            cut(models, ("a", 0, 1), ("less", 2, 3)),
            r"model.layers.0.mlp.up_proj.weight of a has no counterpart in less",
        ),
        (
            listed(models, "tied", "a"),
            "lm_head.weight of a is a head of its own, but tied, which the output is shaped like, ties its head",
        ),
        (listed(models, "a", "int"), "model.norm.weight is F32 in a but I64 in int"),
        (listed(models, "a", "a"), r"models\[1\] is the same model as .*models\[0\]"),
        (
            {**listed(models, "a"), "base_model": models["b"]},
            "base_model is merged like the models, since linear has no base, so list it there: linear needs the",
        ),
    ]:
        error = PlanError if message.startswith((r"models\[1", "base_model")) else PairingError
        assert_refused(tmp_path, document, message, error)


def test_tensors_that_only_later_models_have_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    found, report = merged(tmp_path, **listed(models, "less", "a"))
    assert "model.layers.2.mlp.up_proj.weight" not in found
    assert report.unused["a"] == ("model.layers.2.mlp.up_proj.weight",)
    assert any("1 tensors of a have no counterpart in less" in note for note in report.notes)


def test_slices_that_do_not_fit(models: dict[str, Path], tmp_path: Path) -> None:
    for document, message in [
        (cut(models, ("a", 3, 7)), r"layer_range ends at 7, but a has 5 layers; give an end of at most 5"),
        (
            cut(models, ("a", 0, 2), ("b", 0, 3)),
            r"sources\[1\].layer_range has 3 layers, but .*has 2; all sources",
        ),
        (cut(models, ("a", 0, 1), ("a", 1, 2)), r"sources\[1\] is the same model as"),
        (cut(models, ("a", 0, 1), ("heads", 1, 2)), "num_attention_heads is 3 in heads but 6 in a"),
        (
            cut(models, ("a", 0, 1), ("b", 1, 2), merge_method="task_arithmetic", base_model=models["deep"]),
            r"slices\[0\] has no source for its base deep, so that its layers are not known",
        ),
        (
            {
                "merge_method": "passthrough",
                "slices": [{"base_model": models["a"], **cut(models, ("a", 0, 1))["slices"][0]}],
            },
            r"slices\[0\].base_model: passthrough has no base; take it out",
        ),
    ]:
        assert_refused(tmp_path, document, message, PlanError)


def test_methods_and_their_models(models: dict[str, Path], tmp_path: Path) -> None:
    a, b, less = ({"model": models[name]} for name in ("a", "b", "less"))
    for document, message in [
        (
            {"merge_method": "slerp", "models": [a, b], "parameters": {"t": 1}},
            "slerp needs a base; add base_model",
        ),
        (
            {
                "merge_method": "slerp",
                "base_model": models["a"],
                "models": [a, b, less],
                "parameters": {"t": 1},
            },
            "slerp merges exactly 1 model.s. besides the base, but there are 2",
        ),
        (
            {"merge_method": "model_stock", "base_model": models["a"], "models": [a, b]},
            "model_stock merges at least 2 model.s. besides the base, but there are 1",
        ),
        (
            {"merge_method": "passthrough", "models": [a, b]},
            "passthrough merges exactly 1 model.s., but there are 2",
        ),
        (
            {"merge_method": "slerp", "base_model": models["a"], "models": [b]},
            "parameters: slerp needs the parameter t",
        ),
        (
            {
                "merge_method": "slerp",
                "base_model": models["a"],
                "models": [b],
                "parameters": {"t": [{"filter": "mlp", "value": 1}]},
            },
            "no filter of t matches model.embed_tokens.weight, and slerp has no default for it; add an entry without",
        ),
        (
            {"merge_method": "linear", "models": [a]},
            r"models\[0\].parameters: linear needs the parameter weight",
        ),
        (
            {
                "merge_method": "ties",
                "base_model": models["a"],
                "models": [{**a, "parameters": {"weight": 1}}, b],
            },
            r"models\[0\].parameters: a is the base, and ties has no parameters for that",
        ),
        (
            {
                "merge_method": "della",
                "base_model": models["a"],
                "models": [b],
                "parameters": {"weight": 1, "density": 0.9},
            },
            "`density` ± `epsilon` should lie between 0 and 1",
        ),
    ]:
        assert_refused(tmp_path, document, message, PlanError)


def test_models_that_are_not_there(tmp_path: Path, models: dict[str, Path]) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for name, message in [
        (str(tmp_path / "nowhere"), r"models\[0\].model: model: .*nowhere does not exist"),
        (f"{models['a']}+{tmp_path / 'nowhere'}", r"models\[0\].model: adapter: .*nowhere does not exist"),
        (str(adapter), r"models\[0\].model: .*is a PEFT adapter; write the model .*model\+adapter"),
        (f"{models['a']}+{models['b']}", r"models\[0\].model: b: .*adapter_config.json"),
    ]:
        assert_refused(tmp_path, {**LINEAR, "models": [{"model": name}]}, message, SafemergeError)


def test_null_fields_are_as_if_left_out(tmp_path: Path) -> None:
    document = {**LINEAR, "slices": None, "base_model": None, "dtype": None, "tokenizer_source": None}
    settings = read(tmp_path / "config.yml", **document)
    found = read_document("config.yml", settings.config)
    assert (found.base_model, found.dtype, found.tokenizer_source) == (None, "auto", None)
    assert plain(settings.config) == document
