"""A system call that fails at each step of the output protocol: one line, exit code 5, and a way out that works."""

from __future__ import annotations

import pytest
from forking import Done
from protocol import Case, World, job_of
from test_faults_kills import (
    ASIDE,
    DISCARD,
    DOOM,
    EXCHANGE,
    FILES,
    FRESH,
    INSIDE,
    OPENING,
    SCORES,
    SHARDS,
    closed,
    name_of,
)

from safemerge_fast import _engine

POINTS = _engine.fault_points()
pytestmark = pytest.mark.skipif(
    not POINTS, reason="the engine has no fail points; make test builds one that has"
)

NORMAL = [*OPENING, *SHARDS, *FILES, *FRESH, *DISCARD]
FULL = {"enospc", "edquot"}


def assert_one_line(done: Done) -> None:
    assert done.code == 5, done
    assert done.stdout == "", done
    assert done.stderr.startswith("error: "), done
    assert done.stderr.count("\n") == 1, done
    assert "unexpected" not in done.stderr, done
    assert "Traceback" not in done.stderr, done


def fail(case: Case, points: str) -> None:
    """Lets a call fail once; what stands there is whole, and what the one line advises works."""
    done = case.work(*case.flags, points=points)
    if done.code == 0 and not done.stderr:
        # The engine could do without.
        assert any(point in points for point in ("lock.take=", "shard.create=", "shard.clone=")), done
        case.check_done()
        return
    assert_one_line(done)
    if any(error in points for error in FULL):
        assert "no space left" in done.stderr, done
    case.check_whole(nothing="in-place" in "".join(case.flags) or "move-in" in points)
    if "--resume" in done.stderr:
        again = case.work("--resume")
        assert (again.code, again.stderr) == (0, ""), f"{done.stderr!r} advised --resume, but: {again}"
        case.check_done()
    elif not job_of(case.output).exists():
        # Nothing is left to be resumed: the same again.
        again = case.work(*case.flags)
        assert (again.code, again.stderr) == (0, ""), f"after {done.stderr!r}: {again}"
        case.check_done()
    else:
        case.check_resumed()


@pytest.mark.parametrize(("kind", "error"), [("measured", "enospc"), ("fold", "edquot"), ("scored", "eio")])
def test_a_fresh_output(world: World, kind: str, error: str) -> None:
    names = [*NORMAL, *SCORES] if kind == "measured" else NORMAL
    points = [f"{point}=1*return({error})" for point in names if kind != "fold" or "directory" not in point]
    place = world.path / "errors" / error
    world.each(points, lambda point: fail(world.case(kind, place / name_of(point)), point))


@pytest.mark.parametrize("error", ["enospc", "eio"])
def test_an_output_that_replaces_another(world: World, error: str) -> None:
    place = world.path / "errors-over" / error
    points = [f"{point}=1*return({error})" for point in (*OPENING, *EXCHANGE, "commit.write", "file.write")]
    world.each(
        points,
        lambda point: fail(world.case("scored", place / name_of(point), "--overwrite", old="single"), point),
    )


def test_an_output_that_is_set_aside_or_goes_first(world: World) -> None:
    place = world.path / "errors-others"
    aside = [f"publish.exchange=return(einval);{point}=1*return(eio)" for point in ASIDE]
    first = [f"{point}=1*return(eio)" for point in (*DOOM, "shard.write")]

    def check(point: str) -> None:
        flag = "--overwrite" if point in aside else "--overwrite=in-place"
        fail(world.case("scored", place / name_of(point), flag, old="adapter"), point)

    world.each([*aside, *first], check)


@pytest.mark.parametrize("error", ["enospc", "eio"])
def test_an_output_whose_files_are_moved(world: World, error: str) -> None:
    def check(point: str) -> None:
        case = world.case("scored", world.path / "errors-inside" / error / name_of(point))
        with closed(case):
            done = case.work(points=point)
            assert_one_line(done)
            case.check_unmarked()
            case.check_resumed()

    world.each([f"{point}=1*return({error})" for point in (*INSIDE, "shard.write")], check)


@pytest.mark.parametrize("old", [None, "single"])
@pytest.mark.parametrize("action", ["2*return(eintr)", "return(short)"])
def test_interrupted_calls_and_short_writes_are_completed(world: World, action: str, old: str | None) -> None:
    """At all points at once: each call is interrupted twice, or each write takes half of what is left."""
    flags = () if old is None else ("--overwrite",)
    points = ";".join(f"{point}={action}" for point in POINTS)
    case = world.case("measured", world.path / "completed" / str(old) / name_of(action), *flags, old=old)
    done = case.work(*flags, points=points)
    assert (done.code, done.stderr) == (0, "")
    case.check_done()
