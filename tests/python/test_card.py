"""The model card: front matter as the Hub reads it, the command that makes the same weights again."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from safemerge_fast import merge
from safemerge_fast.checkpoint.model import open_model
from safemerge_fast.recipes.run import read_report
from safemerge_fast.report.public_names import hub_name


@pytest.fixture(scope="module")
def output(quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("card") / "repaired model"
    merge(**quartet, output=directory, threshold=0.4, exclude="gate_proj")
    return directory


def test_front_matter_is_what_the_hub_wants(output: Path) -> None:
    data = ModelCard.load(output / "README.md").data.to_dict()
    assert data["base_model_relation"] == "merge"
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["merge", "safemerge"]
    # Local directories have no name on the Hub, and a card must not claim one.
    assert not data.get("base_model")


def test_models_from_the_hub_s_cache_are_named_as_on_the_hub(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    quartet = make_quartet(tmp_path / "made", shards=1)
    for role in ("finetuned", "safe"):
        snapshot = tmp_path / f"hub/models--some-org--{role}.v1/snapshots/0123abcd"
        shutil.copytree(quartet[role], snapshot)
        quartet[role] = snapshot
    merge(**quartet, output=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(text).data.base_model == ["some-org/finetuned.v1", "some-org/safe.v1"]
    assert "https://huggingface.co/some-org/finetuned.v1" in text


def test_a_directory_that_looks_like_a_hub_name_has_none(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_quartet(tmp_path / "org", shards=1, roles=("base",))
    monkeypatch.chdir(tmp_path)
    assert hub_name(open_model("base", "org/base")) is None


def test_the_table_counts_as_the_report_does(output: Path) -> None:
    report = read_report(output)
    text = (output / "README.md").read_text()
    found = {
        match[1]: tuple(map(int, match.groups()[1:]))
        for match in re.finditer(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    }
    assert found == {c.module_type: (c.analysed, c.merged, c.kept) for c in report.counts}
    assert found["gate_proj"] == (0, 0, 3)
    assert "τ = 0.4 " in text
    assert "0.8 · W_finetuned + 0.2 · W_safe" in text


def test_the_command_makes_the_same_weights_again(
    output: Path, quartet: dict[str, Path], tmp_path: Path
) -> None:
    text = (output / "README.md").read_text()
    (command,) = re.findall(r"```sh\n(.*?)\n```", text, re.DOTALL)
    assert "--threshold 0.4" in command
    before = {path.name: path.read_bytes() for path in output.glob("*.safetensors*")}
    program = f"{sys.executable} -c 'from safemerge_fast.cli import main; main()' "
    again = command.replace("safemerge-fast ", program, 1) + " --overwrite -q"
    # A card holds last parts of paths, so that it works where the models lie.
    where = tmp_path / "models"
    where.mkdir()
    for model in (*quartet.values(), output):
        (where / model.name).symlink_to(model)
    subprocess.run(again, shell=True, check=True, cwd=where)
    assert {path.name: path.read_bytes() for path in output.glob("*.safetensors*")} == before


def test_no_path_of_this_machine_is_published(output: Path, quartet: dict[str, Path]) -> None:
    text = (output / "README.md").read_text()
    for path in (quartet["base"].parent, output.parent, Path.home()):
        assert f"{path}/" not in text
    assert "--base base --aligned aligned" in text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"select": "lowest:3"}, "The 3 of lowest ρ are merged"),
        ({"select": "fraction:0.5"}, "The share 0.5 of lowest ρ is merged"),
        ({"granularity": "layer"}, "A layer, by the mean ρ of its matrices, with ρ strictly below τ = 0.35"),
        ({"alpha": 0.75}, "0.75 · W_finetuned + 0.25 · W_safe"),
        ({"delta_reference": "base"}, "W_finetuned − W_base"),
    ],
)
def test_says_which_rule_was_used(
    quartet: dict[str, Path], tmp_path: Path, settings: dict, sentence: str
) -> None:
    merge(**quartet, output=tmp_path / "out", **settings)
    assert sentence in (tmp_path / "out" / "README.md").read_text()
