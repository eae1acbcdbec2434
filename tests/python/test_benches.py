"""The benchmarks run, compare like with like, and their cost model adds up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports modules of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(BENCHES))

    def load(name: str) -> ModuleType:
        return __import__(name)

    return load


def script(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHES / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("model", "billions", "files"),
    [
        ("qwen2.5-0.5b", 0.494, 1),
        ("qwen2.5-1.5b", 1.544, None),
        ("llama-3.2-3b", 3.213, None),
        ("llama-3.1-8b", 8.030, 4),
        ("llama-3-70b", 70.554, 30),
        ("llama-3.1-405b", 405.853, 191),
        ("mixture-1t", 1026, None),
    ],
)
def test_shapes_are_those_of_the_published_models(
    benches: Any, model: str, billions: float, files: int | None
) -> None:
    shapes = benches("shapes").MODELS[model]
    assert shapes.parameters / 1e9 == pytest.approx(billions, rel=1e-3)
    assert files is None or len(shapes.files()) == files


def test_flops_count_the_products_of_the_analysis(benches: Any) -> None:
    model = benches("cost_model")
    assert model.dense_flops(10, 100) == 3 * 10 * 10 * 100
    assert model.dense_flops(100, 10) == 3 * 10 * 10 * 100 + 2 * 10**3
    small = benches("shapes").MODELS["qwen2.5-1.5b"]
    # Between 3 and 4 times d_out · d_in · the smaller of them for modules that are wide or very tall.
    least = sum(out * into * min(out, into) for out, into in small.projections())
    assert 3 * least <= model.dense_analysis_work(small).flops <= 4 * least
    projections = sum(out * into for out, into in small.projections())
    assert model.low_rank_analysis_work(small, 16).flops == 4 * projections * 32


def test_passes_are_those_of_the_registry(benches: Any) -> None:
    from safemerge_fast import _engine

    registered = {method.name: method.passes for method in _engine.methods()}
    # dare_ties observes only where it rescales by norms.
    assert {**benches("cost_model").MERGES, "dare_ties": (3, registered["dare_ties"])} == {
        name: (models, registered[name]) for name, (models, _) in benches("cost_model").MERGES.items()
    }


def test_a_merge_takes_what_its_slowest_resource_takes(benches: Any) -> None:
    model = benches("cost_model")
    machine = model.Machine(
        name="m",
        source="s",
        cores=2,
        read_gb_s=2.0,
        write_gb_s=1.0,
        startup_s=0.5,
        core_s_per_gb={"linear": 1.0, "ties": 10.0},
    )
    work = model.Work(read=4e9, touched=4e9, written=2e9)
    assert model.merge_seconds(work, "linear", machine) == 0.5 + 4 / 2.0 + 2 / 1.0
    assert model.merge_seconds(work, "ties", machine) == 0.5 + 2 * 10 / 2
    assert model.merge_seconds(work, "slerp", machine) is None
    assert [model.duration(second) for second in (None, 5.0, 150.0, 7000.0)] == [
        "TODO",
        "5 s",
        "2.5 min",
        "1.9 h",
    ]


def test_a_line_is_found(benches: Any) -> None:
    intercept, slope = benches("ladder").line([(1.0, 2.5), (2.0, 4.5), (10.0, 20.5)])
    assert (intercept, slope) == (pytest.approx(0.5), pytest.approx(2.0))


def test_the_peers_do_the_same_work(benches: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    jobs = benches("jobs")
    for name, seed in jobs.FINETUNED.items():
        flags = [] if seed is None else ["--finetune", seed]
        script("checkpoints.py", "tiny", tmp_path / name, *flags)
    for job in ("linear", "slerp", "ties"):
        configuration = tmp_path / f"{job}.yml"
        configuration.write_text(json.dumps(jobs.JOBS[job].configuration(tmp_path)))
        merged = []
        for tool in ("safemerge-fast", "torch_merge.py"):
            output = tmp_path / f"{job}-{tool}"
            if tool == "torch_merge.py":
                script(tool, configuration, "-o", output)
            else:
                words = [sys.executable, "-m", "safemerge_fast", "run", str(configuration), "-o", str(output)]
                subprocess.run(words, check=True, capture_output=True)
            merged.append([load_file(file) for file in sorted(output.glob("*.safetensors"))])
        ours, theirs = merged
        assert len(ours) == len(theirs) == 2
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() == other.keys()
            off = sum(int((mine[key] != other[key]).sum()) for key in mine)
            # float32 sums in another order, ties at the threshold and roundings on the fence aside.
            assert off < 0.02 * sum(tensor.numel() for tensor in mine.values()), job


@pytest.mark.skipif(sys.platform != "linux", reason="limits and peaks are read from /proc")
def test_seventy_billion_runs_on_a_model_of_any_size(tmp_path: Path) -> None:
    done = script("seventy_billion.py", "--models", "tiny", "--directory", tmp_path)
    assert "| tiny | linear | holes |" in done.stdout
    (comparison,) = json.loads((tmp_path / "ladder.json").read_text())["comparisons"]
    assert comparison["facts"]["merge"]["shards"] == 2
    assert not comparison["facts"]["merge"]["torch"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits and peaks are read from /proc")
@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        # Private memory is refused by the kernel.
        ("bytearray(150 << 20)", "MemoryError"),
        # Shared memory, as pages of mapped files, is watched.
        (
            "import mmap, time; m = mmap.mmap(-1, 150 << 20); m[::4096] = bytes(38400); time.sleep(9)",
            "kill",
        ),
    ],
)
def test_a_memory_limit_holds(benches: Any, tmp_path: Path, program: str, complaint: str) -> None:
    command = [sys.executable, "-c", program]
    competitor = benches("timing").Competitor("hog", command, tmp_path / "none", limit_mb=100)
    with pytest.raises(SystemExit, match=complaint):
        competitor.run()


def test_a_competitor_that_writes_too_little_does_not_count(benches: Any, tmp_path: Path) -> None:
    output = tmp_path / "output"
    command = [sys.executable, "-c", f"import os; os.mkdir({os.fspath(output)!r})"]
    with pytest.raises(SystemExit, match="wrote 0 bytes"):
        benches("timing").Competitor("lazy", command, output, least_bytes=1).run()
