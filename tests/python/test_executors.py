"""Which executor is asked for, and what is said where it cannot be had."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conftest import write_quartet
from invoke import run

from safemerge_fast import SettingError
from safemerge_fast.execution.choice import executor_of
from safemerge_fast.execution.local import LocalExecutor
from safemerge_fast.recipes.shared_job import plan_job
from safemerge_fast.recipes.wise_ft import WiseFtSettings
from safemerge_fast.settings import RunSettings


@pytest.mark.parametrize("text", ["local", "ray", "ray:local", "ray:head.cluster:6379", "ray:10.0.0.1:6379"])
def test_executors_are_named(text: str) -> None:
    assert RunSettings(output="out", executor=text).executor == text


@pytest.mark.parametrize(
    "text", ["", "Ray", "ray:", "ray:head", "ray:head:", "ray:a/b:1", "slurm", "ray:h:123456"]
)
def test_what_names_no_executor_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="executor: should be local, ray, ray:HOST:PORT or ray:local"):
        RunSettings(output="out", executor=text)


def test_a_ray_client_is_refused_with_the_way_out() -> None:
    with pytest.raises(SettingError, match="ray job submit -- safemerge-fast merge"):
        RunSettings(output="out", executor="ray://head:10001")


def test_this_process_is_the_default() -> None:
    assert isinstance(executor_of(RunSettings(output="out")), LocalExecutor)


def test_without_ray_the_way_to_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quartet = write_quartet(tmp_path / "in", hidden=24, vocabulary=60, layers=1, intermediate=32, shards=1)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    roles = [word for role in ("aligned", "finetuned") for word in (f"--{role}", str(quartet[role]))]
    done = run(
        *("merge", "--recipe", "wise-ft", *roles),
        *("-o", str(tmp_path / "out"), "--executor", "ray"),
    )
    assert done.exit_code == 2
    assert "pip install 'safemerge-fast[ray]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_planned_job_has_no_executor(tmp_path: Path) -> None:
    settings = WiseFtSettings(aligned="a", finetuned="f", output=str(tmp_path / "out"), executor="ray")
    with pytest.raises(SettingError, match="leave the executor out"):
        plan_job(settings)
