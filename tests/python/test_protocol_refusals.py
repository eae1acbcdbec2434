"""What an output may not touch, whatever the flags: other people's files, inputs by any name, another job's work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from forking import Done
from protocol import REPORT, World, files_of, job_of, mounted, standing

FLAGS = [(), ("--resume",), ("--overwrite",), ("--overwrite=in-place",)]


def assert_refused(done: Done, *parts: str) -> None:
    assert done.code == 5, done
    assert done.stdout == "", done
    assert done.stderr.startswith("error: "), done
    assert done.stderr.count("\n") == 1, done
    for part in parts:
        assert part in done.stderr, done


# --- two writers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, "single"])
def test_writers_at_once(world: World, old: str | None) -> None:
    """One of them wins; the others are refused, or find its output complete. In any case it is whole."""
    for number in range(5):
        flags = ("--overwrite",) if old is not None else ("--resume",) if number % 2 else ()
        case = world.case("scored", world.path / "writers" / f"{old}-{number}", *flags, old=old)
        all_done = world.run_at_once(*[case.run(*flags) for _ in range(4)])
        assert any(done.code == 0 for done in all_done)
        for done in all_done:
            if done.code != 0:
                assert_refused(done)
                assert (
                    "is locked" in done.stderr or "complete" in done.stderr or "unfinished" in done.stderr
                ), done
        case.check_done()


def test_an_output_that_another_process_holds(world: World) -> None:
    from safemerge_fast import _engine

    case = world.case("scored", world.path / "writers" / "held")
    holder = _engine.JobDirectory(case.output, identity="another", inputs=[])
    try:
        for flags in FLAGS:
            assert_refused(case.work(*flags), str(case.output), "another merge is writing it")
    finally:
        holder.close()
    assert case.work().code == 0


# --- what is not ours -----------------------------------------------------------------------------


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", ["thesis.tex", "folder/thesis.tex", "model-00009.safetensors", ".hidden"])
def test_a_foreign_file_in_the_output(
    world: World, tmp_path: Path, name: str, flags: tuple[str, ...]
) -> None:
    case = world.case("scored", tmp_path, old="single")
    (case.output / name).parent.mkdir(exist_ok=True)
    (case.output / name).write_text("years of work")
    before = files_of(case.output)
    assert_refused(case.work(*flags), name.partition("/")[0], "move it away")
    assert files_of(case.output) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("flags", FLAGS)
def test_a_directory_without_a_report_is_nobody_of_ours(
    world: World, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    case = world.case("scored", tmp_path, old="single")
    (case.output / REPORT).unlink()
    before = files_of(case.output)
    assert_refused(case.work(*flags), "did not write")
    assert files_of(case.output) == before


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/../../outside", "", ".", "folder//x", "x\0y"]
)
def test_a_report_that_lists_hostile_names(
    world: World, tmp_path: Path, name: str, flags: tuple[str, ...]
) -> None:
    case = world.case("scored", tmp_path / "place", old="single")
    (tmp_path / "place" / "outside").write_text("years of work")
    (tmp_path / "outside").write_text("years of work")
    report = json.loads((case.output / REPORT).read_text())
    report["files"].append({"name": name, "bytes": 13, "digest": None})
    (case.output / REPORT).write_text(json.dumps(report))
    before = files_of(tmp_path)
    assert_refused(case.work(*flags), REPORT)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"job": {"identity": "x"}}', "\xff", "[" * 100_000])
def test_a_report_that_is_none(world: World, tmp_path: Path, text: str) -> None:
    case = world.case("scored", tmp_path, old="single")
    (case.output / REPORT).write_text(text, encoding="latin-1")
    before = files_of(case.output)
    for flags in FLAGS:
        assert_refused(case.work(*flags), REPORT)
    assert files_of(case.output) == before


def test_a_report_that_is_a_pipe(world: World, tmp_path: Path) -> None:
    case = world.case("scored", tmp_path, old="single")
    (case.output / REPORT).unlink()
    os.mkfifo(case.output / REPORT)
    for flags in FLAGS:
        assert_refused(case.work(*flags))


@pytest.mark.parametrize("flags", [("--resume",), ("--overwrite",)])
def test_a_journal_with_hostile_names(world: World, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Lines that name files elsewhere are nobody's: nothing outside is touched, and the job ends as any."""
    case = world.case("scored", tmp_path / "place")
    outside = tmp_path / "outside"
    outside.write_text("years of work")
    killed = case.work(before=killed_before("_report"))
    assert killed.code == -9
    with (job_of(case.output) / "journal").open("a") as journal:
        for name in ("../../../outside", str(outside), "a/../../outside", "\\u0000", "../output", ".."):
            journal.write(f'\n{{"file": {json.dumps(name)}, "size": 13, "digest": "00"}}\n')
            journal.write(f'{{"revoked": {json.dumps(name)}}}\n')
        journal.write('{"file": "model-00001-of-00002.safe')
    done = case.work(*flags)
    assert (done.code, done.stderr) == (0, "")
    assert outside.read_text() == "years of work"
    case.check_done()


def killed_before(name: str) -> str:
    """Python that kills a run before a function of the recipes' runner."""
    return (
        "import os, safemerge_fast.recipes.run as run\n"
        f"def stop(*arguments):\n    os.kill(os.getpid(), 9)\nrun.{name} = stop\n"
    )


@pytest.mark.parametrize("flags", FLAGS)
def test_a_job_directory_that_is_somebody_elses(world: World, tmp_path: Path, flags: tuple[str, ...]) -> None:
    case = world.case("scored", tmp_path)
    job_of(case.output).mkdir()
    (job_of(case.output) / "thesis.tex").write_text("years of work")
    assert_refused(case.work(*flags), "thesis.tex")
    assert files_of(tmp_path) == {f".{case.output.name}.safemerge/thesis.tex": b"years of work"}


# --- outputs that are inputs ----------------------------------------------------------------------


def link_to_weights(inputs: Path, output: Path) -> None:
    output.mkdir()
    for file in (inputs / "finetuned").iterdir():
        if file.is_file():
            (output / file.name).symlink_to(file)


def hard_links(inputs: Path, output: Path) -> None:
    output.mkdir()
    for file in (inputs / "finetuned").iterdir():
        if file.is_file():
            os.link(file, output / file.name)


def link_to_directory(inputs: Path, output: Path) -> None:
    output.symlink_to(inputs / "safe")


def link_to_parent(inputs: Path, output: Path) -> None:
    output.symlink_to(inputs)


OVERLAPS: dict[str, Callable[[Path, Path], None]] = {
    "symbolic links to the weights": link_to_weights,
    "hard links to the weights": hard_links,
    "a link to an input": link_to_directory,
    "a link to what holds the inputs": link_to_parent,
}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", OVERLAPS)
def test_an_output_that_is_an_input_by_another_name(
    world: World, tmp_path: Path, name: str, marked: bool
) -> None:
    """Also if a report says that all of it is ours."""
    inputs, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(world.path / "in", inputs)
    OVERLAPS[name](inputs, output)
    if marked:
        files = [
            {"name": file, "bytes": len(data), "digest": None} for file, data in files_of(output).items()
        ]
        report = {"job": {"identity": "x"}, "files": files}
        (output.resolve() / REPORT).write_text(json.dumps(report))
    before = files_of(inputs)
    words = [word.replace(str(world.path / "in"), str(inputs)) for word in world.words["scored"]]
    for flags in FLAGS:
        assert_refused(
            world.run(*words, "-o", output, *flags), "input" if marked or "link to" in name else ""
        )
        assert files_of(inputs) == before


def test_a_path_that_leads_back_to_an_input(world: World, tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    shutil.copytree(world.path / "in", inputs)
    before = files_of(tmp_path)
    words = [word.replace(str(world.path / "in"), str(inputs)) for word in world.words["scored"]]
    for output in (tmp_path / "new" / ".." / "in" / "safe", inputs / "base" / "new", inputs):
        for flags in FLAGS:
            assert_refused(world.run(*words, "-o", output, *flags), "input")
    assert files_of(tmp_path) == before
    assert os.listdir(tmp_path) == ["in"]


def test_a_bind_mount_of_an_input(world: World) -> None:
    place = world.path / "bound"
    inputs, output = place / "in", place / "out"
    with mounted(inputs, "16m"):
        shutil.copytree(world.path / "in", inputs, dirs_exist_ok=True)
        output.mkdir()
        subprocess.run(["mount", "--bind", str(inputs / "safe"), str(output)], check=True)
        try:
            before = files_of(inputs)
            words = [word.replace(str(world.path / "in"), str(inputs)) for word in world.words["scored"]]
            for flags in FLAGS:
                assert_refused(world.run(*words, "-o", output, *flags), "input")
            assert files_of(inputs) == before
        finally:
            subprocess.run(["umount", str(output)], check=True)


# --- resume and overwrite -------------------------------------------------------------------------


def test_resuming_a_complete_output_says_so(world: World, tmp_path: Path) -> None:
    case = world.case("scored", tmp_path)
    assert case.work().code == 0

    def files() -> dict[Path, tuple[int, ...]]:
        # Not the time of access: the report is read.
        found = {path: path.stat() for path in case.output.rglob("*")}
        return {
            path: (its.st_ino, its.st_size, its.st_mtime_ns, its.st_ctime_ns) for path, its in found.items()
        }

    before = files()
    assert case.work("--resume").code == 0
    assert files() == before
    assert os.listdir(tmp_path) == ["out"]


def test_resuming_a_damaged_output_is_refused(world: World, tmp_path: Path) -> None:
    case = world.case("scored", tmp_path)
    assert case.work().code == 0
    shard = next(case.output.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    assert_refused(case.work("--resume"), shard.name, "--overwrite")
    assert case.work("--overwrite").code == 0
    case.check_done()


def test_an_output_with_other_settings_is_not_resumed(world: World, tmp_path: Path) -> None:
    case = world.case("scored", tmp_path, old="single")
    assert_refused(case.work("--resume"), "other settings", "--overwrite")
    assert case.is_old()


def test_a_failure_leaves_what_stood_there(world: World, tmp_path: Path) -> None:
    """An error of another kind in the middle: exit code 1 or 3, the old output stays, and resuming works."""
    case = world.case("scored", tmp_path, "--overwrite", old="adapter")
    before = (
        "import safemerge_fast.recipes.run as run\n"
        "def fail(*arguments):\n    raise RuntimeError\nrun._report = fail\n"
    )
    done = case.work("--overwrite", before=before)
    assert done.code == 1
    assert case.is_old()
    case.check_resumed()


def test_an_unfinished_job_is_named_with_both_ways_out(world: World, tmp_path: Path) -> None:
    case = world.case("scored", tmp_path)
    assert case.work(before=killed_before("_files")).code == -9
    assert standing(case.output) is None
    assert_refused(case.work(), str(job_of(case.output)), "--resume", "--overwrite")
    assert case.work("--overwrite").code == 0
    case.check_done()
