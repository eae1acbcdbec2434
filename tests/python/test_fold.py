"""The fold recipe: files, shards, dtypes, resumption, and what the command line says of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora import load_checkpoint, update, write_lora

from safemerge_fast import AdapterError, CheckpointError, OutputError, PlanError, Report, fold, verify

Q = {f"model.layers.{layer}.self_attn.q_proj": (72, 72) for layer in range(3)}
UP = {f"model.layers.{layer}.mlp.up_proj": (200, 72) for layer in range(3)}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "adapter", Q | UP, rank=5, seed=1)


def test_folds_shard_by_shard_what_the_formula_says(
    quartet: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    report = fold(quartet["aligned"], adapter, output=tmp_path / "out")
    original, found = load_checkpoint(quartet["aligned"]), load_checkpoint(tmp_path / "out")
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        delta = update(adapter, name)
        if not delta.shape:
            assert torch.equal(found[name], tensor)
            continue
        exact = tensor.double() + delta
        # bfloat16: half a unit in the last of eight places.
        torch.testing.assert_close(found[name].double(), exact, rtol=2**-8 * 1.001, atol=1e-7)
    assert (report.changed, len(report.tensors), len(report.shards)) == (6, len(original), 3)
    assert verify(tmp_path / "out").bytes_checked == report.bytes_written


def test_dtype_and_shard_size(quartet: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    fold(quartet["aligned"], adapter, output=tmp_path / "out", dtype="float32", max_shard_size="100KB")
    original, found = load_checkpoint(quartet["aligned"]), load_checkpoint(tmp_path / "out")
    for name, tensor in original.items():
        if tensor.is_floating_point():
            assert found[name].dtype == torch.float32
            exact = tensor.double() + update(adapter, name)
            assert float((found[name].double() - exact).abs().max()) < 1e-7
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3


def test_the_files_beside_the_weights(quartet: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    report = fold(quartet["aligned"], adapter, output=tmp_path / "plain")
    out = tmp_path / "plain"
    assert (out / "config.json").read_bytes() == (quartet["aligned"] / "config.json").read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"made_for": "aligned"}
    document = json.loads((out / "safemerge_report.json").read_text())
    assert document == json.loads(report.to_json())
    assert (document["recipe"], document["configuration"]["adapter"]) == ("fold", str(adapter))
    operations = {tensor["name"]: tensor["operation"] for tensor in document["tensors"]}
    assert operations["model.layers.1.mlp.up_proj.weight"] == "linear: model + 2·B·A(adapter)"
    assert operations["model.norm.weight"] == "copy: model"
    card = (out / "README.md").read_text()
    assert '"recipe": "fold"' in card
    assert "`adapter`" in card
    # A tokenizer that was trained with the adapter wins.
    (adapter / "tokenizer_config.json").write_text('{"made_for": "adapter"}')
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    fold(quartet["aligned"], adapter, output=tmp_path / "own")
    assert json.loads((tmp_path / "own" / "tokenizer_config.json").read_text()) == {"made_for": "adapter"}
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "own" / "generation_config.json").is_file()


def test_transformers_loads_it(quartet: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    fold(quartet["aligned"], adapter, output=tmp_path / "out", dtype="float32")
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokens = torch.tensor([[1, 5, 7, 200]])
    with torch.no_grad():
        found = load(tmp_path / "out", dtype=torch.float32)(tokens).logits
        adapted = peft.PeftModel.from_pretrained(
            load(quartet["aligned"], dtype=torch.float32), adapter
        ).eval()
        assert float((adapted(tokens).logits - found).abs().max()) < 1e-5


def test_an_interrupted_fold_is_resumed(quartet: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    def interrupt(event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold(quartet["aligned"], adapter, output=tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    fold(quartet["aligned"], adapter, output=tmp_path / "out", resume=True)
    fold(quartet["aligned"], adapter, output=tmp_path / "whole")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_refusals(quartet: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match=r"model: .* is a PEFT adapter; .*give a whole checkpoint"):
        fold(adapter, adapter, output=out)
    with pytest.raises(AdapterError, match=r"adapter: .*adapter_config\.json cannot be read"):
        fold(quartet["aligned"], quartet["aligned"], output=out)
    with pytest.raises(CheckpointError, match="does not exist"):
        fold(quartet["aligned"], tmp_path / "nowhere", output=out)
    with pytest.raises(OutputError):
        fold(quartet["aligned"], adapter, output=adapter / "inside")
    with pytest.raises(PlanError, match="dtype should be one of auto"):
        fold(quartet["aligned"], adapter, output=out, dtype="int8")
    with pytest.raises(PlanError, match="threads should be a whole number from 1 to"):
        fold(quartet["aligned"], adapter, output=out, threads=0)
    with pytest.raises(PlanError, match="give one of them"):
        fold(quartet["aligned"], adapter, output=out, resume=True, overwrite=True)
    assert not out.exists()
    wrong = write_lora(tmp_path / "wrong", {"model.layers.0.self_attn.q_proj": (72, 99)}, rank=3, seed=0)
    with pytest.raises(AdapterError, match=r"72 outputs and 99 inputs.*\(72, 72\)"):
        fold(quartet["aligned"], wrong, output=out)
    assert not out.exists()


def test_torch_is_not_imported(quartet: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from safemerge_fast import fold\n"
        f"fold({str(quartet['aligned'])!r}, {str(adapter)!r}, output={str(tmp_path / 'out')!r})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_report_counts_only_what_changes(quartet: dict[str, Path], tmp_path: Path) -> None:
    embedding = torch.zeros(321, 72)
    adapter = write_lora(
        tmp_path / "adapter", {}, rank=4, seed=0, more={"model.embed_tokens.weight": embedding}
    )
    report = fold(quartet["aligned"], adapter, output=tmp_path / "out")
    assert isinstance(report, Report)
    assert report.changed == 1
    assert any("ties its head" in note for note in report.notes)
    assert not load_checkpoint(tmp_path / "out")["model.embed_tokens.weight"].any()
