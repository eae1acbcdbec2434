"""Headers of very many tensors, and hostile ones: what they cost, measured in a process of their own."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from safemerge_fast import _engine
from safemerge_fast.errors import CheckpointError

# Prints by how many bytes a process grows when it opens a checkpoint, and its peak; or the error, and the peak.
PROGRAM = """
import sys
from pathlib import Path
from safemerge_fast import _engine, errors

def size(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) << 10

before = size("VmRSS")
try:
    checkpoint = _engine.Checkpoint(sys.argv[1])
    print(size("VmRSS") - before, len(checkpoint))
except errors.CheckpointError as error:
    print(error)
print(size("VmHWM"))
"""


def write_header(path: Path, header: str, data: bytes = b"") -> None:
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def opened(path: Path) -> tuple[str, int]:
    """What a process of its own says of a checkpoint, and the peak of its memory."""
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, path], check=True, capture_output=True, text=True, env=environment
    )
    said, peak = run.stdout.splitlines()
    return said, int(peak)


def names(count: int) -> list[str]:
    return [
        f"model.layers.{number // 1000}.mlp.experts.{number % 1000}.down_proj.weight"
        for number in range(count)
    ]


def header(first: int, count: int) -> str:
    entries = {
        name: {"dtype": "BF16", "shape": [1, 1], "data_offsets": [2 * place, 2 * place + 2]}
        for place, name in enumerate(names(first + count)[first:])
    }
    return json.dumps(entries)


@pytest.mark.parametrize("files", [1, 8])
def test_200_000_tensors_cost_100_bytes_each_beside_their_names(tmp_path: Path, files: int) -> None:
    count = 200_000
    each = count // files
    weight_map = {}
    for number in range(files):
        file = "model.safetensors" if files == 1 else f"model-{number}.safetensors"
        write_header(tmp_path / file, header(number * each, each), bytes(2 * each))
        weight_map |= dict.fromkeys(names(count)[number * each : (number + 1) * each], file)
    if files > 1:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    said, _ = opened(tmp_path)
    grown, found = map(int, said.split())
    assert found == count
    # What the allocator keeps for later counts too; it gives large blocks back.
    assert grown < 100 * count + sum(map(len, names(count))) + (4 << 20)


def test_references_to_tensors_hold_no_strings(tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", header(0, 3), bytes(6))
    checkpoint = _engine.Checkpoint(tmp_path, read_backend="pread")
    assert checkpoint.names == names(3)
    assert (checkpoint.nbytes, checkpoint.parameters, len(checkpoint)) == (6, 3, 3)
    tensors = checkpoint.tensors
    del checkpoint
    assert [tensor.name for tensor in tensors] == names(3)
    assert {(tensor.dtype, tensor.shape, tensor.file) for tensor in tensors} == {
        ("BF16", (1, 1), "model.safetensors")
    }
    assert {(tensor.nbytes, tensor.parameters) for tensor in tensors} == {(2, 1)}


def test_too_many_tensors_and_dimensions_are_refused_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = (f'"{number}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for number in range(1_400_000))
    write_header(path, "{" + ",".join(tensors) + "}")
    said, peak = opened(path)
    assert "more than 1000000 tensors" in said
    assert peak < 256 << 20

    write_header(path, f'{{"a":{{"dtype":"U8","shape":[{"1," * 40_000_000}1],"data_offsets":[0,1]}}}}', b"x")
    said, peak = opened(path)
    assert "more than 64 dimensions" in said
    assert peak < 256 << 20


def test_an_identity_says_what_the_file_system_says(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_header(path, header(0, 1), bytes(2))
    checkpoint = _engine.Checkpoint(tmp_path)
    identity = checkpoint.identity()["model.safetensors"]
    seen = path.stat()
    assert (identity.size, identity.mtime_ns, identity.ctime_ns, identity.inode, identity.device) == (
        seen.st_size,
        seen.st_mtime_ns,
        seen.st_ctime_ns,
        seen.st_ino,
        seen.st_dev,
    )
    assert identity.to_dict() == {
        name: getattr(identity, name) for name in ("size", "mtime_ns", "ctime_ns", "inode", "header_digest")
    }
    assert identity == _engine.Checkpoint(tmp_path).identity()["model.safetensors"]
    checkpoint.check_unchanged()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.check_unchanged()
