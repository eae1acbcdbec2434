"""Outputs that would lack tensors of the aligned model: refused, made anyway, or filled; and heads that are untied."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import write_quartet
from dense import assert_same_bits
from invoke import assert_one_sentence, merge_words, run
from lora import load_checkpoint, write_lora
from torch import Tensor

from safemerge_fast import PairingError, SettingError, fold, merge, resta, verify, wise_ft

MTP = "model.layers.2."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A quartet of two layers and one that predicts further tokens, which finetuned and safe have lost."""

    def edit(role: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        lost = role in ("finetuned", "safe")
        return {name: tensor for name, tensor in tensors.items() if not (lost and name.startswith(MTP))}

    def edit_config(role: str, config: dict[str, Any]) -> None:
        config["num_hidden_layers"] = 2
        if role in ("base", "aligned"):
            config["num_nextn_predict_layers"] = 1

    return write_quartet(
        tmp_path_factory.mktemp("models"), dtype="float32", shards=2, edit=edit, edit_config=edit_config
    )


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


def test_an_output_that_would_lack_tensors_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    result = run(*merge_words(models, tmp_path / "out"))
    assert result.exit_code == 3
    assert_one_sentence(
        result,
        "finetuned lacks 9 tensors that aligned has, and so would the output: ",
        f"{MTP}self_attn.q_proj.weight",
        " and 6 more; ",
        "--fill-from aligned",
        "--allow-missing",
    )
    assert not (tmp_path / "out").exists()
    roles = {role: models[role] for role in ("base", "aligned", "finetuned")}
    with pytest.raises(PairingError, match="finetuned lacks 9 tensors"):
        resta(**roles, output=tmp_path / "out")
    with pytest.raises(PairingError, match="finetuned lacks 9 tensors"):
        wise_ft(models["aligned"], models["finetuned"], output=tmp_path / "out")


def cli(models: Mapping[str, Path], output: Path, flags: list[str], options: dict[str, Any]) -> None:
    result = run(*merge_words(dict(models), output, *flags))
    assert result.exit_code == 0, result.stderr


def yaml(models: Mapping[str, Path], output: Path, flags: list[str], options: dict[str, Any]) -> None:
    file = output.parent / f"{output.name}.yml"
    fields = {"recipe": "safemerge", **{role: str(path) for role, path in models.items()}, **options}
    file.write_text(json.dumps(fields))
    result = run("run", file, "-o", output)
    assert result.exit_code == 0, result.stderr


def api(models: Mapping[str, Path], output: Path, flags: list[str], options: dict[str, Any]) -> None:
    merge(**models, output=output, **options)


WAYS = pytest.mark.parametrize("way", [cli, yaml, api])
Way = Callable[[Mapping[str, Path], Path, list[str], dict[str, Any]], None]


@WAYS
def test_allow_missing_leaves_them_out(models: dict[str, Path], tmp_path: Path, way: Way) -> None:
    output = tmp_path / "out"
    way(models, output, ["--allow-missing"], {"allow_missing": True})
    assert load_checkpoint(output).keys() == load_checkpoint(models["finetuned"]).keys()
    assert (output / "config.json").read_bytes() == (models["finetuned"] / "config.json").read_bytes()
    verify(output)


@WAYS
@pytest.mark.parametrize("size", [None, 60_000])
def test_fill_from_aligned_copies_them(
    models: dict[str, Path], tmp_path: Path, way: Way, size: int | None
) -> None:
    output = tmp_path / "out"
    flags = ["--fill-from", "aligned", *([] if size is None else ["--max-shard-size", str(size)])]
    way(models, output, flags, {"fill_from": "aligned", "max_shard_size": size})
    found, aligned = load_checkpoint(output), load_checkpoint(models["aligned"])
    assert found.keys() == aligned.keys()
    filled = {name for name in aligned if name.startswith(MTP)}
    assert_same_bits({name: found[name] for name in filled}, {name: aligned[name] for name in filled})
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == aligned.keys()
    parts = {file.name for file in output.glob("*.safetensors")}
    assert parts == set(index["weight_map"].values())
    own = {name: load_checkpoint(models["finetuned"])[name] for name in (EMBEDDING,)}
    assert_same_bits({EMBEDDING: found[EMBEDDING]}, own)
    assert config_of(output) == {**config_of(models["finetuned"]), "num_nextn_predict_layers": 1}
    report = json.loads((output / "safemerge_report.json").read_text())
    reasons = {tensor["name"]: tensor["reason"] for tensor in report["tensors"]}
    assert {reasons[name] for name in filled} == {"filled from aligned: not analysed"}
    assert any("9 tensors that finetuned lacks are copied from aligned" in note for note in report["notes"])
    verify(output)


def test_a_configuration_counts_no_layers_that_are_left_out(tmp_path: Path) -> None:
    """As transformers saves a fine-tune: the tensors are lost, and the configuration still counts them."""

    def edit(role: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: each for name, each in tensors.items() if role == "aligned" or not name.startswith(MTP)}

    def edit_config(role: str, config: dict[str, Any]) -> None:
        config |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}

    models = write_quartet(tmp_path, shards=1, edit=edit, edit_config=edit_config)
    report = merge(**models, output=tmp_path / "out", allow_missing=True)
    assert config_of(tmp_path / "out") == {**config_of(models["finetuned"]), "num_nextn_predict_layers": 0}
    assert any("counts no layers for multi-token prediction" in note for note in report.notes)
    merge(**models, output=tmp_path / "filled", fill_from="aligned")
    assert config_of(tmp_path / "filled") == config_of(models["finetuned"])


def test_repairs_fill_as_well(models: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    wise_ft(models["aligned"], models["finetuned"], output=output, alpha=0.25, fill_from="aligned")
    found, aligned = load_checkpoint(output), load_checkpoint(models["aligned"])
    finetuned = load_checkpoint(models["finetuned"])
    assert found.keys() == aligned.keys()
    for name, tensor in aligned.items():
        if name not in finetuned:
            assert torch.equal(found[name], tensor)
        elif tensor.is_floating_point():
            wanted = 0.75 * finetuned[name].double() + 0.25 * tensor.double()
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["merge", "resta", "wise-ft"])
def test_both_ways_at_once_are_refused(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    roles = {role: models[role] for role in ("base", "aligned", "finetuned")}
    call = {"merge": merge, "resta": resta, "wise-ft": wise_ft}[name]
    if name == "wise-ft":
        roles.pop("base")
    with pytest.raises(SettingError, match="allow_missing leaves tensors out that fill_from would copy"):
        call(**roles, output=tmp_path / "out", allow_missing=True, fill_from="aligned")


def test_what_is_accounted_for_is_not_lacking(tmp_path: Path) -> None:
    """Buffers that models compute, and a head that the fine-tuned model ties."""

    def edit(role: str, tensors: dict[str, Tensor]) -> None:
        if role == "aligned":
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        else:
            tensors.pop("model.position_ids")

    models = write_quartet(tmp_path, layers=1, shards=1, edit=edit, stores_head=("aligned",))
    report = merge(**models, output=tmp_path / "out")
    note = f"{HEAD} of aligned is not in the output, which ties it to {EMBEDDING}"
    assert note in report.notes


@pytest.mark.parametrize(
    ("table", "head"),
    [
        ("backbone.embeddings.weight", "lm_head.weight"),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("model.decoder.embed_tokens.weight", "proj_out.weight"),
    ],
)
def test_tied_heads_of_other_families_are_accounted_for(tmp_path: Path, table: str, head: str) -> None:
    def edit(role: str, tensors: dict[str, Tensor]) -> None:
        tensors[table] = tensors.pop(EMBEDDING)
        if role == "aligned":
            tensors[head] = tensors[table]

    models = write_quartet(tmp_path, layers=1, shards=1, edit=edit)
    report = merge(**models, output=tmp_path / "out")
    assert f"{head} of aligned is not in the output, which ties it to {table}" in report.notes


def test_a_head_that_nothing_ties_is_lacking(tmp_path: Path) -> None:
    def edit(role: str, tensors: dict[str, Tensor]) -> None:
        if role == "finetuned":
            tensors.pop(HEAD)

    models = write_quartet(tmp_path, layers=1, shards=1, tied=False, edit=edit)
    with pytest.raises(PairingError, match=f"finetuned lacks 1 tensors .*: {HEAD}; "):
        merge(**models, output=tmp_path / "out")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_quartet(
        tmp_path_factory.mktemp("tied"), dtype="float32", layers=1, shards=1, i64_buffer=False
    )


@WAYS
def test_untie_writes_the_head(tied: dict[str, Path], tmp_path: Path, way: Way) -> None:
    output = tmp_path / "out"
    way(tied, output, ["--untie"], {"untie": True})
    found, finetuned = load_checkpoint(output), load_checkpoint(tied["finetuned"])
    assert found.keys() == {*finetuned, HEAD}
    assert torch.equal(found[HEAD], finetuned[EMBEDDING])
    assert config_of(output) == {**config_of(tied["finetuned"]), "tie_word_embeddings": False}
    model, said = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, finetuned[EMBEDDING])
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    verify(output)


def test_untied_heads_are_merged_with_the_heads_of_the_others(tmp_path: Path) -> None:
    """Where the aligned model has a head of its own, embedding and head come out different."""

    def edit(role: str, tensors: dict[str, Tensor]) -> None:
        if role == "aligned":
            tensors[HEAD] = tensors[EMBEDDING] * 3.0

    models = write_quartet(tmp_path, dtype="float32", layers=1, shards=1, edit=edit)
    output = tmp_path / "out"
    wise_ft(models["aligned"], models["finetuned"], output=output, alpha=0.5, untie=True)
    found = load_checkpoint(output)
    finetuned, aligned = (load_checkpoint(models[role]) for role in ("finetuned", "aligned"))
    for name, own in ((HEAD, HEAD), (EMBEDDING, EMBEDDING)):
        wanted = 0.5 * finetuned[EMBEDDING].double() + 0.5 * aligned[own].double()
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-7)


def test_a_stored_head_is_kept_and_the_configuration_says_so(tmp_path: Path) -> None:
    models = write_quartet(tmp_path, layers=1, shards=1, stores_head=("aligned", "finetuned"))
    merge(**models, output=tmp_path / "out", untie=True)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert load_checkpoint(tmp_path / "out").keys() == load_checkpoint(models["finetuned"]).keys()


def test_a_fold_that_unties_leaves_the_head_as_it_was(tied: dict[str, Path], tmp_path: Path) -> None:
    """What PEFT computes with as long as the adapter is not merged: the embedding changes, the head does not."""
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(3, 321, generator=generator), torch.randn(72, 3, generator=generator)
    factors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    adapter = write_lora(tmp_path / "adapter", {}, rank=3, seed=2, more=factors)
    fold(tied["aligned"], adapter, output=tmp_path / "out", untie=True)
    found, aligned = load_checkpoint(tmp_path / "out"), load_checkpoint(tied["aligned"])
    assert torch.equal(found[HEAD], aligned[EMBEDDING])
    # s = alpha / r = 2
    wanted = aligned[EMBEDDING].double() + 2.0 * (b.double() @ a.double()).T
    torch.testing.assert_close(found[EMBEDDING].double(), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[HEAD], found[EMBEDDING])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_the_head_of_a_safe_adapter_is_the_aligned_embedding(tied: dict[str, Path], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(3, 321, generator=generator), torch.randn(72, 3, generator=generator)
    factors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    safe = write_lora(tmp_path / "adapter", {}, rank=3, seed=2, more=factors)
    roles = {**{role: tied[role] for role in ("base", "aligned", "finetuned")}, "safe": safe}
    merge(**roles, output=tmp_path / "out", untie=True, others="merge", alpha=0.75)
    found = load_checkpoint(tmp_path / "out")
    aligned, finetuned = (
        load_checkpoint(tied[role])[EMBEDDING].double() for role in ("aligned", "finetuned")
    )
    wanted = 0.75 * finetuned + 0.25 * aligned
    torch.testing.assert_close(found[HEAD].double(), wanted, rtol=1e-6, atol=1e-7)
    wanted += 0.25 * 2.0 * (b.double() @ a.double()).T
    torch.testing.assert_close(found[EMBEDDING].double(), wanted, rtol=1e-5, atol=1e-6)


def test_an_embedding_that_is_not_known_cannot_be_untied(tmp_path: Path) -> None:
    def edit(role: str, tensors: dict[str, Tensor]) -> None:
        tensors["model.words.weight"] = tensors.pop(EMBEDDING)

    models = write_quartet(tmp_path, layers=1, shards=1, edit=edit)
    with pytest.raises(PairingError, match="finetuned has none that is known by its name"):
        merge(**models, output=tmp_path / "out", untie=True)


def test_an_adapter_takes_none_of_these(tied: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (72, 72)}, rank=3, seed=2)
    roles = {"base": tied["base"], "aligned": tied["aligned"], "finetuned": adapter}
    for flag in ("--untie", "--allow-missing"):
        result = run(*merge_words(roles, tmp_path / "out", flag))
        assert result.exit_code == 2 or result.exit_code == 3
        assert "is for checkpoints, but the output is an adapter; leave it out" in result.stderr
