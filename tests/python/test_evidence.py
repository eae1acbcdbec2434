"""Scores are measured once: a run that goes on measures only what is missing, and nothing of other models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dense import assert_same_bits, load, weight_files
from invoke import run

from safemerge_fast import ProgressEvent, analyze, merge
from safemerge_fast.analysis import analyze_rows

MODULES = 21


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the modules whose scores were measured, in order."""
    names: list[str] = []

    def counting(models: Any, rows: Iterable[Any], **options: Any) -> Iterator[tuple[str, Any]]:
        for name, score in analyze_rows(models, rows, **options):
            names.append(name)
            yield name, score

    monkeypatch.setattr("safemerge_fast.recipes.safemerge.job.analyze_rows", counting)
    return names


def interrupt(stage: str, done: int) -> Callable[[ProgressEvent], None]:
    """A progress callback that raises once so much of a stage is done."""

    def stop(event: ProgressEvent) -> None:
        if event.stage == stage and event.done >= done:
            raise KeyboardInterrupt

    return stop


def log(output: Path) -> Path:
    """The file of an unfinished job that holds its scores."""
    return output.parent / f".{output.name}.safemerge" / "scores.jsonl"


@pytest.fixture(scope="module")
def whole(quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    merge(**quartet, output=output)
    return output


@pytest.mark.parametrize("done", [0, 1, 8, 20, 21])
def test_an_interrupted_analysis_goes_on_where_it_was(
    quartet: dict[str, Path], tmp_path: Path, measured: list[str], whole: Path, done: int
) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(**quartet, output=output, progress=interrupt("analysis", done))
    assert len(measured) == done
    assert not output.exists()
    events: list[ProgressEvent] = []
    report = merge(**quartet, output=output, resume=True, progress=events.append)
    assert len(measured) == len(set(measured)) == MODULES, "each module once"
    assert {tensor.name for tensor in report.tensors if tensor.analysed} == set(measured)
    analysis = [event.done for event in events if event.stage == "analysis"]
    assert (analysis[0], analysis[-1]) == (done, MODULES)
    assert weight_files(output) == weight_files(whole)
    assert not log(output).exists()


def test_an_interrupted_merge_measures_nothing_again(
    quartet: dict[str, Path], tmp_path: Path, measured: list[str], whole: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(**quartet, output=output, progress=interrupt("merge", 0))
    assert len(measured) == MODULES
    before = {json.loads(line).get("name") for line in log(output).read_text().splitlines()}
    assert before == {None, *measured}
    merge(**quartet, output=output, resume=True)
    assert len(measured) == MODULES
    assert weight_files(output) == weight_files(whole)


def test_a_job_that_goes_on_with_other_settings_is_another_one(
    quartet: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(**quartet, output=output, progress=interrupt("merge", 0))
    report = merge(**quartet, output=output, resume=True, threshold=0.9, alpha=0.5, method="slerp")
    expected = merge(**quartet, output=tmp_path / "same", threshold=0.9, alpha=0.5, method="slerp")
    assert report.merged == expected.merged > 0
    assert report.identity == expected.identity
    assert_same_bits(load(output), load(tmp_path / "same"))


@pytest.mark.parametrize("options", [{"delta_reference": "base"}, {"exclude": "down_proj"}])
def test_scores_of_something_else_are_not_used(
    quartet: dict[str, Path], tmp_path: Path, measured: list[str], whole: Path, options: dict[str, str]
) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(**quartet, output=output, progress=interrupt("merge", 0), **options)
    first = list(measured)
    report = merge(**quartet, output=output, resume=True)
    again = measured[len(first) :]
    # What was excluded is missing; against another reference, every score is another.
    missing = {tensor.name for tensor in report.tensors if tensor.analysed} - set(first)
    assert len(missing) == (3 if "exclude" in options else 0)
    assert missing <= set(again)
    assert "exclude" in options or len(again) == MODULES
    assert weight_files(output) == weight_files(whole)


def test_scores_of_models_that_changed_are_not_used(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path, measured: list[str]
) -> None:
    paths = make_quartet(tmp_path, shards=1)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(**paths, output=output, progress=interrupt("merge", 0))
    make_quartet(tmp_path, shards=1, seed=5, roles=("finetuned",))
    # A fine-tune of another model, which is not what its role says.
    merge(**paths, output=output, resume=True, force=True)
    assert len(measured) == 2 * MODULES
    merge(**paths, output=tmp_path / "anew", force=True)
    assert_same_bits(load(output), load(tmp_path / "anew"))


@pytest.mark.parametrize(
    ("spoil", "lost"),
    [
        (lambda text: text[:-20], 1),
        (lambda text: text[:-1], 0),
        (lambda text: text + '{"name": "model.layers.0', 0),
        (lambda text: text.replace('"rho": ', '"rho": "', 1), 1),
        (lambda text: text.replace('{"name"', '["name"', 1), 1),
        (lambda text: text.replace("scores_of", "scores", 1), MODULES),
        (lambda text: "", MODULES),
    ],
)
def test_what_a_crash_cut_short_is_measured_again(
    quartet: dict[str, Path],
    tmp_path: Path,
    measured: list[str],
    whole: Path,
    spoil: Callable[[str], str],
    lost: int,
) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(**quartet, output=output, progress=interrupt("merge", 0))
    log(output).write_text(spoil(log(output).read_text()))
    measured.clear()
    # Once more, since what follows a line that was cut short must not be glued to it.
    with pytest.raises(KeyboardInterrupt):
        merge(**quartet, output=output, resume=True, progress=interrupt("merge", 0))
    assert len(measured) == lost
    measured.clear()
    merge(**quartet, output=output, resume=True)
    assert measured == []
    assert weight_files(output) == weight_files(whole)


def test_overwriting_measures_anew(quartet: dict[str, Path], tmp_path: Path, measured: list[str]) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(**quartet, output=output, progress=interrupt("merge", 0))
    merge(**quartet, output=output, overwrite=True)
    assert len(measured) == 2 * MODULES


def test_a_finished_job_measures_nothing(
    quartet: dict[str, Path], tmp_path: Path, measured: list[str]
) -> None:
    report = merge(**quartet, output=tmp_path / "out")
    assert merge(**quartet, output=tmp_path / "out", resume=True) == report
    assert len(measured) == MODULES


def test_given_scores_are_measured_further_where_they_leave_a_decision_open(
    quartet: dict[str, Path], tmp_path: Path, measured: list[str]
) -> None:
    roles = {role: quartet[role] for role in ("base", "aligned", "finetuned")}
    exact = analyze(**roles)
    name, score = min(exact.modules.items(), key=lambda item: item[1].rho or 0.0)
    assert score.rho is not None
    wide = replace(score, rho=score.rho + 0.01, rho_low=score.rho - 0.1, rho_high=score.rho + 0.1, columns=32)
    given = tmp_path / "scores.json"
    given.write_text(replace(exact, modules={**exact.modules, name: wide}, failure=1e-3, seed=0).to_json())
    near = merge(**quartet, output=tmp_path / "near", scores=given, threshold=score.rho)
    assert measured == [name]
    (report,) = (one for one in near.tensors if one.name == name)
    assert (report.rho, report.merged) == (score.rho, False)
    far = merge(**quartet, output=tmp_path / "far", scores=given, threshold=min(1.0, score.rho + 0.2))
    assert measured == [name], "the interval settles it"
    (report,) = (one for one in far.tensors if one.name == name)
    assert (report.rho, report.rho_low, report.merged) == (wide.rho, wide.rho_low, True)
    merge(**quartet, output=tmp_path / "exact", scores=given, threshold=0.01, estimator="exact")
    assert measured == [name, name]


def test_an_interrupted_analysis_without_a_job_goes_on_where_it_was(
    quartet: dict[str, Path], tmp_path: Path
) -> None:
    """A process killed in the middle; the second run measures what the first had not, and leaves no trace."""
    roles = [word for role in ("base", "aligned", "finetuned") for word in (f"--{role}", str(quartet[role]))]
    output, partial = tmp_path / "s.json", tmp_path / ".s.json.partial"
    killed = (
        "import os, safemerge_fast.recipes.safemerge.evidence as e\n"
        "from safemerge_fast.cli import main\n"
        "real, count = e.ScoreLog.append, []\n"
        "def append(self, name, score):\n"
        "    real(self, name, score); count.append(name)\n"
        "    if len(count) == 7: os._exit(9)\n"
        "e.ScoreLog.append = append\n"
        "main()\n"
    )
    command = [sys.executable, "-c", killed, "analyze", *roles, "-o", str(output)]
    assert subprocess.run(command, capture_output=True).returncode == 9
    lines = [json.loads(line) for line in partial.read_text().splitlines()]
    known = {line["name"]: line["rho"] for line in lines[1:]}
    assert len(known) == 7
    # What was measured is taken as it stands there: a number that no measurement gives shows it.
    name = lines[1]["name"]
    lines[1] |= {"rho": 0.123, "rho_low": 0.123, "rho_high": 0.123}
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run("analyze", *roles, "-o", output)
    assert result.exit_code == 0, result.stderr
    modules = json.loads(output.read_text())["modules"]
    assert len(modules) == MODULES
    assert modules[name]["rho"] == 0.123
    assert {n: modules[n]["rho"] for n in known if n != name} == {n: r for n, r in known.items() if n != name}
    assert list(tmp_path.iterdir()) == [output]
