"""`safemerge-fast run`: recipes in YAML files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from invoke import run
from lora import load_checkpoint, write_lora

import safemerge_fast
import safemerge_fast._engine
from safemerge_fast import FoldConfiguration, MergeConfiguration, PlanError, fold, merge
from safemerge_fast.recipes.run import read_recipe


def write(path: Path, **document: Any) -> Path:
    # JSON is YAML.
    path.write_text(json.dumps(document))
    return path


def test_fold(quartet: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (72, 72)}, rank=4, seed=0)
    recipe = tmp_path / "fold.yml"
    recipe.write_text(f"recipe: fold\nmodel: {quartet['aligned']}  # a comment\nadapter: {adapter}\n")
    result = run("run", recipe, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("fold: 1 of ")
    fold(quartet["aligned"], adapter, output=tmp_path / "same")
    for file in (tmp_path / "same").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    again = run("run", recipe, "-o", tmp_path / "out")
    assert again.exit_code == 5
    report = json.loads(run("run", recipe, "-o", tmp_path / "out", "--overwrite", "--json").stdout)
    assert (report["recipe"], report["configuration"]["overwrite"]) == ("fold", True)
    assert run("run", recipe, "-o", tmp_path / "out", "--overwrite", "-q").output == ""
    assert run("run", recipe, "-o", tmp_path / "out", "--resume", "--overwrite").exit_code == 2


def test_safemerge(quartet: dict[str, Path], tmp_path: Path) -> None:
    roles = {role: str(path) for role, path in quartet.items()}
    recipe = write(
        tmp_path / "merge.yml", recipe="safemerge", **roles, threshold=0.8, alpha=1, max_shard_size="200KB"
    )
    result = run("run", recipe, "-o", tmp_path / "out", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    report = merge(**roles, output=tmp_path / "same", threshold=0.8, alpha=1.0, max_shard_size="200KB")
    assert 0 < report.merged < len(report.tensors)
    found, expected = load_checkpoint(tmp_path / "out"), load_checkpoint(tmp_path / "same")
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)


def test_fields_become_the_configuration(tmp_path: Path) -> None:
    recipe = write(
        tmp_path / "r.yml", recipe="safemerge", base="b", aligned="a", finetuned="f", scores=None, threads=3
    )
    assert read_recipe(recipe, {"output": "o", "threads": None, "resume": True}) == MergeConfiguration(
        base="b", aligned="a", finetuned="f", output="o", threads=3, resume=True
    )
    assert read_recipe(recipe, {"output": "o", "threads": 2}).threads == 2
    recipe = write(tmp_path / "r.yml", recipe="fold", model="m", adapter="a", max_shard_size="1MB")
    assert read_recipe(recipe, {"output": "o"}) == FoldConfiguration(
        model="m", adapter="a", output="o", max_shard_size=1_000_000
    )


MERGE = {"recipe": "safemerge", "base": "b", "aligned": "a", "finetuned": "f"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "should say `recipe: safemerge or fold or resta or wise-ft`"),
        ({"recipe": "soup"}, "should say `recipe: safemerge or fold or resta or wise-ft`, not 'soup'"),
        ({"recipe": ["fold"]}, "should say"),
        ({"recipe": "fold", "model": "m"}, "r.yml: fold needs the setting adapter"),
        ({"recipe": "fold", "alpha": 1}, "fold has no setting 'alpha'; it has model, adapter, dtype"),
        ({**MERGE, "tau": 0.3}, "safemerge has no setting 'tau'"),
        ({**MERGE, "max-shard-size": 1}, "no setting 'max-shard-size'"),
        ({**MERGE, "output": "o"}, "sets output, which is given on the command line"),
        ({**MERGE, "overwrite": True}, "sets overwrite"),
        ({**MERGE, "alpha": "0.8,v_proj"}, "it should be a number from 0 to 1, also by module type as in"),
        ({**MERGE, "alpha": True}, "also by module type as in 0.8,v_proj=0.5, not True"),
        ({**MERGE, "alpha": 1.5}, "also by module type as in 0.8,v_proj=0.5, not 1.5"),
        ({**MERGE, "threads": 1.0}, "threads should be a whole number from 1 to 4096, not 1.0"),
        ({**MERGE, "safe": 3}, "safe should be a model, not 3"),
        ({**MERGE, "allow_nonfinite": "yes"}, "allow_nonfinite should be true or false"),
        ({**MERGE, "max_shard_size": [1]}, r"max_shard_size should be a size like 5GB, not \[1\]"),
        ({**MERGE, "select": "highest"}, "select"),
        ({**MERGE, "base": None}, "base should be a model, not None"),
    ],
)
def test_what_is_wrong_is_said_by_name(tmp_path: Path, document: dict[str, Any], message: str) -> None:
    result = run("run", write(tmp_path / "r.yml", **document), "-o", tmp_path / "out")
    assert result.exit_code == 3
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: fold\nalpha: .nan\n", "no setting 'alpha'"),
        (
            "recipe: safemerge\nbase: b\naligned: a\nfinetuned: f\nalpha: .nan\n",
            "alpha should be a finite number",
        ),
        ("- fold\n", "should hold fields with values"),
        ("recipe: fold\nmodel: m\nmodel: n\nadapter: a\n", "the field model stands there twice"),
        ("recipe: [fold\n", "is not YAML"),
        ("recipe: !!python/object/apply:os.system [id]\n", "is not YAML"),
        ("1: 2\n", "should hold fields with values"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "r.yml"
    file.write_text(text)
    with pytest.raises(PlanError, match=message):
        read_recipe(file, {"output": "o"})


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.yml cannot be read: there is no such file"):
        read_recipe(tmp_path / "nowhere.yml", {"output": "o"})


def test_inspect_of_an_adapter(tmp_path: Path) -> None:
    import torch

    adapter = write_lora(
        tmp_path / "adapter",
        {"a.q_proj": (6, 8), "b.q_proj": (6, 8)},
        rank=4,
        seed=0,
        more={"a.q_proj.lora_magnitude_vector": torch.ones(6), "norm.weight": torch.ones(8)},
        use_rslora=True,
        base_model_name_or_path="org/model",
    )
    document = json.loads(run("inspect", adapter, "--json").stdout)
    assert document["parameters"] == 2 * 4 * (6 + 8) + 6 + 8
    assert (document["bytes"], document["dtypes"]) == (4 * document["parameters"], {"F32": 6})
    by_name = {module["name"]: module for module in document["modules"]}
    # alpha = 8 over the root of 4.
    assert (by_name["b.q_proj"]["rank"], by_name["b.q_proj"]["scale"]) == (4, 4.0)
    assert by_name["norm"]["replaced"] == {"weight": "base_model.model.norm.weight"}
    text = run("inspect", adapter).stdout
    assert "LoRA adapter of org/model, 126 parameters" in text
    assert "low rank, norms (DoRA)" in text
    assert "weight replaced" in text


def test_from_python_as_on_the_command_line(quartet: dict[str, Path], tmp_path: Path) -> None:
    documents: dict[str, dict[str, Any]] = {
        "safemerge": {"recipe": "safemerge", **{role: str(path) for role, path in quartet.items()}},
        "mergekit": {
            "merge_method": "ties",
            "base_model": str(quartet["aligned"]),
            "models": [{"model": str(quartet["finetuned"]), "parameters": {"weight": 1.0, "density": 0.5}}],
        },
    }
    for name, document in documents.items():
        recipe = write(tmp_path / f"{name}.yml", **document)
        report = safemerge_fast.run(
            recipe, output=tmp_path / name, memory_budget="200MB", read_backend="pread"
        )
        assert report.recipe == name
        assert run("run", recipe, "-o", tmp_path / "same", "--overwrite").exit_code == 0
        found, expected = load_checkpoint(tmp_path / name), load_checkpoint(tmp_path / "same")
        assert found.keys() == expected.keys()
        assert all((found[tensor] == expected[tensor]).all() for tensor in expected)


def test_help_lists_every_method() -> None:
    text = run("run", "--help").stdout
    for method in safemerge_fast._engine.methods():
        assert re.search(rf"^ +{method.name} +\S", text, re.MULTILINE), method.name
