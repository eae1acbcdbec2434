"""Full disks: files that may not grow, and file systems without room. One line, and --resume once there is some."""

from __future__ import annotations

import pytest
from protocol import World, mounted
from test_protocol_refusals import assert_refused


@pytest.mark.parametrize("limit", [1, 100, 1000, 4096, 6000, 6800])
@pytest.mark.parametrize("old", [None, "single"])
def test_a_limit_on_the_size_of_files(world: World, limit: int, old: str | None) -> None:
    flags = () if old is None else ("--overwrite",)
    case = world.case("scored", world.path / "limits" / f"{limit}-{old}", *flags, old=old)
    done = case.work(*flags, file_limit=limit)
    assert_refused(done, "no space left")
    case.check_whole()
    if "--resume" in done.stderr:
        again = case.work("--resume")
        assert (again.code, again.stderr) == (0, ""), f"{done.stderr!r} advised --resume, but: {again}"
        case.check_done()
    else:
        case.check_resumed()


@pytest.mark.parametrize("pages", [1, 2, 4, 6, 8, 10])
def test_a_small_file_system(world: World, pages: int) -> None:
    """The job directory lies on it, beside the output; room is made, and the job goes on."""
    place = world.path / "small" / str(pages)
    with mounted(place, "256k"):
        filler = place / "filler"
        filler.write_bytes(b"x" * 4096 * (64 - pages))
        case = world.case("scored", place / "in")
        done = case.work()
        assert_refused(done, "no space left")
        case.check_whole()
        filler.unlink()
        again = case.work("--resume")
        assert (again.code, again.stderr) == (0, ""), f"{done.stderr!r}: {again}"
        case.check_done()


def test_a_full_file_system_that_is_the_output(world: World) -> None:
    place = world.path / "small" / "volume"
    with mounted(place / "out", "256k"):
        filler = place / "out" / "lost+found"
        filler.write_bytes(b"x" * 4096 * 58)
        case = world.case("scored", place)
        done = case.work()
        assert_refused(done, "no space left")
        filler.unlink()
        case.check_resumed()
