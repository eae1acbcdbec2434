"""The whole pipeline on real files, against a dense merge that shares no code with it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import safemerge_fast
from safemerge_fast import (
    AnalysisError,
    OutputError,
    PlanError,
    ProgressEvent,
    VerificationError,
    analyze,
    merge,
    preview,
    verify,
)
from safemerge_fast.configuration import MergeConfiguration

TAU = 0.35
JOURNAL = ".safemerge-fast.journal"


# --- the oracle: no line of it is shared with the package -----------------------------------------


def load(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory, whatever its files are called."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def fused_multiply_add(x: np.ndarray, weight: float, addend: np.ndarray) -> np.ndarray:
    """fma in float32, computed in float64: the product is exact there, the sum is rounded to odd, then once more.

    A sum rounded to odd at 53 bits rounds correctly to any format of at most 51 bits.
    """
    product = x.astype(np.float64) * np.float64(np.float32(weight))
    other = addend.astype(np.float64)
    total = product + other
    shadow = total - product
    error = (product - (total - shadow)) + (other - shadow)  # Knuth's two-sum: exact
    bits = total.view(np.int64)
    even = (bits & 1) == 0
    away = (error > 0) == (total > 0)
    odd = np.where((error != 0) & even, np.where(away, bits + 1, bits - 1), bits)
    return odd.view(np.float64).astype(np.float32)


def linear(operands: list[tuple[Tensor, float]], dtype: torch.dtype) -> Tensor:
    """Σ weight·tensor by a chain of fma in float32, rounded once to dtype."""
    total = np.zeros(tuple(operands[0][0].shape), dtype=np.float32)
    for tensor, weight in operands:
        total = fused_multiply_add(tensor.float().numpy(), weight, total)
    return torch.from_numpy(total).to(dtype)


def rho(base: Tensor, aligned: Tensor, finetuned: Tensor) -> float:
    """cos(V Vᵀ Δ, Δ), dense, in float64."""
    v, delta = (aligned.double() - base.double()), (finetuned.double() - aligned.double())
    moved = v @ v.T @ delta
    return float((moved * delta).sum() / (moved.norm() * delta.norm()))


def is_projection(name: str) -> bool:
    return name.endswith("_proj.weight")


def cosines(quartet: dict[str, Path]) -> dict[str, float]:
    base, aligned, finetuned = (load(quartet[role]) for role in ("base", "aligned", "finetuned"))
    return {
        name: rho(base[name], aligned[name], tensor)
        for name, tensor in finetuned.items()
        if is_projection(name)
    }


def dense_merge(
    quartet: dict[str, Path],
    merged: set[str],
    *,
    alpha: float = 0.8,
    safe: str = "safe",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The output that is expected: merged tensors by fma, all others the fine-tuned ones."""
    finetuned, other = load(quartet["finetuned"]), load(quartet[safe])
    result = {}
    for name, tensor in finetuned.items():
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if name in merged:
            result[name] = linear([(tensor, alpha), (other[name], 1 - alpha)], wanted)
        else:
            result[name] = tensor.to(wanted)
    return result


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        left = found[name].contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(left, tensor.contiguous().reshape(-1).view(torch.uint8)), name


def weight_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors*")}


@pytest.fixture(scope="module")
def done(quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """One merge with the default settings, for tests that only look at it."""
    output = tmp_path_factory.mktemp("merge") / "out"
    return output, merge(**quartet, output=output)


# --- what the output holds ------------------------------------------------------------------------


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
    assert safemerge_fast.MergeReport.from_json((output / "safemerge_report.json").read_text()) == report
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


# --- settings -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_lowest_takes_the_n_lowest_of_all_shards(
    quartet: dict[str, Path], tmp_path: Path, count: int
) -> None:
    values = cosines(quartet)
    expected = set(sorted(values, key=values.__getitem__)[:count])
    report = merge(**quartet, output=tmp_path / "out", select=f"lowest:{count}")
    assert {tensor.name for tensor in report.tensors if tensor.merged} == expected
    assert_same_bits(load(tmp_path / "out"), dense_merge(quartet, expected))


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
    report = merge(**quartet, output=tmp_path / "out", exclude=r"mlp\.", threshold=2.0)
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
    ours = {"README.md", "safemerge_plan.json", "safemerge_report.json"}
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


# --- scores ---------------------------------------------------------------------------------------


def test_reused_scores_give_the_same_bytes_without_torch(
    quartet: dict[str, Path], tmp_path: Path, done
) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(analyze(quartet["base"], quartet["aligned"], quartet["finetuned"]).to_json())
    script = (
        "import sys\n"
        "from safemerge_fast.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    roles = [word for role, path in quartet.items() for word in (f"--{role}", str(path))]
    command = [sys.executable, "-c", script, "merge", *roles, "-o", str(tmp_path / "out"), "-q", "--scores"]
    finished = subprocess.run([*command, str(scores)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "False False\n"
    assert weight_files(tmp_path / "out") == weight_files(done[0])


def test_scores_of_other_models_are_refused(
    make_quartet: Callable[..., dict[str, Path]], quartet: dict[str, Path], tmp_path: Path
) -> None:
    other = make_quartet(tmp_path / "other", seed=1)
    scores = tmp_path / "scores.json"
    scores.write_text(analyze(other["base"], other["aligned"], other["finetuned"]).to_json())
    with pytest.raises(AnalysisError, match="not of these models"):
        merge(**quartet, output=tmp_path / "out", scores=scores)
    assert not (tmp_path / "out").exists()


def test_scores_against_another_reference_are_refused(quartet: dict[str, Path], tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    found = analyze(quartet["base"], quartet["aligned"], quartet["finetuned"], delta_reference="base")
    scores.write_text(found.to_json())
    with pytest.raises(AnalysisError, match="--delta-reference base"):
        merge(**quartet, output=tmp_path / "out", scores=scores)
    merge(**quartet, output=tmp_path / "out", scores=scores, delta_reference="base")


def test_scores_that_lack_a_module_are_refused(quartet: dict[str, Path], tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(
        analyze(quartet["base"], quartet["aligned"], quartet["finetuned"], exclude="down_proj").to_json()
    )
    with pytest.raises(AnalysisError, match=r"no score for model\.layers\.0\.mlp\.down_proj"):
        merge(**quartet, output=tmp_path / "out", scores=scores)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_refused_by_name(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"

    def spoil(role: str, tensors: dict[str, Tensor]) -> None:
        if role == "finetuned":
            tensors[name][3, 5] = math.nan

    quartet = make_quartet(tmp_path, edit=spoil)
    with pytest.raises(AnalysisError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight cannot be scored"):
        merge(**quartet, output=tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    report = merge(**quartet, output=tmp_path / "out", allow_nonfinite=True, overwrite=True)
    assert [warning.tensor for warning in report.warnings if "NaN" in warning.message] == [name]
    merged = {tensor.name for tensor in report.tensors if tensor.merged}
    assert name in merged
    found, expected = load(tmp_path / "out"), dense_merge(quartet, merged)
    assert torch.equal(found[name].isnan(), expected[name].isnan())
    assert torch.equal(found[name].nan_to_num(), expected[name].nan_to_num())
    scores = tmp_path / "scores.json"
    scores.write_text(
        analyze(quartet["base"], quartet["aligned"], quartet["finetuned"], allow_nonfinite=True).to_json()
    )
    with pytest.raises(AnalysisError, match=r"q_proj\.weight cannot be scored"):
        merge(**quartet, output=tmp_path / "again", scores=scores)


def test_near_the_resolution_of_the_dtype_there_is_a_warning(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    """At ‖V‖/‖W‖ = 0.2 % bfloat16's rounding is as large as V itself; in float32 nothing is wrong."""
    coarse = make_quartet(tmp_path / "bf16", task_scale=0.002)
    report = merge(**coarse, output=tmp_path / "coarse")
    assert {warning.tensor for warning in report.warnings} == set(cosines(coarse))
    fine = make_quartet(tmp_path / "f32", task_scale=0.002, dtype="float32")
    assert merge(**fine, output=tmp_path / "fine").warnings == ()


# --- interruption, resumption, replacement --------------------------------------------------------


def stop_after_first_shard(output: Path, error: BaseException) -> Callable[[ProgressEvent], None]:
    """A progress callback that raises once the first shard is committed and the second is being analysed."""
    import time

    first = output / "model-00001-of-00003.safetensors"
    seen: list[str] = []

    def stop(event: ProgressEvent) -> None:
        if event.stage != "analysis":
            return
        seen.append(event.item)
        if len(seen) > 8:
            deadline = time.monotonic() + 20
            while not first.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            raise error

    return stop


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the callback failed")])
def test_an_interrupted_merge_looks_unfinished_and_is_resumed(
    quartet: dict[str, Path], tmp_path: Path, done, error: BaseException
) -> None:
    output = tmp_path / "out"
    with pytest.raises(type(error)):
        merge(**quartet, output=output, progress=stop_after_first_shard(output, error))
    left = {path.name for path in output.iterdir()}
    assert "model-00001-of-00003.safetensors" in left
    assert JOURNAL in left
    assert not left & {"config.json", "model.safetensors.index.json", "model.safetensors"}
    with pytest.raises(OutputError, match="unfinished merge"):
        merge(**quartet, output=output)
    before = (output / "model-00001-of-00003.safetensors").stat()
    report = merge(**quartet, output=output, resume=True)
    after = (output / "model-00001-of-00003.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert report.shards[0]["resumed"]
    assert weight_files(output) == weight_files(done[0])
    assert not (output / JOURNAL).exists()
    verify(output)


def test_a_killed_merge_is_resumed_too(quartet: dict[str, Path], tmp_path: Path, done) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_merge\n"
        "from safemerge_fast import merge\n"
        "class Killed(BaseException): pass\n"
        "stop = test_merge.stop_after_first_shard(Path(sys.argv[2]), Killed())\n"
        "def kill(event):\n"
        "    try: stop(event)\n"
        "    except Killed: os.kill(os.getpid(), signal.SIGKILL)\n"
        "merge(*sys.argv[3:], output=sys.argv[2], progress=kill)\n"
    )
    output = tmp_path / "out"
    roles = [str(quartet[role]) for role in ("base", "aligned", "finetuned", "safe")]
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(output), *roles]
    finished = subprocess.run(command, capture_output=True, check=False)
    assert finished.returncode == -9, finished.stderr
    assert (output / "model-00001-of-00003.safetensors").exists()
    assert not (output / "config.json").exists()
    report = merge(**quartet, output=output, resume=True)
    assert report.shards[0]["resumed"]
    assert weight_files(output) == weight_files(done[0])


def test_resuming_with_other_files_leaves_no_stray_weights(
    quartet: dict[str, Path], tmp_path: Path, done
) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(**quartet, output=output, progress=stop_after_first_shard(output, KeyboardInterrupt()))
    merge(**quartet, output=output, resume=True, max_shard_size="1GB")
    assert sorted(weight_files(output)) == ["model.safetensors"]
    assert_same_bits(load(output), load(done[0]))


def test_resuming_with_another_alpha_redoes_what_it_changes(quartet: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(**quartet, output=output, progress=stop_after_first_shard(output, KeyboardInterrupt()))
    report = merge(**quartet, output=output, resume=True, alpha=0.3)
    merged = {tensor.name for tensor in report.tensors if tensor.merged}
    assert_same_bits(load(output), dense_merge(quartet, merged, alpha=0.3))


def test_overwrite_replaces_an_output_of_another_layout(
    quartet: dict[str, Path], tmp_path: Path, done
) -> None:
    output = tmp_path / "out"
    merge(**quartet, output=output, alpha=0.1, max_shard_size="60KB")
    with pytest.raises(OutputError, match="--overwrite"):
        merge(**quartet, output=output)
    merge(**quartet, output=output, overwrite=True)
    assert weight_files(output) == weight_files(done[0])
    verify(output)


def test_a_failed_overwrite_leaves_the_old_output(quartet: dict[str, Path], tmp_path: Path, done) -> None:
    output = tmp_path / "out"
    shutil.copytree(done[0], output)
    with pytest.raises(RuntimeError):
        merge(**quartet, output=output, overwrite=True, progress=raise_at_once)
    assert weight_files(output) == weight_files(done[0])
    verify(output)


def raise_at_once(event: ProgressEvent) -> None:
    raise RuntimeError("at once")


# --- verification ---------------------------------------------------------------------------------


def test_verify_names_the_tensor_whose_byte_differs(done, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(done[0], output)
    name = "model.layers.1.mlp.up_proj.weight"
    index = json.loads((output / "model.safetensors.index.json").read_text())
    file = output / index["weight_map"][name]
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[start + 7] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError) as raised:
        verify(output)
    assert f"tensor {name} of {file} differs from the plan at byte {start + 7};" in str(raised.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "model-00002-of-00003.safetensors").unlink(), "model-00002-of-00003.safetensors"),
        (
            lambda out: shutil.copy(next(out.glob("*.safetensors")), out / "x.safetensors"),
            "x.safetensors is not in",
        ),
        (lambda out: (out / "model.safetensors.index.json").unlink(), "index.json is missing"),
        (lambda out: (out / "model.safetensors.index.json").write_text("{}"), "index.json does not say"),
        (lambda out: os.truncate(out / "model-00003-of-00003.safetensors", 999), "model-00003-of-00003"),
    ],
)
def test_verify_refuses_what_loaders_would_trip_over(
    done, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    output = tmp_path / "out"
    shutil.copytree(done[0], output)
    spoil(output)
    with pytest.raises(VerificationError, match=message):
        verify(output)


def test_verify_refuses_inputs_that_are_not_those_of_the_plan(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    quartet = make_quartet(tmp_path, shards=1)
    merge(**quartet, output=tmp_path / "out")
    file = quartet["safe"] / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"model.norm.weight"', b'"model.nori.weight"'))
    with pytest.raises(PlanError, match="has changed since the plan was made"):
        verify(tmp_path / "out")


def test_verify_a_sample_compares_less(done) -> None:
    report = verify(done[0], sample=0.01)
    assert 0 < report.bytes_checked <= report.bytes_total


# --- preview and configuration --------------------------------------------------------------------


def test_preview_counts_what_the_merge_then_does(quartet: dict[str, Path], tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(analyze(quartet["base"], quartet["aligned"], quartet["finetuned"]).to_json())
    roles = {role: str(path) for role, path in quartet.items()}
    known = preview(MergeConfiguration(**roles, output=str(tmp_path / "out"), scores=str(scores)))
    unknown = preview(MergeConfiguration(**roles, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    report = merge(**quartet, output=tmp_path / "out", scores=scores)
    assert known.merged == report.merged
    assert known.counts == report.counts
    assert known.bytes_read == report.bytes_read
    assert known.bytes_written == unknown.bytes_written == report.bytes_written
    assert unknown.merged is None
    assert unknown.bytes_read > report.bytes_read
    assert unknown.bytes_analysed == 3 * sum(
        tensor.nbytes for name, tensor in load(quartet["finetuned"]).items() if is_projection(name)
    )
    refused = preview(MergeConfiguration(**roles, output=str(tmp_path / "out")))
    assert any("not empty" in note for note in refused.notes)
    inside = preview(MergeConfiguration(**roles, output=str(quartet["safe"] / "out")))
    assert any("overlaps the safe model" in note for note in inside.notes)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"alpha": 1.5}, "alpha should lie between 0 and 1"),
        ({"alpha": math.nan}, "alpha should lie between 0 and 1"),
        ({"method": "slerp"}, "method should be linear"),
        ({"dtype": "int8"}, "dtype should be auto"),
        ({"delta_reference": "safe"}, "delta_reference should be"),
        ({"threads": 0}, "threads should be at least 1"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"include": "("}, "not a regular expression"),
        ({"max_shard_size": "big"}, "should be like 5GB"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        merge("b", "a", "f", output=tmp_path / "out", **setting)


# --- the public API -------------------------------------------------------------------------------


def test_every_public_name_is_there_and_in_the_right_module() -> None:
    for name in safemerge_fast.__all__:
        value = getattr(safemerge_fast, name)
        assert value.__module__.startswith("safemerge_fast")
        assert value.__name__ == name
    assert safemerge_fast.__version__ == safemerge_fast._engine.__version__
    with pytest.raises(AttributeError):
        _ = safemerge_fast.nothing_of_this_name


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    script = (
        "import sys, safemerge_fast; print(sorted({'torch', 'numpy', 'rich', 'click'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
