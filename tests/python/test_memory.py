"""Peak memory is a constant: a model whose largest tensor has 1 GB is merged in a quarter of that."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safemerge_fast.analysis.score import Score
from safemerge_fast.analysis.scores import Scores, describe_source
from safemerge_fast.checkpoint.model import open_model

SHAPE = (16384, 32768)
NAME = "model.layers.0.mlp.up_proj.weight"
BYTES = 2 * SHAPE[0] * SHAPE[1]


def sparse_checkpoint(directory: Path, last: bytes) -> Path:
    """One bfloat16 matrix of 1 GiB, all holes (zeros) but for its last element."""
    directory.mkdir()
    header = {NAME: {"dtype": "BF16", "shape": list(SHAPE), "data_offsets": [0, BYTES]}}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(BYTES - 2, os.SEEK_CUR)
        file.write(last)
    (directory / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    return directory


def high_water_mark(process: int) -> int:
    """Peak resident bytes of a process since it was started; ru_maxrss would count its parent's before exec."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kilobytes = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), "0")
    return int(kilobytes) << 10


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads peak memory from /proc, which Linux has"
)
def test_a_tensor_of_1_gb_is_merged_within_256_mb(tmp_path: Path) -> None:
    # 1.0, 1.0, 2.0 and 4.0 in bfloat16.
    values = {"base": b"\x80\x3f", "aligned": b"\x80\x3f", "finetuned": b"\x00\x40", "safe": b"\x80\x40"}
    paths = {role: sparse_checkpoint(tmp_path / role, value) for role, value in values.items()}
    score = Score(0.1, 0.5, 1.0, 1.0, 1.0, 0.0, None)
    sources = {
        role: describe_source(open_model(role, path)) for role, path in paths.items() if role != "safe"
    }
    scores = tmp_path / "scores.json"
    scores.write_text(Scores({NAME: score}, "aligned", sources, "cpu", 0.0).to_json())

    roles = [word for role, path in paths.items() for word in (f"--{role}", str(path))]
    command = [sys.executable, "-m", "safemerge_fast", "merge", *roles, "--scores", str(scores)]
    process = subprocess.Popen([*command, "-o", str(tmp_path / "out"), "--alpha", "0.75", "--force"])
    peak = 0
    while process.poll() is None:
        peak = max(peak, high_water_mark(process.pid))
        time.sleep(0.002)
    assert process.returncode == 0
    assert 10 << 20 < peak < 256 << 20

    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        file.seek(-4, os.SEEK_END)
        # 0.75 · 2 + 0.25 · 4 = 2.5, after a zero.
        assert file.read() == b"\x00\x00\x20\x40"
