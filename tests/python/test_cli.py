"""The command line: help, usage, streams, interruption, and the examples of its documentation."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from invoke import assert_one_sentence, merge_words, run

SCRIPT = "from safemerge_fast.cli import main; main()"
COMMANDS = (
    "demo",
    "check",
    "inspect",
    "analyze",
    "merge",
    *("plan", "work", "finish"),
    "sweep",
    "keep",
    "judge",
    "run",
    "verify",
)

# --- help, imports, usage -------------------------------------------------------------------------


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name}  ", result.stdout, re.MULTILINE)
        one = run(name, "--help")
        assert one.exit_code == 0
        assert one.stdout.startswith(f"Usage: main {name}")
        assert "-v, --verbose" in one.stdout


def test_version_is_the_engine_s() -> None:
    from safemerge_fast import __version__

    assert run("--version").stdout == f"safemerge-fast {__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"], ["inspect", "MODEL"], ["verify", "OUT"]])
def test_commands_that_need_no_analysis_import_no_torch(words: list[str], quartet, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if "OUT" in words:
        assert run(*merge_words(quartet, output, "-q")).exit_code == 0
    words = [{"MODEL": str(quartet["base"]), "OUT": str(output)}.get(word, word) for word in words]
    script = (
        "import sys\nfrom safemerge_fast.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "No such command"),
        (["merge", "--base", "b", "--aligned", "a", "-o", "out"], "Missing option '--finetuned'"),
        (["merge", "--base", "b", "--finetuned", "f", "-o", "out"], "Missing option '--aligned'"),
        (["merge", "--aligned", "a", "--finetuned", "f", "-o", "out"], "Missing option '--base'"),
        (["merge", "--base", "b", "--aligned", "a", "--finetuned", "f"], "Missing option '-o'"),
        (["analyze", "--base", "b", "--aligned", "a"], "Missing option '--finetuned'"),
        (["verify"], "Missing argument 'OUT'"),
    ],
)
def test_missing_words_are_usage_errors(words: list[str], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--alpha", "1.5", "alpha should be a finite number from 0 to 1, also by module type as in"),
        ("--alpha", "nan", "0.8,v_proj=0.5, not nan"),
        ("--alpha", "0.8,v_proj=x", "a number from 0 to 1, also by module type as in 0.8,v_proj=0.5, not"),
        ("--tau", "inf", "a finite number from 0 to 1, not inf"),
        ("--tau", "1.01", "a finite number from 0 to 1, not 1.01"),
        ("--select", "lowest:-1", "lowest:N"),
        ("--select", "fraction:2", "fraction:F"),
        ("--select", "null:-1", "null:K (K a number of at least 0)"),
        ("--select", "z:inf", "z:K (K a number)"),
        ("--select", "best", "select should be"),
        ("--granularity", "tensor", "'module', 'layer'"),
        ("--method", "karcher", "'linear'"),
        ("--include", "(", "not a regular expression"),
        ("--exclude", "[", "not a regular expression"),
        ("--max-shard-size", "5 apples", "like 5GB"),
        ("--memory-budget", "0", "like 5GB"),
        ("--threads", "0", "threads should be a whole number from 1 to 4096"),
        ("--dtype", "int8", "'bfloat16'"),
    ],
)
def test_malformed_values_are_usage_errors(
    quartet, tmp_path: Path, option: str, value: str, message: str
) -> None:
    result = run(*merge_words(quartet, tmp_path / "out", option, value))
    assert result.exit_code == 2
    assert option.replace("--tau", "--threshold") in result.stderr
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_more_modules_than_there_are_is_a_usage_error(quartet, tmp_path: Path) -> None:
    result = run(*merge_words(quartet, tmp_path / "out", "--select", "lowest:22"))
    assert result.exit_code == 2
    assert_one_sentence(result, "select is lowest:22", "only 21 modules are analysed")
    assert list(tmp_path.iterdir()) == []


def test_resume_and_overwrite_exclude_each_other(quartet, tmp_path: Path) -> None:
    result = run(*merge_words(quartet, tmp_path / "out", "--resume", "--overwrite"))
    assert result.exit_code == 2
    assert "give one of them" in result.stderr


# --- streams --------------------------------------------------------------------------------------


def test_json_is_all_that_stdout_holds(quartet, tmp_path: Path) -> None:
    roles = [word for role in ("base", "aligned", "finetuned") for word in (f"--{role}", quartet[role])]
    output = tmp_path / "out"
    scores = run("analyze", *roles, "--json", "-o", tmp_path / "s.json")
    assert json.loads(scores.stdout) == json.loads((tmp_path / "s.json").read_text())
    plan = run(*merge_words(quartet, output, "--json", "--dry-run", "--scores", tmp_path / "s.json"))
    report = run(*merge_words(quartet, output, "--json", "--scores", tmp_path / "s.json"))
    assert json.loads(report.stdout) == json.loads((output / "safemerge_report.json").read_text())
    assert json.loads(plan.stdout)["merged"] == sum(
        t.get("merged", False) for t in json.loads(report.stdout)["tensors"]
    )
    shown = json.loads(run("inspect", output, "--json").stdout)
    assert (
        shown["parameters"]
        == json.loads((output / "model.safetensors.index.json").read_text())["metadata"]["total_parameters"]
    )
    assert json.loads(run("verify", output, "--json", "-q").stdout)["files"] == 3
    for result in (scores, plan, report):
        assert result.exit_code == 0
        assert "{" not in result.stderr


def test_quiet_prints_nothing(quartet, tmp_path: Path) -> None:
    for words in (merge_words(quartet, tmp_path / "out", "-q"), ["verify", tmp_path / "out", "-q"]):
        result = run(*words)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_tables_go_to_stdout_and_notes_to_stderr(quartet, tmp_path: Path) -> None:
    roles = {role: path for role, path in quartet.items() if role != "safe"}
    result = run(*merge_words(roles, tmp_path / "out"))
    assert "q_proj" in result.stdout
    assert "note:" not in result.stdout
    assert "note: no safe model was given" in result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "\x1b" not in result.stdout + result.stderr, "no colours into a pipe"


def test_warnings_are_condensed_unless_verbose(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    quartet = make_quartet(tmp_path, task_scale=0.002)
    result = run(*merge_words(quartet, tmp_path / "out"))
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert len(lines) == 4
    assert "and 18 more" in lines[-1]
    verbose = run(*merge_words(quartet, tmp_path / "out", "--overwrite", "-v"))
    assert verbose.stderr.count("warning: model.layers.") == 21


def test_ascii_streams_get_question_marks_not_tracebacks(quartet, tmp_path: Path) -> None:
    words = [str(word) for word in merge_words(quartet, tmp_path / "out")]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"median ?" in done.stdout


def test_a_traceback_only_with_vv(quartet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("a fault\nof ours")

    monkeypatch.setattr("safemerge_fast.recipes.safemerge.job.open_roles", fail)
    result = run(*merge_words(quartet, tmp_path / "out"))
    assert result.exit_code == 1
    assert_one_sentence(result, "unexpected ZeroDivisionError: a fault of ours", "-vv")
    verbose = run(*merge_words(quartet, tmp_path / "out", "-vv"))
    assert verbose.exit_code == 1
    assert "Traceback" in verbose.stderr
    wrong = run("inspect", tmp_path / "nowhere", "-vv")
    assert wrong.exit_code == 3
    assert "Traceback" in wrong.stderr
    assert wrong.stderr.splitlines()[-1].startswith("error: ")


def test_verify_exits_with_4_and_names_the_place(quartet, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run(*merge_words(quartet, output, "-q")).exit_code == 0
    file = output / "model-00003-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    spans = {k: v["data_offsets"] for k, v in json.loads(data[8 : 8 + length]).items() if k != "__metadata__"}
    last = max(spans, key=lambda name: spans[name][1])
    data[-1] ^= 0x80
    file.write_bytes(data)
    result = run("verify", output)
    assert result.exit_code == 4
    assert_one_sentence(result, last, str(file))
    assert run("verify", tmp_path).exit_code == 3


# --- interruption ---------------------------------------------------------------------------------


def assert_nothing_complete(output: Path) -> None:
    """What is left, if anything, cannot be loaded as a checkpoint."""
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    assert not names & {"config.json", "model.safetensors.index.json", "safemerge_report.json"}
    assert not [name for name in names if name.endswith(".safetensors")]


def test_ctrl_c_exits_with_130(quartet, tmp_path: Path) -> None:
    """A real SIGINT, sent once the merge has begun."""
    script = (
        "import safemerge_fast.recipes.safemerge.job as job, time\n"
        "from safemerge_fast.cli import main\n"
        "real = job.analyze_rows\n"
        "def slow(*arguments, **options):\n"
        "    for item in real(*arguments, **options):\n"
        "        print('scored', flush=True); time.sleep(0.2); yield item\n"
        "job.analyze_rows = slow\n"
        "main()\n"
    )
    words = [str(word) for word in merge_words(quartet, tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "scored\n"
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr == "error: interrupted; what is committed stays, continue with --resume\n"
    assert time.monotonic() - started < 10
    assert_nothing_complete(tmp_path / "out")


# --- the other commands ---------------------------------------------------------------------------


def test_inspect_counts_what_torch_counts(quartet) -> None:
    from safetensors.torch import load_file

    tensors = {
        name: tensor
        for file in quartet["finetuned"].glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    shown = json.loads(run("inspect", quartet["finetuned"], "--json").stdout)
    assert shown["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert shown["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {t["name"]: tuple(t["shape"]) for t in shown["tensors"]} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert sum(entry["parameters"] for entry in shown["module_types"]) == shown["parameters"]
    assert shown["dtypes"] == {"BF16": len(tensors) - 2, "F32": 1, "I64": 1}
    assert {t["name"] for t in shown["tensors"] if t["analysed"]} == {n for n in tensors if "_proj" in n}
    table = run("inspect", quartet["finetuned"]).stdout
    assert f"{shown['parameters']:,} parameters" in table
    assert "down_proj" in table


def test_analyze_writes_scores_table_and_plot(quartet, tmp_path: Path) -> None:
    import csv

    roles = [word for role in ("base", "aligned", "finetuned") for word in (f"--{role}", quartet[role])]
    files = [tmp_path / name for name in ("s.json", "s.csv", "p.svg")]
    result = run("analyze", *roles, "-o", files[0], "--csv", files[1], "--plot", files[2], "--tau", "0.5")
    assert result.exit_code == 0, result.stderr
    modules = json.loads(files[0].read_text())["modules"]
    with files[1].open() as lines:
        table = {line["name"]: float(line["rho"]) for line in csv.DictReader(lines)}
    assert table == {name: score["rho"] for name, score in modules.items()}
    below = sum(score["rho"] < 0.5 for score in modules.values())
    (footer,) = [line.split() for line in result.stdout.splitlines() if line.startswith(" all ")]
    assert footer == ["all", str(len(modules)), str(below)]
    assert files[2].read_text().count("<svg") == 1


def test_analyze_finds_out_before_the_work_that_it_cannot_write(tmp_path: Path) -> None:
    """The models do not even exist: what is wrong with the output is said first."""
    words = ["analyze", "--base", "b", "--aligned", "a", "--finetuned", "f"]
    assert run(*words, "--plot", tmp_path / "p.pdf").exit_code == 2
    for option, name in (("-o", "s.json"), ("--csv", "s.csv"), ("--plot", "p.png")):
        result = run(*words, option, tmp_path / "no" / name)
        assert result.exit_code == 5
        assert_one_sentence(result, str(tmp_path / "no"))
