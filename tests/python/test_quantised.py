"""Merges of quantised tensors, each format against an independent decoder and encoder in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from dense import load, weight_files
from invoke import assert_one_sentence, merge_words, run
from quantised_formats import FORMS
from quantised_models import Quartet, assert_requantised, bfloat16, llama_quartet, same_bytes

import safemerge_fast
from safemerge_fast.recipes.preview import preview
from safemerge_fast.recipes.run import carry_out
from safemerge_fast.recipes.safemerge.settings import SafemergeSettings
from safemerge_fast.report.report import Report

# gpt-oss stores stacked experts only.
LLAMAS = [name for name in FORMS if name != "gpt-oss"]


@pytest.fixture(scope="module")
def quartets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Quartet]:
    """One quartet of each format, made when it is asked for; read it, never change it."""
    made: dict[str, Quartet] = {}

    def of(name: str) -> Quartet:
        if name not in made:
            made[name] = llama_quartet(tmp_path_factory.mktemp("llama"), FORMS[name])
        return made[name]

    return of


def merged(quartet: Quartet, output: Path, **settings: object) -> Report:
    wanted = {"device": "cpu", "threshold": 0.35, "alpha": 0.8} | settings
    return safemerge_fast.merge(**quartet.words(), output=str(output), **wanted)


def touched(report: Report) -> set[str]:
    return {tensor.name for tensor in report.tensors if tensor.merged}


@pytest.mark.parametrize("name", LLAMAS)
def test_rho_is_that_of_the_decoded_weights(quartets: Callable[[str], Quartet], name: str) -> None:
    quartet = quartets(name)
    scores = safemerge_fast.analyze(
        **{role: path for role, path in quartet.words().items() if role != "safe"}
    )
    found = scores.modules
    assert found.keys() == quartet.roles["finetuned"].forms.keys()
    for tensor, score in found.items():
        assert score.rho == pytest.approx(quartet.cosine(tensor), abs=1e-6)


@pytest.mark.parametrize("name", LLAMAS)
def test_changed_tensors_are_quantised_again_and_others_keep_their_bytes(
    quartets: Callable[[str], Quartet], tmp_path: Path, name: str
) -> None:
    quartet, form = quartets(name), FORMS[name]
    report = merged(quartet, tmp_path / "out")
    changed = touched(report)
    finetuned = quartet.roles["finetuned"]
    assert set() < changed < finetuned.forms.keys(), "the threshold divides them"
    found, before = load(tmp_path / "out"), finetuned.stored
    assert found.keys() == before.keys()
    parts = {part for tensor in changed for part in form.names(tensor)[:2]}
    for stored, tensor in before.items():
        assert stored in parts or same_bytes(found[stored], tensor), stored
    expected = quartet.merged(changed)
    for tensor, numbers in expected.items():
        assert_requantised(form, tensor, found, numbers.double().numpy())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((finetuned.path / "config.json").read_text())
    files = {file.name for file in finetuned.path.glob("*.safetensors*")}
    assert set(weight_files(tmp_path / "out")) == files
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == found.keys()
    for stored, file in index["weight_map"].items():
        assert stored in weight_map(tmp_path / "out" / file)
    safemerge_fast.verify(output=str(tmp_path / "out"))


def weight_map(file: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return set(opened.keys())


@pytest.mark.parametrize("name", LLAMAS)
def test_the_report_says_what_survives(quartets: Callable[[str], Quartet], tmp_path: Path, name: str) -> None:
    quartet, form = quartets(name), FORMS[name]
    report = merged(quartet, tmp_path / "out")
    found, before = load(tmp_path / "out"), quartet.roles["finetuned"].exact()
    expected = quartet.merged(touched(report))
    shares = {}
    for tensor in report.tensors:
        assert tensor.encoding == (form.words if tensor.name in quartet.roles["finetuned"].forms else None)
        if tensor.name not in expected:
            assert tensor.survival is None
            assert tensor.retained is None
            continue
        now, was = form.decode(tensor.name, found), before[tensor.name]
        stored, wanted = now - was, expected[tensor.name].double().numpy() - was
        assert tensor.survival == pytest.approx(np.linalg.norm(stored) / np.linalg.norm(wanted), rel=1e-4)
        share = (stored * wanted).sum() / (wanted**2).sum()
        assert tensor.retained == pytest.approx(share, rel=1e-4, abs=1e-5)
        assert abs(tensor.retained) <= tensor.survival + 1e-9, "a part is no longer than the whole"
        shares[tensor.name] = share
    warnings = [str(warning) for warning in report.warnings if "quantised again" in str(warning)]
    assert bool(warnings) == any(share < 0.5 for share in shares.values())


def served_with(changed: set[str], among: Iterable[str]) -> set[str]:
    """Tensors that servers load into one module with one of the changed ones, these included."""
    together = ("qkv", ("gate", "up"))

    def module(name: str) -> str:
        parent, _, leaf = name.removesuffix("_proj.weight").rpartition(".")
        return next((f"{parent}.{leaves}" for leaves in together if leaf in leaves), name)

    modules = {module(name) for name in changed}
    return {name for name in among if module(name) in modules}


@pytest.mark.parametrize(
    ("only", "lost"), [("k_proj", "qkv"), ("up_proj", ("gate", "up")), ("down_proj", ("down",))]
)
def test_what_servers_load_as_one_module_is_dequantised_together(
    tmp_path: Path, only: str, lost: Iterable[str]
) -> None:
    """vLLM fuses q, k and v, and gate and up, and takes all or none of them for quantised."""
    quartet = llama_quartet(tmp_path, FORMS["block fp8"])
    others = "|".join({*"qkvo", "gate", "up", "down"} - {only.removesuffix("_proj")})
    report = merged(
        quartet, tmp_path / "out", threshold=1.0, exclude=rf"layers\.0\.|\.({others})_proj", encode="bfloat16"
    )
    (changed,) = touched(report)
    parent = changed.removesuffix(".weight").rpartition(".")[0]
    expected = {f"{parent}.{leaf}_proj" for leaf in lost}
    assert f"{parent}.{only}" in expected
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    listed = set(config["quantization_config"]["modules_to_not_convert"])
    assert listed - {"model.embed_tokens"} == expected
    found, numbers = load(tmp_path / "out"), quartet.roles["finetuned"].single()
    for name in (f"{module}.weight" for module in expected):
        assert found[name].dtype == torch.bfloat16
        assert name == changed or same_bytes(found[name], bfloat16(numbers[name]))


@pytest.mark.parametrize("encode", ["bfloat16", "all"])
@pytest.mark.parametrize("name", LLAMAS)
def test_dequantised_tensors_are_the_merge_rounded_once(
    quartets: Callable[[str], Quartet], tmp_path: Path, name: str, encode: str
) -> None:
    quartet, form = quartets(name), FORMS[name]
    report = merged(quartet, tmp_path / "out", encode=encode)
    changed, finetuned = touched(report), quartet.roles["finetuned"]
    lost = served_with(changed, finetuned.forms) if encode == "bfloat16" else set(finetuned.forms)
    numbers, found, before = finetuned.single(), load(tmp_path / "out"), finetuned.stored
    expected = {tensor: bfloat16(numbers[tensor]) for tensor in lost}
    expected |= {tensor: bfloat16(value) for tensor, value in quartet.merged(changed).items()}
    gone = {part for tensor in lost for part in form.names(tensor)}
    expected |= {stored: tensor for stored, tensor in before.items() if stored not in gone}
    assert found.keys() == expected.keys()
    for stored, tensor in expected.items():
        assert same_bytes(found[stored], tensor), stored
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if encode == "all":
        assert "quantization_config" not in config
    else:
        listed = config["quantization_config"]["modules_to_not_convert"]
        # Without a list transformers leaves out the embedding's like and the head; with one, only what it names.
        plain = {"model.embed_tokens"}
        assert set(listed) == plain | {tensor.removesuffix(".weight") for tensor in lost}
    assert all((tensor.encoding is None) == (tensor.name in lost or tensor.name not in finetuned.forms)
               for tensor in report.tensors)  # fmt: skip
    assert all(tensor.survival is None for tensor in report.tensors)
    safemerge_fast.verify(output=str(tmp_path / "out"))


def test_int4_that_does_not_change_is_the_same_again(tmp_path: Path) -> None:
    """Half of a tensor and half of the same: its numbers are computed, its scales chosen, its codes written anew."""
    quartet = llama_quartet(tmp_path, FORMS["int4"])
    words = {**quartet.words(), "safe": quartet.words()["finetuned"]}
    report = safemerge_fast.merge(
        **words, output=str(tmp_path / "out"), device="cpu", threshold=1.0, alpha=0.5, force=True
    )
    assert touched(report) == quartet.roles["finetuned"].forms.keys()
    found = load(tmp_path / "out")
    for stored, tensor in quartet.roles["finetuned"].stored.items():
        assert same_bytes(found[stored], tensor), stored
    assert all(tensor.survival is None for tensor in report.tensors)


def test_a_resumed_merge_knows_what_survived(
    quartets: Callable[[str], Quartet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted once its weights are there, it has nothing left to compute, and still says the same."""
    quartet = quartets("nvfp4")
    report = merged(quartet, tmp_path / "out")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("safemerge_fast.recipes.run._report", stop)
        with pytest.raises(KeyboardInterrupt):
            merged(quartet, tmp_path / "again")
    again = merged(quartet, tmp_path / "again", resume=True)
    assert all(shard.resumed for shard in again.shards)
    assert list(again.tensors) == list(report.tensors)
    assert any(tensor.survival is not None for tensor in again.tensors)
    finished = merged(quartet, tmp_path / "again", resume=True)
    assert list(finished.tensors) == list(report.tensors)
    replaced = merged(quartet, tmp_path / "again", overwrite=True)
    assert list(replaced.tensors) == list(report.tensors)


@pytest.mark.parametrize("encode", ["keep", "bfloat16", "all"])
def test_dry_run_counts_the_bytes_that_are_written(
    quartets: Callable[[str], Quartet], tmp_path: Path, encode: str
) -> None:
    words = quartets("block fp8").words()
    settings = SafemergeSettings(
        **words,
        output=str(tmp_path / "out"),
        encode=encode,
        device="cpu",
        threshold=0.35,
    )
    report = carry_out(settings)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert report.bytes_written == written
    scores = tmp_path / "scores.json"
    three = {role: path for role, path in words.items() if role != "safe"}
    scores.write_text(safemerge_fast.analyze(**three).to_json())
    known = preview(msgspec.structs.replace(settings, scores=str(scores), output=str(tmp_path / "other")))
    assert known.bytes_written == written


@pytest.mark.parametrize("read_backend", ["mmap", "pread"])
@pytest.mark.parametrize("name", ["block fp8", "int4", "nvfp4"])
def test_threads_shards_and_ways_of_reading_change_no_bit(
    quartets: Callable[[str], Quartet], tmp_path: Path, name: str, read_backend: str
) -> None:
    quartet = quartets(name)
    merged(quartet, tmp_path / "one", threads=1)
    merged(quartet, tmp_path / "two", threads=3, read_backend=read_backend, max_shard_size=40_000)
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(same_bytes(one[key], two[key]) for key in one)


def test_inspect_shows_the_format(quartets: Callable[[str], Quartet]) -> None:
    quartet = quartets("nvfp4")
    result = run("inspect", quartet.paths["finetuned"])
    assert result.exit_code == 0, result.stderr
    assert "14 NVFP4, 5 BF16, 1 F32, 1 I64" in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith(" down_proj"))
    assert line.split() == ["down_proj", "NVFP4", "2", "61,440", "96×320", "yes"]
    document = json.loads(run("inspect", quartet.paths["finetuned"], "--json").stdout)
    assert document["encodings"] == {"NVFP4": 14}
    assert sum(document["dtypes"].values()) == 7
    stored = quartet.roles["finetuned"].stored
    for tensor in document["tensors"]:
        form = quartet.roles["finetuned"].forms.get(tensor["name"])
        assert tensor["encoding"] == (None if form is None else form.words)
        parts = [tensor["name"]] if form is None else form.names(tensor["name"])
        assert tensor["bytes"] == sum(stored[part].nbytes for part in parts)


def test_analyze_says_which_formats_there_are(quartets: Callable[[str], Quartet], tmp_path: Path) -> None:
    paths = quartets("int4").paths
    roles = [word for role in ("base", "aligned", "finetuned") for word in (f"--{role}", paths[role])]
    result = run("analyze", *roles, "-v")
    assert result.exit_code == 0, result.stderr
    assert "quantised tensors of base, aligned, finetuned: 14 as INT4 (pack-quantized)" in result.stderr


HOSTILE: dict[str, tuple[str, Callable[[dict[str, torch.Tensor], str], None], tuple[str, ...]]] = {}


def _break(form: str, *parts: str) -> Callable[[Callable[[dict[str, torch.Tensor], str], None]], None]:
    def register(edit: Callable[[dict[str, torch.Tensor], str], None]) -> None:
        HOSTILE[edit.__name__] = (form, edit, parts)

    return register


@_break("block fp8", "[5, 1]", "q_proj.weight")
def other_grid(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name + "_scale_inv"] = torch.ones(5, 1)


@_break("block fp8", "q_proj.weight_scale_inv", "is expected")
def no_scales(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name + "_scale_inv"]


@_break("block fp8", "q_proj.weight", "non-finite")
def nan_scale(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name + "_scale_inv"].fill_(float("nan"))


@_break("mxfp4", "q_proj.weight", "non-finite")
def nan_power(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name + "_scale"][0, 0] = 255


@_break("mxfp4", "q_proj.weight_packed is U8")
def no_powers(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name + "_scale"]


@_break("int4", "q_proj.weight_scale")
def no_scales_of_integers(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name + "_scale"]


@_break("int4", "q_proj.weight_shape")
def another_shape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name + "_shape"] = torch.tensor([96, 95], dtype=torch.int32)


@_break("nvfp4", "q_proj.weight_global_scale", "positive")
def zero_global(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name + "_global_scale"].zero_()


@_break("nvfp4 modelopt", "q_proj.weight_scale_2", "positive")
def negative_global(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name + "_scale_2"].fill_(-1.0)


@_break("nvfp4", "q_proj.weight_global_scale")
def no_global(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name + "_global_scale"]


@_break("nvfp4", "swizzled")
def swizzled(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name + "_scale"] = torch.ones(128, 8).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_quantised_tensors_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    form, edit, parts = HOSTILE[case]
    name = "model.layers.1.self_attn.q_proj.weight"

    def spoil(role: str, tensors: dict[str, torch.Tensor]) -> None:
        if role == "finetuned":
            edit(tensors, name)

    quartet = llama_quartet(tmp_path, FORMS[form], edit=spoil)
    result = run(*merge_words(quartet.paths, tmp_path / "out", "--device", "cpu"))
    assert result.exit_code == 3, (result.exit_code, result.stderr)
    assert_one_sentence(result, *parts)
    assert not (tmp_path / "out").exists()
