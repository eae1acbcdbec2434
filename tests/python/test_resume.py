"""Interruption, resumption and replacement of outputs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from dense import assert_same_bits, dense_merge, load, weight_files

from safemerge_fast import OutputError, ProgressEvent, merge, verify

JOURNAL = ".safemerge-fast.journal"


@pytest.fixture(scope="module")
def done(quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """One merge with the default settings, for tests that only look at it."""
    output = tmp_path_factory.mktemp("merge") / "out"
    return output, merge(**quartet, output=output)


def stop_after_first_shard(output: Path, error: BaseException) -> Callable[[ProgressEvent], None]:
    """A progress callback that raises once the first shard is committed and the second is being analysed."""
    import time

    journal = output / JOURNAL
    seen: list[str] = []

    def stop(event: ProgressEvent) -> None:
        if event.stage != "analysis":
            return
        seen.append(event.item)
        if len(seen) > 8:
            deadline = time.monotonic() + 20
            # A shard counts as committed once its line is in the journal, a moment after it has its name.
            while b"model-00001" not in journal.read_bytes() and time.monotonic() < deadline:
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
        "import test_resume\n"
        "from safemerge_fast import merge\n"
        "class Killed(BaseException): pass\n"
        "stop = test_resume.stop_after_first_shard(Path(sys.argv[2]), Killed())\n"
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
