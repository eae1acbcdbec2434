"""Interruption, resumption and replacement of outputs, as the Python API has them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from dense import assert_same_bits, dense_merge, load, weight_files
from protocol import files_of, job_of

import safemerge_fast.recipes.run
from safemerge_fast import OutputError, ProgressEvent, merge, verify


@pytest.fixture(scope="module")
def done(quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """One merge with the default settings, for tests that only look at it."""
    output = tmp_path_factory.mktemp("merge") / "out"
    return output, merge(**quartet, output=output)


def stop_when_written(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Raises once all shards are committed and nothing else is."""

    def stop(*arguments: object) -> None:
        raise error

    patch.setattr(safemerge_fast.recipes.run, "_report", stop)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the callback failed")])
def test_an_interrupted_merge_leaves_a_job_and_is_resumed(
    quartet: dict[str, Path], tmp_path: Path, done, error: BaseException
) -> None:
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_when_written(patch, error)
        with pytest.raises(type(error)):
            merge(**quartet, output=output)
    assert not output.exists()
    shard = job_of(output) / "output" / "model-00001-of-00003.safetensors"
    before = shard.stat()
    with pytest.raises(OutputError, match="unfinished merge"):
        merge(**quartet, output=output)
    report = merge(**quartet, output=output, resume=True)
    after = (output / shard.name).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert all(shard.resumed for shard in report.shards)
    assert (report.bytes_read, report.bytes_written) == (0, 0)
    assert weight_files(output) == weight_files(done[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    verify(output)


def test_scores_that_were_measured_are_not_measured_again(
    quartet: dict[str, Path], tmp_path: Path, done
) -> None:
    output = tmp_path / "out"
    seen: list[int] = []

    def stop(event: ProgressEvent) -> None:
        if event.stage == "analysis" and event.done == 5:
            raise KeyboardInterrupt

    def note(event: ProgressEvent) -> None:
        if event.stage == "analysis":
            seen.append(event.done)

    with pytest.raises(KeyboardInterrupt):
        merge(**quartet, output=output, progress=stop)
    merge(**quartet, output=output, resume=True, progress=note)
    # Five are there at once, and the others follow one by one.
    assert seen == list(range(5, 22))
    assert weight_files(output) == weight_files(done[0])


def test_resuming_with_other_files_leaves_no_stray_weights(
    quartet: dict[str, Path], tmp_path: Path, done
) -> None:
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_when_written(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge(**quartet, output=output)
    merge(**quartet, output=output, resume=True, max_shard_size="1GB")
    assert sorted(weight_files(output)) == ["model.safetensors"]
    assert_same_bits(load(output), load(done[0]))


def test_resuming_with_another_alpha_redoes_what_it_changes(quartet: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_when_written(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge(**quartet, output=output)
    report = merge(**quartet, output=output, resume=True, alpha=0.3)
    merged = {tensor.name for tensor in report.tensors if tensor.merged}
    assert_same_bits(load(output), dense_merge(quartet, merged, alpha=0.3))


def test_resuming_a_complete_output_returns_its_report(
    quartet: dict[str, Path], tmp_path: Path, done
) -> None:
    output = tmp_path / "out"
    first = merge(**quartet, output=output)
    before = files_of(output)
    again = merge(**quartet, output=output, resume=True)
    assert (again.seconds, again.shards, again.output) == (first.seconds, first.shards, first.output)
    assert files_of(output) == before


@pytest.mark.parametrize("overwrite", [True, "in-place"])
def test_overwrite_replaces_an_output_of_another_layout(
    quartet: dict[str, Path], tmp_path: Path, done, overwrite: bool | str
) -> None:
    output = tmp_path / "out"
    merge(**quartet, output=output, alpha=0.1, max_shard_size="60KB")
    with pytest.raises(OutputError, match="--overwrite"):
        merge(**quartet, output=output)
    merge(**quartet, output=output, overwrite=overwrite)
    assert weight_files(output) == weight_files(done[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    verify(output)


def test_a_failed_overwrite_leaves_the_old_output(quartet: dict[str, Path], tmp_path: Path, done) -> None:
    output = tmp_path / "out"
    shutil.copytree(done[0], output)

    def fail(event: ProgressEvent) -> None:
        raise RuntimeError("at once")

    with pytest.raises(RuntimeError):
        merge(**quartet, output=output, overwrite=True, progress=fail)
    assert files_of(output) == files_of(done[0])
    verify(output)
