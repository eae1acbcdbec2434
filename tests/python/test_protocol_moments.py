"""Kills and signals at random moments: what stands under the output's name is whole, and --resume ends the same."""

from __future__ import annotations

import random
import signal

import pytest
from protocol import Case, World

RESUMABLE = "error: interrupted; what is committed stays, continue with --resume\n"
KILLS = 8
SIGNALS = 6

SCENES = {
    "fresh": ("measured", None, ()),
    "over another layout": ("scored", "single", ("--overwrite",)),
    "an adapter over a checkpoint": ("adapter", "scored", ("--overwrite",)),
    "in place": ("scored", "adapter", ("--overwrite=in-place",)),
}


def scene(world: World, name: str, place: str) -> Case:
    kind, old, flags = SCENES[name]
    return world.case(kind, world.path / "moments" / place, *flags, old=old)


def duration(world: World, name: str, place: str) -> float:
    """Seconds that a run takes here and now."""
    case = scene(world, name, f"{place} undisturbed")
    done = case.work(*case.flags)
    assert done.code == 0, done
    return done.seconds


@pytest.mark.parametrize("name", SCENES)
def test_kills(world: World, name: str) -> None:
    moments = random.Random(name)
    whole = duration(world, name, name)

    def check(number: int) -> None:
        case = scene(world, name, f"{name} {number}")
        # Most of a run is imports: half of the kills come when it is writing.
        moment = moments.uniform(0.0 if number % 2 else 0.4, 1.1) * whole
        done = case.work(*case.flags, after=moment)
        assert done.code in (-signal.SIGKILL, 0), done
        case.check_whole(nothing=name == "in place")
        case.check_resumed()

    world.each(range(KILLS), check)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["fresh", "over another layout"])
def test_signals(world: World, name: str, number: signal.Signals) -> None:
    moments = random.Random(name)
    whole = duration(world, name, f"{name} {number}")

    def check(run: int) -> None:
        case = scene(world, name, f"{name} {number} {run}")
        # The first moments are Python's own start: the handlers come with the package.
        done = case.work(*case.flags, after=moments.uniform(0.2, 1.1) * whole, signal=int(number))
        assert done.code in (130, 0), done
        assert done.stdout == "", done
        if done.code == 0:
            assert done.stderr == "", done
            case.check_done()
            return
        assert done.stderr in (RESUMABLE, "error: interrupted\n"), done
        case.check_whole()
        if done.stderr == RESUMABLE:
            again = case.work("--resume")
            assert (again.code, again.stderr) == (0, ""), f"--resume was advised, but: {again}"
            case.check_done()
        else:
            case.check_resumed()

    world.each(range(SIGNALS), check)


@pytest.mark.parametrize(
    ("where", "advised"),
    [
        # What is under way when the signal comes: nothing is begun yet, or there is something to go on from.
        ("safemerge_fast.recipes.run.input_paths", False),
        ("safemerge_fast.recipes.safemerge.job.SafemergeJob.contents", True),
        ("safemerge_fast.recipes.run._files", True),
    ],
)
def test_resume_is_advised_when_there_is_something_to_resume(world: World, where: str, advised: bool) -> None:
    module, _, name = where.rpartition(".")
    owner = module if not module.endswith("SafemergeJob") else module.rpartition(".")[0]
    before = (
        f"import importlib, os, signal\nowner = importlib.import_module({owner!r})\n"
        + ("owner = owner.SafemergeJob\n" if owner != module else "")
        + f"original = owner.{name}\n"
        "def stopped(*arguments, **options):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return original(*arguments, **options)\n"
        f"owner.{name} = stopped\n"
    )
    case = world.case("scored", world.path / "advice" / name, "--overwrite", old="single")
    done = case.work("--overwrite", before=before)
    assert (done.code, done.stderr) == (130, RESUMABLE if advised else "error: interrupted\n")
    assert case.is_old()
    if advised:
        case.check_resumed()
    else:
        assert [path.name for path in case.output.parent.iterdir()] == ["out"]
