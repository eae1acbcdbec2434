"""What cannot be merged is refused: exit code, one clear sentence, nothing left that looks complete."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from invoke import assert_one_sentence, merge_words, run
from torch import Tensor

# --- broken inputs --------------------------------------------------------------------------------


def test_a_wrong_path(quartet, tmp_path: Path) -> None:
    roles = quartet | {"safe": tmp_path / "nowhere"}
    result = run(*merge_words(roles, tmp_path / "out"))
    assert result.exit_code == 3
    assert_one_sentence(result, "safe", str(tmp_path / "nowhere"), "does not exist")
    assert not (tmp_path / "out").exists()


def broken_quartet(
    make_quartet: Callable[..., dict[str, Path]], path: Path, role: str, change: Callable[[dict], object]
) -> dict[str, Path]:
    def edit(found: str, tensors: dict[str, Tensor]) -> None:
        if found == role:
            change(tensors)

    return make_quartet(path, edit=edit)


def test_a_missing_tensor(make_quartet: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    quartet = broken_quartet(make_quartet, tmp_path, "base", lambda tensors: tensors.pop(name))
    result = run(*merge_words(quartet, tmp_path / "out"))
    assert result.exit_code == 3
    assert_one_sentence(result, name, "base", "--exclude")
    assert not (tmp_path / "out").exists()


def test_a_shape_mismatch(make_quartet: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    quartet = broken_quartet(
        make_quartet, tmp_path, "safe", lambda tensors: tensors.update({name: tensors[name][:-1].clone()})
    )
    result = run(*merge_words(quartet, tmp_path / "out"))
    assert result.exit_code == 3
    assert_one_sentence(result, name, "36", "35", "safe")
    assert not (tmp_path / "out").exists()


def test_a_truncated_shard(make_quartet: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    quartet = make_quartet(tmp_path)
    file = quartet["aligned"] / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 5)
    result = run(*merge_words(quartet, tmp_path / "out"))
    assert result.exit_code == 3
    assert_one_sentence(result, str(file), "truncated")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "head",
    [
        b"\xff" * 8,  # a header of 2^64 bytes
        (3).to_bytes(8, "little") + b"{]}",
        (2).to_bytes(8, "little") + b"[]",
        b"\x00\x01",
    ],
)
def test_a_corrupt_header(make_quartet: Callable[..., dict[str, Path]], tmp_path: Path, head: bytes) -> None:
    quartet = make_quartet(tmp_path)
    file = quartet["finetuned"] / "model-00001-of-00003.safetensors"
    file.write_bytes(head + (file.read_bytes()[len(head) :] if len(head) > 2 else b""))
    result = run(*merge_words(quartet, tmp_path / "out"))
    assert result.exit_code == 3
    assert_one_sentence(result, str(file))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors"])
def test_an_index_that_names_another_directory(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path, place: str
) -> None:
    quartet = make_quartet(tmp_path)
    index = quartet["base"] / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.norm.weight"] = place
    index.write_text(json.dumps(document))
    result = run(*merge_words(quartet, tmp_path / "out"))
    assert result.exit_code == 3
    assert_one_sentence(result, str(index), place)
    assert not (tmp_path / "out").exists()


def test_an_adapter_and_a_pickle(quartet, tmp_path: Path) -> None:
    for name, file, word in (
        ("adapter", "adapter_config.json", "adapter"),
        ("bin", "pytorch_model.bin", "convert"),
    ):
        directory = tmp_path / name
        directory.mkdir()
        (directory / file).write_text("{}")
        (directory / "adapter_model.safetensors").write_bytes(b"") if name == "adapter" else None
        result = run(*merge_words(quartet | {"safe": directory}, tmp_path / "out"))
        assert result.exit_code == 3
        assert_one_sentence(result, str(directory), word)


# --- outputs that must not be touched -------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("where", ["equal", "inside", "around", "link"])
def test_an_output_that_overlaps_an_input(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path, where: str, flags: list[str]
) -> None:
    quartet = make_quartet(tmp_path / "in")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    output = {
        "equal": quartet["finetuned"],
        "inside": quartet["base"] / "out",
        "around": tmp_path / "in",
        "link": tmp_path / "link",
    }[where]
    if where == "link":
        output.symlink_to(quartet["safe"])
    result = run(*merge_words(quartet, output, *flags))
    assert result.exit_code == 5
    assert_one_sentence(result, str(output), "input")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_output_that_exists(quartet, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    for flags in ([], ["--resume"], ["--overwrite"]):
        result = run(*merge_words(quartet, output, *flags))
        assert result.exit_code == 5
        assert_one_sentence(result, str(output), "thesis.tex", "move it away")
        assert [path.name for path in output.iterdir()] == ["thesis.tex"]
    file = tmp_path / "file"
    file.write_text("")
    result = run(*merge_words(quartet, file))
    assert result.exit_code == 5
    assert_one_sentence(result, str(file), "is a file")


def test_a_disk_that_cannot_be_written(quartet, tmp_path: Path) -> None:
    result = run(*merge_words(quartet, Path("/proc/safemerge-out")))
    assert result.exit_code == 5
    assert_one_sentence(result, "/proc/", "safemerge-out")


def test_a_merge_that_fails_midway_leaves_nothing_complete(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    """The last layer's values are infinite: earlier shards may be written by then."""
    name = "model.layers.2.mlp.down_proj.weight"

    def spoil(role: str, tensors: dict[str, Tensor]) -> None:
        if role == "aligned":
            tensors[name][0, 0] = float("inf")

    quartet = make_quartet(tmp_path, edit=spoil)
    result = run(*merge_words(quartet, tmp_path / "out"))
    assert result.exit_code == 3
    assert_one_sentence(result, name, "aligned", "--allow-nonfinite")
    assert not (tmp_path / "out").exists()
