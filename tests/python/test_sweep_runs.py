"""Sweeps that go wrong, are killed or refused: each failure is said, what is judged stays, and the rest goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from invoke import assert_one_sentence, run
from sweep_judges import METRICS, FakeJudge

import safemerge_fast as sf
from safemerge_fast.sweeps.metrics import MetricError, read_metrics

GRID = {"select": ["lowest:2", "lowest:4", "lowest:6"], "alpha": 0.5}
NAMES = [f"lowest-{count}-alpha-0.5" for count in (2, 4, 6)]
SCRIPT = "from safemerge_fast.__main__ import main; main()"


@pytest.fixture(scope="module")
def models(make_quartet: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_quartet(
        tmp_path_factory.mktemp("models"), layers=1, vocabulary=40, hidden=24, intermediate=40, shards=2
    )


def sweep(models: dict[str, Path], judge: FakeJudge, output: Path, **more: Any) -> sf.SweepReport:
    settings = {"eval": judge.command, "metrics": METRICS, "grid": GRID, "controls": [], **more}
    return sf.sweep(**models, output=output, **settings)


def words(models: dict[str, Path], judge: FakeJudge, output: Path, *more: str) -> list[str]:
    roles = [word for role, path in models.items() for word in (f"--{role}", str(path))]
    metrics = [word for name, path in METRICS.items() for word in ("--metric", f"{name}={path}")]
    select = ["--select", ",".join(GRID["select"]), "--alpha", "0.5", "--controls", "none"]
    return ["sweep", *roles, "--eval", judge.command, *metrics, *select, "-o", str(output), *more]


def untimed(directory: Path) -> list[dict[str, Any]]:
    """The log without what differs from run to run."""
    lines = []
    for line in (directory / "sweep.jsonl").read_text().splitlines()[1:]:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        entry.pop("seconds", None)
        # The identity of a job holds its scores, and they say how long they took.
        entry.pop("job", None)
        entry["settings"].pop("output")
        entry["settings"].pop("scores")
        lines.append(entry)
    return lines


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("fail", "the command ended with exit code 1: the judge's last words"),
        ("signal", "the command ended with signal SIGTERM: this is said on stderr"),
        ("garbage", "cannot be read as JSON"),
        ("nothing", "the command ended well, but wrote no JSON to {out}"),
        (
            "several",
            "the command wrote not {out} but 2 JSON files beside it, such as more.json and results_2026.json",
        ),
        ("lacks", "the metric refusals is not there: $.refusals.rate leads to nothing"),
        ("text", "the metric refusals is no finite number: at $.refusals.rate stands 'many'"),
        ("nan", "the metric refusals is no finite number: at $.refusals.rate stands nan"),
    ],
)
def test_a_judge_that_fails_is_said_and_the_sweep_goes_on(
    models: dict[str, Path], tmp_path: Path, how: str, message: str
) -> None:
    judge = FakeJudge(tmp_path / "judge", **{NAMES[1]: how})
    report = sweep(models, judge, tmp_path / "out")
    first, second, third = report.results
    assert judge.judged == NAMES
    assert first.failed is third.failed is None
    assert second.failed is not None
    assert message in second.failed
    assert second.metrics is None
    assert report.failed == (second,)
    assert second.name not in report.pareto
    assert "judging lowest-4-alpha-0.5" in (tmp_path / "out" / "logs" / f"{NAMES[1]}.log").read_text()
    # Tried again, and nothing else is.
    judge.misbehave()
    again = sweep(models, judge, tmp_path / "out", resume=True)
    assert judge.judged == [*NAMES, NAMES[1]]
    assert not again.failed
    assert [result.name for result in again.results] == NAMES


def test_a_judge_that_hangs_is_stopped_with_all_that_it_started(
    models: dict[str, Path], tmp_path: Path
) -> None:
    judge = FakeJudge(tmp_path / "judge", **{NAMES[0]: "hang"})
    report = sweep(models, judge, tmp_path / "out", timeout=5)
    assert report.results[0].failed == "the command took longer than 5 s and was stopped"
    assert not report.results[1].failed
    assert ends(judge.child)


def test_what_a_judge_leaves_running_is_ended(models: dict[str, Path], tmp_path: Path) -> None:
    judge = FakeJudge(tmp_path / "judge", **{NAMES[0]: "leave"})
    assert not sweep(models, judge, tmp_path / "out").failed
    assert ends(judge.child)


def ends(process: int) -> bool:
    """Whether a process has ended, or does soon; it is nobody's child any more."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(process, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


def test_a_json_file_of_another_name_is_taken(models: dict[str, Path], tmp_path: Path) -> None:
    """lm-evaluation-harness puts a date behind the name that it is given."""
    judge = FakeJudge(tmp_path / "judge", **{NAMES[0]: "beside"})
    assert not sweep(models, judge, tmp_path / "out").failed


def test_a_model_that_cannot_be_made_has_failed(
    models: dict[str, Path], tmp_path: Path, make_quartet: Any
) -> None:
    """Values that are not finite are met when the weights are read."""
    import torch

    def spoil(role: str, tensors: dict[str, torch.Tensor]) -> None:
        if role == "aligned":
            tensors["model.embed_tokens.weight"][0, 0] = float("nan")

    spoilt = make_quartet(
        tmp_path / "m", layers=1, vocabulary=40, hidden=24, intermediate=40, shards=2, edit=spoil
    )
    judge = FakeJudge(tmp_path / "judge")
    report = sweep(spoilt, judge, tmp_path / "out", recipes=[{"recipe": "wise-ft", "alpha": 0.5}])
    assert [result.name for result in report.failed] == ["wise-ft-alpha-0.5"]
    assert "it cannot be made: " in (report.failed[0].failed or "")
    assert "model.embed_tokens.weight" in (report.failed[0].failed or "")
    assert list((tmp_path / "out" / "candidates").iterdir()) == []


def test_an_input_that_changes_ends_the_sweep(make_quartet: Any, tmp_path: Path) -> None:
    models = make_quartet(tmp_path / "m", layers=1, vocabulary=40, hidden=24, intermediate=40, shards=2)
    judge = FakeJudge(tmp_path / "judge")
    file = min(models["safe"].glob("*.safetensors"))
    touch = f"{sys.executable} -c 'import os, sys; os.utime(sys.argv[3])' {{model}} {{out}} {file}"
    with pytest.raises(sf.SafemergeError, match="changed"):
        sweep(models, judge, tmp_path / "out", eval=touch)


# --- kills and resuming -----------------------------------------------------------------------------


def undisturbed(models: dict[str, Path], tmp_path: Path) -> list[dict[str, Any]]:
    judge = FakeJudge(tmp_path / "judge0")
    judge.command = judge.command.replace("judge0", "judge")
    (tmp_path / "judge0").rename(tmp_path / "judge")
    sweep(models, judge, tmp_path / "undisturbed")
    (tmp_path / "judge").rename(tmp_path / "judge0")
    return untimed(tmp_path / "undisturbed")


@pytest.mark.parametrize(("how", "place"), [("kill", 0), ("kill", 1), ("kill", 2), ("interrupt", 1)])
def test_a_sweep_that_is_killed_goes_on(
    models: dict[str, Path], tmp_path: Path, place: int, how: str
) -> None:
    expected = undisturbed(models, tmp_path)
    judge = FakeJudge(tmp_path / "judge", **{NAMES[place]: how})
    command = words(models, judge, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == (-9 if how == "kill" else 130), done.stderr
    if how == "interrupt":
        assert (
            done.stderr.splitlines()[-1]
            == "error: interrupted; what is committed stays, continue with --resume"
        )
        assert "Traceback" not in done.stderr
    assert untimed(tmp_path / "out") == expected[:place]
    result = run(*command)
    assert_one_sentence(result, "holds a sweep already; go on with --resume")
    assert result.exit_code == 5
    result = run(*command, "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert untimed(tmp_path / "out") == expected
    # What was being judged is judged again, what was judged is not.
    assert judge.judged == [*NAMES[: place + 1], *NAMES[place:]]
    assert [entry["name"] for entry in json.loads(result.stdout)["results"]] == NAMES


def test_a_kill_between_any_two_bytes_of_the_log(models: dict[str, Path], tmp_path: Path) -> None:
    judge = FakeJudge(tmp_path / "judge")
    sweep(models, judge, tmp_path / "out")
    log = tmp_path / "out" / "sweep.jsonl"
    whole, expected = log.read_bytes(), untimed(tmp_path / "out")
    lines = whole.splitlines(keepends=True)
    for cut in (0, 5, len(lines[0]) - 1, len(lines[0]), len(lines[0]) + 7, len(whole) - 3):
        log.write_bytes(whole[:cut])
        known = max(0, whole[:cut].count(b"\n") - 1)
        before = len(judge.judged)
        report = sweep(models, judge, tmp_path / "out", resume=True)
        assert untimed(tmp_path / "out") == expected
        assert not report.failed
        assert judge.judged[before:] == NAMES[known:], cut


def test_a_sweep_that_stops_while_it_merges_goes_on(models: dict[str, Path], tmp_path: Path) -> None:
    judge = FakeJudge(tmp_path / "judge")

    class StopError(Exception):
        pass

    def stop(event: sf.ProgressEvent) -> None:
        if event.stage == "merge" and len(judge.judged) == 1:
            raise StopError

    with pytest.raises(StopError):
        sweep(models, judge, tmp_path / "out", progress=stop)
    assert judge.judged == NAMES[:1]
    report = sweep(models, judge, tmp_path / "out", resume=True)
    assert judge.judged == NAMES
    assert not report.failed
    assert list((tmp_path / "out" / "candidates").iterdir()) == []


def test_candidates_can_be_added(models: dict[str, Path], tmp_path: Path) -> None:
    judge = FakeJudge(tmp_path / "judge")
    sweep(models, judge, tmp_path / "out")
    more = {"select": [*GRID["select"], "lowest:1"], "alpha": 0.5}
    report = sweep(models, judge, tmp_path / "out", grid=more, resume=True)
    assert judge.judged == [*NAMES, "lowest-1-alpha-0.5"]
    assert [result.name for result in report.results] == [*NAMES, "lowest-1-alpha-0.5"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {"refusals": "$.refusals.rate:max"}}, "another metrics"),
        ({"random_seed": 7}, "another random_seed"),
        ({"dtype": "float32"}, "another dtype"),
        ({"safe": None}, "another safe"),
        ({"delta_reference": "base"}, "another delta_reference"),
    ],
)
def test_another_sweep_is_not_mixed_with_it(
    models: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    judge = FakeJudge(tmp_path / "judge")
    sweep(models, judge, tmp_path / "out", grid={"alpha": 0.5})
    roles = {**models, **{name: value for name, value in change.items() if name in models}}
    others = {name: value for name, value in change.items() if name not in models}
    with pytest.raises(sf.PlanError, match=f"holds a sweep of {message}.*; name a new directory"):
        sweep(roles, judge, tmp_path / "out", grid={"alpha": 0.5}, resume=True, **others)


def test_another_version_of_an_input_is_not_mixed_with_it(make_quartet: Any, tmp_path: Path) -> None:
    models = make_quartet(tmp_path / "m", layers=1, vocabulary=40, hidden=24, intermediate=40, shards=2)
    judge = FakeJudge(tmp_path / "judge")
    sweep(models, judge, tmp_path / "out", grid={"alpha": 0.5})
    os.utime(min(models["safe"].glob("*.safetensors")))
    with pytest.raises(sf.PlanError, match="other inputs: a file has changed since"):
        sweep(models, judge, tmp_path / "out", grid={"alpha": 0.5}, resume=True)


def test_two_sweeps_do_not_work_in_one_directory(models: dict[str, Path], tmp_path: Path) -> None:
    outer = FakeJudge(tmp_path / "judge")
    script = tmp_path / "inner.py"
    inner = ["-c", SCRIPT, *words(models, outer, tmp_path / "out", "--resume")]
    script.write_text(
        "import json, subprocess, sys\n"
        f"done = subprocess.run([sys.executable, *{inner!r}], capture_output=True, text=True)\n"
        "json.dump({'refusals': {'rate': done.returncode}, 'said': done.stderr}, open(sys.argv[2], 'w'))\n"
    )
    command = f"{sys.executable} {script} {{model}} {{out}}"
    metrics = {"refusals": METRICS["refusals"]}
    report = sweep(models, outer, tmp_path / "out", eval=command, metrics=metrics, grid={"alpha": 0.5})
    assert report.results[0].metrics == {"refusals": 5.0}
    said = json.loads((tmp_path / "out" / "results" / "alpha-0.5" / "out.json").read_text())["said"]
    assert said.startswith("error: another process works in ")


# --- refusals ---------------------------------------------------------------------------------------


def test_foreign_directories_and_inputs_are_left_alone(models: dict[str, Path], tmp_path: Path) -> None:
    judge = FakeJudge(tmp_path / "judge")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(sf.OutputError, match=r"holds files of no sweep, such as thesis\.txt"):
            sweep(models, judge, tmp_path / "full", resume=resume)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    for output in (models["safe"], models["safe"] / "sweep"):
        with pytest.raises(sf.OutputError, match="lies in the input"):
            sweep(models, judge, output)
    assert judge.judged == []


def test_links_in_the_directory_are_not_followed(models: dict[str, Path], tmp_path: Path) -> None:
    judge = FakeJudge(tmp_path / "judge")
    mine = tmp_path / "mine"
    (mine / "lowest-1").mkdir(parents=True)
    (mine / "lowest-1" / "thesis.txt").write_text("mine")
    sweep(models, judge, tmp_path / "out", grid={"select": "lowest:2"})
    (tmp_path / "out" / "candidates").rmdir()
    (tmp_path / "out" / "candidates").symlink_to(mine)
    with pytest.raises(sf.OutputError, match="is a link, which a sweep does not follow"):
        sweep(models, judge, tmp_path / "out", grid={"select": "lowest:1"}, resume=True)
    assert (mine / "lowest-1" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--eval", "judge {model}"], 2, "eval has no {out}"),
        (["--eval", ""], 2, "eval is empty"),
        (["--eval", "judge '{model} {out}"], 2, "eval cannot be split into words"),
        (["--eval", "no-such-program {model} {out}"], 2, "there is no program no-such-program to run"),
        (["--metric", "loss=$.loss"], 2, "loss should end in :max or :min"),
        (["--metric", "loss=$.a[:max"], 2, "the path of loss should read like"),
        (["--metric", "a b=$.a:max"], 2, "a name is at most 60 letters"),
        (["--metric", "refusals:max"], 2, "refusals is given twice"),
        (["--alpha", "0.5,1.5"], 2, "alpha should be a finite number from 0 to 1"),
        (["--select", "lowest"], 2, "select should be"),
        (
            ["--select", "lowest:99"],
            2,
            "the candidate lowest-99-alpha-0.5: select is lowest:99, but only 7 modules",
        ),
        (
            ["--controls", "alined"],
            2,
            "controls should be among aligned, finetuned, safe, no-safe, shrink, random",
        ),
        (["--recipe", "rest gamma=1"], 2, "recipes, number 1 should name one of safemerge, fold, resta"),
        (["--recipe", "resta gama=1"], 2, "recipes, number 1 has no setting 'gama'"),
        (["--recipe", "resta gamma=99"], 2, "gamma should be a finite number from -10 to 10, not 99"),
        (["--recipe", "resta gamma"], 2, "should read like 'resta gamma=0.5,1'"),
        (["--recipe", "resta 'gamma=1"], 2, "should read like 'resta gamma=0.5,1'"),
        (["--recipe", "fold"], 2, "recipes, number 1"),
        (["--plot", "x.pdf"], 2, "the name should end in .png or .svg, not '.pdf'"),
        (["--plot", "no/such/x.png"], 5, "no/such does not exist"),
        (["--randoms", "0"], 2, "randoms should be a whole number from 1 to 1000"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_is_made(
    models: dict[str, Path], tmp_path: Path, more: list[str], code: int, message: str
) -> None:
    judge = FakeJudge(tmp_path / "judge")
    result = run(*words(models, judge, tmp_path / "out"), *more)
    assert_one_sentence(result, message)
    assert result.exit_code == code
    assert not (tmp_path / "out").exists()


def test_a_sweep_of_nothing_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    judge = FakeJudge(tmp_path / "judge")
    with pytest.raises(sf.SettingError, match="there is nothing to sweep"):
        sweep(models, judge, tmp_path / "out", grid=None)
    assert_one_sentence(
        run("sweep", "-o", tmp_path / "out"), "base is missing; give --base, or a file that has it"
    )


# --- the command line and files ---------------------------------------------------------------------


def test_the_command_line_reports(models: dict[str, Path], tmp_path: Path) -> None:
    judge = FakeJudge(tmp_path / "judge", **{NAMES[1]: "fail"})
    result = run(
        *words(models, judge, tmp_path / "out"), "--plot", tmp_path / "p.svg", "--html", tmp_path / "p.html"
    )
    assert result.exit_code == 6
    page = (tmp_path / "p.html").read_text()
    assert all(name in page for name in NAMES)
    assert "the judge's last words" in page
    assert "lowest-2-alpha-0.5" in result.stdout
    assert "failed" in result.stdout
    lines = result.stderr.splitlines()
    assert (
        lines[1]
        == "2 of 3: lowest-4-alpha-0.5 failed: the command ended with exit code 1: the judge's last words"
    )
    assert lines[-1].startswith(
        "1 of 3 models could not be made or judged, such as lowest-4-alpha-0.5: the command"
    )
    assert (tmp_path / "p.svg").exists()
    keep = next(line for line in lines if "keep it by" in line)
    command = keep.partition("safemerge-fast ")[2].replace("OUT", str(tmp_path / "kept")).split()
    kept = run(*command)
    assert kept.exit_code == 0, kept.stderr
    assert kept.stderr.startswith("$ safemerge-fast merge --base ")
    again = kept.stderr.splitlines()[0].split()[2:]
    again[again.index("--output") + 1] = str(tmp_path / "again")
    assert run(*again).exit_code == 0
    for file in (tmp_path / "kept").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_file_says_what_to_sweep_and_options_win(models: dict[str, Path], tmp_path: Path) -> None:
    judge = FakeJudge(tmp_path / "judge")
    document = {
        "recipe": "sweep",
        **{role: str(path) for role, path in models.items()},
        "eval": judge.command,
        "metrics": {"refusals": "$.refusals.rate:max"},
        "grid": {"alpha": [0.2, 0.4], "select": "lowest:3"},
        "recipes": [{"recipe": "resta", "gamma": [0.5, 1]}],
        "controls": ["finetuned"],
        "keep": "all",
    }
    (tmp_path / "s.yml").write_text(json.dumps(document))
    result = run(
        "sweep", tmp_path / "s.yml", "-o", tmp_path / "out", "--alpha", "0.7", "--keep", "none", "--json"
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    names = ["finetuned", "select-lowest-3", "resta"]
    names = [entry["name"] for entry in report["results"]]
    assert names == ["finetuned", "lowest-3-alpha-0.7", "resta-gamma-0.5", "resta-gamma-1.0"]
    assert report["kept"] == []
    assert [metric["name"] for metric in report["metrics"]] == ["refusals"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"output": "x"}, "sets output, which is given on the command line (see sweep --help)"),
        ({"treshold": 1}, "sweep has no setting 'treshold'"),
        ({"recipe": "safemerge"}, "is for safemerge-fast run"),
        ([1], "should hold fields with values"),
        ({"grid": {"treshold": 0.3}}, "grid has no setting 'treshold'; it may have threshold, select"),
        ({"grid": {"threshold": []}}, "grid: threshold has no value"),
        (
            {"grid": {"threshold": ["low"]}},
            "grid: threshold should be a finite number from 0 to 1, not 'low'",
        ),
    ],
)
def test_files_that_say_no_sweep(
    models: dict[str, Path], tmp_path: Path, document: Any, message: str
) -> None:
    judge = FakeJudge(tmp_path / "judge")
    base = {
        **{role: str(path) for role, path in models.items()},
        "eval": judge.command,
        "metrics": METRICS,
        "grid": {"alpha": 0.5},
    }
    whole = {**base, **document} if isinstance(document, dict) else document
    (tmp_path / "s.yml").write_text(json.dumps(whole))
    result = run("sweep", tmp_path / "s.yml", "-o", tmp_path / "out")
    assert_one_sentence(result, message)
    assert not (tmp_path / "out").exists()


def test_a_value_for_each_type_is_one_value() -> None:
    """As α for some module types: the commas in it separate no values."""
    from safemerge_fast.cli.sweep import _parts

    assert _parts("0.5,0.8,v_proj=0.5,o_proj=0.1,1") == ["0.5", "0.8,v_proj=0.5,o_proj=0.1", "1"]


# --- metrics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("$.a.b", 1.0),
        ("a.b", 1.0),
        ("$['a']['b']", 1.0),
        ('$.a["c.d"][1]', 3.0),
        ("$.a['c.d'][-1]", 4.0),
        ("$.exact_match,none", 5.0),
        ("$.a-b_c (d)", 6.0),
        ("", 7.0),
    ],
)
def test_paths(path: str, wanted: float) -> None:
    document = {
        "a": {"b": 1, "c.d": [2, 3.0, 4]},
        "exact_match,none": 5,
        "a-b_c (d)": 6,
        "name.x": 7,
    }
    (metric,) = read_metrics({"name.x": f"{path}:min"})
    assert metric.read(document) == wanted
    assert metric.gain(wanted) == -wanted


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({}, "$.a"),
        ([], "$.a"),
        ([1], "$[1]"),
        ({"a": [1]}, "$.a.b"),
        ({"a": {"0": 1}}, "$.a[0]"),
        ({"a": None}, "$.a"),
        ({"a": True}, "$.a"),
        ({"a": {}}, "$.a"),
        ({"a": float("inf")}, "$.a"),
        ("text", "$.a"),
    ],
)
def test_what_is_no_number_is_no_metric(document: Any, path: str) -> None:
    (metric,) = read_metrics({"name": f"{path}:max"})
    with pytest.raises(MetricError, match="the metric name is"):
        metric.read(document)


def test_placeholders_are_filled_once() -> None:
    from safemerge_fast.sweeps.command import _filled

    given = {"model": "/a/{out}", "out": "/b/{model}", "name": "n", "aligned": "x"}
    assert _filled("--args=pretrained={model},{out}{name}{other}{}", given) == (
        "--args=pretrained=/a/{out},/b/{model}n{other}{}"
    )


def test_all_settings_of_a_rule_can_be_swept(models: dict[str, Path], tmp_path: Path) -> None:
    judge = FakeJudge(tmp_path / "judge")
    names = [f"model.layers.0.{part}.weight" for part in ("mlp.up_proj", "self_attn.o_proj")]
    (tmp_path / "list.txt").write_text("\n".join(names))
    common = words(models, judge, tmp_path / "out")
    for option in ("--select", "--alpha", "--controls"):
        place = common.index(option)
        del common[place : place + 2]
    result = run(
        *common,
        *(
            "--select",
            "null:2,z:0,lowest:1,threshold",
            "--per-type",
            "false,true",
            "--alpha",
            "0.8,v_proj=0.5,0.6",
        ),
        *("--modules", tmp_path / "list.txt", "--keep", "all", "--controls", "random", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    entries = {entry["name"]: entry for entry in json.loads(result.stdout)["results"]}
    candidates = [name for name, entry in entries.items() if "control" not in entry]
    # Only a rank is taken within types.
    assert len(candidates) == (4 + 2) * 2
    assert "lowest-1-per-type-True-alpha-0.8-v_proj-0.5" in candidates
    listed = entries["modules-list-alpha-0.6"]
    assert {kind: some for kind, (some, _) in listed["merged"].items() if some} == {"up_proj": 1, "o_proj": 1}
    assert sum(some for some, _ in entries["lowest-1-per-type-True-alpha-0.6"]["merged"].values()) == 7
    kept = tmp_path / "out" / "candidates" / "modules-list-alpha-0.6"
    sf.merge(**models, output=tmp_path / "direct", modules=tmp_path / "list.txt", alpha=0.6)
    for file in kept.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "direct" / file.name).read_bytes()
    # Another list under the same name is another candidate.
    before = len(judge.judged)
    (tmp_path / "list.txt").write_text(names[0])
    more = ("--modules", tmp_path / "list.txt", "--alpha", "0.6", "--per-type", "false", "--controls", "none")
    result = run(*common, *more, "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert judge.judged[before:] == ["modules-list-alpha-0.6"]
