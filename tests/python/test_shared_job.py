"""plan, work and finish: what they make of a job together is what merge makes alone, or one clear error."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import write_quartet
from invoke import run
from lora import write_lora

SHARDS = 3
OF_THE_RUN = ("safemerge_report.json", "safemerge_report.html", "README.md")


@pytest.fixture(scope="module")
def quartet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("quartet")
    return write_quartet(path, hidden=24, vocabulary=60, layers=2, intermediate=32, shards=SHARDS)


def words(quartet: dict[str, Path], kind: str) -> list[str]:
    if kind == "safemerge":
        roles = [word for role, path in quartet.items() for word in (f"--{role}", str(path))]
        return [*roles, "--select", "lowest:3"]
    roles = [word for role in ("aligned", "finetuned") for word in (f"--{role}", str(quartet[role]))]
    return [*roles, "--recipe", kind]


def files_of(output: Path) -> dict[str, bytes]:
    """All files but those that tell of the run; the job's directory is gone."""
    assert not (output.parent / f".{output.name}.safemerge").exists()
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in output.rglob("*")
        # The plan says when derived tensors were written.
        if path.is_file()
        and path.name not in OF_THE_RUN
        and not (path.name == "safemerge_plan.json" and (output / "safemerge_derived").is_dir())
    }


def merged(quartet: dict[str, Path], kind: str, output: Path) -> dict[str, bytes]:
    done = run("merge", *words(quartet, kind), "-o", str(output), "-q")
    assert done.exit_code == 0, done.stderr
    return files_of(output)


def planned(quartet: dict[str, Path], kind: str, output: Path, *more: str) -> None:
    done = run("plan", *words(quartet, kind), "-o", str(output), "-q", *more)
    assert done.exit_code == 0, done.stderr
    assert not output.exists()


def work(output: Path, index: str) -> dict[str, list[str]]:
    done = run("work", str(output), "--index", index, "--json", "--threads", "1")
    assert done.exit_code == 0, done.stderr
    worked: dict[str, list[str]] = json.loads(done.stdout)
    return worked


def finished(output: Path) -> dict[str, bytes]:
    done = run("finish", str(output), "-q")
    assert done.exit_code == 0, done.stderr
    assert run("verify", str(output), "-q").exit_code == 0
    return files_of(output)


@pytest.mark.parametrize("kind", ["safemerge", "wise-ft", "safety-vector"])
@pytest.mark.parametrize(
    "indices",
    [
        ["0/1"],
        ["0/3", "1/3", "2/3"],
        ["2/3", "0/3", "1/3", "1/3"],
        ["7/9", "1/2", "0/2", "0/2"],
        ["0/1", "0/1"],
    ],
    ids=",".join,
)
def test_bytes_are_those_of_merge_in_any_order(
    quartet: dict[str, Path], tmp_path: Path, kind: str, indices: Sequence[str]
) -> None:
    whole = merged(quartet, kind, tmp_path / "whole")
    out = tmp_path / "out"
    planned(quartet, kind, out)
    prepared = [file for index in indices for file in work(out, index)["prepared"]]
    assert len(prepared) == len(set(prepared)) == SHARDS, "what is prepared is not prepared again"
    assert finished(out) == whole
    done = run("work", str(out), "--index", indices[0])
    assert (done.exit_code, done.stdout) == (0, f"{out} is complete already; nothing to do\n")
    again = run("finish", str(out), "--json")
    assert (again.exit_code, json.loads(again.stdout)) == (0, json.loads((out / OF_THE_RUN[0]).read_text()))
    assert files_of(out) == whole


def test_the_report_is_that_of_a_merge(quartet: dict[str, Path], tmp_path: Path) -> None:
    merged(quartet, "safemerge", tmp_path / "whole")
    out = tmp_path / "out"
    planned(quartet, "safemerge", out)
    work(out, "0/1")
    finished(out)
    one, many = (json.loads((path / OF_THE_RUN[0]).read_text()) for path in (tmp_path / "whole", out))
    for field in ("tensors", "inputs", "job", "warnings", "bytes_written"):
        assert one[field] == many[field], field
    assert all(not shard["resumed"] and shard["bytes_written"] for shard in many["shards"])


def test_workers_at_once_at_the_same_share(quartet: dict[str, Path], tmp_path: Path) -> None:
    whole = merged(quartet, "wise-ft", tmp_path / "whole")
    out = tmp_path / "out"
    planned(quartet, "wise-ft", out)
    command = [sys.executable, "-m", "safemerge_fast", "work", str(out), "-q"]
    workers = [subprocess.Popen(command) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert finished(out) == whole


def test_finishing_too_early_names_what_is_missing(quartet: dict[str, Path], tmp_path: Path) -> None:
    whole = merged(quartet, "wise-ft", tmp_path / "whole")
    out = tmp_path / "out"
    planned(quartet, "wise-ft", out)
    done = run("finish", str(out))
    assert done.exit_code == 5
    assert "lacks 3 of 3 files: model-00001-of-00003.safetensors, " in done.stderr
    work(out, "1/3")
    done = run("finish", str(out))
    assert done.exit_code == 5
    assert done.stderr.count("\n") == 1
    assert (
        "lacks 2 of 3 files: model-00001-of-00003.safetensors, model-00003-of-00003.safetensors;"
        in done.stderr
    )
    assert not out.exists()
    worked = work(out, "0/1")
    assert worked["found"] == ["model-00002-of-00003.safetensors"], "it is committed already"
    assert finished(out) == whole


@pytest.mark.parametrize("seed", range(6))
def test_a_worker_that_is_killed_leaves_nothing_that_counts(
    quartet: dict[str, Path], tmp_path: Path, seed: int
) -> None:
    whole = merged(quartet, "wise-ft", tmp_path / "whole")
    out = tmp_path / "out"
    planned(quartet, "wise-ft", out)
    dice = random.Random(seed)
    worker = subprocess.Popen([sys.executable, "-m", "safemerge_fast", "work", str(out), "-q"])
    time.sleep(dice.uniform(0.1, 0.6))
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    attempts = out.parent / ".out.safemerge" / "attempts"
    # As of a worker on another machine that is killed in mid-shard, and of one whose document was cut short.
    (attempts / ".model-00001-of-00003.safetensors.w5.partial").write_bytes(b"half")
    (attempts / "w5.json").write_bytes(b'{"version":1,"shard":{"file":"model-00001')
    for index in ("1/2", "0/2"):
        work(out, index)
    assert finished(out) == whole


def test_what_another_process_claims_is_compared_with_the_plan(
    quartet: dict[str, Path], tmp_path: Path
) -> None:
    whole = merged(quartet, "wise-ft", tmp_path / "whole")
    out = tmp_path / "out"
    planned(quartet, "wise-ft", out)
    work(out, "0/1")
    attempts = out.parent / ".out.safemerge" / "attempts"
    lost, cut, other = sorted(attempts.glob("*.json"))
    document = json.loads(lost.read_text())["shard"]
    (attempts / f".{document['file']}.{document['attempt']}.partial").unlink()
    document = json.loads(cut.read_text())["shard"]
    os.truncate(attempts / f".{document['file']}.{document['attempt']}.partial", 9)
    other.write_text(other.read_text().replace('"digest":"', '"digest":"0'))
    done = run("finish", str(out))
    assert done.exit_code == 5
    assert "lacks 3 of 3 files" in done.stderr
    assert len(work(out, "0/1")["prepared"]) == 3
    assert finished(out) == whole


def test_a_merge_goes_on_with_what_workers_prepared(quartet: dict[str, Path], tmp_path: Path) -> None:
    whole = merged(quartet, "wise-ft", tmp_path / "whole")
    out = tmp_path / "out"
    planned(quartet, "wise-ft", out)
    work(out, "2/3")
    done = run("merge", *words(quartet, "wise-ft"), "-o", str(out), "--resume", "-q")
    assert done.exit_code == 0, done.stderr
    assert files_of(out) == whole
    shards = json.loads((out / OF_THE_RUN[0]).read_text())["shards"]
    assert all(shard["bytes_written"] for shard in shards)


def test_a_second_plan_is_refused_resumed_or_begins_anew(quartet: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned(quartet, "wise-ft", out)
    work(out, "0/3")
    done = run("plan", *words(quartet, "wise-ft"), "-o", str(out))
    assert done.exit_code == 5
    assert "has an unfinished merge" in done.stderr
    planned(quartet, "wise-ft", out, "--resume")
    assert work(out, "0/3")["found"] == ["model-00001-of-00003.safetensors"], "the same plan goes on"
    # With other settings nothing of it counts.
    planned(quartet, "wise-ft", out, "--overwrite", "--alpha", "0.25")
    done = run("finish", str(out))
    assert "lacks 3 of 3" in done.stderr
    work(out, "0/1")
    whole = run("merge", *words(quartet, "wise-ft"), "-o", str(tmp_path / "whole"), "--alpha", "0.25", "-q")
    assert whole.exit_code == 0
    assert finished(out) == files_of(tmp_path / "whole")
    done = run("plan", *words(quartet, "wise-ft"), "-o", str(out))
    assert done.exit_code == 5


def test_an_older_output_stands_until_the_new_one_is_whole(quartet: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = merged(quartet, "wise-ft", out)
    done = run("plan", *words(quartet, "wise-ft"), "-o", str(out), "-q", "--overwrite", "--alpha", "0.25")
    assert done.exit_code == 0
    work(out, "0/1")
    assert (out / "config.json").read_bytes() == old["config.json"]
    assert json.loads((out / "safemerge_report.json").read_text())["configuration"]["alpha"] != 0.25
    assert finished(out)["model-00001-of-00003.safetensors"] != old["model-00001-of-00003.safetensors"]


@pytest.mark.parametrize("step", ["work", "finish"])
def test_an_input_that_has_changed_is_named(tmp_path: Path, step: str) -> None:
    quartet = write_quartet(
        tmp_path / "in", hidden=24, vocabulary=60, layers=2, intermediate=32, shards=SHARDS
    )
    out = tmp_path / "out"
    planned(quartet, "wise-ft", out)
    if step == "finish":
        work(out, "0/1")
    changed = next(quartet["finetuned"].glob("*.safetensors"))
    os.utime(changed, ns=(1, 1))
    done = run(step, str(out))
    assert done.exit_code == 3
    assert f"{changed} has changed since the plan was made" in done.stderr
    assert not out.exists()


def test_a_configuration_that_has_changed_is_refused(tmp_path: Path) -> None:
    quartet = write_quartet(
        tmp_path / "in", hidden=24, vocabulary=60, layers=2, intermediate=32, shards=SHARDS
    )
    out = tmp_path / "out"
    planned(quartet, "wise-ft", out)
    work(out, "0/1")
    path = quartet["finetuned"] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_cache": False}))
    done = run("finish", str(out))
    assert done.exit_code == 3
    assert "planned with other inputs" in done.stderr


@pytest.mark.parametrize("step", ["work", "finish"])
def test_another_version_is_refused(quartet: dict[str, Path], tmp_path: Path, step: str) -> None:
    out = tmp_path / "out"
    planned(quartet, "wise-ft", out)
    path = out.parent / ".out.safemerge" / "handed-out.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "program": "9.9"}))
    done = run(step, str(out))
    assert done.exit_code == 3
    assert "was planned by safemerge-fast 9.9" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"program": "0.1.0"}', '{"program": 3}'])
def test_a_damaged_document_is_refused(quartet: dict[str, Path], tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    planned(quartet, "wise-ft", out)
    (out.parent / ".out.safemerge" / "handed-out.json").write_text(text)
    for step in ("work", "finish"):
        done = run(step, str(out))
        assert done.exit_code == 3, done.stderr
        assert "plan again" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_plan_that_is_not_whole_is_refused(quartet: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned(quartet, "wise-ft", out)
    path = out.parent / ".out.safemerge" / "plan.json"
    path.write_bytes(path.read_bytes()[:-9])
    done = run("work", str(out))
    assert done.exit_code == 3
    assert "is not the plan that was handed out" in done.stderr


def test_finishing_elsewhere_is_refused(
    quartet: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    planned(quartet, "wise-ft", out)
    work(out, "0/1")
    here = os.getcwd()
    monkeypatch.chdir(tmp_path)
    done = run("finish", str(out))
    assert done.exit_code == 3
    assert f"was planned in {here}" in done.stderr


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("3", "should be like 0/8"),
        ("a/b", "should be like 0/8"),
        ("0/0", "should be like 0/8"),
        ("-1/3", "should be like 0/8"),
        ("3/3", "counts from 0, so that the last of 3 is 2/3"),
    ],
)
def test_an_index_that_is_none_is_a_usage_error(tmp_path: Path, index: str, message: str) -> None:
    done = run("work", str(tmp_path / "out"), "--index", index)
    assert done.exit_code == 2
    assert message in done.stderr


def test_there_is_no_job(tmp_path: Path) -> None:
    for step in ("work", "finish"):
        done = run(step, str(tmp_path / "out"))
        assert done.exit_code == 5
        assert "has no job that waits for workers" in done.stderr


def test_an_adapter_is_not_handed_out(tmp_path: Path) -> None:
    quartet = write_quartet(tmp_path / "in", hidden=24, vocabulary=60, layers=2, intermediate=32, shards=1)
    modules = {"model.layers.0.self_attn.q_proj": (24, 24)}
    adapters = {
        role: write_lora(tmp_path / role, modules, rank=2, seed=seed)
        for seed, role in enumerate(("finetuned", "safe"))
    }
    roles = {**{role: quartet[role] for role in ("base", "aligned")}, **adapters}
    given = [word for role, path in roles.items() for word in (f"--{role}", str(path))]
    done = run("plan", *given, "-o", str(tmp_path / "out"), "--select", "lowest:1")
    assert done.exit_code == 2, done.stderr
    assert "one process makes at once" in done.stderr
    shutil.rmtree(tmp_path / ".out.safemerge", ignore_errors=True)
