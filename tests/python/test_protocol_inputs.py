"""Inputs that change while a job runs: each role, at each stage, in each way. Nothing is published."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forking import Done
from protocol import World, standing

STAGES = {
    # Called between stages of a job: what is changed there must be noticed behind it.
    "before the analysis": ("safemerge_fast.recipes.run", "input_paths"),
    "behind the analysis": ("safemerge_fast.recipes.safemerge.job", "judge_scores"),
    "behind the check of the analysis": ("safemerge_fast.recipes.run", "require_unchanged"),
    "before publication": ("safemerge_fast.recipes.run", "_files"),
}

# The same bytes but for one element, and what happens to the times of the file.
WAYS = {
    "rewritten": "os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 10**9))",
    "rewritten, time put back": "os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))",
    "replaced": (
        "shutil.copy(path, path + '.new'); os.utime(path + '.new', ns=(old.st_atime_ns, old.st_mtime_ns)); "
        "os.replace(path + '.new', path)"
    ),
    "gone": "os.unlink(path)",
}

BEFORE = """
import importlib, os, shutil
owner = importlib.import_module({module!r})
original = owner.{name}
path = {path!r}
calls = []

def changed(*arguments, **options):
    # What the function itself looks at is from before the change.
    result = original(*arguments, **options)
    if not calls:
        old = os.stat(path)
        with open(path, "r+b") as file:
            file.seek(-2, 2)
            file.write(b"xx")
        {way}
    calls.append(None)
    return result

owner.{name} = changed
"""


@pytest.fixture
def copied(world: World, tmp_path: Path) -> Callable[..., tuple[Done, Path, Path]]:
    """Runs a merge of a copy of the inputs, one of which changes."""

    def run(role: str, stage: str, way: str, *flags: str) -> tuple[Done, Path, Path]:
        place = tmp_path / "inputs"
        shutil.copytree(world.path / "in", place)
        file = next((place / role).glob("*-00002-of-*.safetensors"))
        words = [word.replace(str(world.path / "in"), str(place)) for word in world.words["measured"]]
        module, name = STAGES[stage]
        before = BEFORE.format(module=module, name=name, path=str(file), way=WAYS[way])
        output = tmp_path / "out"
        return world.run(*words, "-q", "-o", output, *flags, before=before), file, output

    return run


@pytest.mark.parametrize("role", ["base", "aligned", "finetuned", "safe"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_input_that_changes(copied: Callable[..., tuple[Done, Path, Path]], stage: str, role: str) -> None:
    # All ways at one stage or another, and each role at each stage.
    number = list(STAGES).index(stage) + ["base", "aligned", "finetuned", "safe"].index(role)
    way = list(WAYS)[number % len(WAYS)]
    done, file, output = copied(role, stage, way)
    assert done.code == 3, done
    assert done.stderr.startswith("error: "), done
    assert done.stderr.count("\n") == 1, done
    assert str(file) in done.stderr or (str(file.parent) in done.stderr and file.name in done.stderr), done
    assert not os.path.lexists(output)


@pytest.mark.parametrize("way", WAYS)
def test_the_old_output_stays(
    world: World, copied: Callable[..., tuple[Done, Path, Path]], tmp_path: Path, way: str
) -> None:
    world.stand("single", tmp_path / "out")
    done, _, output = copied("safe", "before publication", way, "--overwrite")
    assert done.code == 3, done
    assert standing(output) == world.whole["single"]


def test_scores_of_inputs_that_have_changed_are_measured_again(world: World, tmp_path: Path) -> None:
    """A job is killed, an input is replaced, the job goes on: nothing of the old input is in the output."""
    place = tmp_path / "inputs"
    shutil.copytree(world.path / "in", place)
    words = [word.replace(str(world.path / "in"), str(place)) for word in world.words["measured"]]
    stop = (
        "import os, safemerge_fast.recipes.run as run\n"
        "def stop(*arguments):\n    os.kill(os.getpid(), 9)\n"
        "run._files = stop\n"
    )
    killed = world.run(*words, "-q", "-o", tmp_path / "out", before=stop)
    assert killed.code == -9
    # Roles change their places: every score and every shard is another.
    (place / "safe").rename(place / "tmp")
    (place / "finetuned").rename(place / "safe")
    (place / "tmp").rename(place / "finetuned")
    done = world.run(*words, "-q", "-o", tmp_path / "out", "--resume")
    assert (done.code, done.stderr) == (0, "")
    fresh = world.run(*words, "-q", "-o", tmp_path / "fresh")
    assert fresh.code == 0
    for file in (tmp_path / "fresh").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
