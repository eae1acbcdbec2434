"""The whole pipeline on real files, against a dense merge that shares no code with it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dense import (
    TAU,
    assert_same_bits,
    cosines,
    dense_merge,
    fused_multiply_add,
    is_projection,
    load,
    rho,
    weight_files,
)
from safetensors.torch import load_file

from safemerge_fast import ProgressEvent, SettingError, merge, verify
from safemerge_fast.recipes.run import read_report


@pytest.fixture(scope="module")
def done(quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """One merge with the default settings, for tests that only look at it."""
    output = tmp_path_factory.mktemp("merge") / "out"
    return output, merge(**quartet, output=output)


def test_the_oracle_s_fma_is_the_processor_s() -> None:
    """Against libm's fmaf, on numbers whose exact sums lie near ties."""
    import ctypes

    fmaf = ctypes.CDLL("libm.so.6").fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    generator = np.random.default_rng(0)
    x = generator.standard_normal(3000).astype(np.float32)
    addend = (generator.standard_normal(3000) * 10.0 ** generator.integers(-9, 3, 3000)).astype(np.float32)
    addend[::3] = -(x[::3] * np.float32(0.8))
    expected = np.array([fmaf(a, 0.8, b) for a, b in zip(x, addend, strict=True)], dtype=np.float32)
    assert np.array_equal(fused_multiply_add(x, 0.8, addend), expected)


def test_every_tensor_is_that_of_a_dense_merge(quartet: dict[str, Path], done) -> None:
    output, report = done
    expected = {name for name, value in cosines(quartet).items() if value < TAU}
    assert 0 < len(expected) < len(cosines(quartet)), "the quartet has modules of both kinds"
    assert {tensor.name for tensor in report.tensors if tensor.merged} == expected
    assert_same_bits(load(output), dense_merge(quartet, expected))


def test_transformers_loads_it_and_computes_the_same_logits(quartet: dict[str, Path], done) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    output, report = done
    assert LlamaForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    loaded = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
    dense = dense_merge(quartet, {tensor.name for tensor in report.tensors if tensor.merged})
    expected = LlamaForCausalLM(AutoConfig.from_pretrained(quartet["finetuned"]))
    missing, unexpected = expected.load_state_dict(dense, strict=False)
    assert set(missing) == {"lm_head.weight"}
    assert set(unexpected) == {"model.position_ids"}
    expected.tie_weights()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        found = loaded(tokens).logits
        assert torch.equal(found, expected(tokens).logits)
        finetuned = LlamaForCausalLM.from_pretrained(quartet["finetuned"], dtype=torch.float32)
        assert not torch.equal(found, finetuned(tokens).logits)


def test_keeps_files_order_and_index_of_the_finetuned_model(quartet: dict[str, Path], done) -> None:
    output, _ = done
    source = quartet["finetuned"]
    names = sorted(path.name for path in source.glob("*.safetensors"))
    assert sorted(path.name for path in output.glob("*.safetensors")) == names

    def header(path: Path) -> dict:
        with path.open("rb") as file:
            return json.loads(file.read(int.from_bytes(file.read(8), "little")))

    for name in names:
        ours, theirs = header(output / name), header(source / name)
        assert list(ours) == list(theirs)
        assert ours["__metadata__"] == {"format": "pt"}
    index = "model.safetensors.index.json"
    assert json.loads((output / index).read_text()) == json.loads((source / index).read_text())


def test_permissions_follow_the_umask(done) -> None:
    output, _ = done
    umask = os.umask(0)
    os.umask(umask)
    for path in output.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


def test_leaves_no_trace_of_the_work(done) -> None:
    output, _ = done
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []


def test_the_report_states_what_was_measured(quartet: dict[str, Path], done) -> None:
    output, report = done
    assert read_report(output) == report
    base, aligned, finetuned = (load(quartet[role]) for role in ("base", "aligned", "finetuned"))
    for tensor in report.tensors:
        if not is_projection(tensor.name):
            assert not tensor.analysed
            assert tensor.rho is None
            continue
        v = aligned[tensor.name].double() - base[tensor.name].double()
        delta = finetuned[tensor.name].double() - aligned[tensor.name].double()
        value = rho(base[tensor.name], aligned[tensor.name], finetuned[tensor.name])
        null = float(v.square().sum() / (math.sqrt(v.shape[0]) * (v @ v.T).norm()))
        assert tensor.rho == pytest.approx(value, abs=1e-5)
        assert tensor.rho_null == pytest.approx(null, abs=1e-5)
        assert tensor.v_norm == pytest.approx(float(v.norm()), rel=1e-5)
        assert tensor.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert tensor.merged == (value < TAU)
        assert tensor.operation == (
            "linear: 0.8 finetuned + 0.2 safe" if tensor.merged else "copy: finetuned"
        )
    for role, path in quartet.items():
        files = report.inputs[role]["files"]
        assert {name: facts["size"] for name, facts in files.items()} == {
            file.name: file.stat().st_size for file in path.glob("*.safetensors")
        }
    written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert report.bytes_written == written
    assert report.versions["torch"] == torch.__version__
    assert report.peak_memory_bytes > 10_000_000
    assert report.seconds["total"] >= report.seconds["analysis"] > 0


def test_verify_finds_the_output_as_planned(done) -> None:
    output, _ = done
    report = verify(output)
    assert (
        report.bytes_checked
        == report.bytes_total
        == sum(path.stat().st_size for path in output.glob("*.safetensors"))
    )
    assert report.files == 3


def test_progress_reaches_the_end_of_both_stages(quartet: dict[str, Path], tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    merge(**quartet, output=tmp_path / "out", progress=events.append)
    for stage, total in (
        ("analysis", sum(map(is_projection, load(quartet["finetuned"])))),
        ("merge", sum(tensor.nbytes for tensor in load(quartet["finetuned"]).values())),
    ):
        seen = [event for event in events if event.stage == stage]
        assert {event.total for event in seen} == {total}
        assert [event.done for event in seen] == sorted(event.done for event in seen)
        assert seen[-1].done == total


# --- settings --------------------------------------------------------------------------------------


def test_without_a_safe_model_the_aligned_one_plays_it(quartet: dict[str, Path], tmp_path: Path) -> None:
    roles = {role: path for role, path in quartet.items() if role != "safe"}
    report = merge(**roles, output=tmp_path / "out", alpha=0.6)
    merged = {tensor.name for tensor in report.tensors if tensor.merged}
    assert merged
    assert_same_bits(load(tmp_path / "out"), dense_merge(quartet, merged, alpha=0.6, safe="aligned"))
    assert any("no safe model was given" in note for note in report.notes)


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)],
)
def test_dtype_rounds_once_and_is_what_loaders_see(
    quartet: dict[str, Path], tmp_path: Path, asked: str, dtype: torch.dtype
) -> None:
    from transformers import LlamaForCausalLM

    output = tmp_path / "out"
    report = merge(**quartet, output=output, dtype=asked)
    merged = {tensor.name for tensor in report.tensors if tensor.merged}
    assert_same_bits(load(output), dense_merge(quartet, merged, dtype=dtype))
    assert json.loads((output / "config.json").read_text())["dtype"] == asked
    assert LlamaForCausalLM.from_pretrained(output).model.embed_tokens.weight.dtype == dtype
    verify(output)


def test_max_shard_size_changes_files_and_nothing_else(
    quartet: dict[str, Path], tmp_path: Path, done
) -> None:
    output = tmp_path / "out"
    merge(**quartet, output=output, max_shard_size="60KB")
    files = sorted(output.glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 60_000 or len(tensors) == 1
    assert_same_bits(load(output), load(done[0]))
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}


def test_a_single_file_stays_single(make_quartet: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    quartet = make_quartet(tmp_path, shards=1)
    merge(**quartet, output=tmp_path / "out")
    assert sorted(weight_files(tmp_path / "out")) == ["model.safetensors"]


def test_single_files_can_be_given_for_models(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    quartet = make_quartet(tmp_path / "in", shards=1)
    merge(**quartet, output=tmp_path / "by directory")
    files = {role: path / "model.safetensors" for role, path in quartet.items()}
    merge(**files, output=tmp_path / "by file")
    by_file, by_directory = tmp_path / "by file", tmp_path / "by directory"
    assert {p.name for p in by_file.iterdir()} == {p.name for p in by_directory.iterdir()}
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        assert (by_file / name).read_bytes() == (by_directory / name).read_bytes()


def test_dtype_is_written_wherever_the_configuration_names_one(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    def nest(role: str, config: dict) -> None:
        config["torch_dtype"] = config.pop("dtype")
        config["text_config"] = {"dtype": "bfloat16", "hidden_size": 72}
        config["vision_config"] = {"hidden_size": 8}

    quartet = make_quartet(tmp_path, edit_config=nest)
    merge(**quartet, output=tmp_path / "out", dtype="float32", threshold=0.0)
    before = json.loads((quartet["finetuned"] / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    before["torch_dtype"] = before["text_config"]["dtype"] = "float32"
    assert after == before


def test_max_shard_size_can_join_all_files(quartet: dict[str, Path], tmp_path: Path, done) -> None:
    merge(**quartet, output=tmp_path / "out", max_shard_size="1GB")
    assert sorted(weight_files(tmp_path / "out")) == ["model.safetensors"]
    assert_same_bits(load(tmp_path / "out"), load(done[0]))


def test_others_merges_what_is_not_analysed(quartet: dict[str, Path], tmp_path: Path) -> None:
    report = merge(**quartet, output=tmp_path / "out", others="merge")
    low = {name for name, value in cosines(quartet).items() if value < TAU}
    finetuned = load(quartet["finetuned"])
    others = {name for name, t in finetuned.items() if not is_projection(name) and t.is_floating_point()}
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= others
    assert {tensor.name for tensor in report.tensors if tensor.merged} == low | others
    assert_same_bits(load(tmp_path / "out"), dense_merge(quartet, low | others))


@pytest.mark.parametrize("count", [0, 1, 5, 20, 21])
def test_lowest_takes_the_n_lowest_of_all_shards(
    quartet: dict[str, Path], tmp_path: Path, count: int
) -> None:
    values = cosines(quartet)
    expected = set(sorted(values, key=values.__getitem__)[:count])
    report = merge(**quartet, output=tmp_path / "out", select=f"lowest:{count}")
    assert {tensor.name for tensor in report.tensors if tensor.merged} == expected
    assert_same_bits(load(tmp_path / "out"), dense_merge(quartet, expected))


@pytest.mark.parametrize(("granularity", "units"), [("module", "21 modules"), ("layer", "3 layers")])
def test_lowest_of_more_than_there_are_is_refused(
    quartet: dict[str, Path], tmp_path: Path, granularity: str, units: str
) -> None:
    most = int(units.split()[0])
    with pytest.raises(SettingError, match=f"select is lowest:{most + 1}, but only {units} are analysed"):
        merge(**quartet, output=tmp_path / "out", select=f"lowest:{most + 1}", granularity=granularity)
    assert list(tmp_path.iterdir()) == []
    report = merge(**quartet, output=tmp_path / "out", select=f"lowest:{most}", granularity=granularity)
    assert report.merged == 21


def test_granularity_layer_decides_by_the_mean(quartet: dict[str, Path], tmp_path: Path) -> None:
    layers: dict[str, list[float]] = {}
    for name, value in cosines(quartet).items():
        layers.setdefault(name.split(".")[2], []).append(value)
    threshold = sorted(sum(values) / len(values) for values in layers.values())[1]
    low = {layer for layer, values in layers.items() if sum(values) / len(values) < threshold - 1e-4}
    report = merge(**quartet, output=tmp_path / "out", granularity="layer", threshold=threshold - 1e-4)
    expected = {name for name in cosines(quartet) if name.split(".")[2] in low}
    assert 0 < len(expected) < len(cosines(quartet))
    assert {tensor.name for tensor in report.tensors if tensor.merged} == expected


def test_exclude_keeps_and_reports(quartet: dict[str, Path], tmp_path: Path) -> None:
    report = merge(**quartet, output=tmp_path / "out", exclude=r"mlp\.", select="fraction:1")
    expected = {name for name in cosines(quartet) if ".mlp." not in name}
    assert {tensor.name for tensor in report.tensors if tensor.merged} == expected
    assert {t.reason for t in report.tensors if ".mlp." in t.name} == {"excluded: not analysed"}


def test_merging_nothing_still_gives_the_finetuned_weights(quartet: dict[str, Path], tmp_path: Path) -> None:
    report = merge(**quartet, output=tmp_path / "out", threshold=0.0)
    assert report.merged == 0
    assert any(note.startswith("no tensor was merged") for note in report.notes)
    assert_same_bits(load(tmp_path / "out"), load(quartet["finetuned"]))


def test_companions_come_from_the_finetuned_model(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    quartet = make_quartet(
        tmp_path,
        edit_config=lambda role, config: config.update(auto_map={"AutoModel": "modeling_x.Model"}),
    )
    source = quartet["finetuned"]
    wanted = {
        "tokenizer.json": "{}",
        "merges.txt": "a b",
        "vocab.json": "{}",
        "spiece.model": "s",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        "LICENSE.txt": "free",
        "modeling_x.py": "from .layers_x import Layer",
        "layers_x.py": "import torch",
        "preprocessor_config.json": "{}",
    }
    unwanted = {
        "pytorch_model.bin": "pickle",
        "optimizer.pt": "states",
        "consolidated.00.pth": "weights",
        "params.json": "{}",
        "model.gguf": "x",
        "vocab.bin": "x",
        "stray.py": "import os",
        "README.md": "old card",
        "trainer_state.json": "{}",
        "original/params.json": "{}",
    }
    for name, text in (wanted | unwanted).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    output = tmp_path / "out"
    merge(**quartet, output=output, threshold=0.0)
    for name in (*wanted, "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes(), name
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    ours = {"README.md", "safemerge_plan.json", "safemerge_report.html", "safemerge_report.json"}
    weights = {*weight_files(source)}
    assert found == {
        *wanted,
        *ours,
        *weights,
        "tokenizer_config.json",
        "generation_config.json",
        "config.json",
    }
    assert "old card" not in (output / "README.md").read_text()
