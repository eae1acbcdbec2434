"""Shards that are handed out: whatever becomes of attempts, the output is what one process makes, or there is none."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import write_quartet
from fake_pool import BAD, FakePool, Script, hands_out

from safemerge_fast import _engine
from safemerge_fast.errors import OutputError, PlanError
from safemerge_fast.execution.executor import Executor
from safemerge_fast.recipes import recipes
from safemerge_fast.recipes.run import carry_out_job
from safemerge_fast.recipes.wise_ft import WiseFtSettings
from safemerge_fast.report.report import Report

FILES = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
# What does not tell of the run.
COMPARED = [*FILES, "model.safetensors.index.json", "config.json", "safemerge_plan.json"]


@pytest.fixture(scope="module")
def quartet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("quartet")
    return write_quartet(path, hidden=24, vocabulary=60, layers=2, intermediate=32, shards=3)


@pytest.fixture(scope="module")
def whole(quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process makes."""
    return files_of(Path(merge(quartet, tmp_path_factory.mktemp("whole") / "out").output))


def merge(
    quartet: dict[str, Path], output: Path, executor: Executor | None = None, **settings: Any
) -> Report:
    roles = {role: str(quartet[role]) for role in ("aligned", "finetuned")}
    wanted = WiseFtSettings(**roles, output=str(output), **settings)
    return carry_out_job(recipes()["wise-ft"].open(wanted), time.perf_counter(), executor)


def files_of(output: Path) -> dict[str, bytes]:
    assert not (output.parent / f".{output.name}.safemerge").exists(), "nothing of the job is left"
    assert not [name for name in os.listdir(output) if name.startswith(".")]
    return {name: (output / name).read_bytes() for name in COMPARED}


def attempts_left(output: Path) -> list[str]:
    attempts = output.parent / f".{output.name}.safemerge" / "attempts"
    return sorted(os.listdir(attempts)) if attempts.is_dir() else []


SCRIPTS: dict[str, Script] = {
    "undisturbed": {},
    "one dies": {(FILES[1], 0): "die"},
    "one dies three times": {(FILES[0], number): "die" for number in range(3)},
    "all die once": {(file, 0): "die" for file in FILES},
    "one freezes and wakes": {(FILES[2], 0): "freeze"},
    "all freeze and wake": {(file, 0): "freeze" for file in FILES},
    "one sleeps on": {(FILES[0], 0): "sleep"},
    "said twice": {(file, 0): "twice" for file in FILES},
    "said late": {(FILES[1], 0): "late"},
    "its file is gone": {(FILES[1], 0): "vanish", (FILES[1], 1): "vanish"},
    "one after the other": {(FILES[0], 0): "freeze", (FILES[0], 1): "die", (FILES[0], 2): "late"},
}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_bytes_do_not_depend_on_what_becomes_of_attempts(
    quartet: dict[str, Path], whole: dict[str, bytes], tmp_path: Path, name: str, slots: int
) -> None:
    pools: list[FakePool] = []
    report = merge(quartet, tmp_path / "out", hands_out(SCRIPTS[name], slots=slots, pools=pools))
    assert files_of(tmp_path / "out") == whole
    assert [shard.file for shard in report.shards] == FILES
    assert report.bytes_written == sum(len(whole[file]) for file in FILES)
    (pool,) = pools
    assert pool.closed
    assert len(pool.started) == 3 + len(SCRIPTS[name]) - sum(
        action == "twice" for action in SCRIPTS[name].values()
    )


@pytest.mark.parametrize("seed", range(25))
def test_any_course_of_events_ends_with_the_same_bytes(
    quartet: dict[str, Path], whole: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    script = {(file, number): dice.choice(BAD) for file in FILES for number in range(dice.randrange(4))}
    merge(quartet, tmp_path / "out", hands_out(script, slots=dice.randrange(1, 5)))
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("die", r"00002-of-00003.* in 4 attempts, the last on node-7: the worker died"),
        ("sleep", "said nothing for 3 seconds"),
    ],
)
def test_a_shard_that_nobody_can_make_ends_the_job(
    quartet: dict[str, Path], whole: dict[str, bytes], tmp_path: Path, action: str, words: str
) -> None:
    script = {(FILES[1], number): action for number in range(4)}
    pools: list[FakePool] = []
    with pytest.raises(OutputError, match=words):
        merge(quartet, tmp_path / "out", hands_out(script, pools=pools))
    assert pools[0].closed
    assert not (tmp_path / "out").exists()
    assert attempts_left(tmp_path / "out") == []
    report = merge(quartet, tmp_path / "out", resume=True)
    assert [shard.resumed for shard in report.shards] == [True, False, True]
    assert files_of(tmp_path / "out") == whole


def test_what_another_attempt_cannot_mend_is_not_tried_again(
    quartet: dict[str, Path], tmp_path: Path
) -> None:
    pools: list[FakePool] = []
    with pytest.raises(PlanError, match="an input has changed"):
        merge(quartet, tmp_path / "out", hands_out({(FILES[0], 0): "refuse"}, slots=3, pools=pools))
    assert len(pools[0].started) == 3
    assert {order.attempt for order in pools[0].started[1:]} <= pools[0].stopped
    assert attempts_left(tmp_path / "out") == []
    assert not (tmp_path / "out").exists()


def test_an_interruption_stops_all_and_leaves_what_is_committed(
    quartet: dict[str, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    pools: list[FakePool] = []

    def interrupt() -> None:
        if len(pools[0].asleep) == 2:
            raise KeyboardInterrupt

    executor = hands_out(
        {(FILES[1], 0): "freeze", (FILES[2], 0): "freeze"},
        slots=3,
        pools=pools,
        prepare=lambda pool: setattr(pool, "before_wait", interrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        merge(quartet, tmp_path / "out", executor)
    assert pools[0].closed
    assert pools[0].stopped == {order.attempt for order in pools[0].started[1:]}
    assert attempts_left(tmp_path / "out") == []
    # Who was frozen wakes up beside the run that goes on, and finds nothing to write to or is too late.
    report = merge(quartet, tmp_path / "out", hands_out({}), resume=True)
    assert [shard.resumed for shard in report.shards] == [True, False, False]
    assert files_of(tmp_path / "out") == whole
    assert all(type(news).__name__ == "Failed" for news in pools[0].wake())
    assert files_of(tmp_path / "out") == whole


def test_a_second_driver_is_refused_and_one_that_is_killed_is_taken_over(
    quartet: dict[str, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    child = os.fork()
    if child == 0:
        pools: list[FakePool] = []

        def look() -> None:
            if len(pools[0].directory.committed) == 2 and pools[0].unsaid:
                try:
                    merge(quartet, output, resume=True)
                except OutputError as error:
                    os._exit(7 if "is locked" in str(error) else 8)

        executor = hands_out(
            {(FILES[2], 0): "late"},
            slots=1,
            pools=pools,
            prepare=lambda pool: setattr(pool, "before_wait", look),
        )
        try:
            merge(quartet, output, executor)
        finally:
            os._exit(9)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7, "another driver was refused, and this one died"
    # The third shard was prepared, but nobody was told.
    assert len(attempts_left(output)) == 1
    report = merge(quartet, output, hands_out({}), resume=True)
    assert [shard.resumed for shard in report.shards] == [True, True, False]
    assert files_of(output) == whole


FAILING = """
import sys
from pathlib import Path
from safemerge_fast import _engine
from safemerge_fast.errors import OutputError
plan = _engine.Plan(Path(sys.argv[1]).read_bytes())
job = _engine.JobDirectory(sys.argv[2], identity="x")
job.append("scores", b"x")
made = [
    _engine.prepare_shard(plan, job.path, file, job.begin_attempt(file), threads=1) for file in plan.shards[:2]
]
for prepared in made:
    try:
        _engine.commit_shard(plan, job, prepared)
    except OutputError as error:
        print(error)
print(job.committed)
"""


@pytest.mark.skipif(
    not _engine.fault_points(), reason="the engine has no fail points; make test builds one that has"
)
def test_after_a_line_of_the_journal_failed_nothing_more_is_committed(
    quartet: dict[str, Path], tmp_path: Path
) -> None:
    merge(quartet, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", FAILING, tmp_path / "out" / "safemerge_plan.json", tmp_path / "other"],
        env={**os.environ, "FAILPOINTS": "commit.sync=1*return(eio)"},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, committed = done.stdout.splitlines()
    assert "journal" in first
    assert "an earlier line" in second
    assert committed == "[]"


def test_a_shard_of_another_plan_is_not_committed(quartet: dict[str, Path], tmp_path: Path) -> None:
    merge(quartet, tmp_path / "half", alpha=0.25)
    other = _engine.Plan((tmp_path / "half" / "safemerge_plan.json").read_bytes())
    executor = hands_out({}, prepare=lambda pool: setattr(pool, "plan", other))
    with pytest.raises(PlanError, match="prepared for another plan"):
        merge(quartet, tmp_path / "out", executor)
    assert attempts_left(tmp_path / "out") == []
    assert not (tmp_path / "out").exists()
