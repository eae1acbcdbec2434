"""Many tensors, many files and many operands: what one engine plan takes of memory and descriptors."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads memory from /proc, which Linux has"
)

PRELUDE = """
import ctypes, json, resource, sys
from pathlib import Path
from safemerge_fast import _engine

def status(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) << 10

def settled():
    # The peak is counted from here on.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")

directory = Path(sys.argv[1])

def plan_of(operations, shards, names, **options):
    sources = {name: _engine.Checkpoint(directory / name, **options) for name in names}
    stated = {
        name: {
            "path": source.path,
            "files": {file: facts.to_dict() for file, facts in source.identity().items()},
        }
        for name, source in sources.items()
    }
    document = {"version": 2, "sources": stated, "operations": operations, "shards": shards}
    return sources, json.dumps(document)
"""


def run(program: str, *arguments: object) -> dict[str, float]:
    """Runs a program in a process of its own, and reads what it prints as JSON."""
    command = [sys.executable, "-c", PRELUDE + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


def write_shard(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Writes a safetensors file without the library, which is slow for many tensors."""
    header, data, end = {}, [], 0
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(values)]}
        end += len(values)
        data.append(values)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


def blend(*weights: float) -> dict[str, object]:
    operands = [
        {"operand": {"source": f"model{number}"}, "weight": weight} for number, weight in enumerate(weights)
    ]
    return {"merge": {"method": "linear", "parameters": {"normalize": False}, "operands": operands}}


MANY = 200_000

MANY_TENSORS = """
names = ["model0", "model1"]
sources, text = plan_of(json.loads(sys.argv[2]), [], names)
shards = [
    {"file": "all.safetensors", "tensors": [
        {"name": tensor.name, "operation": 0} for tensor in sources["model0"].tensors
    ]}
]
sources, text = plan_of(json.loads(sys.argv[2]), shards, names)
del shards
before = settled()
plan = _engine.Plan(text, sources=sources)
parsing = status("VmHWM") - before
after = settled()
del text
before_execution = settled()
output = _engine.JobDirectory(directory / "out", identity="a test")
plan.execute(output, threads=2)
output.publish()
execution = status("VmHWM") - before_execution
print(json.dumps({"parsing": parsing, "plan": after - before, "execution": execution}))
"""


def test_a_plan_of_many_tensors_takes_little_memory(tmp_path: Path) -> None:
    # As a model of experts names them: 62 bytes.
    names = [
        f"model.layers.{number // 1000}.mlp.experts.{number % 1000}.down_proj.weight_{number % 7}"
        for number in range(MANY)
    ]
    values = np.arange(MANY * 4, dtype=np.float32).reshape(MANY, 4)
    for model, scale in (("model0", 1.0), ("model1", 3.0)):
        rows = [row.tobytes() for row in values * np.float32(scale)]
        tensors = {name: ("F32", [2, 2], row) for name, row in zip(names, rows, strict=True)}
        write_shard(tmp_path / model / "model.safetensors", tensors)
    found = run(MANY_TENSORS, tmp_path, json.dumps([blend(0.5, 0.5)]))
    assert found["plan"] < 150 * MANY, found
    assert found["parsing"] < 300 * MANY, found
    # Two workers' tiles, and the header of 25 MB.
    assert found["execution"] < 64 << 20, found

    merged = (tmp_path / "out" / "all.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", merged[:8])
    header = json.loads(merged[8 : 8 + length])
    assert len(header) == MANY + 1
    # (1 + 3) / 2 of whole numbers below 2^24 is exact.
    assert np.array_equal(np.frombuffer(merged, dtype=np.float32, offset=8 + length), 2 * values.reshape(-1))


FILES, MODELS = 200, 7

MANY_FILES = """
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
names = json.loads(sys.argv[3])
shards = [
    {"file": f"model-{n}.safetensors", "tensors": [{"name": f"t{n}.{k}", "operation": 0} for k in range(3)]}
    for n in range(int(sys.argv[4]))
]
backend = sys.argv[5]
sources, text = plan_of(json.loads(sys.argv[2]), shards, names, read_backend=backend)
plan = _engine.Plan(text, sources=sources)
output = _engine.JobDirectory(directory / f"out-{backend}", identity="a test")
facts = plan.execute(output, threads=16)
output.publish()
found = plan.verify(directory / f"out-{backend}", threads=16)
open_files = len(list(Path("/proc/self/fd").iterdir()))
print(json.dumps({
    "written": len(facts), "wrong": len(found.mismatches), "checked": found.bytes_checked, "open": open_files
}))
"""


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_many_files_of_many_models_need_few_descriptors(tmp_path: Path, backend: str) -> None:
    rng = np.random.default_rng(5)
    names = [f"model{number}" for number in range(MODELS)]
    expected = {}
    for number in range(FILES):
        total = np.zeros((3, 16), dtype=np.float64)
        for name in names:
            values = rng.integers(-8, 8, (3, 16)).astype(np.float32)
            total += values
            tensors = {f"t{number}.{k}": ("F32", [16], values[k].tobytes()) for k in range(3)}
            write_shard(tmp_path / name / f"model-{number}.safetensors", tensors)
        expected[f"model-{number}.safetensors"] = total
    for name in names:
        weight_map = {f"t{n}.{k}": f"model-{n}.safetensors" for n in range(FILES) for k in range(3)}
        index = tmp_path / name / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    operations = json.dumps([blend(*[1.0] * MODELS)])
    found = run(MANY_FILES, tmp_path, operations, json.dumps(names), FILES, backend)
    assert found["written"] == FILES
    assert found["wrong"] == 0
    # A few files a model may stay open for the tensors that follow; none for each shard.
    assert found["open"] < 64
    for file, total in expected.items():
        data = (tmp_path / f"out-{backend}" / file).read_bytes()
        assert np.array_equal(np.frombuffer(data[-4 * total.size :], np.float32), total.reshape(-1))


TOO_MANY = """
sources, text = plan_of(json.loads(sys.argv[2]), json.loads(sys.argv[3]), ["model0"], read_backend="pread")
plan = _engine.Plan(text, sources=sources)
output = _engine.JobDirectory(directory / "out", identity="a test")
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
held = []
try:
    while True:
        held.append(open("/dev/null"))
except OSError:
    held.pop().close()
message = ""
try:
    plan.execute(output, threads=1)
except Exception as error:
    message = f"{type(error).__name__}: {error}"
print(json.dumps({"message": message}))
"""


def test_no_descriptor_left_is_an_error_that_names_file_and_limit(tmp_path: Path) -> None:
    write_shard(tmp_path / "model0" / "model.safetensors", {"x": ("F32", [4], bytes(16))})
    shards = [{"file": "out.safetensors", "tensors": [{"name": "x", "operation": 0}]}]
    found = run(TOO_MANY, tmp_path, json.dumps([blend(1.0)]), json.dumps(shards))
    message = str(found["message"])
    assert ".safetensors" in message
    assert "may have 32 files open" in message
    assert "ulimit -n" in message


RANK, ROWS, COLUMNS, OPERANDS, MATRICES = 256, 256, 2048, 10, 6

BUDGET = """
options = json.loads(sys.argv[3])
shards = [{"file": "out.safetensors", "tensors": [{"name": f"w{n}", "operation": n} for n in range(6)]}]
sources, text = plan_of(
    json.loads(sys.argv[2]), shards, ["model", "adapters"], read_backend=options.pop("read_backend")
)
plan = _engine.Plan(text, sources=sources)
free, bound = plan.memory(threads=16), plan.memory(threads=16, **options)
before = settled()
output = _engine.JobDirectory(directory / sys.argv[4], identity="a test")
plan.execute(output, threads=16, **options)
output.publish()
print(json.dumps({"free": free, "bound": bound, "grown": status("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Six matrices, each with ten adapters of rank 256; and operations that blend the ten sums."""
    directory = tmp_path_factory.mktemp("adapted")
    rng = np.random.default_rng(3)

    def values(*shape: int) -> tuple[str, list[int], bytes]:
        return "F32", list(shape), rng.standard_normal(shape, dtype=np.float32).tobytes()

    matrices = {f"w{n}": values(ROWS, COLUMNS) for n in range(MATRICES)}
    write_shard(directory / "model" / "model.safetensors", matrices)
    factors = {}
    for n in range(MATRICES):
        for k in range(OPERANDS):
            factors[f"{n}.{k}.a"], factors[f"{n}.{k}.b"] = values(RANK, COLUMNS), values(ROWS, RANK)
    write_shard(directory / "adapters" / "model.safetensors", factors)
    operations = []
    for n in range(MATRICES):
        operands = []
        for k in range(OPERANDS):
            a, b = ({"source": "adapters", "tensor": f"{n}.{k}.{factor}"} for factor in "ab")
            low_rank = [{"a": a, "b": b, "scale": 0.01}]
            operands.append({"operand": {"source": "model", "low_rank": low_rank}, "weight": 0.1})
        merge = {"method": "linear", "parameters": {"normalize": False}, "operands": operands}
        operations.append({"merge": merge})
    return directory, json.dumps(operations)


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_a_memory_budget_counts_factors_and_holds(adapted: tuple[Path, str], backend: str) -> None:
    directory, operations = adapted
    # The factors of one matrix that all workers share take 20 MiB of it.
    budget = 96 << 20
    options = json.dumps({"memory_budget": budget, "read_backend": backend})
    found = run(BUDGET, directory, operations, options, f"out-{backend}")
    assert found["free"] > 2 * budget
    assert found["bound"] <= budget
    # Slack for stacks of threads and what the allocator keeps.
    assert found["grown"] < budget + (16 << 20), found


def test_a_budget_that_one_worker_exceeds_is_refused(adapted: tuple[Path, str]) -> None:
    directory, operations = adapted
    options = json.dumps({"memory_budget": 16 << 20, "read_backend": "auto"})
    with pytest.raises(AssertionError, match=r"memory budget of 16777216 bytes is below the \d+ that one"):
        run(BUDGET, directory, operations, options, "refused")
