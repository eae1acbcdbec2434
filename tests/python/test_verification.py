"""Verification: what it finds, and how it names it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_checkpoint
from lora import write_lora

from safemerge_fast import (
    CheckpointError,
    PlanError,
    ProgressEvent,
    VerificationError,
    fold,
    merge,
    verify,
)


@pytest.fixture(scope="module")
def done(quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """One merge with the default settings, for tests that only look at it."""
    output = tmp_path_factory.mktemp("merge") / "out"
    return output, merge(**quartet, output=output)


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
        (
            lambda out: (out / "model.safetensors.index.json").unlink(),
            "index.json is missing, but the report lists it",
        ),
        (
            lambda out: (out / "model.safetensors.index.json").write_text("{}"),
            "index.json has 2 bytes, the report says",
        ),
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


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config.json", b'"vocab_size": 321', b'"vocab_size": 123'),
        ("tokenizer_config.json", b"finetuned", b"finetunes"),
        ("generation_config.json", b'"eos_token_id": 2', b'"eos_token_id": 3'),
        ("README.md", b"SafeMERGE", b"SafeMERGY"),
        ("model.safetensors.index.json", b"model-00001-of", b"model-00002-of"),
        ("safemerge_plan.json", b'"weight":0.8', b'"weight":0.9'),
    ],
)
def test_verify_finds_a_small_file_of_the_same_size_that_was_altered(
    done, tmp_path: Path, name: str, old: bytes, new: bytes
) -> None:
    output = tmp_path / "out"
    shutil.copytree(done[0], output)
    file = output / name
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))
    with pytest.raises(VerificationError, match=f"{file} is not what was written: its digest differs"):
        verify(output)
    file.write_bytes(data)
    verify(output)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "README.md", "safemerge_plan.json"])
def test_verify_finds_a_small_file_that_is_missing_longer_or_no_file(done, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    shutil.copytree(done[0], output)
    file = output / name
    data = file.read_bytes()
    file.write_bytes(data + b" ")
    with pytest.raises(
        VerificationError, match=f"{file} has {len(data) + 1} bytes, the report says {len(data)}"
    ):
        verify(output)
    file.unlink()
    with pytest.raises(VerificationError, match=f"{file} is missing"):
        verify(output)
    os.mkfifo(file)
    with pytest.raises(VerificationError, match=f"{file} is a named pipe"):
        verify(output)


@pytest.mark.parametrize(
    "stray",
    ["pytorch_model.bin", "consolidated.safetensors", "modeling_x.py", ".hidden", "original/params.json"],
)
def test_verify_names_a_file_that_the_report_does_not_know(done, tmp_path: Path, stray: str) -> None:
    output = tmp_path / "out"
    shutil.copytree(done[0], output)
    (output / stray).parent.mkdir(exist_ok=True)
    (output / stray).write_text("{}")
    with pytest.raises(VerificationError, match=f"{output / stray} is not in the report"):
        verify(output)


def test_verify_names_a_link_to_a_directory(done, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(done[0], output)
    (output / "onnx").symlink_to(tmp_path)
    with pytest.raises(VerificationError, match=f"{output / 'onnx'} is not in the report"):
        verify(output)


def test_verify_says_that_a_job_is_unfinished(quartet: dict[str, Path], tmp_path: Path) -> None:
    def stop(event: ProgressEvent) -> None:
        if event.done > 3:
            raise KeyboardInterrupt

    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(**quartet, output=output, progress=stop)
    assert not output.exists()
    with pytest.raises(CheckpointError, match=f"{output} is unfinished: .*--resume"):
        verify(output)
    merge(**quartet, output=output, resume=True)
    verify(output)


def test_verify_says_what_is_no_output(quartet: dict[str, Path], tmp_path: Path, done) -> None:
    with pytest.raises(CheckpointError, match="does not exist or is not a directory"):
        verify(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no safemerge_report\.json"):
        verify(quartet["base"])
    output = tmp_path / "out"
    shutil.copytree(done[0], output)
    report = output / "safemerge_report.json"
    text = report.read_text()
    for spoiled in ("", "{}", text.replace('"version": 2', '"version": 7', 1), text[:-100]):
        report.write_text(spoiled)
        with pytest.raises(PlanError, match=f"cannot read {report}"):
            verify(output)


def test_verify_refuses_a_report_and_a_plan_of_different_weights(done, tmp_path: Path) -> None:
    """Both are well-formed, and the report agrees with what is there."""
    output = tmp_path / "out"
    shutil.copytree(done[0], output)
    report = output / "safemerge_report.json"
    document = json.loads(report.read_text())
    (output / "extra.safetensors").write_bytes(b"\0" * 64)
    document["files"].append({"name": "extra.safetensors", "bytes": 64, "digest": None})
    report.write_text(json.dumps(document))
    with pytest.raises(VerificationError, match=r"report and plan disagree on extra\.safetensors"):
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


TILE = 4 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fold whose one file of weights has 16 tiles and a bit; nothing of it is adapted but one small matrix."""
    path = tmp_path_factory.mktemp("large")
    tensors = {
        "model.embed_tokens.weight": torch.arange(16 * TILE // 4, dtype=torch.float32).reshape(-1, 64),
        "model.layers.0.self_attn.q_proj.weight": torch.ones(64, 64),
    }
    model = write_checkpoint(path / "model", tensors, {"model_type": "llama"})
    adapter = write_lora(path / "adapter", {"model.layers.0.self_attn.q_proj": (64, 64)}, rank=2, seed=0)
    fold(model, adapter, output=path / "out")
    return path / "out"


def test_seeds_sample_different_tiles_and_one_seed_the_same(large: Path, tmp_path: Path) -> None:
    """Each tile is spoiled in turn: a sample finds it if, and only if, it looks there."""
    output = tmp_path / "out"
    shutil.copytree(large, output)
    file = output / "model.safetensors"
    size = file.stat().st_size
    looked: dict[int, set[int]] = {seed: set() for seed in (0, 1, 2, 2**64 - 1)}
    for tile in range(-(-size // TILE)):
        # The file's first tile begins with the header.
        place = min(tile * TILE + TILE // 2, size - 1)
        with file.open("r+b") as opened:
            opened.seek(place)
            byte = opened.read(1)
            opened.seek(place)
            opened.write(bytes([byte[0] ^ 1]))
        for seed, tiles in looked.items():
            try:
                assert 0 < verify(output, sample=0.25, seed=seed).bytes_checked < size / 2
            except VerificationError as error:
                found = str(error)
                tiles.add(tile)
            else:
                continue
            assert f"differs from the plan at byte {place};" in found
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(byte)
    for tiles in looked.values():
        assert 2 <= len(tiles) <= 8, "about a quarter of 17"
    assert len({frozenset(tiles) for tiles in looked.values()}) == len(looked)
    assert (
        verify(output, sample=0.25, seed=1).bytes_checked == verify(large, sample=0.25, seed=1).bytes_checked
    )
    assert verify(output).bytes_checked == size
