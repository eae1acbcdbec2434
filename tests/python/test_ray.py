"""Ray's workers prepare the shards: the bytes are those of one process, whatever becomes of workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_quartet
from invoke import run
from safetensors.torch import load_file, save_file
from test_attempts import COMPARED, FILES, attempts_left, files_of

from safemerge_fast import _engine

# Ray reads it while it is imported; without it, 127.0.0.1 becomes an address that others can reach.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'safemerge-fast[ray]'")
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def quartet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("quartet")
    return write_quartet(path, hidden=24, vocabulary=60, layers=2, intermediate=32, shards=3)


def words(quartet: dict[str, Path], output: Path) -> list[str]:
    roles = [word for role in ("aligned", "finetuned") for word in (f"--{role}", str(quartet[role]))]
    return ["merge", "--recipe", "wise-ft", *roles, "-o", str(output), "-q"]


@pytest.fixture(scope="module")
def whole(quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run(*words(quartet, output)).exit_code == 0
    return files_of(output)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Four processors on 127.0.0.1, where each worker process waits for two seconds before it syncs its first shard."""
    from ray.cluster_utils import Cluster

    changed = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FAILPOINTS": "shard.sync=1*sleep(2000)",
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "node_ip_address": "127.0.0.1", "include_dashboard": False},
    )
    yield cluster.address
    cluster.shutdown()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def workers() -> list[int]:
    """Processes of this cluster that are at an attempt."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
            environment = (path.parent / "environ").read_bytes()
        except OSError:
            continue
        if text.startswith(b"ray::_attempt") and b"FAILPOINTS=shard.sync=1*sleep(2000)" in environment:
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("task_cpus", [4, 2, 1])
def test_bytes_do_not_depend_on_the_number_of_workers(
    quartet: dict[str, Path], whole: dict[str, bytes], tmp_path: Path, cluster: str, task_cpus: int
) -> None:
    output = tmp_path / "out"
    done = run(*words(quartet, output), "--executor", f"ray:{cluster}", "--task-cpus", str(task_cpus))
    assert done.exit_code == 0, done.stderr
    assert files_of(output) == whole
    assert run("verify", output, "-q").exit_code == 0
    assert not ray.is_initialized()


@pytest.mark.skipif(not _engine.fault_points(), reason="workers are too quick without fail points")
def test_the_shard_of_a_worker_that_dies_is_handed_out_again(
    quartet: dict[str, Path], whole: dict[str, bytes], tmp_path: Path, cluster: str
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "safemerge_fast", *words(quartet, output)]
    job = subprocess.Popen([*command, "--executor", f"ray:{cluster}", "--task-cpus", "4"])
    attempts = tmp_path / ".out.safemerge" / "attempts"
    until = time.monotonic() + 60
    while not (attempts.is_dir() and os.listdir(attempts) and (found := workers())):
        assert time.monotonic() < until
        assert job.poll() is None
        time.sleep(0.02)
    os.kill(found[0], signal.SIGKILL)
    assert job.wait(timeout=120) == 0
    assert files_of(output) == whole


def test_wrong_data_is_not_tried_again(tmp_path: Path, cluster: str) -> None:
    quartet = write_quartet(tmp_path / "in", hidden=24, vocabulary=60, layers=2, intermediate=32, shards=3)
    file = sorted(quartet["finetuned"].glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    output = tmp_path / "out"
    done = run(*words(quartet, output), "--executor", f"ray:{cluster}", "--task-cpus", "4")
    assert done.exit_code == 3, done.stderr
    assert name in done.stderr
    assert "(on " in done.stderr
    assert done.stderr.count("\n") == 1
    assert attempts_left(output) == []
    assert not output.exists()


@pytest.mark.skipif(not _engine.fault_points(), reason="workers are too quick without fail points")
def test_an_interruption_stops_the_workers(
    quartet: dict[str, Path], whole: dict[str, bytes], tmp_path: Path, cluster: str
) -> None:
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "safemerge_fast",
        *words(quartet, output),
        "--executor",
        f"ray:{cluster}",
    ]
    # Processes that have not yet waited: with another number of threads none is used again.
    job: Any = subprocess.Popen([*command, "--task-cpus", "2"], stderr=subprocess.PIPE, text=True)
    attempts = tmp_path / ".out.safemerge" / "attempts"
    until = time.monotonic() + 60
    while not (attempts.is_dir() and os.listdir(attempts)):
        assert time.monotonic() < until
        if job.poll() is not None:
            pytest.skip("the workers were quicker than the test")
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=30)
    assert job.returncode == 130, said
    assert said == "error: interrupted; what is committed stays, continue with --resume\n"
    assert not output.exists()
    assert run(*words(quartet, output), "--resume").exit_code == 0
    assert files_of(output) == whole


def test_no_cluster_answers(quartet: dict[str, Path], tmp_path: Path) -> None:
    done = run(*words(quartet, tmp_path / "out"), "--executor", "ray:127.0.0.1:1")
    assert done.exit_code == 2, done.stderr
    assert "no Ray cluster answers" in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_cluster_on_this_machine(quartet: dict[str, Path], whole: dict[str, bytes], tmp_path: Path) -> None:
    """As typed: the command starts the cluster and ends it."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "safemerge_fast", *words(quartet, output), "--executor", "ray:local"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert (done.returncode, done.stderr) == (0, "")
    assert files_of(output) == whole
    assert set(COMPARED) >= set(FILES)
