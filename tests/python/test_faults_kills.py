"""A kill at each step of the output protocol: the old output or the new one stands there; --resume ends the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
from protocol import Case, World, job_of, mounted, standing

from safemerge_fast import _engine

POINTS = _engine.fault_points()
pytestmark = pytest.mark.skipif(
    not POINTS, reason="the engine has no fail points; make test builds one that has"
)

KILLED = -9

OPENING = [
    *("job.make", "lock.open", "lock.take", "output.make", "record.create", "record.write", "record.sync"),
    *("record.rename", "record.directory-sync", "journal.open", "journal.directory-sync"),
]
SCORES = ["job-file.open", "job-file.write", "job-file.remove"]
SHARDS = [
    *("attempts.make", "attempt.write", "attempt.sync", "attempts.give-up", "attempts.remove"),
    *("shard.create", "shard.allocate", "shard.write", "shard.truncate", "shard.sync", "shard.rename"),
    *("shard.directory-sync", "commit.write", "commit.sync"),
]
FILES = [
    *("file.directory", "file.create", "file.write", "file.sync", "file.rename", "file.directory-sync"),
    "sweep.directory",
]
FRESH = ["publish.sync", "publish.rename", "publish.parent-sync", "publish.job-sync"]
EXCHANGE = [
    *("publish.sync", "publish.exchange", "publish.parent-sync", "publish.job-sync"),
    *("old.file", "old.directory"),
]
ASIDE = ["publish.set-aside", "publish.move-in", "publish.parent-sync", "publish.job-sync", "old.file"]
DOOM = ["doom.rename", "doom.sync", "doom.file", "doom.directory"]
DISCARD = ["discard.file", "discard.lock", "discard.job"]
INSIDE = [
    *("moves.create", "moves.write", "moves.sync", "moves.rename", "moves.directory-sync"),
    *("move.directory", "move.rename", "move.sync"),
]
# What is left of another job: files of its scores, shards, half a file in a folder.
LEFT = [
    *("sweep.file", "sweep.directory", "revoke.write", "revoke.sync", "discard.directory", "attempt.abort"),
]

ALL = {
    *(*OPENING, *SCORES, *SHARDS, *FILES, *FRESH, *EXCHANGE, *ASIDE, *DOOM, *DISCARD, *INSIDE, *LEFT),
    *("parent.make", "parent.sync", "settle.put-back", "settle.sync", "shard.clone", "move.remove"),
}


def at(points: Iterable[str]) -> list[str]:
    """A kill when each is passed for the first time."""
    return [f"{point}=return(kill)" for point in points]


def later(*points: str) -> list[str]:
    """A kill when each is passed for the second time."""
    return [f"{point}=1*off->return(kill)" for point in points]


def name_of(points: str) -> str:
    """A directory's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in points)


def kill(case: Case, points: str) -> None:
    """Kills a run."""
    done = case.work(*case.flags, points=points)
    assert done.code == KILLED, f"not killed: {done}"


def kill_and_resume(case: Case, points: str, *, nothing: bool = False) -> None:
    """Kills a run, looks at what stands there, resumes and looks again."""
    kill(case, points)
    case.check_whole(nothing=nothing)
    case.check_resumed()


def test_every_point_is_known() -> None:
    assert set(POINTS) == ALL


# --- nothing stood there --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["measured", "scored", "single", "adapter", "fold", "mergekit"])
def test_a_fresh_output(world: World, kind: str) -> None:
    points = at(["file.rename", *FRESH, *DISCARD])
    if kind == "measured":
        points = at([*OPENING, *SCORES, *SHARDS, *FILES, *FRESH, *DISCARD])
        points += later("job-file.write", "shard.rename", "commit.sync", "file.rename")
    elif kind != "adapter":
        points += at(["commit.sync"])
    place = world.path / "fresh" / kind
    world.each(points, lambda point: kill_and_resume(world.case(kind, place / name_of(point)), point))


def test_directories_above_that_are_not_there_yet(world: World) -> None:
    def check(point: str) -> None:
        case = world.case("fold", world.path / "deep" / name_of(point))
        case.output = case.output.parent / "a" / "b" / "out"
        kill_and_resume(case, point)

    world.each(at(["parent.make", "parent.sync"]) + later("parent.make", "parent.sync"), check)


# --- an older output stood there ------------------------------------------------------------------


def test_an_output_that_is_exchanged_for_another(world: World) -> None:
    # Steps that know nothing of an older output are those of a fresh one.
    names = ["lock.take", "record.rename", "journal.open", "shard.rename", "commit.sync", "file.rename"]
    points = at([*names, *EXCHANGE, *DISCARD]) + later("old.file", "file.rename", "commit.sync")
    place = world.path / "exchange"
    world.each(
        points,
        lambda point: kill_and_resume(
            world.case("scored", place / name_of(point), "--overwrite", old="single"), point
        ),
    )


@pytest.mark.parametrize(
    ("kind", "old"),
    [("adapter", "scored"), ("single", "adapter"), ("adapter", "adapter"), ("mergekit", "fold")],
)
def test_an_output_of_another_format_or_the_same(world: World, kind: str, old: str) -> None:
    place = world.path / "formats" / f"{kind}-{old}"
    world.each(
        at(["file.rename", "publish.exchange", "publish.parent-sync", "old.file", "discard.file"]),
        lambda point: kill_and_resume(
            world.case(kind, place / name_of(point), "--overwrite", old=old), point
        ),
    )


def test_a_file_system_that_cannot_exchange(world: World) -> None:
    """The old output is set aside then, and for a moment nothing stands there."""
    place = world.path / "aside"

    def check(point: str) -> None:
        case = world.case("scored", place / name_of(point), "--overwrite", old="adapter")
        kill_and_resume(case, f"publish.exchange=return(einval);{point}", nothing="move-in" in point)

    world.each(at(ASIDE), check)


@pytest.mark.parametrize("old", ["adapter", "single"])
def test_an_output_that_is_replaced_in_place(world: World, old: str) -> None:
    points = at([*DOOM, "shard.create", "commit.sync", "file.rename", *FRESH, *DISCARD]) + later("doom.file")
    place = world.path / "in-place" / old

    def check(point: str) -> None:
        case = world.case("scored", place / name_of(point), "--overwrite=in-place", old=old)
        kill_and_resume(case, point, nothing=True)

    world.each(points, check)


# --- a second kill --------------------------------------------------------------------------------


def test_a_kill_while_an_old_output_is_put_back(world: World) -> None:
    place = world.path / "put-back"

    def check(point: str) -> None:
        case = world.case("scored", place / name_of(point), "--overwrite", old="single")
        kill(case, "publish.exchange=return(einval);publish.move-in=return(kill)")
        assert standing(case.output) is None
        assert case.work("--resume", points=point).code == KILLED
        case.check_whole(nothing=point.startswith("settle.put-back"))
        case.check_resumed()

    world.each(at(["settle.put-back", "settle.sync"]), check)


def test_a_kill_while_another_job_is_cleared_away(world: World) -> None:
    """A job with other settings was killed; what it has measured and written is swept before the new one begins."""
    place = world.path / "left"

    def check(point: str) -> None:
        case = world.case("measured", place / name_of(point))
        other = case.work("--seed", "1", "--method", "ties", points="publish.rename=return(kill)")
        assert other.code == KILLED
        # Half a file in a folder, as a kill in the middle leaves it.
        (job_of(case.output) / "output" / "folder").mkdir()
        (job_of(case.output) / "output" / "folder" / "half").write_bytes(b"ha")
        # A shard that another attempt was at.
        (job_of(case.output) / "attempts").mkdir(exist_ok=True)
        (job_of(case.output) / "attempts" / ".model.safetensors.7.partial").write_bytes(b"ha")
        resumes = not point.startswith("discard")
        done = case.work("--resume" if resumes else "--overwrite", points=point)
        assert done.code == KILLED, f"not killed: {done}"
        case.check_whole()
        case.check_resumed()

    world.each(at(LEFT), check)


@pytest.mark.parametrize("where", ["commit.sync", "publish.rename", "publish.job-sync", "discard.lock"])
def test_a_job_that_is_killed_again_and_again(world: World, where: str) -> None:
    """Each run gets one shard further, or none."""
    case = world.case("measured", world.path / "again" / where)
    kill(case, f"{where}=return(kill)")
    for _ in range(3):
        case.check_whole()
        done = case.work("--resume", points=f"{where}=return(kill)")
        assert done.code in (KILLED, 0), done
    case.check_resumed()


# --- an output that cannot be renamed -------------------------------------------------------------


def check_inside(case: Case, point: str) -> None:
    done = case.work(*case.flags, points=point)
    assert done.code == KILLED, f"not killed: {done}"
    case.check_unmarked()
    case.check_resumed()


@pytest.mark.parametrize("old", [None, "single", "adapter"])
def test_a_directory_that_lets_nothing_be_made_beside_the_output(world: World, old: str | None) -> None:
    points = at([*INSIDE, *DISCARD, "commit.sync"]) + later("move.rename", "move.sync")
    flags = () if old is None else ("--overwrite",)
    if old is not None:
        points += at(["move.remove"]) + later("move.remove")

    def check(point: str) -> None:
        case = world.case("scored", world.path / "closed" / str(old) / name_of(point), *flags, old=old)
        with closed(case):
            check_inside(case, point)

    world.each(points, check)


@contextmanager
def closed(case: Case) -> Iterator[None]:
    """Lets nothing be made beside the output."""
    case.output.mkdir(exist_ok=True)
    case.plain = True
    case.output.parent.chmod(0o555)
    try:
        yield
    finally:
        case.output.parent.chmod(0o755)


@pytest.mark.parametrize("old", [None, "adapter"])
def test_an_output_that_is_a_mount_point(world: World, old: str | None) -> None:
    flags = () if old is None else ("--overwrite=in-place",)
    points = at(["commit.sync", "moves.rename", "move.rename", "discard.file"])
    points += at(["doom.file"]) if old is not None else []

    def check(point: str) -> None:
        output = world.path / "mounted" / str(old) / name_of(point) / "out"
        with mounted(output, "64m"):
            check_inside(world.case("scored", output.parent, *flags, old=old), point)

    world.each(points, check)
