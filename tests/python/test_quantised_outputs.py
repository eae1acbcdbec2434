"""Outputs with quantised tensors: tiles, damage, tensors that ride along, and numbers that no format can say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dense import load
from invoke import assert_one_sentence, merge_words, run
from quantised_formats import FORMS
from quantised_models import Quartet, llama_quartet, same_bytes
from torch import Tensor

import safemerge_fast
from safemerge_fast import _engine
from safemerge_fast.report.report import Report

LLAMAS = [name for name in FORMS if name != "gpt-oss"]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def merged(quartet: Quartet, output: Path, **settings: object) -> Report:
    wanted = {"device": "cpu", "threshold": 0.5, "alpha": 0.8} | settings
    return safemerge_fast.merge(**quartet.words(), output=str(output), **wanted)


@pytest.mark.parametrize("name", LLAMAS)
def test_tiles_that_cut_bands_change_no_bit_and_no_share(tmp_path: Path, name: str) -> None:
    report = merged(llama_quartet(tmp_path, FORMS[name]), tmp_path / "out")
    plan = _engine.Plan((tmp_path / "out" / "safemerge_plan.json").read_bytes())
    expected = {tensor.name: tensor.survival for tensor in report.tensors if tensor.survival is not None}
    along = {tensor.name: tensor.retained for tensor in report.tensors if tensor.retained is not None}
    assert expected
    assert along.keys() == expected.keys()
    for tile_bytes, threads in ((4096, 1), (12288, 3)):
        job = _engine.JobDirectory(tmp_path / f"tiles-{threads}", identity="tiles")
        facts = plan.execute(job, tile_bytes=tile_bytes, threads=threads)
        survival = {key: share for fact in facts for key, share in fact.survival.items()}
        assert survival == pytest.approx(expected, rel=1e-9, abs=1e-12)
        retained = {key: share for fact in facts for key, share in fact.retained.items()}
        assert retained == pytest.approx(along, rel=1e-9, abs=1e-12)
        for file in plan.shards:
            assert (Path(job.files) / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
        job.close()


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape"])
def test_damage_to_any_part_is_found(tmp_path: Path, part: str) -> None:
    report = merged(llama_quartet(tmp_path, FORMS["int4"]), tmp_path / "out", threshold=1.0)
    assert any(tensor.merged for tensor in report.tensors)
    name = Q_PROJ.replace("weight", part)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    file = tmp_path / "out" / index["weight_map"][name]
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start, _ = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + start] ^= 1
    file.write_bytes(data)
    result = run("verify", tmp_path / "out")
    assert result.exit_code != 0
    assert name in result.stderr + result.stdout


@pytest.mark.parametrize("encode", ["keep", "bfloat16", "all"])
def test_scales_of_activations_go_where_their_weight_goes(tmp_path: Path, encode: str) -> None:
    form = FORMS["tensor fp8"]

    def ride(role: str, tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name.replace("weight", "input_scale")] = torch.tensor(float(len(role)))

    quartet = llama_quartet(tmp_path, form, edit=ride)
    report = merged(quartet, tmp_path / "out", encode=encode)
    found, finetuned = load(tmp_path / "out"), quartet.roles["finetuned"]
    for tensor in report.tensors:
        if tensor.name in finetuned.forms:
            rider = tensor.name.replace("weight", "input_scale")
            assert (rider in found) == (tensor.encoding is not None)
            assert rider not in found or float(found[rider]) == len("finetuned")


NAN = {"block fp8": ("", 0x7F), "mxfp4": ("_scale", 0xFF), "nvfp4": ("_scale", 0x7F)}


@pytest.mark.parametrize("name", NAN)
def test_nan_is_not_quantised_again_even_where_it_is_allowed(tmp_path: Path, name: str) -> None:
    """In a format without NaN it would become a number; in the others, all that share its scale would become NaN."""
    ending, code = NAN[name]

    def spoil(role: str, tensors: dict[str, Tensor]) -> None:
        if role == "finetuned":
            tensors[Q_PROJ + ending].view(torch.uint8)[0, 0] = code

    quartet = llama_quartet(tmp_path, FORMS[name], edit=spoil)
    words = merge_words(quartet.paths, tmp_path / "out", "--device", "cpu", "--tau", "1", "--allow-nonfinite")
    result = run(*words)
    assert result.exit_code == 3
    assert_one_sentence(result, "q_proj.weight", "NaN", "--encode bfloat16")
    merged(quartet, tmp_path / "out", threshold=1.0, allow_nonfinite=True, encode="bfloat16", overwrite=True)
    merged(quartet, tmp_path / "kept", threshold=0.0, on_undefined="keep", allow_nonfinite=True)
    found = load(tmp_path / "kept")
    assert all(same_bytes(found[key], value) for key, value in quartet.roles["finetuned"].stored.items())


@pytest.mark.parametrize("name", ["mxfp4", "int4", "nvfp4"])
def test_what_is_too_small_for_four_bits_changes_nothing(tmp_path: Path, name: str) -> None:
    """Scales that clip or coarsen the numbers of their own format would do far more than was asked for."""
    quartet = llama_quartet(tmp_path, FORMS[name])
    report = merged(quartet, tmp_path / "out", threshold=1.0, alpha=0.999)
    for tensor in report.tensors:
        if tensor.merged:
            assert tensor.survival is not None
            assert tensor.survival < 0.05
    (warning,) = [warning.message for warning in report.warnings if "quantised again" in warning.message]
    assert "of 14 tensors that were quantised again less than half of the change is stored" in warning
    assert "--encode bfloat16" in warning
    found = load(tmp_path / "out")
    form = FORMS[name]
    for key in quartet.roles["finetuned"].forms:
        before = quartet.roles["finetuned"].exact()[key]
        after = form.decode(key, found)
        assert ((before - after) ** 2).sum() <= 1e-4 * (before**2).sum()


@pytest.mark.parametrize("encode", ["keep", "bfloat16", "all"])
def test_what_modelopt_says_beside_the_weights_stays_while_it_is_true(tmp_path: Path, encode: str) -> None:
    quartet = llama_quartet(tmp_path, FORMS["nvfp4 modelopt"])
    told = quartet.paths["finetuned"] / "hf_quant_config.json"
    told.write_text('{"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}')
    merged(quartet, tmp_path / "out", encode=encode)
    copied = tmp_path / "out" / told.name
    assert copied.exists() == (encode == "keep")
    assert encode != "keep" or copied.read_bytes() == told.read_bytes()
