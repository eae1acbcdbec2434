"""What methods gather of a tensor does not grow with it: peak memory of an engine alone, without torch."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROWS, COLUMNS = 128, 1 << 18
BYTES = 2 * ROWS * COLUMNS

# Prints how much the peak rose over the merge.
PROGRAM = """
import json, sys
from pathlib import Path
from safemerge_fast import _engine

def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) << 10

directory, merge = Path(sys.argv[1]), json.loads(sys.argv[2])
def stated_files(path):
    return {file: facts.to_dict() for file, facts in _engine.Checkpoint(path).identity().items()}

sources = {
    name: {"path": str(directory / name), "files": stated_files(directory / name)}
    for name in ("left", "right")
}
tensor = {"name": "x", "dtype": "BF16", "shape": json.loads(sys.argv[3]), "operation": 0}
shards = [{"file": "out.safetensors", "tensors": [tensor]}]
operations = [{"merge": merge}]
plan = _engine.Plan(json.dumps({"version": 2, "sources": sources, "operations": operations, "shards": shards}))
before = peak()
output = _engine.JobDirectory(directory / sys.argv[4], identity="a test")
plan.execute(output, threads=2, tile_bytes=1 << 20)
output.publish()
print(peak() - before)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one bfloat16 matrix of 64 MiB, all holes (zeros) but for the last element."""
    directory = tmp_path_factory.mktemp("inputs")
    for name, last in (("left", b"\x80\x3f"), ("right", b"\x00\x40")):
        (directory / name).mkdir()
        header = {"x": {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [0, BYTES]}}
        text = json.dumps(header).encode()
        with (directory / name / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.seek(BYTES - 2, os.SEEK_CUR)
            file.write(last)
    return directory


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads peak memory from /proc, which Linux has"
)
@pytest.mark.parametrize(
    ("method", "parameters", "bound"),
    [
        # A sum of 6 MiB for each chunk in work, one total, and 4 MiB of facts; 200 MiB if all 32 chunks were kept.
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, 64 << 20),
        # Two counters of 2 MiB, and copies of them.
        ("breadcrumbs", {"rescale": "l1"}, 40 << 20),
        ("model_stock", {}, 32 << 20),
    ],
)
def test_observations_are_bounded(
    inputs: Path, method: str, parameters: dict[str, object], bound: int
) -> None:
    def operand(source: str) -> dict[str, str]:
        return {"source": source, "tensor": "x"}

    merge: dict[str, object] = {"method": method, "parameters": parameters}
    entries: list[dict[str, object]] = [{"operand": operand("left")}, {"operand": operand("right")}]
    if method != "model_stock":
        entries = [{**entry, "weight": 0.5} for entry in entries]
    if method == "breadcrumbs":
        entries = [{**entry, "parameters": {"density": 0.5}} for entry in entries]
    if method != "nuslerp":
        merge["base"] = operand("left")
    values = [json.dumps({**merge, "operands": entries}), json.dumps([ROWS, COLUMNS]), f"out-{method}"]
    command = [sys.executable, "-c", PROGRAM, str(inputs), *values]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < bound, f"{int(done.stdout) >> 20} MiB"
