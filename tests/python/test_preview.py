"""Previews: what would be done, and what would stand in its way; nothing is written."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import msgspec
import pytest
from invoke import merge_words, run
from lora import load_checkpoint, write_lora

from safemerge_fast import FoldConfiguration, MergeConfiguration, PlanError, _engine, analyze, merge, preview

PYTHON_BYTES = 60_000_000
"""What a preview counts for Python itself."""

TORCH_BYTES = 400_000_000
"""What it counts for torch at least, which the analysis needs."""


@pytest.fixture(scope="module")
def scores(quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("scores") / "scores.json"
    file.write_text(analyze(quartet["base"], quartet["aligned"], quartet["finetuned"]).to_json())
    return str(file)


def settings(quartet: dict[str, Path], output: Path, **options: Any) -> MergeConfiguration:
    roles = {role: str(path) for role, path in quartet.items()}
    return MergeConfiguration(**roles, output=str(output), **options)


@pytest.mark.parametrize("options", [{}, {"threads": 2}, {"threads": 3, "memory_budget": "64MB"}])
def test_memory_is_what_the_engine_says_of_the_plan(
    quartet: dict[str, Path], tmp_path: Path, scores: str, options: dict[str, Any]
) -> None:
    outlook = preview(settings(quartet, tmp_path / "out", scores=scores, **options))
    merge(**quartet, output=tmp_path / "out", scores=scores, **options)
    plan = _engine.Plan((tmp_path / "out" / "safemerge_plan.json").read_bytes())
    budget = 64_000_000 if "memory_budget" in options else None
    engine = plan.memory(threads=options.get("threads"), memory_budget=budget)
    assert outlook.memory_bytes == PYTHON_BYTES + engine
    assert budget is None or engine <= budget


def test_the_analysis_counts_where_it_takes_more(
    quartet: dict[str, Path], tmp_path: Path, scores: str
) -> None:
    known = preview(settings(quartet, tmp_path / "out", scores=scores, threads=1))
    unknown = preview(settings(quartet, tmp_path / "out", threads=1))
    assert known.memory_bytes < PYTHON_BYTES + TORCH_BYTES < unknown.memory_bytes
    assert (known.bytes_analysed, known.analysed) == (0, unknown.analysed)


def test_a_budget_that_is_too_small_is_refused(quartet: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="memory budget of 1000 bytes is below"):
        preview(settings(quartet, tmp_path / "out", memory_budget=1000))


def notes(quartet: dict[str, Path], output: Path, **options: Any) -> list[str]:
    """What is said of the output."""
    return list(preview(settings(quartet, output, **options)).notes)


def test_nothing_is_said_of_an_output_that_can_be_made(quartet: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "new", tmp_path / "empty", tmp_path / "many" / "levels" / "down"):
        assert notes(quartet, output) == []
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_what_would_be_refused_is_said(quartet: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert notes(quartet, file) == [f"the merge would be refused: {file} is a file"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    (note,) = notes(quartet, full)
    assert note.startswith(f"the merge would be refused: {full} is not empty")
    assert notes(quartet, full, overwrite=True) == notes(quartet, full, resume=True) == []
    for inside in (quartet["base"] / "out", quartet["safe"], quartet["safe"].parent):
        assert any("overlaps the input" in note for note in notes(quartet, inside, overwrite=True))


def test_an_unfinished_job_is_said(quartet: dict[str, Path], tmp_path: Path) -> None:
    def stop(event: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(**quartet, output=output, progress=stop)
    (note,) = notes(quartet, output)
    assert f"an unfinished one of {output} waits, pass --resume or --overwrite" in note
    assert notes(quartet, output, resume=True) == notes(quartet, output, overwrite=True) == []


def test_too_little_room_is_said_unless_old_files_make_room(
    quartet: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    needed = preview(settings(quartet, tmp_path / "out")).bytes_written
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed - 1))
    said = ["the output's file system has less room than the weights need"]
    assert preview(settings(quartet, tmp_path / "out")).free_bytes == needed - 1
    assert notes(quartet, tmp_path / "out") == said
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine").write_text("mine")
    # The old output stays until the new one is whole.
    assert notes(quartet, tmp_path / "old", overwrite=True) == said
    assert notes(quartet, tmp_path / "old", overwrite="in-place") == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed))
    assert notes(quartet, tmp_path / "out") == notes(quartet, tmp_path / "old", overwrite=True) == []


def test_notes_of_the_pairing_come_first(quartet: dict[str, Path], tmp_path: Path) -> None:
    roles = {role: path for role, path in quartet.items() if role != "safe"}
    found = notes(roles, tmp_path / "out", include="nothing_here")
    assert found[0].startswith("--include nothing_here matches no tensor")
    assert any("no safe model was given" in note for note in found)


def test_json_holds_what_the_preview_does(quartet: dict[str, Path], tmp_path: Path, scores: str) -> None:
    outlook = preview(settings(quartet, tmp_path / "out", scores=scores))
    document = json.loads(outlook.to_json())
    counts = document.pop("counts")
    assert document.pop("coverage") == msgspec.to_builtins(outlook.coverage)
    assert document == {
        name: list(value) if isinstance(value, tuple) else value
        for name in outlook.__dataclass_fields__
        if name not in ("counts", "coverage")
        for value in (getattr(outlook, name),)
    }
    assert {entry["module_type"]: entry["merged"] for entry in counts} == {
        count.module_type: count.merged for count in outlook.counts
    }
    result = run(*merge_words(quartet, tmp_path / "out", "--scores", scores, "--dry-run", "--json"))
    shown = json.loads(result.stdout)
    assert {**shown, "free_bytes": 0} == {**json.loads(outlook.to_json()), "free_bytes": 0}


def test_a_file_is_previewed_too(quartet: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (72, 72)}, rank=4, seed=0)
    fold = {"model": str(quartet["aligned"]), "adapter": str(adapter)}
    file = tmp_path / "fold.yml"
    file.write_text(json.dumps({"recipe": "fold", **fold}))
    before = sorted(tmp_path.iterdir())
    result = run("run", file, "-o", tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert sorted(tmp_path.iterdir()) == before
    shown = json.loads(result.stdout)
    outlook = preview(FoldConfiguration(**fold, output=str(tmp_path / "out")))
    assert (shown["merged"], shown["tensors"], shown["files"]) == (
        1,
        len(load_checkpoint(quartet["aligned"])),
        3,
    )
    assert shown["bytes_read"] == outlook.bytes_read
    text = run("run", file, "-o", tmp_path / "out", "--dry-run").stdout
    assert "3 file(s) in" in text
    assert "peak memory  about" in text
